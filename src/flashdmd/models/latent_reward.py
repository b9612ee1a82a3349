"""Latent reward models of Stable Diffusion 1.x, 2.x, XL and 3: built from a pipeline, kept, loaded.

A folder holds config.json, model.safetensors (trunk, projections, logit scale), and the text
encoders and tokenizers where they were trained with it; where not, the name of the pipeline that
has them. Architectures: LPO, arXiv 2502.01051, and its public code for the first three.
"""

import copy
import json
import os
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from diffusers import DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from flashdmd.errors import UserError
from flashdmd.files import forget_origins, replace_folder
from flashdmd.models.reward_mmdit import EarlyBlocks
from flashdmd.models.reward_unet import EncoderHalf
from flashdmd.models.trust import check_length, refuse_config, refuse_unsafe, trusted
from flashdmd.plain import json_object
from flashdmd.reward import LatentReward, as_trained
from flashdmd.sampler import Cond
from flashdmd.schedule import Process, RectifiedFlow, VariancePreserving

T5_TOKENS = 256  # of a prompt, as Stable Diffusion 3's pipeline reads it
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
NOTHING = ([None, None], (None, None))  # an entry of an index whose part is not there
PLAIN_LEVELS = (0, 0, 0, 0)  # of an autoencoder that does not say: 8 pixels a place
SWITCH = "gradient_checkpointing"  # blocks of diffusers and transformers have it, off
IDLE = ("safety_checker", "feature_extractor", "image_encoder")  # parts of pipelines not used here

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Kind:
    """What a pipeline of a class has."""

    network: str  # the component whose early part is the trunk
    encoders: int
    learns_words: bool  # LPO: the CLIPs are trained with the trunk, SD3's encoders are not


KINDS = {
    "StableDiffusionPipeline": Kind("unet", 1, True),
    "StableDiffusionXLPipeline": Kind("unet", 2, True),
    "StableDiffusion3Pipeline": Kind("transformer", 3, False),
}
NETWORKS = {"unet": UNet2DConditionModel, "transformer": SD3Transformer2DModel}


