"""Our denoisers, prompts and exported students against what stock diffusers computes."""

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashdmd import export
from flashdmd.algorithm import Method, split
from flashdmd.errors import UserError
from flashdmd.models.padding import RepeatLast, compress
from flashdmd.models.teacher import Teacher, load_pipeline, to_uint8
from flashdmd.sampler import Sampler, guided, times

PROMPTS = ["fluent emoji of a strawberry", "a bird emoji"]


@pytest.fixture(scope="module", params=["score", "flow"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp(request.param) / "pipeline"
    make = tiny.score_folder if request.param == "score" else tiny.flow_folder
    return load_pipeline(make(folder))


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("without") / "pipeline"
    return load_pipeline(tiny.flow_folder(folder, t5=False))


@pytest.fixture
def calls(teacher: Teacher) -> Iterator[list[tuple[dict, Tensor]]]:
    """Every call that the stock pipeline makes of its network: (keyword arguments, output)."""
    seen: list[tuple[dict, Tensor]] = []

    def look(_: object, args: tuple, kwargs: dict, output: tuple) -> None:
        names = ("sample", "timestep", "encoder_hidden_states")
        seen.append((dict(zip(names, args, strict=False)) | kwargs, output[0]))

    hook = teacher.denoiser.network.register_forward_hook(look, with_kwargs=True)
    yield seen
    hook.remove()


def stock(teacher: Teacher, guidance: float) -> None:
    """The stock pipeline on prompts of its own reading."""
    pipeline = teacher.pipeline
    noise = teacher.noise(len(PROMPTS), 0)
    pipeline(
        PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=guidance, output_type="latent"
    )


def test_x0_hat_is_what_the_stock_pipelines_own_call_implies(teacher: Teacher, calls: list) -> None:
    stock(teacher, guidance=1.0)
    for arguments, output in list(calls):
        x_t = arguments.get("sample", arguments.get("hidden_states"))
        t = arguments["timestep"].expand(len(x_t)).float()
        theirs = teacher.process.to_x0(output, x_t, t)
        ours = teacher.denoiser(x_t, t, teacher.encode_prompts(PROMPTS))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_guidance_is_what_the_stock_pipelines_own_call_implies(
    teacher: Teacher, calls: list
) -> None:
    stock(teacher, guidance=4.0)
    for arguments, output in list(calls):
        x_t, _ = arguments.get("sample", arguments.get("hidden_states")).chunk(2)
        t = arguments["timestep"].expand(2 * len(x_t))[: len(x_t)].float()
        nothing, something = output.chunk(2)
        theirs = teacher.process.to_x0(nothing + 4.0 * (something - nothing), x_t, t)
        real = guided(teacher.denoiser, teacher.unconditional, 4.0)
        ours = real(x_t, t, teacher.encode_prompts(PROMPTS))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_a_sample_is_the_stock_pipelines(teacher: Teacher, guidance: float) -> None:
    noise = teacher.noise(len(PROMPTS), 0)
    theirs = teacher.pipeline(
        PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=guidance, output_type="np"
    ).images
    theirs = (theirs * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
    ours = teacher.sample(PROMPTS, noise, 3, guidance)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_pictures_survive_the_autoencoders_own_scale(teacher: Teacher) -> None:
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    vae = teacher.pipeline.vae
    theirs = vae.decode(vae.encode(images).latent_dist.mode()).sample
    ours = teacher.decode(teacher.encode(images))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_students_plain_call_is_our_sampler(teacher: Teacher, n: int, tmp_path: Path) -> None:
    check_plain_call(teacher, evenly(teacher, n), tmp_path)


def test_a_student_of_a_teacher_without_t5_is_called_as_plainly(
    without_t5: Teacher, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="text_encoder_3"):
        DiffusionPipeline.from_pretrained(without_t5.folder)
    check_plain_call(without_t5, evenly(without_t5, 4), tmp_path)


def evenly(teacher: Teacher, n: int) -> tuple[int, ...]:
    top = teacher.default_steps[0]
    return tuple(round(top - k * 1000 / n) for k in range(n))


def check_plain_call(teacher: Teacher, steps: tuple[int, ...], tmp_path: Path) -> None:
    """Same noises, same picture: the first is given, the later ones are drawn in the same order."""
    student = teacher.denoiser.twin("student").requires_grad_(True)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    method = Method(**split(steps))
    folder = export.write_student(teacher, student, method, tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = teacher.noise(2, 7)
    torch.manual_seed(3)
    theirs = pipeline(
        PROMPTS, latents=noise, num_inference_steps=len(steps), guidance_scale=0, output_type="np"
    ).images
    torch.manual_seed(3)
    sampler = Sampler(teacher.process, steps)
    latents = sampler.sample(student, noise, teacher.encode_prompts(PROMPTS))
    with torch.no_grad():
        ours = to_uint8(teacher.decode(latents))
    assert pipeline.scheduler.timesteps.tolist() == list(steps)
    theirs = (theirs * 255).round().astype(np.uint8).transpose(0, 3, 1, 2)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert export.notes_of(folder).steps == steps
    assert ours.std() > 1


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_every_step_list_has_a_stock_scheduler(teacher: Teacher, n: int) -> None:
    steps = evenly(teacher, n)
    scheduler = export.scheduler_for(teacher, steps)
    scheduler.set_timesteps(n)
    assert [float(t) for t in scheduler.timesteps] == [float(t) for t in steps]


@pytest.mark.parametrize("teacher", ["score"], indirect=True)
def test_a_students_scheduler_is_told_nothing_that_it_does_not_know(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers warns of it whenever the student is loaded."""
    own = DDPMScheduler.from_config(teacher.pipeline.scheduler.config, variance_type="fixed_large")
    monkeypatch.setattr(teacher.pipeline, "scheduler", own)
    scheduler = export.scheduler_for(teacher, teacher.default_steps)
    known = inspect.signature(type(scheduler).__init__).parameters
    assert {k for k in scheduler.config if not k.startswith("_")} <= set(known)
    assert scheduler.config.prediction_type == own.config.prediction_type


def test_steps_off_every_stock_grid_are_refused(teacher: Teacher) -> None:
    with pytest.raises(UserError, match="cannot be written as a stock scheduler's grid"):
        export.scheduler_for(teacher, (999, 900, 100))


def test_the_middle_of_the_network_is_a_map_of_features(teacher: Teacher) -> None:
    noise = teacher.noise(2, 0)
    t, cond = times(500, noise), teacher.encode_prompts(PROMPTS)
    seen: list[Any] = []
    middle = teacher.family.middle(teacher.denoiser.network)
    hook = middle.register_forward_hook(lambda _, __, output: seen.append(output))
    teacher.denoiser(noise, t, cond)
    hook.remove()
    feature = teacher.denoiser.bottleneck(noise, t, cond)
    torch.testing.assert_close(
        feature, teacher.family.feature(seen[0], noise, teacher.denoiser.network)
    )
    assert feature.ndim == 4
    assert len(feature) == 2
    moved = noise.clone()
    moved[0] += 1
    other = teacher.denoiser.bottleneck(moved, t, cond)
    assert not torch.equal(other[0], feature[0])
    torch.testing.assert_close(other[1], feature[1])
    before = teacher.denoiser(noise, t, cond)  # and nothing of it stays behind
    torch.testing.assert_close(teacher.denoiser(noise, t, cond), before)


def test_what_lies_behind_the_middle_is_not_run(teacher: Teacher) -> None:
    network = teacher.denoiser.network
    last = network.conv_out if teacher.family.kind == "score" else network.proj_out
    ran: list[None] = []
    hook = last.register_forward_hook(lambda *_: ran.append(None))
    noise = teacher.noise(1, 0)
    teacher.denoiser.bottleneck(noise, times(500, noise), teacher.encode_prompts(PROMPTS[:1]))
    assert not ran
    teacher.denoiser(noise, times(500, noise), teacher.encode_prompts(PROMPTS[:1]))
    hook.remove()
    assert len(ran) == 1


def test_one_token_counted_often_equals_equal_tokens() -> None:
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=32, pooled_projection_dim=12, pos_embed_max_size=4,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, tokens, pooled = torch.randn(2, 4, 4, 4), torch.randn(2, 7, 12), torch.randn(2, 12)
    t = torch.tensor([100.0, 900.0])
    padded = torch.cat([tokens, torch.zeros(2, 50, 12)], dim=1)
    short, copies = compress(padded)
    assert (short.shape[1], copies) == (8, 50)
    with torch.no_grad():
        expected = network(x, padded, pooled, t).sample
        with RepeatLast(16 + 8, copies):
            ours = network(x, short, pooled, t).sample
        unweighted = network(x, short, pooled, t).sample
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (unweighted - expected).abs().max() > 0.05


def test_a_teacher_without_t5_reads_prompts_as_one_whose_t5_is_silent(
    without_t5: Teacher, tmp_path: Path
) -> None:
    with_t5 = load_pipeline(tiny.flow_folder(tmp_path / "with"))
    ours, theirs = with_t5.encode_prompts(PROMPTS), without_t5.encode_prompts(PROMPTS)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: None, "is not a folder"),
        (lambda f: f.mkdir(), "has no model_index.json"),
        (lambda f: (f.mkdir(), (f / "model_index.json").write_text("{")), "cannot be read"),
        (lambda f: (f.mkdir(), (f / "model_index.json").write_text("[1]")), "cannot be read"),
        (
            lambda f: (
                f.mkdir(),
                (f / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}'),
            ),
            "is a KolorsPipeline; supported are",
        ),
        (
            lambda f: (
                f.mkdir(),
                (f / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}'),
            ),
            "the pipeline has no unet",
        ),
    ],
)
def test_a_folder_that_is_no_teacher_is_named(tmp_path: Path, spoil: object, message: str) -> None:
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        load_pipeline(tmp_path / "model")


def test_a_truncated_weights_file_is_named(teacher: Teacher, tmp_path: Path) -> None:
    copy = shutil.copytree(teacher.folder, tmp_path / "copy")
    weights = copy / teacher.family.network / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pipeline(copy)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("beside", ["nothing", "another file"])
def test_pickled_weights_are_refused(whole: Path, tmp_path: Path, part: str, beside: str) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    (path,) = (copy / part).glob("*.safetensors")
    pickled = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(path), path.with_name(pickled))
    load_pipeline(copy)  # a pickle beside safetensors does no harm
    if beside == "nothing":
        path.unlink()
        said = rf"{part}/{pickled} is a pickle.*safetensors are accepted.*save_pretrained"
    else:
        path.rename(path.with_name("other.safetensors"))
        said = r"cannot be loaded: .* no file named .*model\.safetensors"
    with pytest.raises(UserError, match=said):
        load_pipeline(copy)


def edited(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


def without_a_weight(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "conv_in.weight"}, path)


def with_no_number(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"conv_out.bias": torch.full((tiny.CHANNELS,), torch.nan)}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "the tokenizer .* has 2 tokens"),
        (lambda f: edited(f / "model_index.json", unet=[None, None]), "has no unet"),
        (lambda f: edited(f / "model_index.json", tokenizer=[None, None]), "has no tokenizer"),
        (lambda f: edited(f / "unet/config.json", sample_size=None), "sample_size=None"),
        (lambda f: edited(f / "unet/config.json", sample_size=[8, 16]), r"sample_size=\[8, 16\]"),
        (without_a_weight, "lacks the weight unet.conv_in.weight"),
        (with_no_number, "unet.conv_out.bias in .* holds numbers that are none"),
        *(
            (lambda f, v=v: edited(f / "scheduler/scheduler_config.json", **v), message)
            for v, message in (
                ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
                ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
                ({"trained_betas": [0.1] * 1000}, "trained_betas"),
                ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2'"),
            )
        ),
    ],
)
def test_what_loads_and_is_no_teacher_is_named(
    whole: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    spoil(copy)
    with pytest.raises(UserError, match=message):
        load_pipeline(copy)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.score_folder(tmp_path_factory.mktemp("whole") / "model")
