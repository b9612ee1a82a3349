"""Teachers: diffusers pipelines, by folder or hub id, frozen and ready to be distilled."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging

from flashdmd.errors import UserError
from flashdmd.models.denoiser import NetworkDenoiser
from flashdmd.models.families import FAMILIES, Family
from flashdmd.models.trust import (
    check_length,
    offline,
    refuse_pickled_file,
    refuse_unsafe,
    refuse_whole_numbers,
    trusted,
)
from flashdmd.plain import json_object
from flashdmd.sampler import Cond, Denoiser, guided
from flashdmd.schedule import Process

diffusers_logging.disable_progress_bar()  # loading takes a second; the bars that matter are ours
transformers_logging.disable_progress_bar()

Precision = Literal["fp32", "bf16"]
INDEX = "model_index.json"
VAE = ("diffusers", "AutoencoderKL")  # as an index says it
ACCEPTED = (
    "give a diffusers pipeline folder (as written by save_pretrained), a hub id such as "
    "stabilityai/stable-diffusion-xl-base-1.0, or emoji-score or emoji-flow"
)
NO_PICTURE = (
    "holds numbers that are none; its weights or its configurations are damaged, or it was trained "
    "until it broke"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Teacher:
    """A loaded pipeline: its networks frozen, ready to be distilled."""

    folder: Path
    family: Family
    pipeline: Any
    process: Process
    denoiser: NetworkDenoiser
    source: "Pipeline | None" = None  # where it was loaded from
    resolution: int = 0  # pixels across a square picture; 0: what the network was made for
    in_run: bool = False  # the autoencoder runs in the caller's autocast, not in its own precision
    guidance: float | None = None  # the scale that a network with embedded guidance is told
    words: Callable[[list[str]], Cond] | None = None  # encoded before; None: by the encoders
    nothing: Cond = field(default_factory=dict)  # the unconditional input, of one example

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.network.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a square picture's latent."""
        return self.latent_shape_of(self.image_size, self.image_size)

    def latent_shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture of so many pixels."""
        factor = self.family.factor(self.pipeline)
        return self.family.channels(self.pipeline), height // factor, width // factor

    @property
    def image_size(self) -> int:
        """Pixels across a square picture."""
        return self.resolution or self.family.resolution(self.pipeline)

    @property
    def default_steps(self) -> tuple[int, ...]:
        return self.family.steps(self.pipeline)

    def guided(self, scale: float) -> Denoiser:
        """The teacher under guidance, as its stock pipeline computes it."""
        if self.family.embeds_guidance(self.pipeline):
            return lambda x_t, t, cond: self.denoiser(
                x_t, t, {**cond, "guidance": torch.full_like(t, scale)}
            )
        if self.family.affine or scale == 1:
            return guided(self.denoiser, self.unconditional, scale)

        def both(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            nothing = {**cond, **self.unconditional(len(x_t))}
            pair = {name: torch.cat([nothing[name], cond[name]]) for name in cond}
            answers = self.denoiser.output(torch.cat([x_t, x_t]), torch.cat([t, t]), pair)
            nobody, somebody = answers.chunk(2)
            out = self.family.guide(nobody, somebody, scale)
            return self.process.to_x0(out, x_t, t)

        return both

    def hold(self, dtype: Precision) -> None:
        """Rounds the network, which is frozen."""
        if self.denoiser.dtype != DTYPES[dtype]:
            self.denoiser.network.to(DTYPES[dtype])

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], sizes: Float[Tensor, "B 6"] | None = None) -> Cond:
        """In the encoders' own precision wherever it is called: what a student is conditioned on
        when it is used. `sizes` are what SDXL is told of the pictures; None: squares of their own.
        """
        if sizes is None:
            side = float(self.image_size)
            sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]]).expand(len(prompts), 6)
        with torch.autocast(self.device.type, enabled=False):
            cond = self.words(prompts) if self.words else self.read(prompts)
        cond = cond | self.family.sized(self.pipeline, sizes)
        if self.family.embeds_guidance(self.pipeline):
            cond["guidance"] = torch.full((len(prompts),), self.guidance or self.family.guidance)
        return {name: value.to(self.device) for name, value in cond.items()}

    def read(self, prompts: list[str]) -> Cond:
        """What the text encoders make of prompts, in float32."""
        cond = self.family.encode_prompts(self.pipeline, prompts, self.device)
        return {k: v.float() if v.is_floating_point() else v for k, v in cond.items()}

    @torch.no_grad()
    def unconditional(self, n: int) -> Cond:
        """What guidance guides away from, n times; encoded once. Sizes are the picture's own."""
        if not self.nothing:
            with torch.autocast(self.device.type, enabled=False):
                cond = self.family.unconditional(self.pipeline, self.device)
            self.nothing = {k: v.float() if v.is_floating_point() else v for k, v in cond.items()}
        return {k: v.to(self.device).expand(n, *v.shape[1:]) for k, v in self.nothing.items()}

    def forget_encoders(self) -> None:
        """Drops the text encoders, once everything that will be read is."""
        self.unconditional(1)
        for name in [n for n in self.pipeline.components if n.startswith("text_encoder")]:
            setattr(self.pipeline, name, None)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        with self.vae_precision():
            return self.family.encode(self.pipeline, images.to(self.device)).float()

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        with self.vae_precision():
            return self.family.decode(self.pipeline, latents).float()

    def vae_precision(self) -> AbstractContextManager[Any]:
        """Float32 unless asked otherwise: SDXL's decoder overflows in float16, and a discriminator
        of pixels sees what bfloat16 rounds.
        """
        return nullcontext() if self.in_run else torch.autocast(self.device.type, enabled=False)

    def noise(
        self, n: int, seed: int, shape: tuple[int, int, int] | None = None
    ) -> Float[Tensor, "B C h w"]:
        """The starting noise of `n` pictures, each of its own seed (seed, seed + 1, ...)."""
        generators = (torch.Generator().manual_seed(seed + i) for i in range(n))
        return torch.stack(
            [torch.randn(shape or self.latent_shape, generator=g) for g in generators]
        )

    @torch.no_grad()
    def sample(
        self, prompts: list[str], noise: Float[Tensor, "B C h w"], steps: int, guidance: float
    ) -> np.ndarray:
        """(B, 3, H, W) uint8 by the pipeline's own sampler."""
        noise, half = noise.to(self.device), self.denoiser.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):  # latents are float32
            images = self.family.sample(self.pipeline, prompts, noise, steps, guidance)
        if not np.isfinite(images).all():
            raise UserError(f"what {self.folder} draws {NO_PICTURE}")
        pictures: np.ndarray = (images * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
        return pictures


def to_uint8(images: Float[Tensor, "B 3 H W"]) -> np.ndarray:
    """[-1, 1] -> uint8, rounded as diffusers' image processor does."""
    unit = (images / 2 + 0.5).clamp(0, 1).cpu()
    if not unit.isfinite().all():
        raise UserError(f"what the student draws {NO_PICTURE}")
    pictures: np.ndarray = (unit.numpy() * 255).round().astype(np.uint8)
    return pictures


@dataclass(frozen=True)
class Pipeline:
    """Where a teacher comes from, and how it is held."""

    name: str  # a pipeline folder, or a hub id
    revision: str | None = None
    variant: str | None = None  # of the files' names, such as fp16
    lora: str | None = None  # a LoRA that belongs to the teacher: a folder, a file or a hub id
    lora_scale: float = 1.0
    vae: str | None = None  # an autoencoder in place of the pipeline's
    dtype: Precision = "fp32"  # of network and text encoders; the autoencoder stays in float32
    learns: bool = False  # copies of the network are to learn: it is in float32 until they are made


def load_pipeline(source: Pipeline | Path, device: torch.device | str = "cpu") -> Teacher:
    """Loads a pipeline of a supported family, frozen.

    Raises UserError when it is missing, is no pipeline, is of a family that is not supported, or
    holds weights that are pickled or cannot be read.
    """
    source = Pipeline(str(source)) if isinstance(source, Path) else source
    folder = Path(source.name)
    entries = index_of(source.name, source.revision)
    family = family_of(source.name, entries)
    refuse(source, family, entries)
    # a black picture in a censored one's place would be learned like any other
    absent: dict[str, Any] = {
        k: None for k, v in entries.items() if v == [None, None] or k == "safety_checker"
    }
    if "safety_checker" in absent:
        absent["requires_safety_checker"] = False
    parts: dict[str, Any] = {"vae": load_vae(source.vae)} if source.vae else {}
    given = {**absent, **parts}
    here = trusted(source.name, entries, given, revision=source.revision, variant=source.variant)
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            here,
            variant=source.variant,
            dtype={
                "default": DTYPES[source.dtype],
                "vae": torch.float32,
                **({family.network: torch.float32} if source.learns else {}),
            },
            local_files_only=True,
            use_safetensors=True,
            **given,
        )
    except Exception as e:  # diffusers, transformers and safetensors each raise their own kinds
        raise UserError(f"the pipeline in {source.name} cannot be loaded: {e}") from e
    pipeline.set_progress_bar_config(disable=True)
    if source.lora:
        add_lora(pipeline, source.lora, source.lora_scale)
    family.complete(pipeline)
    check_whole(source.name, pipeline, family)
    process = family.process(pipeline)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    pipeline.to(device)
    check_finite(source.name, pipeline)
    denoiser = NetworkDenoiser(getattr(pipeline, family.network), family, process)
    return Teacher(folder, family, pipeline, process, denoiser, source)


