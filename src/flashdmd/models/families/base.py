"""What differs between kinds of teacher, one subclass each. docs/families.md: how to add one."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from flashdmd.errors import UserError
from flashdmd.sampler import Cond
from flashdmd.schedule import STEPS, Process, RectifiedFlow

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Family:
    """A kind of pipeline. `network` is what x_0_hat comes from; the rest answers for its pipeline.

    The defaults are those of a flow-matching transformer whose autoencoder is an AutoencoderKL.
    """

    pipelines: ClassVar[tuple[str, ...]]  # class names in model_index.json
    kind: ClassVar[Literal["score", "flow"]] = "flow"
    network: ClassVar[str] = "transformer"
    needs: ClassVar[tuple[str, ...]] = ("vae", "scheduler", "tokenizer", "text_encoder")
    lora_layers: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    student_shift: ClassVar[float] = 3.0  # [DEF] where a teacher's shift depends on the picture
    guidance: ClassVar[float] = 7.0  # [DEF] of the teacher while distilling
    affine: ClassVar[bool] = True  # guidance is x_u + scale (x_c - x_u); if not, see `guide`
    call: ClassVar[dict[str, Any]] = {}  # what the pipeline's call is told at any size

    # what is computed ---------------------------------------------------------------------------

    def process(self, pipeline: Any) -> Process:
        """The noise process and what the network predicts. Raises UserError for one unknown."""
        return Process(RectifiedFlow(), "flow")

    def encode_prompts(self, pipeline: Any, prompts: list[str], device: torch.device) -> Cond:
        """Keyword tensors of `output`, batch first, of one length whatever the prompts are."""
        raise NotImplementedError

    def unconditional(self, pipeline: Any, device: torch.device) -> Cond:
        """What guidance guides away from, of one example."""
        return self.encode_prompts(pipeline, [""], device)

    def sized(self, pipeline: Any, sizes: Tensor) -> Cond:
        """What the network is told of the pictures' sizes, of (B, 6): original height and width,
        top and left of the crop, target height and width.
        """
        return {}

    def output(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's answer in the kind of `process`, of the shape of `x_t` (B, C, h, w)."""
        raise NotImplementedError

    def context(
        self, network: nn.Module, x_t: Tensor, cond: Cond
    ) -> Callable[[], AbstractContextManager[Any]]:
        """Makes what `output` has to run in, and runs in again when it is recomputed."""
        return nullcontext

    def middle(self, network: nn.Module) -> nn.Module:
        """The module in whose answer DMD2's head looks for features."""
        blocks = network.get_submodule("transformer_blocks")
        assert isinstance(blocks, nn.ModuleList)
        return blocks[len(blocks) // 2]

    def feature(self, answer: Any, x_t: Tensor, network: nn.Module) -> Tensor:
        """(B, D, h, w) of what `middle` answers."""
        tokens: Tensor = answer[1] if isinstance(answer, tuple) else answer  # the image's (B, N, D)
        side = round(tokens.shape[1] ** 0.5 * (x_t.shape[-2] / x_t.shape[-1]) ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, -1))

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Guidance of the network's outputs, where the pipeline's is not `affine`."""
        return unconditional + scale * (conditional - unconditional)

    def embeds_guidance(self, pipeline: Any) -> bool:
        """Whether a guided teacher is one call, the scale among its inputs."""
        return False

    # pictures -----------------------------------------------------------------------------------

    def channels(self, pipeline: Any) -> int:
        """Of a latent."""
        return int(pipeline.vae.config.latent_channels)

    def factor(self, pipeline: Any) -> int:
        """Pixels across a place of a latent."""
        return int(pipeline.vae_scale_factor)

    def multiple(self, pipeline: Any) -> int:
        """What the sides of a picture must be multiples of: a patch of latent places, in pixels."""
        patch = getattr(pipeline, self.network).config.get("patch_size", 1)
        return self.factor(pipeline) * (patch if isinstance(patch, int) else 1)

    def resolution(self, pipeline: Any) -> int:
        """Pixels across the square picture that the network was made for."""
        size = getattr(pipeline, self.network).config.get("sample_size")
        return int(size or pipeline.default_sample_size) * self.factor(pipeline)

    def encode(self, pipeline: Any, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents, as the network knows them."""
        vae = pipeline.vae
        latents: Tensor = vae.encode(images).latent_dist.mode().float()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        images: Tensor = vae.decode(latents).sample
        return images

    # the stock pipeline -------------------------------------------------------------------------

    def sample(
        self, pipeline: Any, prompts: list[str], noise: Tensor, steps: int, guidance: float
    ) -> Any:
        """(B, H, W, 3) in [0, 1], by the pipeline's own loop."""
        factor = self.factor(pipeline)
        return pipeline(
            prompt=list(prompts),  # Z-Image writes into the list
            latents=self.pack(pipeline, noise),
            height=noise.shape[-2] * factor,
            width=noise.shape[-1] * factor,
            num_inference_steps=steps,
            output_type="np",
            **self.call,
            **self.guided_call(pipeline, guidance, len(prompts)),
        ).images

    def pack(self, pipeline: Any, noise: Tensor) -> Tensor:
        """Latents as the pipeline wants them given."""
        return noise

    def guided_call(self, pipeline: Any, guidance: float, n: int) -> dict[str, Any]:
        """How the pipeline is asked for a guidance, of `n` prompts; 0 and 1 ask for none."""
        return {"guidance_scale": guidance}

    # the student --------------------------------------------------------------------------------

    def shift(self, pipeline: Any) -> float:
        """Of the teacher's own times: s u / (1 + (s - 1) u)."""
        config = pipeline.scheduler.config
        if config.get("use_dynamic_shifting"):
            return self.student_shift
        return float(config.get("shift") or config.get("flow_shift") or 1.0)

    def steps(self, pipeline: Any) -> tuple[int, ...]:
        """A student's four, evenly spaced, then shifted as the teacher's are."""
        s = self.shift(pipeline)
        return tuple(round(STEPS * s * u / (1 + (s - 1) * u)) for u in (1.0, 0.75, 0.5, 0.25))

    def scheduler(self, pipeline: Any, steps: tuple[int, ...]) -> Any:
        """The stock scheduler with which the pipeline's plain call walks `steps` (nearly)."""
        return FlowMatchEulerDiscreteScheduler(
            shift=self.fitting_shift(steps), stochastic_sampling=True
        )

    def fitting_shift(self, steps: tuple[int, ...]) -> float:
        """The shift that makes 1, 1 - 1/N, ..., 1/N these steps. For pipelines that ask for that
        grid themselves.
        """
        if len(steps) == 1:
            return 1.0
        last, u = steps[-1] / STEPS, 1 / len(steps)
        return round(last * (1 - u) / (u * (1 - last)), 6)

    def grid(self, pipeline: Any, scheduler: Any, n: int) -> list[float]:
        """The network times of the pipeline's plain call at `n` steps."""
        scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)])
        return [float(t) for t in scheduler.timesteps]

    def complete(self, pipeline: Any) -> None:
        """Puts in what a pipeline may lack."""

    def check(self, pipeline: Any) -> None:
        """Raises UserError for a pipeline of this family that cannot be a teacher."""
        for name in (self.network, *self.needs):
            if getattr(pipeline, name, None) is None:
                raise UserError(f"the pipeline has no {name}")
        config = pipeline.vae.config
        size = getattr(pipeline, self.network).config.get("sample_size", 1)
        scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor") or 0.0
        if not (number(scale) and scale > 0 and number(shift)):
            raise UserError(
                f"the vae has scaling_factor={scale!r} and shift_factor={shift!r}; accepted are a "
                "finite number above 0, and one or none"
            )
        if type(size) is not int or size < 1:
            raise UserError(
                f"the {self.network} has sample_size={size!r}; a whole number above 0 is needed, "
                "the latent places across a square picture"
            )


def number(value: Any) -> bool:
    """Whether it is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)
