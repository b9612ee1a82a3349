"""Family by family: x_0_hat, guidance and prompts are what the stock pipeline itself computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dits
import tiny_export
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    QwenImagePipeline,
)
from torch import Tensor

from flashdmd import export
from flashdmd.algorithm import Method, split
from flashdmd.errors import UserError
from flashdmd.models.families.flux import packed, unpacked
from flashdmd.models.teacher import Teacher, load_pipeline, to_uint8
from flashdmd.sampler import Sampler, times

PROMPTS = ["fluent emoji of a strawberry", "a bird emoji"]
SIDE = 32  # pixels


@pytest.fixture(scope="module", params=[*tiny_export.KINDS, *tiny_export.ALSO, *tiny_dits.MAKE])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    make = tiny_dits if request.param in tiny_dits.MAKE else tiny_export
    make.pipeline(request.param).save_pretrained(folder)
    loaded = load_pipeline(folder)
    loaded.resolution = SIDE
    return loaded


def stock_steps(
    teacher: Teacher, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x_t, t, x_0_hat) of each step of the stock pipeline on prompts of its own reading: from what
    it hands to its scheduler, so guidance, signs and scales are the pipeline's.
    """
    scheduler, seen = teacher.pipeline.scheduler, []
    noise = teacher.noise(len(PROMPTS), 0)
    step = scheduler.step

    def watch(out: Tensor, t: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        x_t = scheduler.scale_model_input(sample, t) if score else sample
        x_t, given = placed(x_t, noise), placed(out, noise)
        time = t.expand(len(noise)).float()
        seen.append((x_t, time, teacher.process.to_x0(given, x_t, time)))
        return step(out, t, sample, *args, **kwargs)

    score = teacher.family.kind == "score"
    monkeypatch.setattr(scheduler, "step", watch)
    teacher.pipeline(
        prompt=list(PROMPTS),
        latents=teacher.family.pack(teacher.pipeline, noise),
        height=SIDE,
        width=SIDE,
        num_inference_steps=3,
        output_type="latent",
        **teacher.family.call,
        **teacher.family.guided_call(teacher.pipeline, guidance, len(PROMPTS)),
    )
    return seen


def placed(x: Tensor, like: Tensor) -> Tensor:
    """Latents as the family has them, of what the pipeline steps on."""
    if x.shape == like.shape:
        return x
    if x.shape[2] == like.shape[1]:  # FLUX.2's places are its tokens
        return x.transpose(1, 2).reshape(like.shape)
    return unpacked(x, like)


def tokens(x: Tensor, pipeline: Any) -> Tensor:
    """The inverse of `placed`."""
    if isinstance(pipeline, Flux2Pipeline | Flux2KleinPipeline):
        return x.flatten(2).transpose(1, 2)
    return packed(x) if isinstance(pipeline, FluxPipeline | QwenImagePipeline) else x


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_guided_teacher_is_the_stock_pipelines(
    teacher: Teacher, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = stock_steps(teacher, guidance, monkeypatch)
    teacher.guidance = guidance
    cond, real = teacher.encode_prompts(PROMPTS), teacher.guided(guidance)
    assert len({float(t[0]) for _, t, _ in seen}) == 3
    for x_t, t, theirs in seen:
        torch.testing.assert_close(real(x_t, t, cond), theirs, atol=1e-4, rtol=1e-4)
    x_t, t, theirs = seen[1]
    other = teacher.encode_prompts(PROMPTS[::-1])  # the words are heard at all
    assert (real(x_t, t, other) - theirs).abs().max() > 1e-3


def test_prompts_are_of_one_length_and_read_alike_in_any_company(teacher: Teacher) -> None:
    """So that they can be kept one by one and batched in any order."""
    words = [*PROMPTS, "", "a red apple and a green pear, side by side on a plate"]
    together = teacher.encode_prompts(words)
    for i, prompt in enumerate(words):
        for name, alone in teacher.encode_prompts([prompt]).items():
            torch.testing.assert_close(alone[0], together[name][i], atol=1e-5, rtol=1e-4)
    nothing = teacher.unconditional(2)
    assert all(together[k].shape[1:] == v.shape[1:] for k, v in nothing.items())


def test_the_middle_is_a_map_of_its_own_picture(teacher: Teacher) -> None:
    noise, cond = teacher.noise(2, 0), teacher.encode_prompts(PROMPTS)
    feature = teacher.denoiser.bottleneck(noise, times(500, noise), cond)
    columns = feature.shape[3]
    side, moved = noise.shape[-1] // columns, noise.clone()
    moved[0, :, :side, -side:] += 1  # the corner at the top right
    change = (teacher.denoiser.bottleneck(moved, times(500, noise), cond) - feature).norm(dim=1)
    assert change[1].max() < 1e-5
    if teacher.family.network == "transformer":  # a UNet sees everything from everywhere
        assert int(change[0].flatten().argmax()) == columns - 1


def test_pictures_survive_the_autoencoder(teacher: Teacher) -> None:
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    vae = teacher.pipeline.vae
    framed = images.unsqueeze(2) if isinstance(vae, AutoencoderKLQwenImage) else images
    seen = vae.encode(framed)
    theirs = vae.decode(seen.latent if "latent" in seen else seen.latent_dist.mode()).sample
    theirs = theirs.reshape(images.shape)
    latents = teacher.encode(images)
    assert latents.shape[1:] == teacher.latent_shape
    torch.testing.assert_close(teacher.decode(latents), theirs, atol=1e-4, rtol=1e-4)


def test_a_student_is_called_plainly(teacher: Teacher, tmp_path: Path) -> None:
    """The stock call on the written folder is our walk, at the times that its scheduler has."""
    student = teacher.denoiser.twin("student").requires_grad_(True)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    steps, guidance = teacher.default_steps, 3.0
    method = Method(**split(steps), teacher_guidance_scale=guidance)
    folder = export.write_student(teacher, student, method, tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    far, picture = difference(teacher, student, pipeline, steps, guidance)
    grid = [float(t) for t in pipeline.scheduler.timesteps]
    near = 0 if teacher.family.kind == "score" else export.NEAR
    assert max(abs(a - b) for a, b in zip(grid, steps, strict=True)) <= near
    assert far <= 1
    assert picture.std() > 1


def difference(
    teacher: Teacher, student: Any, pipeline: Any, steps: tuple[int, ...], guidance: float
) -> tuple[int, np.ndarray]:
    """The largest difference, in 255ths, of the pictures of a pipeline's plain call and of our walk
    at its times, noise for noise; and our pictures.
    """
    pipeline.set_progress_bar_config(disable=True)
    noise, family = teacher.noise(2, 7), teacher.family
    torch.manual_seed(3)
    theirs = pipeline(
        prompt=list(PROMPTS),
        latents=family.pack(pipeline, noise),
        height=SIDE,
        width=SIDE,
        num_inference_steps=len(steps),
        output_type="np",
        guidance_scale=export.plain_guidance(teacher, guidance),
        **family.call,
    ).images
    theirs = (theirs * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
    grid = [float(t) for t in pipeline.scheduler.timesteps]
    torch.manual_seed(3)
    teacher.guidance = guidance
    cond = teacher.encode_prompts(PROMPTS)
    latents = walk(Sampler(teacher.process, steps), grid, student, noise, cond, pipeline)
    with torch.no_grad():
        ours = to_uint8(teacher.decode(latents))
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max()), ours


@torch.no_grad()
def walk(
    sampler: Sampler, grid: list[float], student: Any, x: Tensor, cond: Any, pipeline: Any
) -> Tensor:
    """The sampler's walk at times that need not be whole."""
    for t, after in zip(grid, [*grid[1:], None], strict=True):
        x0 = student(x, torch.full((len(x),), t), cond)
        if after is None:
            return x0
        alpha, sigma = sampler.process.at(torch.full((len(x),), after), x0)
        fresh = torch.randn(tokens(x0, pipeline).shape)  # in the pipeline's own order
        x = alpha * x0 + sigma * placed(fresh, x0)
    raise AssertionError


def test_the_table_of_families_is_true(teacher: Teacher) -> None:
    name = type(teacher.pipeline).__name__
    rows = (Path(__file__).parents[1] / "docs/families.md").read_text().splitlines()
    row = next(row for row in rows if row.startswith(f"| `{name}`"))
    steps, guidance = row.split("|")[3:5]
    assert ", ".join(map(str, teacher.default_steps)) in steps
    assert f" {teacher.family.guidance:g}" in guidance


def test_packing_is_undone() -> None:
    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(unpacked(packed(x), x), x)
    assert packed(x).shape == (2, 12, 16)


@pytest.mark.parametrize("absent", ["1", "2", "12", "123"])
def test_an_sd3_without_some_of_its_encoders_hears_the_others(absent: str, tmp_path: Path) -> None:
    """Zeros are in an absent one's place (arXiv 2403.03206); the stock code needs both CLIPs."""
    whole = load_pipeline(saved(tiny_export.sd3(), tmp_path / "whole"))
    part = load_pipeline(saved(tiny_export.without(tiny_export.sd3(), *absent), tmp_path / "part"))
    ours, theirs = (t.encode_prompts(PROMPTS) for t in (part, whole))
    pooled = {"1": slice(0, tiny_export.L), "2": slice(tiny_export.L, None)}
    for number, where in pooled.items():
        said = ours["pooled_projections"][:, where]
        assert said.any() == (number not in absent)
        if number not in absent:
            torch.testing.assert_close(said, theirs["pooled_projections"][:, where])
    tokens = ours["encoder_hidden_states"]
    assert tokens.any() == (absent != "123")
    noise = part.noise(2, 0)
    assert np.isfinite(part.sample(PROMPTS, noise, 2, 3.0)).all()


def saved(pipeline: Any, folder: Path) -> Path:
    for encoder in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if (part := getattr(pipeline, encoder)) is not None:
            torch.manual_seed(0)
            for p in part.parameters():
                torch.nn.init.normal_(p, std=0.1)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "file", "value", "message"),
    [
        ("klein", "model_index.json", {"is_distilled": True}, "few-step student already"),
        ("sana", "scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "use_flow_sigmas"),
        ("sana", "scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "'epsilon'"),
        (
            "pixart",
            "scheduler/scheduler_config.json",
            {"beta_schedule": "squaredcos_cap_v2"},
            "over 1000",
        ),
    ],
)
def test_what_is_no_teacher_of_its_family_is_refused(
    kind: str, file: str, value: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_dits.pipeline(kind).save_pretrained(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(content | value))
    with pytest.raises(UserError, match=message):
        load_pipeline(tmp_path)