def refuse(source: Pipeline, family: Family, entries: dict[str, Any]) -> None:
    """Raises UserError for what configurations alone tell to be no teacher, before it is loaded."""
    with understood(source.name):
        pipeline = sketch(source.name, family, entries, source.vae, source.revision)
        family.check(pipeline)
        if pipeline.scheduler.config:
            family.process(pipeline)  # else loading says what is wrong with it


@contextmanager
def understood(name: str) -> Iterator[None]:
    """Inside, configurations are asked; what they answer may be of any shape."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{name}: {e}") from e
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as e:
        raise UserError(f"the configurations in {name} cannot be understood: {e!r}") from e


def sketch(
    name: str,
    family: Family,
    entries: dict[str, Any],
    vae: str | None = None,
    revision: str | None = None,
) -> Any:
    """A pipeline of configurations without networks, for what a family asks of it before it is
    loaded: of its network, its scheduler and its autoencoder, or another one, `vae`.
    """
    read = (family.network, "scheduler", "vae")
    parts: dict[str, Any] = {
        part: None
        if entry in ([None, None], (None, None))
        else SimpleNamespace(
            config=FrozenDict(part_config(name, part, entry, revision) if part in read else {})
        )
        for part, entry in entries.items()
        if isinstance(entry, list | tuple)
    }
    if vae is not None:
        parts["vae"] = SimpleNamespace(config=FrozenDict(part_config(vae, "", VAE)))
    made = SimpleNamespace(config=FrozenDict(entries), **parts)
    if made.__dict__.get("vae"):
        config = made.vae.config  # as the pipelines of diffusers do it
        halved = config.get("temperal_downsample")
        blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels") or ()
        made.vae_scale_factor = 2 ** (len(halved) if halved else max(0, len(blocks) - 1))
    return made


def index_of(name: str, revision: str | None = None) -> dict[str, Any]:
    """What model_index.json says. Raises UserError when there is none, or none to be read."""
    folder = Path(name)
    try:
        if not folder.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise UserError(f"pretrained_model_name_or_path={name!r} is not a folder; {ACCEPTED}")
        if folder.is_dir() and not (folder / INDEX).is_file():
            raise UserError(f"pretrained_model_name_or_path={name!r} has no {INDEX}; {ACCEPTED}")
        if folder.is_dir():
            entries = json_object((folder / INDEX).read_bytes())
        else:
            entries = dict(
                DiffusionPipeline.load_config(name, revision=revision, local_files_only=offline())
            )
        entries["_class_name"] = str(entries["_class_name"])
    except (ValueError, KeyError, TypeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{name}/{INDEX} cannot be read as a pipeline index: {e!r}") from e
    except OSError as e:
        how = "HF_HUB_OFFLINE is set and it is not in the cache" if offline() else str(e)
        raise UserError(
            f"pretrained_model_name_or_path={name!r} is no folder here, and as a hub id it cannot "
            f"be read: {how}; {ACCEPTED}"
        ) from e
    return entries


def part_config(
    name: str, part: str, entry: Sequence[str | None] = (), revision: str | None = None
) -> dict[str, Any]:
    """The config of a pipeline's component, from its folder or the hub; {} if it has none.

    With `entry`, that of the index, what the file leaves out is as its class has it.
    """
    path = f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"
    path = path.removeprefix("/")
    try:
        if Path(name).is_dir():
            text = (Path(name) / path).read_bytes()
        else:
            here = hf_hub_download(name, path, revision=revision, local_files_only=offline())
            text = Path(here).read_bytes()
        found = json_object(text)
    except (OSError, ValueError):
        return {}
    made = getattr(diffusers, str(entry[-1]), None) if entry else None
    known = inspect.signature(made.__init__).parameters.values() if made else ()
    return {p.name: p.default for p in known if p.default is not p.empty} | found


def family_of(name: str, entries: dict[str, Any]) -> Family:
    """Raises UserError for a kind of pipeline that is not supported."""
    pipeline = entries["_class_name"]
    if pipeline not in FAMILIES:
        raise UserError(f"{name} is a {pipeline}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[pipeline]()


def load_vae(name: str) -> Any:
    """An autoencoder by folder or hub id. Raises UserError when it cannot be loaded."""
    try:
        here = Path(name).is_dir() or offline()
        if Path(name).is_dir():
            refuse_unsafe(Path(name))
            refuse_whole_numbers(Path(name))
        return AutoencoderKL.from_pretrained(
            name, dtype=torch.float32, local_files_only=here, use_safetensors=True
        )
    except Exception as e:  # as above
        raise UserError(
            f"pretrained_vae_model_name_or_path={name!r} cannot be loaded: {e}; give the folder or "
            "hub id of an AutoencoderKL"
        ) from e


def add_lora(pipeline: Any, lora: str, scale: float = 1.0, fused: bool = True) -> None:
    """Adds a LoRA to the weights, or lays it beside them, where rounded ones keep it whole.

    Raises UserError when it is not the network's.
    """
    path = Path(lora)
    refuse_pickled_file(path)
    try:
        where = {"weight_name": path.name} if path.is_file() else {}
        pipeline.load_lora_weights(
            str(path.parent) if path.is_file() else lora,
            adapter_name="lora",
            use_safetensors=True,
            **where,
        )
        pipeline.set_adapters("lora", scale)
        if fused:
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
    except Exception as e:  # as above, and peft
        raise UserError(
            f"the LoRA {lora} cannot be put on {type(pipeline).__name__}: {e}; give a folder, a "
            ".safetensors file or a hub id that load_lora_weights of diffusers reads"
        ) from e


def check_finite(name: str, pipeline: Any) -> None:
    """Raises UserError for weights that are no numbers; where the pipeline is, and so quickly."""
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            for weight, p in module.named_parameters():
                if not p.isfinite().all():
                    raise UserError(f"{part}.{weight} in {name} holds numbers that are none")


def check_whole(name: str, pipeline: Any, family: Family) -> None:
    """Raises UserError for what loads without complaint and is no teacher.

    A part or a weight that is not there, or a CLIP tokenizer without its words or its length.
    """
    try:
        family.check(pipeline)
    except UserError as e:
        raise UserError(f"{name}: {e}") from e
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            for weight, p in module.named_parameters():
                if p.is_meta:
                    raise UserError(f"the pipeline in {name} lacks the weight {part}.{weight}")
    for number in ("", "_2"):
        tokenizer = getattr(pipeline, f"tokenizer{number}", None)
        encoder = getattr(pipeline, f"text_encoder{number}", None)
        if not isinstance(tokenizer, CLIPTokenizer) or encoder is None:
            continue
        check_length(f"the tokenizer{number} in {name}", tokenizer, encoder)
        words, known = len(tokenizer), int(encoder.config.vocab_size)
        if words < known:
            raise UserError(
                f"the tokenizer{number} in {name} has {words} tokens where the text encoder knows "
                f"{known}: its files (tokenizer.json, or vocab.json and merges.txt) are missing or "
                "of another"
            )
