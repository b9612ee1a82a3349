"""What the flow-matching teacher takes over from the score-based one."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from gaussian import Gaussian
from transformers import CLIPTextModel

from flashdmd.emoji import flow
from flashdmd.emoji.flow import with_a_last_layer
from flashdmd.emoji.teacher import text_config, tokens, train_tokenizer
from flashdmd.emoji.world import ASSETS, World
from flashdmd.schedule import Process, RectifiedFlow


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


@pytest.mark.usefixtures("small")
def test_a_flow_teacher_starts_from_words_and_can_be_trained_on(tmp_path: Path) -> None:
    flow.train_flow(tmp_path / "first", ASSETS / "score", 1, batch=2)
    first = DiffusionPipeline.from_pretrained(tmp_path / "first/pipeline")
    flow.train_flow(tmp_path / "on", tmp_path / "first/pipeline", 1, batch=2, seed=1)
    on = DiffusionPipeline.from_pretrained(tmp_path / "on/pipeline")
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        before, after = (getattr(p, part).state_dict() for p in (first, on))
        moved = {k for k in before if not torch.equal(before[k], after[k])}
        assert moved, part
        if part == "text_encoder":
            assert all("layers.4." in k or k.startswith("text_projection") for k in moved)
    assert all(
        torch.equal(a, b) for a, b in zip(first.vae.parameters(), on.vae.parameters(), strict=True)
    )


def test_the_flow_teachers_own_sampler_draws_a_gaussian() -> None:
    """With the exact velocity, 50 steps keep the mean, and the spread to a few per cent."""
    straight = Process(RectifiedFlow(), "flow")
    exact, scheduler = Gaussian(straight, 0.7, 0.4), flow.own_sampler()
    scheduler.set_timesteps(50)
    x = torch.randn(20_000, 1)
    for t in scheduler.timesteps:
        s = t.expand(len(x)).float()
        x0 = exact.denoiser(x, s)
        x = scheduler.step((x - x0) / (s[:, None] / 1000), t, x).prev_sample
    assert x.mean().item() == pytest.approx(0.7, abs=0.02)
    assert x.std().item() == pytest.approx(0.4, rel=0.07)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rendering of a few pictures, and no sheets."""
    monkeypatch.setattr(flow, "RENDERINGS", 1)
    monkeypatch.setattr(World, "indices", lambda self, split: list(range(8)))
    monkeypatch.setattr(flow, "contact_sheet", lambda *_, **__: None)
    monkeypatch.setattr(flow, "fused", lambda network: network)  # a minute to compile