KINDS_OF = {  # of the values of `Facts`
    "kind": str, "base": str, "learns_words": bool, "network": dict, "pixels": int, "latents": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """All that a reward is beside its weights; config.json."""

    kind: str  # the pipeline's class
    base: str  # the pipeline that it was built from, a folder or a name on the hub
    learns_words: bool
    network: dict[str, Any]  # the config of the network whose early part is the trunk
    pixels: int  # across a place of the latent
    latents: dict[str, int | float]  # what tells one autoencoder's latents from another's

    @property
    def process(self) -> Process:
        """Whose latents the trunk is trained on."""
        if KINDS[self.kind].network == "transformer":
            return Process(RectifiedFlow(), "flow")
        return Process(VariancePreserving(), "eps")

    @property
    def token_width(self) -> int:
        """Of an MMDiT's tokens, to which the CLIPs' are padded; 0 for a UNet, whose they are."""
        return int(self.network.get("joint_attention_dim", 0))


class Words(nn.Module):
    """Prompts through a pipeline's text encoders: one CLIP, two (SDXL), or two and a T5 (SD3).

    With a `width`, that of the trunk's tokens, a T5's follow the CLIPs', or zeros if there is none.
    """

    def __init__(self, tokenizers: list[Any], encoders: list[nn.Module], width: int = 0) -> None:
        super().__init__()
        self.tokenizers, self.width = tokenizers, width
        self.encoders = nn.ModuleList(encoders)

    def forward(self, prompts: list[str]) -> Cond:
        """What LatentReward is conditioned on. The empty prompt is encoded once."""
        n = len(prompts)
        tokens, pooled = self.read([*prompts, ""])
        cond = {"tokens": tokens[:n], "pooled": pooled[:n]}
        cond["no_tokens"] = tokens[n:].expand(n, -1, -1)
        if len(self.encoders) > 1:
            cond["no_pooled"] = pooled[n:].expand(n, -1)
        return cond

    def read(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(tokens, pooled): a CLIP's alone are its last, normalised; of several their last but one.

        The pooled feature is then the projected one of all that project it.
        """
        clips = [
            encoder(self.ids(i, prompts), output_hidden_states=True)
            for i, encoder in enumerate(self.encoders[:2])
        ]
        if len(clips) == 1:
            return clips[0].last_hidden_state, clips[0].pooler_output
        tokens = torch.cat([out.hidden_states[-2] for out in clips], dim=-1)
        pooled = torch.cat([out.text_embeds for out in clips if "text_embeds" in out], dim=-1)
        if self.width:
            padded = F.pad(tokens, (0, self.width - tokens.shape[-1]))
            tokens = torch.cat([padded, self.third(prompts, padded)], dim=1)
        return tokens, pooled

    def third(self, prompts: list[str], like: Tensor) -> Tensor:
        if len(self.encoders) < 3:
            return like.new_zeros(len(prompts), T5_TOKENS, self.width)
        states: Tensor = self.encoders[2](self.ids(2, prompts, T5_TOKENS))[0]
        return states

    def ids(self, i: int, prompts: list[str], length: int | None = None) -> Tensor:
        tokenizer = self.tokenizers[i]
        read = tokenizer(
            prompts,
            padding="max_length",
            max_length=length or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        numbers: Tensor = read.input_ids
        return numbers.to(next(self.encoders[i].parameters()).device)


class LRM(nn.Module):
    """A latent reward model as stage 2 asks it: the score of latents of `process` at their t."""

    def __init__(self, network: LatentReward, words: Words, facts: Facts, process: Process) -> None:
        super().__init__()
        self.network, self.words = network, words
        self.facts, self.process = facts, process

    def forward(
        self, z_t: Float[Tensor, "B C H W"], t: Float[Tensor, "B"], cond: Cond
    ) -> Float[Tensor, "B"]:
        if isinstance(self.facts.process.schedule, VariancePreserving):
            z_t, t = as_trained(self.process, z_t, t)
        score: Tensor = self.network(z_t.to(self.network.visual.weight.dtype), t, cond)
        return score

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Cond:
        """In the encoders' own precision wherever it is called; a tensor of each name, dense."""
        with torch.autocast(self.network.visual.weight.device.type, enabled=False):
            return {name: value.contiguous() for name, value in self.words(prompts).items()}

    def learned(self) -> nn.Module:
        """What is trained: the network, and the text encoders unless they are frozen.

        Frozen ones stay in evaluation mode (a T5 drops out in training mode).
        """
        parts = {"network": self.network}
        return nn.ModuleDict(parts | ({"words": self.words} if self.facts.learns_words else {}))

    def save_memory(self) -> None:
        """Activations are computed anew in the backward pass instead of being kept."""
        blocks: list[Any] = [m for m in self.learned().modules() if hasattr(m, SWITCH)]
        for block in blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def open_base(name: str, without: tuple[str, ...] = ()) -> Any:
    """The pipeline in a folder, or of that name on the hub, but for the parts `without`.

    Raises UserError for one that cannot be loaded or has no latent reward model here.
    """
    folder = Path(name)
    local = (folder / "model_index.json").is_file()
    if not local and (folder.exists() or name.startswith(".") or name.count("/") != 1):
        raise UserError(
            f"no pipeline, a folder with model_index.json, is in {name}; give one, or a name on "
            "the hub, such as stabilityai/stable-diffusion-xl-base-1.0"
        )
    try:
        index = DiffusionPipeline.load_config(name, local_files_only=local)
    except Exception as e:  # a file system's, a hub's or JSON's
        raise UserError(f"the pipeline {name} cannot be found: {e}") from e
    kind_of(str(index["_class_name"]), name)
    absent = [part for part, entry in index.items() if entry in NOTHING]
    left_out = dict.fromkeys([*absent, *(part for part in (*IDLE, *without) if part in index)])
    here = trusted(name, index, left_out)
    try:
        return DiffusionPipeline.from_pretrained(
            here, dtype=torch.float32, local_files_only=True, use_safetensors=True, **left_out
        )
    except Exception as e:  # diffusers, transformers and safetensors each raise their own kinds
        raise UserError(f"the pipeline {name} cannot be loaded: {e}") from e


def kind_of(class_name: str, where: str) -> Kind:
    if class_name not in KINDS:
        raise UserError(
            f"{where} is a {class_name}; latent reward models are of {', '.join(KINDS)}"
        )
    return KINDS[class_name]


def build(
    pipeline: Any,
    base: str,
    learns_words: bool | None = None,
    text_projection: Path | None = None,
) -> LRM:
    """An untrained reward of copies of a pipeline's networks; `base` is what it was loaded from.

    `learns_words`: whether its text encoders are trained; None: as LPO does. `text_projection` is a
    safetensors file of a whole CLIP, whose text projection an only encoder's feature starts with;
    None: as it is.
    """
    name = type(pipeline).__name__
    kind = kind_of(name, base)
    network, vae = getattr(pipeline, kind.network), pipeline.vae
    facts = Facts(
        kind=name,
        base=base,
        learns_words=kind.learns_words if learns_words is None else learns_words,
        network={k: v for k, v in network.config.items() if not k.startswith("_")},
        pixels=2 ** (len(vae.config.get("block_out_channels", PLAIN_LEVELS)) - 1),
        latents=space_of(vae),
    )
    words = copy.deepcopy(words_of(pipeline, facts)).requires_grad_(facts.learns_words)
    reward = LRM(network_of(network, facts), words, facts, facts.process).eval()
    reward.network.requires_grad_(True)
    if text_projection is not None:
        start_projection(reward.network, text_projection)
    return reward


def words_of(pipeline: Any, facts: Facts) -> Words:
    """A pipeline's own tokenizers and encoders."""
    names = [n for n in ENCODERS[: KINDS[facts.kind].encoders] if getattr(pipeline, n) is not None]
    tokenizers = [getattr(pipeline, tokenizer_of(n)) for n in names]
    encoders = [getattr(pipeline, n) for n in names]
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        check_length(f"a tokenizer of {facts.base}", tokenizer, encoder)
    return Words(tokenizers, encoders, facts.token_width)


def tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


def network_of(network: nn.Module, facts: Facts) -> LatentReward:
    """The trunk is the early part of `network`; T is projected where the pipeline does not."""
    trunk: EncoderHalf | EarlyBlocks
    if isinstance(network, SD3Transformer2DModel):
        trunk, text = EarlyBlocks(network), facts.network["pooled_projection_dim"]
    else:
        trunk, text = EncoderHalf(network, facts.pixels), facts.network["cross_attention_dim"]
        if trunk.add_time_proj is not None:
            sizes = 6 * facts.network["addition_time_embed_dim"]
            text = facts.network["projection_class_embeddings_input_dim"] - sizes
    reward = LatentReward(trunk, sum(trunk.channels), trunk.channels[-1], int(text))
    if KINDS[facts.kind].encoders > 1:
        reward.text = nn.Identity()
    return reward


def start_projection(network: LatentReward, path: Path) -> None:
    try:
        weight = load_file(path)["text_projection.weight"]
        network.text.load_state_dict({"weight": weight})
    except Exception as e:  # no such file, no such key, another width, or a projection of no use
        raise UserError(
            f"{path} holds no text_projection.weight for this text encoder ({e}); give the "
            "model.safetensors of the CLIP that it is from, such as openai/clip-vit-large-patch14, "
            "and only for a pipeline of one encoder"
        ) from e


def space_of(vae: Any) -> dict[str, int | float]:
    """Channels, scale and shift of latents: one autoencoder may be another's retrained decoder."""
    config = vae.config
    return {
        "channels": config.get("latent_channels") or config.get("z_dim"),
        "scaling_factor": config.get("scaling_factor") or 1.0,
        "shift_factor": config.get("shift_factor") or 0.0,
    }


def write(reward: LRM, folder: Path) -> None:
    """A pipeline that keeps the text encoders is named by the way to it from `folder`."""
    facts, base = reward.facts, reward.facts.base
    if Path(base).is_dir():
        facts = replace(facts, base=os.path.relpath(base, folder))
    with replace_folder(folder) as beside:
        (beside / "config.json").write_text(json.dumps(asdict(facts), indent=2) + "\n")
        state = {k: v.contiguous() for k, v in reward.network.state_dict().items()}
        save_file(state, beside / "model.safetensors")
        if facts.learns_words:
            encoders: Any = reward.words.encoders
            for name, encoder, tokenizer in zip(
                ENCODERS, encoders, reward.words.tokenizers, strict=False
            ):
                encoder.save_pretrained(beside / name)
                tokenizer.save_pretrained(beside / tokenizer_of(name))
            forget_origins(beside)


def is_one(folder: Path) -> bool:
    """Whether a folder is a reward that `write` wrote."""
    try:
        return "kind" in json_object((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False


def load(
    folder: Path,
    process: Process,
    vae: Any,
    dtype: torch.dtype = torch.float32,
    encoders_of: Any = None,
) -> LRM:
    """The reward in `folder`, frozen, for latents of `process` and `vae`.

    Encoders that were not trained with it come from `encoders_of`, a loaded pipeline, or else from
    the one that the folder names. Raises UserError when it is missing, cannot be read, or scores
    latents of another autoencoder or process.
    """
    facts = facts_of(folder)
    check(folder, facts, process, vae)
    try:
        made = NETWORKS[KINDS[facts.kind].network]
        with torch.device("meta"):  # shapes alone: the weights are read next
            network = network_of(made(**facts.network), facts)
        network.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        words = read_words(folder, facts, encoders_of)
    except Exception as e:  # JSON, safetensors, diffusers, transformers: each has its own kinds
        raise UserError(
            f"the latent reward model in {folder} cannot be read ({e}); give a folder written by "
            "`flashdmd reward`"
        ) from e
    reward = LRM(network, words, facts, process).to(dtype)
    return reward.eval().requires_grad_(False)


def facts_of(folder: Path) -> Facts:
    """What a reward's folder says of it. Raises UserError when it says something else."""
    try:
        said = json_object((folder / "config.json").read_bytes())
        wrong = [n for n, kind in KINDS_OF.items() if not isinstance(said.get(n), kind)]
        if wrong or said["kind"] not in KINDS:
            raise ValueError(f"{(wrong or ['kind'])[0]} is none that is known")
        refuse_config("network", said["network"])
        facts = Facts(**said)
    except (OSError, ValueError, TypeError) as e:
        raise UserError(
            f"the latent reward model in {folder} cannot be read ({e}); give a folder written by "
            "`flashdmd reward`"
        ) from e
    return replace(facts, base=str(folder / facts.base)) if facts.base[:1] == "." else facts


def read_words(folder: Path, facts: Facts, encoders_of: Any) -> Words:
    if not facts.learns_words:
        others = (KINDS[facts.kind].network, "vae", "scheduler")
        return words_of(encoders_of or open_base(facts.base, without=others), facts)
    tokenizers, encoders = [], []
    for name in ENCODERS:
        if (path := folder / name).is_dir():
            refuse_unsafe(path)
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            made = getattr(transformers, config.architectures[0])
            if not issubclass(made, transformers.PreTrainedModel):
                raise UserError(f"{path}/config.json names {made.__name__}, which is no network")
            encoders.append(made.from_pretrained(path, local_files_only=True, use_safetensors=True))
            beside = folder / tokenizer_of(name)
            tokenizers.append(
                AutoTokenizer.from_pretrained(
                    beside, local_files_only=True, trust_remote_code=False
                )
            )
            check_length(f"the tokenizer in {beside}", tokenizers[-1], encoders[-1])
    return Words(tokenizers, encoders, facts.token_width)


def check(folder: Path, facts: Facts, process: Process, vae: Any) -> None:
    """Raises UserError for latents that the reward has never seen the like of."""
    if (given := space_of(vae)) != facts.latents:
        raise UserError(
            f"the latent reward model in {folder} scores latents of {facts.latents} and this "
            f"teacher's are of {given}; name one trained on its latents, or none"
        )
    trained, asked = (p.schedule for p in (facts.process, process))
    if isinstance(trained, RectifiedFlow) and not isinstance(asked, RectifiedFlow):
        raise UserError(
            f"the latent reward model in {folder} is of a flow and this teacher is not; name one "
            "trained on its kind, or none"
        )
