"""Text encoders that say nothing, for pipelines that lack one and code that cannot do without."""

from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LENGTH = 256  # zero tokens in T5's place; StableDiffusion3Pipeline's default length
PLACES = 77  # CLIP's


def silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 whose encodings are zeros, for a folder that `from_pretrained` accepts as it stands.

    diffusers does not load a StableDiffusion3Pipeline folder without a third text encoder unless
    told so in the call; zeros are what the pipeline itself puts in place of a missing one.
    """
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=LENGTH)
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(vocabulary), d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1
        )
    )
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def silent_clip(
    width: int, tokenizer: CLIPTokenizer | None = None
) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    """A CLIP whose states and pooled feature are zeros of `width`, reading by `tokenizer`'s words.

    Zeros in an encoder's place are what Stable Diffusion 3 was trained with (arXiv 2403.03206).
    """
    if tokenizer is None:
        vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
        tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=PLACES)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    for weight in encoder.parameters():
        nn.init.zeros_(weight)
    return encoder, tokenizer


def is_silent(encoder: nn.Module) -> bool:
    """Whether an encoder is one of these: what it says are zeros."""
    last = getattr(getattr(encoder, "encoder", None), "final_layer_norm", None)
    if isinstance(encoder, T5EncoderModel) and last is not None:
        return not bool(last.weight.any())
    clip = isinstance(encoder, CLIPTextModelWithProjection)
    return clip and not any(bool(p.any()) for p in encoder.parameters())
