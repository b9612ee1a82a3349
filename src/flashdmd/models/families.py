"""Teachers: diffusers pipeline folders behind one interface. The only file that imports diffusers
to load or run a teacher; a family says how its networks are called and how its prompts are read.
"""

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import logging as transformers_logging

from flashdmd.errors import UserError
from flashdmd.models.padding import RepeatLast, compress
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS, Kind, Process, RectifiedFlow, VariancePreserving


@runtime_checkable
class Family(Protocol):
    """What differs between kinds of teacher."""

    kind: Literal["score", "flow"]
    network: str  # the pipeline's component that is distilled

    def process(self, pipeline: Any) -> Process: ...

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Cond: ...

    def sample(self, pipeline: Any, prompts: list[str], **how: Any) -> Any: ...

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor: ...

    def middle(self, network: nn.Module) -> nn.Module: ...

    def feature(self, output: Any, x_t: Tensor) -> Tensor: ...


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a UNet under scaled-linear betas, one CLIP text encoder."""

    kind: Literal["score", "flow"] = "score"
    network = "unet"

    def process(self, pipeline: Any) -> Process:
        config = pipeline.scheduler.config
        if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
            raise UserError(
                "the teacher's scheduler has trained_betas or rescale_betas_zero_snr; only plain "
                "'scaled_linear' betas are supported"
            )
        kinds: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
        betas, steps = config.get("beta_schedule"), config.get("num_train_timesteps")
        if betas != "scaled_linear" or steps != STEPS:
            raise UserError(
                f"the teacher's scheduler has beta_schedule={betas!r} over {steps} steps; only "
                f"'scaled_linear' over {STEPS} is supported"
            )
        if config.prediction_type not in kinds:
            raise UserError(
                f"the teacher's scheduler has prediction_type={config.prediction_type!r}; "
                f"supported are {', '.join(kinds)}"
            )
        schedule = VariancePreserving(config.beta_start, config.beta_end)
        return Process(schedule, kinds[config.prediction_type])

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Cond:
        embeds, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
        return {"encoder_hidden_states": embeds}

    def sample(self, pipeline: Any, prompts: list[str], **how: Any) -> Any:
        return pipeline(prompts, **how).images

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        out: Tensor = network(x_t, t, **cond).sample
        return out

    def middle(self, network: nn.Module) -> nn.Module:
        return network.get_submodule("mid_block")

    def feature(self, output: Any, x_t: Tensor) -> Tensor:
        feature: Tensor = output
        return feature


class StableDiffusion3:
    """Stable Diffusion 3 and 3.5: an MMDiT on straight paths, up to three text encoders."""

    kind: Literal["score", "flow"] = "flow"
    network = "transformer"

    def process(self, pipeline: Any) -> Process:
        return Process(RectifiedFlow(), "flow")

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Cond:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device="cpu", do_classifier_free_guidance=False
        )
        tokens, copies = compress(embeds)
        repeats = torch.full((len(tokens),), copies)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled, "repeats": repeats}

    def sample(self, pipeline: Any, prompts: list[str], **how: Any) -> Any:
        """The pipeline's own loop, on prompts whose padding is computed once."""
        cond, nothing = (self.encode_prompts(pipeline, p) for p in (prompts, [""]))
        copies = int(cond["repeats"][0])
        if copies != int(nothing["repeats"][0]):  # guidance needs prompts of one length
            return pipeline(prompts, **how).images
        nothing = {k: v.expand(len(prompts), *v.shape[1:]) for k, v in nothing.items()}
        with RepeatLast(self._keys(pipeline.transformer, how["latents"], cond), copies):
            return pipeline(
                prompt_embeds=cond["encoder_hidden_states"],
                pooled_prompt_embeds=cond["pooled_projections"],
                negative_prompt_embeds=nothing["encoder_hidden_states"],
                negative_pooled_prompt_embeds=nothing["pooled_projections"],
                **how,
            ).images

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with RepeatLast(self._keys(network, x_t, cond), int(cond["repeats"][0])):
            out: Tensor = network(
                hidden_states=x_t,
                timestep=t,
                encoder_hidden_states=cond["encoder_hidden_states"],
                pooled_projections=cond["pooled_projections"],
            ).sample
        return out

    def _keys(self, network: nn.Module, x_t: Tensor, cond: Cond) -> int:
        """Tokens of a joint attention: the image's patches and the prompt's."""
        patch = int(network.get_parameter("pos_embed.proj.weight").shape[-1])
        return x_t.shape[-2] * x_t.shape[-1] // patch**2 + cond["encoder_hidden_states"].shape[1]

    def middle(self, network: nn.Module) -> nn.Module:
        blocks = network.get_submodule("transformer_blocks")
        assert isinstance(blocks, nn.ModuleList)
        return blocks[len(blocks) // 2]

    def feature(self, output: Any, x_t: Tensor) -> Tensor:
        tokens: Tensor = output[1]  # (B, N, C), the image's
        side = round(tokens.shape[1] ** 0.5 * (x_t.shape[-2] / x_t.shape[-1]) ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, -1))


