"""The doctor's figures against measured ones: real networks, real optimizers, real iterations."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from flashdmd import config
from flashdmd.doctor.advice import advice, count, gb, table
from flashdmd.doctor.estimate import GB, Estimate, Networks, Plan, Row, estimate
from flashdmd.errors import UserError
from flashdmd.memory import held, peak_memory
from flashdmd.models import meta, passes
from flashdmd.models.backbones import EfficientNetLite
from flashdmd.models.recompute import running
from flashdmd.optimizers import make_optimizer
from flashdmd.session import open_session

UNET = {
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
}
BLOCKS = {"attention_head_dim": 16, "num_attention_heads": 4, "sample_size": 8}
DENOISERS = {
    "sd-1.5": lambda: UNet2DConditionModel(**UNET),
    "sdxl": lambda: UNet2DConditionModel(
        **UNET,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    ),
    "sd3": lambda: SD3Transformer2DModel(
        **BLOCKS,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    ),
    "flux": lambda: FluxTransformer2DModel(
        attention_head_dim=16,
        num_attention_heads=4,
        num_layers=1,
        num_single_layers=1,
        in_channels=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    ),
    "pixart": lambda: PixArtTransformer2DModel(
        **BLOCKS,
        num_layers=1,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=64,
        caption_channels=32,
        use_additional_conditions=False,
    ),
}
BACKBONE = meta.backbone("efficientnet-lite0")
VAE = tiny.vae().to("meta").requires_grad_(False)
SIZES = {  # published, or the sum over the published weights' index
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
    "stabilityai/stable-diffusion-2-1": 865_910_724,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "stabilityai/stable-diffusion-3-medium-diffusers": 2_028_328_000,
    "stabilityai/stable-diffusion-3.5-medium": 2_243_171_520,
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "black-forest-labs/FLUX.1-schnell": 11_891_178_560,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": 610_856_096,
}
CLIP_L, CLIP_G, T5 = 123_060_480, 694_659_840, 4_762_310_656


@pytest.mark.parametrize("name", SIZES)
def test_known_pipelines_have_their_published_sizes(name: str) -> None:
    parts = meta.parts_of(name)
    assert meta.numbers(parts.denoiser) == SIZES[name]
    assert all(p.is_meta for p in (*parts.denoiser.parameters(), *parts.denoiser.buffers()))


def test_known_text_encoders_and_backbones_have_their_published_sizes() -> None:
    sdxl = meta.parts_of("stabilityai/stable-diffusion-xl-base-1.0")
    assert [*map(meta.numbers, sdxl.text_encoders.values())] == [CLIP_L, CLIP_G]
    assert (meta.numbers(sdxl.vae), sdxl.resolution, sdxl.factor) == (83_653_863, 1024, 8)
    flux = meta.parts_of("black-forest-labs/FLUX.1-dev")
    assert [*map(meta.numbers, flux.text_encoders.values())] == [CLIP_L, T5]
    assert flux.resolution == 1024
    for name, size in (("sam-vit-base", 88_883_456), ("dinov2-large", 304_366_592)):
        assert meta.numbers(meta.backbone(f"facebook/{name}")) == size


def test_every_known_part_belongs_to_something() -> None:
    used = {v for p in meta.table("pipelines").values() for k, v in p.items() if k != "class"}
    assert used | set(meta.table("backbones").values()) == set(meta.table("parts"))


@pytest.mark.parametrize("make", [tiny.score_folder, tiny.flow_folder])
def test_a_folder_gives_the_networks_that_loading_it_gives(make: object, tmp_path: Path) -> None:
    parts = meta.parts_of(str(make(tmp_path)))
    assert parts.resolution == 64
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert held(vae) == sum(p.numel() * 4 for p in parts.vae.parameters())
    assert {k: v.shape for k, v in vae.state_dict().items()} == {
        k: v.shape for k, v in parts.vae.state_dict().items()
    }
    assert len(parts.text_encoders) == (1 if make is tiny.score_folder else 3)


def test_no_weight_is_read(tmp_path: Path) -> None:
    tiny.score_folder(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert meta.numbers(meta.parts_of(str(tmp_path)).denoiser) > 0


def test_a_pipeline_in_the_hubs_cache_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "models--someone--something"
    tiny.score_folder(home / "snapshots/abc")
    (home / "refs").mkdir()
    (home / "refs/main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert meta.numbers(meta.parts_of("someone/something").denoiser) > 0


@pytest.mark.parametrize("name", ["nowhere/nothing", "not a name at all!", "no-such-folder"])
def test_what_is_not_there_is_said_with_what_is_known(name: str) -> None:
    with pytest.raises(UserError, match="stable-diffusion-xl-base"):
        meta.parts_of(name)


def test_a_broken_folder_is_said(tmp_path: Path) -> None:
    tiny.score_folder(tmp_path)
    (tmp_path / "unet/config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        meta.parts_of(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    with pytest.raises(UserError, match="no unet or transformer"):
        meta.parts_of(str(tmp_path))


def shapes(network: nn.Module) -> nn.Module:
    """A copy of no numbers."""
    return copy.deepcopy(network).to("meta").requires_grad_(False)


def networks_with(denoiser: nn.Module) -> Networks:
    return Networks(meta.Parts("tiny", shapes(denoiser), VAE, {}), BACKBONE)


def saved_bytes(network: nn.Module, batch: int, half: bool) -> int:
    """What autograd itself says that it saves, and that is no parameter; storages once."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    saved: dict[int, tuple[Tensor, int]] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = t, storage.nbytes()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        passes.feed(network, batch, 8)
    return sum(size for _, size in saved.values())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", DENOISERS)
