"""`flashdmd export`: stock diffusers loads what is written, and draws the student's picture."""

from pathlib import Path
from typing import Any

import pytest
import tiny_export
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flashdmd import export
from flashdmd.algorithm import Method, split
from flashdmd.errors import UserError
from flashdmd.models.denoiser import Adapter, AdapterDenoiser, NetworkDenoiser
from flashdmd.models.lora_keys import FILE_NAME, merge
from flashdmd.models.teacher import Pipeline, Teacher, load_pipeline
from flashdmd.publish import export_run

KINDS = ("sd1", "sdxl", "sd3", "flux")
SIDE = 4 * tiny_export.SIDE  # pixels
PROMPT = "fluent emoji of a strawberry"
GUIDANCE = 3.0  # FLUX dev is told it


def disturbed(student: NetworkDenoiser, std: float) -> NetworkDenoiser:
    with torch.no_grad():
        for p in student.parameters():
            p.add_(std * torch.randn_like(p))
    return student


@pytest.fixture(scope="module", params=KINDS)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp(request.param) / "teacher"
    tiny_export.pipeline(request.param).save_pretrained(folder)
    loaded = load_pipeline(folder)
    loaded.resolution = SIDE
    return loaded


@pytest.fixture(scope="module")
def run_of_lora(teacher: Teacher) -> Path:
    """A run folder whose student is a LoRA, its scale not 1."""
    plain = load_pipeline(teacher.folder)
    d, adapter = plain.denoiser, Adapter(4, 2.0, plain.family.lora_layers)
    plain.denoiser = AdapterDenoiser(d.network, d.family, d.process, adapter)
    plain.resolution = SIDE
    student = disturbed(plain.denoiser.twin("student").requires_grad_(True), 0.2)
    return written(plain, student, teacher.folder.with_name("lora-run"))


@pytest.fixture(scope="module")
def run_of_full(teacher: Teacher) -> Path:
    student = disturbed(teacher.denoiser.twin("student").requires_grad_(True), 0.03)
    return written(teacher, student, teacher.folder.with_name("full-run"))


def written(teacher: Teacher, student: NetworkDenoiser, run: Path) -> Path:
    method = Method(**split(teacher.default_steps), teacher_guidance_scale=GUIDANCE)
    export.write_student(teacher, student, method, run / "student")
    return run


