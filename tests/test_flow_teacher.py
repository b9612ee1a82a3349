"""What the flow-matching teacher takes over from the score-based one."""

from pathlib import Path

import torch
from transformers import CLIPTextModel

from flashdmd.emoji.flow import with_a_last_layer
from flashdmd.emoji.teacher import text_config, tokens, train_tokenizer
from flashdmd.emoji.world import World


def test_the_flow_teacher_reads_the_words_that_were_taught(tmp_path: Path) -> None:
    """Penultimate states, which Stable Diffusion 3 reads, are the taught encoder's last."""
    tokenizer = train_tokenizer(World(), tmp_path)
    torch.manual_seed(0)
    taught = CLIPTextModel(text_config(tokenizer, 32, layers=2)).eval()
    deeper = with_a_last_layer(taught, tokenizer).eval()
    ids = tokens(tokenizer, ["fluent emoji of a strawberry", ""])
    states = deeper(ids, output_hidden_states=True).hidden_states
    assert len(states) == 4
    norm = taught.final_layer_norm
    assert torch.allclose(norm(states[-2]), taught(ids).last_hidden_state, atol=1e-6)
    assert torch.equal(states[-1], states[-2])  # the new layer adds nothing yet
    learning = [name for name, p in deeper.named_parameters() if p.requires_grad]
    assert learning
    assert all("layers.2." in name or name.startswith("text_projection") for name in learning)