def test_a_pass_on_no_numbers_holds_what_a_real_one_holds(kind: str, half: bool) -> None:
    torch.manual_seed(0)
    real = DENOISERS[kind]().requires_grad_(True)
    found = passes.denoiser_pass(shapes(real), 8, torch.float32, half, "cpu")
    for batch in (1, 3):
        kept, peak = passes.measure(partial(passes.feed, real, batch, 8), real, half)
        assert found.keeps(batch) == pytest.approx(kept, rel=0.01)
        assert found.holds(batch) == pytest.approx(peak, rel=0.01)
        # the inputs live beside what is saved of them
        assert kept == pytest.approx(saved_bytes(real, batch, half), rel=0.1)


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_checkpointing_and_adapters_are_seen_in_a_pass(kind: str) -> None:
    torch.manual_seed(0)
    network = DENOISERS[kind]()
    bare = shapes(network)
    full = passes.denoiser_pass(bare, 8, torch.float32, True, "cpu")
    lora = passes.denoiser_pass(bare, 8, torch.bfloat16, True, "cpu", rank=4)
    less = passes.denoiser_pass(bare, 8, torch.bfloat16, True, "cpu", checkpointing=True, rank=4)
    assert less.keeps(4) < 0.5 * lora.keeps(4) < 0.5 * full.keeps(4)

    real = passes.adapted(network, 4, (), torch.bfloat16)
    real.enable_gradient_checkpointing()
    kept, peak = passes.measure(lambda: passes.feed(real, 4, 8), real, True)
    assert less.keeps(4) == pytest.approx(kept, rel=0.01)
    assert less.holds(4) == pytest.approx(peak, rel=0.05)


def test_a_decoder_and_a_discriminator_are_measured_as_real_ones() -> None:
    vae = tiny.vae().requires_grad_(False)
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    real = passes.measure(lambda: vae.decode(latents).sample, vae, False)
    found = passes.decoder_pass(VAE, 8, False, "cpu")
    assert (found.keeps(2), found.holds(2)) == pytest.approx(real, rel=0.01)

    seeing = EfficientNetLite(0)
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    real = passes.measure(
        lambda: torch.cat([m.mean((2, 3)) for m in seeing(images)], 1), seeing, False
    )
    found = passes.discriminator_pass(BACKBONE, 64, 4, False, "cpu", learns=False)
    assert found.keeps(2) == pytest.approx(real[0], rel=0.05)  # and the heads, which are small


