"""The sections of a recipe but for `method`, which is `algorithm.Method`: each key, its bounds."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from flashdmd.algorithm import LARGEST, MANY
from flashdmd.augment import Change
from flashdmd.schedule import STEPS

Text = Annotated[str, Field(min_length=1)]  # none is empty: that is no name
Rate = Annotated[float, Field(ge=0, le=LARGEST)]
Norm = Annotated[float, Field(gt=0, le=LARGEST)]
Signed = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Decay = Annotated[float, Field(ge=0, le=1000)]  # times a rate
Whole = Annotated[int, Field(ge=0, lt=MANY)]
Count = Annotated[int, Field(ge=1, lt=MANY)]
Blocks = Annotated[tuple[Whole, ...], Field(min_length=1)]
Window = tuple[Whole, Whole]
Names = Annotated[tuple[Text, ...], Field(min_length=1)]
Metric = Literal["kid", "retrieval", "reward", "held_out_reward", "diversity"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, content: Any) -> Any:
        return tupled(content)


def tupled(content: Any) -> Any:
    """Lists, which are how YAML and JSON write tuples, as tuples."""
    if isinstance(content, dict):
        return {key: tupled(value) for key, value in content.items()}
    return tuple(map(tupled, content)) if isinstance(content, list) else content


class Model(Section):
    pretrained_model_name_or_path: Text = "emoji-score"  # a folder, a hub id, emoji-score or -flow
    revision: Text | None = None  # of the hub id
    variant: Text | None = None  # of its files' names, such as fp16
    teacher_lora: Text | None = None  # a LoRA that belongs to the teacher: folder, file, hub id
    teacher_lora_scale: Signed = 1.0  # of what teacher_lora adds
    pretrained_vae_model_name_or_path: Text | None = None  # None: the pipeline's own
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"  # of all that is frozen but the autoencoder
    vae_precision: Literal["fp32", "run"] = "fp32"  # run: as train.mixed_precision
    quantize_base: Literal["none", "int8", "nf4"] = "none"  # of LoRA's base
    reward_model_name_or_path: Text | None = "emoji-reward"  # or a folder; None: stage 1 only
    student_model_name_or_path: Text | None = None  # a student to start from; None: the teacher

    @field_validator("vae_precision", mode="before")
    @classmethod
    def _half(cls, value: Any) -> Any:
        if value in ("fp16", "bf16", "no"):
            raise ValueError(
                "the Pixel-GAN learns through the decoder, and SDXL's overflows in float16 and "
                "loses what bfloat16 rounds; use fp32, or run to follow train.mixed_precision"
            )
        return value


class Lora(Section):
    rank: Whole = 0  # of student and score estimator; 0: full fine-tuning
    lora_alpha: Norm | None = None  # None: as rank, a scale of 1
    lora_layers: Names | None = None  # names of layers that get one; None: the family's


class Critic(Section):
    backbone: Text = "efficientnet-lite0"  # or a SAM, DINOv2, DINOv3 folder or hub id, timm:NAME
    blocks: Blocks | None = None  # whose maps have heads; None: SAM's global ones, four
    width: Count = 128  # [DEF] channels of the heads (ADM: 256, on SAM)
    crop: Count | None = None  # latent places across a random crop that is decoded; None: all
    augment: tuple[Change, ...] = ()  # DiffAugment: colour, translation, cutout; [DEF] none
    r1_weight: Rate = 0.0  # [DEF] of approximate R1 on real pictures; 0: none
    r1_sigma: Norm = 0.1  # [DEF] its noise


class Data(Section):
    train_data_dir: Text = "emoji"  # real pictures, captions (docs/data.md); teacher: its samples
    prompts: Text | None = None  # .txt, one a line, or .jsonl with "prompt"; None: the captions
    image_column: Text | None = None  # of a Hugging Face data set; None: guessed
    caption_column: Text | None = None  # likewise
    resolution: Annotated[int, Field(ge=8, lt=MANY)] | None = None  # pixels; None: the teacher's
    aspect_ratio_buckets: bool = False  # a batch of one shape, not all cut to squares
    teacher_samples: Count = 4096  # pictures, where train_data_dir is teacher
    cache_dir: Text | None = None  # of embeddings, latents, teacher samples; None: output_dir/cache
    cache_text_embeddings: bool = False  # then the text encoders are let go
    cache_latents: bool = False  # of the real pictures; a picture is then always cut the same
    dataloader_num_workers: Whole = 0  # processes that draw ahead; 0: none


class Train(Section):
    arm: Literal["flash-dmd", "dmd2"] = "flash-dmd"  # the method, or what it is compared with
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    max_train_steps: Whole = 1000  # GENERATOR updates of stage 1 (paper: 1k)
    joint_train_steps: Whole = 400  # generator updates of stage 2; 0: none
    stage2: Literal["joint", "rl"] = "joint"  # rl: preference updates alone, and they are counted
    train_batch_size: Count = 64  # images an iteration (paper: 64 SDXL, 32 SD3)
    preference_batch_size: Count = 32  # [DEF] prompts of a preference update, a pair at each S_rl
    gradient_accumulation_steps: Count = 1  # parts that a batch is worked through in
    gradient_checkpointing: bool = False  # of the networks that learn, decoder and backbone
    sharded: bool = False  # student, score estimator and teacher, over the processes (FSDP2)
    use_8bit_adam: bool = False  # moments in 8 bits, of bitsandbytes
    learning_rate: Rate = 1e-6  # [DEF] G, full fine-tuning of SDXL: SenseFlow's (DMD2: 5e-7)
    fake_score_learning_rate: Rate = 1e-6  # [DEF] psi: SenseFlow's
    discriminator_learning_rate: Rate = 1e-4  # [DEF] heads start from random weights; 1e-5..1e-4
    preference_learning_rate: Rate = 1e-6  # [DEF] G in stage 2 (LPO's LoRA: 1e-5); own moments
    stage2_learning_rate: Rate | None = None  # [DEF] G's distilling updates of stage 2; None: as 1
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # DMD2
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999  # DMD2
    adam_weight_decay: Decay = 0.01  # DMD2
    adam_epsilon: Annotated[float, Field(ge=1e-30, le=LARGEST)] = 1e-8  # torch's
    max_grad_norm: Norm = 10.0  # of student and score estimator; DMD2, full fine-tuning
    discriminator_max_grad_norm: Norm = 1.0  # [DEF] heads: SenseFlow's
    preference_max_grad_norm: Norm = 1.0  # [DEF] G in stage 2: LPO's
    lr_warmup_steps: Whole = 0  # of each network's own updates
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99  # [DEF] student's (RTDMD); 0: none
    mixed_precision: Literal["no", "bf16"] = "bf16"  # of the networks; losses are float32
    seed: Seed = 0  # with the step it decides all that is drawn
    checkpointing_steps: Whole = 100  # generator updates; 0: only at the end
    checkpoints_total_limit: Count | None = 2  # the newest; None keeps all
    max_bad_iterations: Count = 3  # [DEF] skips of one update in a row, for NaN; then it stops
    gan_calibration_steps: Window = (50, 150)  # [DEF] generator updates; sets lambda_adv

    @field_validator("gan_calibration_steps")
    @classmethod
    def _rises(cls, window: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= window[0] < window[1]:
            raise ValueError(f"gan_calibration_steps={list(window)} must rise from 0 or more")
        return window

    @model_validator(mode="after")
    def _parts(self) -> "Train":
        parts = self.gradient_accumulation_steps
        for name in ("train_batch_size", "preference_batch_size"):
            if getattr(self, name) % parts:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not a multiple of "
                    f"gradient_accumulation_steps={parts}: a batch is worked through in equal parts"
                )
        return self


class Validation(Section):
    prompts: tuple[Text, ...] = ()  # shown in the report; none: some of those that are measured
    num_prompts: Annotated[int, Field(ge=8, le=276)] = 276  # measured on, one picture each
    teacher_steps: Annotated[int, Field(ge=1, le=STEPS)] = 50  # of the teacher beside it
    seed: Seed = 1234  # of the starting noise, the same for every arm
    best_metric: Metric | None = None  # measured at each checkpoint, the best is kept; None: no