def plain_call(pipeline: Any, teacher: Teacher) -> Tensor:
    """The call of the card; flow schedulers draw from the generator that torch has."""
    torch.manual_seed(3)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline(
        PROMPT,
        height=SIDE,
        width=SIDE,
        num_inference_steps=4,
        guidance_scale=export.plain_guidance(teacher, GUIDANCE),
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images


def weights(pipeline: Any) -> dict[str, Tensor]:
    return tiny_export.network(pipeline).state_dict()


def test_the_formats_of_a_lora_hold_one_student(
    teacher: Teacher, run_of_lora: Path, tmp_path: Path
) -> None:
    base, network = weights(teacher.pipeline), teacher.family.network
    stored = load_file(run_of_lora / "student" / FILE_NAME)
    adapter = {k.removeprefix(f"{network}."): v for k, v in stored.items()}
    expected = merge(base, adapter)  # base + B A, the scale of 1/2 in B
    assert max((expected[k] - base[k]).abs().max() for k in base) > 0.01

    export_run(run_of_lora, "diffusers", tmp_path / "whole")
    whole = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    close(weights(whole), expected)
    picture = plain_call(whole, teacher)

    export_run(run_of_lora, "lora", tmp_path / "lora")
    stacked = DiffusionPipeline.from_pretrained(teacher.folder)
    stacked.load_lora_weights(tmp_path / "lora")
    stacked.scheduler = whole.scheduler
    torch.testing.assert_close(plain_call(stacked, teacher), picture, atol=1e-4, rtol=1e-4)
    stacked.fuse_lora()
    stacked.unload_lora_weights()
    close(weights(stacked), expected)
    untouched = DiffusionPipeline.from_pretrained(teacher.folder)
    untouched.scheduler = whole.scheduler
    assert (picture - plain_call(untouched, teacher)).std() > 0.01

    export_run(run_of_lora, "comfyui", tmp_path / "comfyui.safetensors")
    other = DiffusionPipeline.from_pretrained(teacher.folder)  # diffusers reads these names as well
    other.load_lora_weights(tmp_path / "comfyui.safetensors")
    other.fuse_lora()
    other.unload_lora_weights()
    close(weights(other), expected)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def test_the_scheduler_on_the_card_is_the_one_that_is_written(
    teacher: Teacher, run_of_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's own lines, run beside the base: a card does not tell whose home that is in."""
    monkeypatch.chdir(teacher.folder.parent)
    export_run(run_of_lora, "lora", tmp_path / "lora")
    export_run(run_of_lora, "diffusers", tmp_path / "whole")
    text = (tmp_path / "lora/README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace('"lora"', f'"{tmp_path / "lora"}"')
    names: dict[str, Any] = {}
    lines = [line for line in code.splitlines() if not line.startswith("image")]
    exec("\n".join(lines), names)
    ours = DiffusionPipeline.from_pretrained(tmp_path / "whole").scheduler
    grids = [teacher.family.grid(teacher.pipeline, s, 4) for s in (ours, names["pipe"].scheduler)]
    assert grids[0] == grids[1]


def test_a_full_fine_tuning_is_exported_whole_or_as_its_best_lora(
    teacher: Teacher, run_of_full: Path, tmp_path: Path
) -> None:
    _, lost = export_run(run_of_full, "diffusers", tmp_path / "whole", dtype="fp16")
    assert not lost
    half = load_file(next((tmp_path / "whole" / teacher.family.network).glob("*.safetensors")))
    assert {v.dtype for v in half.values()} == {torch.float16}
    _, lost = export_run(run_of_full, "lora", tmp_path / "lora", rank=2)
    assert "is not in this LoRA of rank 2" in lost
    stacked = DiffusionPipeline.from_pretrained(teacher.folder)
    stacked.load_lora_weights(tmp_path / "lora")
    stacked.fuse_lora()
    stacked.unload_lora_weights()
    tuned = weights(DiffusionPipeline.from_pretrained(run_of_full / "student"))
    base, got = weights(teacher.pipeline), weights(stacked)
    missed = sum((got[k] - tuned[k]).square().sum() for k in base)
    assert missed < sum((base[k] - tuned[k]).square().sum() for k in base)  # nearer than the base


def test_a_single_file_is_loaded_by_stock_diffusers(
    teacher: Teacher, run_of_full: Path, tmp_path: Path
) -> None:
    path, _ = export_run(run_of_full, "single-file", tmp_path / "student.safetensors")
    with safe_open(path, "pt") as file:
        assert any("diffusion_model." in name for name in file.keys())  # noqa: SIM118
    if teacher.family.network != "unet":
        return  # the readers of transformers know the published widths alone: test_single_file.py
    loaded = type(teacher.pipeline).from_single_file(path, config=str(teacher.folder))
    loaded.scheduler = DiffusionPipeline.from_pretrained(run_of_full / "student").scheduler
    whole = DiffusionPipeline.from_pretrained(run_of_full / "student")
    close(weights(loaded), weights(whole))
    pictures = [plain_call(p, teacher) for p in (loaded, whole)]
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=1e-4)


def test_a_teacher_may_have_a_lora_of_its_own(
    teacher: Teacher, run_of_lora: Path, tmp_path: Path
) -> None:
    styled = load_pipeline(
        Pipeline(str(teacher.folder), lora=str(run_of_lora / "student"), lora_scale=0.5)
    )
    network = teacher.family.network
    stored = load_file(run_of_lora / "student" / FILE_NAME)
    adapter = {k.removeprefix(f"{network}."): v for k, v in stored.items()}
    close(weights(styled.pipeline), merge(weights(teacher.pipeline), adapter, 0.5))


def test_what_cannot_be_exported_is_named(run_of_full: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for run, form, output, why in (
        (tmp_path, "lora", tmp_path / "x", "holds no student"),
        (run_of_full, "gguf", tmp_path / "x", "there are diffusers, lora, comfyui, single-file"),
        (run_of_full, "lora", tmp_path / "there", "is there already"),
        (run_of_full, "single-file", tmp_path / "x", "ends in .safetensors"),
    ):
        with pytest.raises(UserError, match=why):
            export_run(run, form, output)