def test_a_gpus_norms_run_in_float32() -> None:
    """Under autocast a group norm keeps its input in float32 there, and in bf16 here."""
    bare = shapes(DENOISERS["sd3"]())
    here = passes.denoiser_pass(bare, 8, torch.float32, True, "cpu")
    there = passes.denoiser_pass(bare, 8, torch.float32, True, "cuda")
    assert 1.1 * here.kept[1] < there.kept[1] < 2 * here.kept[1]
    in_full = passes.denoiser_pass(bare, 8, torch.float32, False, "cuda")
    assert in_full == passes.denoiser_pass(bare, 8, torch.float32, False, "cpu")


def test_graphs_share_the_weights_copies_of_autocast() -> None:
    found = passes.Pass((100, 10), (130, 11))
    assert found.keeps(4) == 140
    assert found.keeps(4, graphs=2) == 180
    assert found.keeps(4, graphs=2, casts=2) == 280
    assert found.works(4) == 34


def by_role(found: Estimate) -> dict[str, Row]:
    return {row.role: row for row in found.rows}


def session_in(folder: Path, make: object, *overrides: str) -> object:
    make(folder / "teacher")
    (folder / "recipe.yaml").write_text("{}")
    fixed = (
        f"model.pretrained_model_name_or_path={folder / 'teacher'}",
        "model.reward_model_name_or_path=null",
        "train.joint_train_steps=0",
        "train.train_batch_size=4",
        "method.gan_gradient_ratio=null",
        f"output_dir={folder / 'run'}",
    )
    return open_session(config.load(folder / "recipe.yaml", [*fixed, *overrides]))


STEPS = "method.student_timesteps=[1000, 750, 500, 250]"


@pytest.mark.parametrize(
    ("make", "overrides", "most"),
    [
        (tiny.score_folder, (), 1.15),
        # the doctor counts a prompt's padding, which this family computes once
        (tiny.flow_folder, (STEPS,), 1.6),
    ],
    ids=["score", "flow"],
)
def test_a_run_needs_what_was_foretold(
    make: object, overrides: tuple[str, ...], most: float, tmp_path: Path
) -> None:
    session = session_in(tmp_path, make, *overrides)
    trainer = session.trainer("distill")
    trainer.iterate()  # now every optimizer has its moments

    networks = Networks(meta.parts_of(str(tmp_path / "teacher")), BACKBONE)
    plan = Plan(
        train_batch_size=4, preference_batch_size=4, joint_train_steps=0,
        vae_precision="fp32", device="cpu",
    )  # fmt: skip
    found = estimate(networks, plan)
    row = by_role(found)

    learners, components = session.learners, session.teacher.pipeline.components
    texts = [v for k, v in components.items() if k.startswith("text_encoder") and v is not None]
    for role, network in {
        "teacher": session.teacher.denoiser,
        "student": session.generator,
        "score estimator": session.score,
        "averaged student": session.student,
        "backbone": session.discriminator.backbone,
        "heads": session.discriminator.heads,
        "autoencoder": session.teacher.pipeline.vae,
    }.items():
        assert row[role].weights == held(network), role
    for role, name in (
        ("student", "generator"),
        ("score estimator", "score"),
        ("heads", "discriminator"),
    ):
        assert row[role].moments == held(learners[name].optimizer), role
    encoders = sum(r.weights for r in found.rows if r.role.startswith("text"))
    assert encoders == pytest.approx(sum(map(held, texts)), rel=0.001)  # positions are one buffer

    optimizers = [learners[name].optimizer for name in ("generator", "score", "discriminator")]
    everything = [
        session.teacher.denoiser, session.generator, session.score, session.student,
        session.discriminator, session.teacher.pipeline.vae, *texts, *optimizers,
    ]  # fmt: skip
    trainer.iterate()  # without the generator
    measured = peak_memory(trainer.iterate, everything)  # with it
    assert measured <= found.peak
    adds = sum(found.updates[found.fullest])
    assert adds < most * (measured - held(*everything))