FEW_PLACES = 256
diffusers_logging.disable_progress_bar()  # loading takes a second; the bars that matter are ours
transformers_logging.disable_progress_bar()

FAMILIES: dict[str, Callable[[], Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusion3Pipeline": StableDiffusion3,
}


def attention(x_t: Float[Tensor, "B C H W"]) -> AbstractContextManager[None]:
    """The plain kernel where gradients are wanted of few places on a processor.

    The fused one's backward pass is slow there: forward and backward of the embedded UNet take 275
    ms with it and 238 with the plain one, forward alone 77 and 91 (batch 32).
    """
    few = x_t.shape[-2] * x_t.shape[-1] <= FEW_PLACES
    if few and x_t.device.type == "cpu" and torch.is_grad_enabled():
        plain: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return plain
    return nullcontext()


class NetworkDenoiser(nn.Module):
    """A pipeline's network as x_0_hat = f(x_t, t, cond)."""

    def __init__(self, network: nn.Module, family: Family, process: Process) -> None:
        super().__init__()
        self.network, self.family, self.process = network, family, process

    def forward(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        cond: Cond,
        middle_only: bool = False,
    ) -> Float[Tensor, "B D h w"]:
        """x_0_hat; or the features of the network's middle, without running what lies behind it."""
        if middle_only:
            return self._middle(x_t, t, cond)
        with attention(x_t):
            out = self.family.output(self.network, x_t, t, cond)
        return self.process.to_x0(out.float(), x_t, t)

    def bottleneck(
        self, x_t: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], cond: Cond
    ) -> Float[Tensor, "B D h w"]:
        features: Tensor = self(x_t, t, cond, middle_only=True)
        return features

    def _middle(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        def stop(_: nn.Module, __: Any, output: Any) -> None:
            raise _Reached(output)

        hook = self.family.middle(self.network).register_forward_hook(stop)
        try:
            with attention(x_t):
                self.family.output(self.network, x_t, t, cond)
        except _Reached as reached:
            return self.family.feature(reached.output, x_t).float()
        finally:
            hook.remove()
        raise AssertionError("the network has a middle and did not come by it")


class _Reached(Exception):  # noqa: N818 - it is no error
    """The middle of the network has answered."""

    def __init__(self, output: Any) -> None:
        self.output = output


@dataclass
class Teacher:
    """A loaded pipeline: frozen networks, in float32, ready to be distilled."""

    folder: Path
    family: Family
    pipeline: Any
    process: Process
    denoiser: NetworkDenoiser

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config: Any = self.denoiser.network.config
        size = int(config.sample_size)
        return int(config.in_channels), size, size

    @property
    def image_size(self) -> int:
        """Pixels across a picture."""
        factor: int = 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        return self.latent_shape[1] * factor

    @property
    def default_steps(self) -> tuple[int, ...]:
        return (999, 749, 499, 249) if self.family.kind == "score" else (1000, 750, 500, 250)

    def trainable_copy(self) -> NetworkDenoiser:
        """A student or score estimator that starts as this teacher, every parameter trainable."""
        twin = copy.deepcopy(self.denoiser).requires_grad_(True)
        twin.train(False)  # no dropout in any of these networks; train mode would change nothing
        return twin

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        """In float32 wherever it is called: what a student is conditioned on when it is used."""
        with torch.autocast("cpu", enabled=False):
            return self.family.encode_prompts(self.pipeline, prompts)

    def unconditional(self, n: int) -> Cond:
        """The encoding of the empty prompt, n times; encoded once."""
        if not hasattr(self, "_nothing"):
            self._nothing = self.encode_prompts([""])
        return {k: v.expand(n, *v.shape[1:]) for k, v in self._nothing.items()}

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        vae = self.pipeline.vae
        latents: Tensor = vae.encode(images).latent_dist.mode().float()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        images: Tensor = vae.decode(latents).sample
        return images.float()

    def noise(self, n: int, seed: int) -> Float[Tensor, "B C h w"]:
        """The starting noise of `n` pictures, each of its own seed (seed, seed + 1, ...)."""
        generators = (torch.Generator().manual_seed(seed + i) for i in range(n))
        return torch.stack([torch.randn(self.latent_shape, generator=g) for g in generators])

    @torch.no_grad()
    def sample(
        self, prompts: list[str], noise: Float[Tensor, "B C h w"], steps: int, guidance: float
    ) -> np.ndarray:
        """(B, 3, H, W) uint8 by the pipeline's own sampler."""
        images = self.family.sample(
            self.pipeline,
            prompts,
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="np",
        )
        pictures: np.ndarray = (images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
        return pictures


def to_uint8(images: Float[Tensor, "B 3 H W"]) -> np.ndarray:
    """[-1, 1] -> uint8, rounded as diffusers' image processor does."""
    unit = (images / 2 + 0.5).clamp(0, 1)
    pictures: np.ndarray = (unit.numpy() * 255).round().astype(np.uint8)
    return pictures


def load(folder: Path) -> Teacher:
    """Loads a pipeline folder of a supported family, in float32 and frozen.

    Raises UserError when the folder is missing, is no pipeline, is of a family that is not
    supported, or holds weights that are pickled or cannot be read.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        found = "is not a folder" if not folder.is_dir() else "has no model_index.json"
        raise UserError(
            f"pretrained_model_name_or_path={str(folder)!r} {found}; give a diffusers pipeline "
            f"folder (as written by save_pretrained), or emoji-score or emoji-flow"
        )
    try:
        entries = dict(json.loads(index.read_text("utf-8")))
        name = str(entries["_class_name"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{index} cannot be read as a pipeline index: {e!r}") from e
    if name not in FAMILIES:
        raise UserError(f"{folder} is a {name}; supported are {', '.join(FAMILIES)}")
    refuse_pickles(folder)
    try:
        absent = dict.fromkeys(k for k, v in entries.items() if v == [None, None])
        pipeline = DiffusionPipeline.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, **absent
        )
    except Exception as e:  # diffusers, transformers and safetensors each raise their own kinds
        raise UserError(f"the pipeline in {folder} cannot be loaded: {e}") from e
    pipeline.set_progress_bar_config(disable=True)
    family = FAMILIES[name]()
    check_whole(folder, pipeline, family.network)
    process = family.process(pipeline)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    denoiser = NetworkDenoiser(getattr(pipeline, family.network), family, process)
    return Teacher(folder, family, pipeline, process, denoiser)


def refuse_pickles(folder: Path) -> None:
    """Raises UserError for a component that has no safetensors but weights of another format."""
    for path in sorted(folder.glob("*/*.bin")):
        if not any(path.parent.glob("*.safetensors")):
            raise UserError(
                f"{path} is a pickle, which may run any code when it is read; safetensors are "
                "accepted: if you trust the folder, load it with DiffusionPipeline.from_pretrained "
                "and write it anew with save_pretrained"
            )


def check_whole(folder: Path, pipeline: Any, network: str) -> None:
    """Raises UserError for what loads without complaint and is no teacher.

    A part or a weight that is not there, a tokenizer without its words, or pictures not square.
    """
    for name in (network, "vae", "scheduler", "tokenizer", "text_encoder"):
        if getattr(pipeline, name, None) is None:
            raise UserError(f"the pipeline in {folder} has no {name}")
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            for weight, p in part.named_parameters():
                if p.is_meta:
                    raise UserError(f"the pipeline in {folder} lacks the weight {name}.{weight}")
                if not p.isfinite().all():
                    raise UserError(f"{name}.{weight} in {folder} holds numbers that are none")
    words, known = len(pipeline.tokenizer), int(pipeline.text_encoder.config.vocab_size)
    if words < known:
        raise UserError(
            f"the tokenizer in {folder} has {words} tokens where the text encoder knows {known}: "
            "its files (tokenizer.json, or vocab.json and merges.txt) are missing or of another"
        )
    if not isinstance(size := getattr(pipeline, network).config.sample_size, int):
        raise UserError(
            f"the {network} in {folder} has sample_size={size!r}; a number is needed, the latent "
            "places across a square picture"
        )