@pytest.mark.parametrize(
    ("kind", "base"),
    [("sd-1.5", "none"), ("sdxl", "none"), ("sd3", "none"), ("sd3", "int8"), ("sdxl", "nf4")],
)
def test_lora_holds_what_was_foretold(kind: str, base: str) -> None:
    if base != "none":
        pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[base])
    from flashdmd.models.quantise import quantise_base

    torch.manual_seed(0)
    network = DENOISERS[kind]()
    plan = Plan(rank=4, quantize_base=base, frozen_dtype="bf16", device="cpu", train_batch_size=2)
    found = by_role(estimate(networks_with(network), plan))

    real = passes.adapted(network, 0, (), torch.bfloat16).requires_grad_(False)
    for buffer_owner in real.modules():
        for name, b in buffer_owner._buffers.items():
            buffer_owner._buffers[name] = b.to(torch.bfloat16) if b.is_floating_point() else b
    quantise_base(real, base)
    assert found["base and teacher"].weights == pytest.approx(held(real), rel=0.02)

    before = held(real)
    meta.add_adapter(real, "student", 4)
    adapter = held(real) - before
    for role in ("student", "score estimator", "averaged student", "reference"):
        assert found[role].weights == adapter
    optimizer = make_optimizer((p for p in real.parameters() if p.requires_grad), 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        out = passes.feed(real, 2, 8)
    out.float().square().sum().backward()
    optimizer.step()
    assert found["score estimator"].moments == held(optimizer)
    assert found["student"].moments == 2 * held(optimizer)  # and those of its preferences
    assert found["score estimator"].gradients == adapter


def test_eight_bit_moments_and_a_checkpointed_run_are_smaller() -> None:
    networks = networks_with(DENOISERS["sdxl"]())
    plan = Plan(train_batch_size=4, preference_batch_size=4)
    full = estimate(networks, plan)
    assert by_role(estimate(networks, replace(plan, ema_decay=0.0))).keys() == by_role(
        full
    ).keys() - {"averaged student"}
    assert by_role(estimate(networks, replace(plan, joint_train_steps=0))).keys() == by_role(
        full
    ).keys() - {"reference"}
    packed = estimate(networks, replace(plan, use_8bit_adam=True))
    assert packed.weights == full.weights
    assert 0.25 < packed.moments / full.moments < 0.4  # small tensors stay as they are
    assert estimate(networks, replace(plan, gradient_checkpointing=True)).peak < full.peak


def test_dmd2_has_no_backbone_and_runs_through_the_score_estimator() -> None:
    networks = networks_with(DENOISERS["sd-1.5"]())
    found = estimate(networks, Plan(arm="dmd2", joint_train_steps=0, train_batch_size=4))
    assert "backbone" not in by_role(found)
    assert by_role(found)["heads"].numbers > 0
    assert found.updates.keys() == {"generator", "score"}


def test_advice_saves_what_it_says_and_ends_in_the_smallest_run() -> None:
    networks = networks_with(DENOISERS["sdxl"]())
    plan = Plan(train_batch_size=8, preference_batch_size=4, frozen_dtype="bf16")
    first, *steps = advice(networks, plan)
    assert gb(estimate(networks, plan).peak) in first
    assert "generator update" in first

    assert steps[0].startswith("train.gradient_checkpointing=true")
    then = replace(plan, gradient_checkpointing=True)
    saved = estimate(networks, plan).peak - estimate(networks, then).peak
    assert f": {gb(saved)} less, {gb(estimate(networks, then).peak)}" in steps[0]
    assert steps[1].startswith("train.gradient_accumulation_steps=4:")
    assert any(line.startswith("lora.rank=64") for line in steps)


def test_advice_does_not_repeat_what_is_done() -> None:
    networks = networks_with(DENOISERS["sdxl"]())
    done = Plan(
        train_batch_size=4, preference_batch_size=4, gradient_accumulation_steps=4, device="cpu",
        gradient_checkpointing=True, use_8bit_adam=True, ema_decay=0.0, frozen_dtype="bf16",
        rank=4, quantize_base="nf4", crop=4, cache_text_embeddings=True,
    )  # fmt: skip
    assert len(list(advice(networks, done))) == 1


def test_cards_are_those_that_hold_the_peak_with_some_room() -> None:
    def of(peak: float) -> Estimate:
        return Estimate(Plan(), (Row("teacher", "UNet", 1, round(peak * GB)),), {"score": (0, 0)})

    assert of(7).cards[0] == 12  # not 8: the allocator's waste, and CUDA itself
    assert of(6.5).cards[0] == 8
    assert of(75).cards == [80, 141]
    assert of(77).cards == [141]
    assert of(140).cards == []


def test_the_table_names_sizes_and_cards() -> None:
    rows = (
        Row("teacher", "UNet2DConditionModel", 2_567_463_684, 5 * GB),
        Row("student", "UNet2DConditionModel", 2_028_328_000, 10 * GB, GB, 20 * GB, 3 * GB),
    )
    text = table(Estimate(Plan(), rows, {"score": (GB, 2 * GB), "generator": (0, GB)}, ("So.",)))
    for word in ("2.57 B", "2.03 B", "15.0 GB", "20.0 GB", "38.0 GB", "score update", "So."):
        assert word in text
    assert "40 no, 48 yes" in text
    assert (count(859_520_964), count(999), gb(512), gb(0)) == ("859.52 M", "999", "0.5 KB", "-")


def test_a_class_that_cannot_be_run_is_said_and_its_weights_are_counted() -> None:
    class Other(UNet2DConditionModel):
        def forward(self, sample: Tensor, timestep: Tensor, mystery: Tensor) -> Tensor:
            raise AssertionError

    other = Other(**UNET)
    found = estimate(networks_with(other), Plan(train_batch_size=4))
    assert by_role(found)["student"].weights == held(other)
    assert "mystery" in found.notes[0]
    assert "Other" in found.notes[0]


def test_stored_bytes_are_read_from_headers(tmp_path: Path) -> None:
    vae = tiny.vae()
    vae.save_pretrained(tmp_path)
    assert meta.stored_bytes(tmp_path) == held(vae)
    assert meta.stored_bytes(tmp_path / "none") == 0


@pytest.mark.parametrize("name", ["facebook/dinov2-small", "facebook/sam-vit-base"])
def test_vision_transformers_see_as_maps(name: str) -> None:
    backbone = meta.backbone(name)
    maps = backbone(torch.empty(2, 3, 224, 224, device="meta"))
    width = {"facebook/dinov2-small": 384, "facebook/sam-vit-base": 768}[name]
    side = {"facebook/dinov2-small": 16, "facebook/sam-vit-base": 14}[name]
    assert [tuple(m.shape) for m in maps] == [(2, width, side, side)] * 4


def test_an_unknown_backbone_is_said() -> None:
    with pytest.raises(UserError, match="dinov2-large"):
        meta.backbone("facebook/nothing")


@pytest.mark.slow
def test_sdxl_is_looked_at_as_a_whole() -> None:
    networks = Networks(
        meta.parts_of("stabilityai/stable-diffusion-xl-base-1.0"),
        meta.backbone("efficientnet-lite0"),
    )
    found = estimate(networks, Plan(gradient_checkpointing=True, gradient_accumulation_steps=32))
    assert "2.57 B" in table(found)
    assert by_role(found)["student"].weights == 4 * 2_567_463_684
    assert json.dumps(found.updates)
    assert 100 * GB < found.peak < 200 * GB


def test_a_pass_that_fails_leaves_no_context_behind() -> None:
    """Else whatever is computed again afterwards would run as the doctor's passes do."""

    def fail() -> Tensor:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        passes.measure(fail, torch.nn.Linear(1, 1), half=True)
    assert running.get() is nullcontext
