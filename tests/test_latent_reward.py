"""The latent reward models of the real families, against the stock networks they are cut from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import networks
import pytest
import tiny_reward
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_reward import PROMPTS, residuals, stirred
from torch import Tensor

from flashdmd.algorithm import split
from flashdmd.errors import UserError
from flashdmd.models.latent_reward import (
    KINDS,
    NETWORKS,
    Facts,
    build,
    load,
    network_of,
    open_base,
    write,
)
from flashdmd.models.reward_mmdit import EarlyBlocks
from flashdmd.models.reward_unet import EncoderHalf
from flashdmd.models.teacher import load_pipeline
from flashdmd.reward import GUIDANCE
from flashdmd.sampler import repeat
from flashdmd.schedule import Process, RectifiedFlow, VariancePreserving

VP, FLOW = Process(VariancePreserving(), "eps"), Process(RectifiedFlow(), "flow")
T = torch.tensor([1.0, 501.0, 951.0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: tiny_reward.folder_of(kind, root / kind) for kind in tiny_reward.KINDS}


def pipeline_of(folder: Path) -> DiffusionPipeline:
    """Opened as the module does, and with no weight left at 0 or 1."""
    torch.manual_seed(1)
    pipeline = open_base(str(folder))
    stirred(pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer)
    return pipeline


def process_of(kind: str) -> Process:
    return FLOW if kind == "sd3" else VP


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_trunk_of_sd_sees_down_residuals_2_5_8_11_and_the_middle(
    folders: dict[str, Path],
) -> None:
    unet = pipeline_of(folders["sd"]).unet
    x, words = torch.randn(3, 4, 8, 8), torch.randn(3, 24, 32)
    down, middle = residuals(unet, sample=x, timestep=T, encoder_hidden_states=words)
    trunk = EncoderHalf(unet)
    close(trunk(x, T, words), [*(down[i] for i in (2, 5, 8, 11)), middle])
    assert trunk.channels == [8, 16, 24, 24, 24]


def test_the_trunk_of_sdxl_sees_down_residuals_2_5_8_and_the_middle_at_the_pictures_size(
    folders: dict[str, Path],
) -> None:
    unet = pipeline_of(folders["sdxl"]).unet
    x, words, pooled = torch.randn(3, 4, 8, 4), torch.randn(3, 24, 64), torch.randn(3, 24)
    added = {
        "text_embeds": pooled,
        "time_ids": torch.tensor([[64.0, 32, 0, 0, 64, 32]]).expand(3, 6),
    }
    call = {"sample": x, "timestep": T, "encoder_hidden_states": words}
    down, middle = residuals(unet, added_cond_kwargs=added, **call)
    ours = EncoderHalf(unet, pixels=8)(x, T, words, pooled)
    close(ours, [*(down[i] for i in (2, 5, 8)), middle])
    larger = EncoderHalf(unet, pixels=16)(x, T, words, pooled)
    assert (larger[0] - ours[0]).abs().max() > 1e-3


def test_the_trunk_of_sd3_sees_the_image_tokens_after_three_quarters_of_the_blocks(
    folders: dict[str, Path],
) -> None:
    transformer = pipeline_of(folders["sd3"]).transformer
    seen: list[Tensor] = []
    hook = transformer.transformer_blocks[2].register_forward_hook(
        lambda _, __, out: seen.append(out[1])
    )
    x, words, pooled = torch.randn(3, 4, 8, 4), torch.randn(3, 30, 80), torch.randn(3, 56)
    transformer(x, words, pooled, T)
    hook.remove()
    trunk = EarlyBlocks(transformer)
    (ours,) = trunk(x, T, words, pooled)
    assert ours.shape == (3, 32, 4, 2)
    torch.testing.assert_close(ours.flatten(2).transpose(1, 2), seen[0])
    assert len(trunk.transformer_blocks) == 3
    assert len(EarlyBlocks(transformer, depth=1).transformer_blocks) == 1


SIZES = {  # the published configs, as far as they decide a shape here
    "StableDiffusionPipeline": ({"cross_attention_dim": 768}, (768, 4800)),
    "StableDiffusionXLPipeline": (
        {
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (1280, 3520),
    ),
    "StableDiffusion3Pipeline": (
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        (2048, 1536),
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_at_the_published_sizes_the_projection_has_lpos_shape(name: str) -> None:
    """4800 -> 768, 3520 -> 1280; of SD3 the tokens after block 18, 1536 wide, to both CLIPs'."""
    config, shape = SIZES[name]
    with torch.device("meta"):
        whole = NETWORKS[KINDS[name].network](**config)
        reward = network_of(whole, Facts(name, "base", True, dict(whole.config), 8, {}))
    assert tuple(reward.visual.weight.shape) == shape
    if name == "StableDiffusion3Pipeline":
        assert len(reward.trunk.transformer_blocks) == 18


def stock_prompts(kind: str, pipeline: DiffusionPipeline, prompts: list[str]) -> list[Tensor]:
    """(tokens, pooled) of the pipeline's own encode_prompt."""
    if kind == "sd":
        tokens = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        read = pipeline.tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        )
        return [tokens, pipeline.text_encoder(read.input_ids).pooler_output]
    if kind == "sdxl":
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompts, device="cpu", do_classifier_free_guidance=False
        )
        return [tokens, pooled]
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, device="cpu", do_classifier_free_guidance=False
    )
    return [tokens, pooled]


@pytest.mark.parametrize("kind", tiny_reward.KINDS)
def test_prompts_are_read_as_the_pipeline_reads_them(kind: str, folders: dict[str, Path]) -> None:
    pipeline = pipeline_of(folders[kind])
    cond = build(pipeline, "base").encode_prompts(PROMPTS)
    tokens, pooled = stock_prompts(kind, pipeline, PROMPTS)
    no_tokens, no_pooled = stock_prompts(kind, pipeline, [""] * 3)
    torch.testing.assert_close(cond["tokens"], tokens)
    torch.testing.assert_close(cond["pooled"], pooled)
    torch.testing.assert_close(cond["no_tokens"], no_tokens)
    if kind != "sd":
        torch.testing.assert_close(cond["no_pooled"], no_pooled)
    assert (tokens[0] - tokens[1]).abs().max() > 0.1
    assert (pooled[0] - pooled[1]).abs().max() > 0.01


def test_sd3_without_its_t5_reads_prompts_as_the_pipeline_does(tmp_path: Path) -> None:
    pipeline = open_base(str(tiny_reward.sd3(tmp_path / "two", with_t5=False)))
    tokens, pooled = stock_prompts("sd3", pipeline, PROMPTS)
    cond = build(pipeline, "base").encode_prompts(PROMPTS)
    torch.testing.assert_close(cond["tokens"], tokens)
    torch.testing.assert_close(cond["pooled"], pooled)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_score_is_the_formula_on_the_stock_unets_own_maps(
    kind: str, folders: dict[str, Path]
) -> None:
    """V = W [averages with the prompt; u + 7.5 (c - u) of the middle], T = pooled or P pooled."""
    pipeline = pipeline_of(folders[kind])
    reward = build(pipeline, "base")
    if kind == "sd":
        stirred(reward.network.text)
    x = torch.randn(3, 4, 8, 8)

    def averages(prompts: list[str]) -> tuple[list[Tensor], Tensor, Tensor]:
        tokens, pooled = stock_prompts(kind, pipeline, prompts)
        call = {"sample": x, "timestep": T, "encoder_hidden_states": tokens}
        if kind == "sdxl":
            sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(3, 6)
            call["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        down, middle = residuals(pipeline.unet, **call)
        maps = [down[i] for i in (2, 5, 8, 11) if i < len(down)]
        return [m.mean((2, 3)) for m in maps], middle.mean((2, 3)), pooled

    levels, conditional, pooled = averages(PROMPTS)
    _, unconditional, _ = averages([""] * 3)
    middle = unconditional + 7.5 * (conditional - unconditional)
    v = torch.cat([*levels, middle], dim=1) @ reward.network.visual.weight.T
    words = pooled @ reward.network.text.weight.T if kind == "sd" else pooled
    cosine = (v * words).sum(1) / v.norm(dim=1) / words.norm(dim=1)
    torch.testing.assert_close(
        reward(x, T, reward.encode_prompts(PROMPTS)), 14.2848 * cosine, atol=1e-4, rtol=1e-4
    )
    assert GUIDANCE == 7.5
    assert ("text.weight" in reward.network.state_dict()) == (kind == "sd")
    assert list(reward.network.visual.weight.shape) == ([32, 96] if kind == "sd" else [24, 72])


@pytest.mark.parametrize("kind", tiny_reward.KINDS)
def test_a_batch_may_be_permuted_and_repeated(kind: str, folders: dict[str, Path]) -> None:
    reward = build(pipeline_of(folders[kind]), "base")
    cond, x, order = reward.encode_prompts(PROMPTS), torch.randn(3, 4, 8, 8), [2, 0, 1]
    with torch.no_grad():
        scores = reward(x, T, cond)
        permuted = reward(x[order], T[order], {k: v[order] for k, v in cond.items()})
        repeated = reward(x.repeat(2, 1, 1, 1), T.repeat(2), repeat(cond, 2))
        for other in (T.flip(0), T + 40):
            assert (reward(x, other, cond) - scores).abs().max() > 1e-4
    torch.testing.assert_close(permuted, scores[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(repeated, scores.repeat(2), atol=1e-4, rtol=1e-4)
    assert scores.std() > 1e-3


def test_each_time_of_its_own_process_is_itself(folders: dict[str, Path]) -> None:
    """All 1000: what stage 2 asks of a teacher on the trunk's own betas is not moved."""
    reward = build(pipeline_of(folders["sd"]), "base")
    asked: list[Tensor] = []
    reward.network.forward = lambda x, t, cond: asked.extend((x, t)) or t  # type: ignore
    x, t = torch.randn(1000, 4, 1, 1), torch.arange(1000).float()
    reward(x, t, {})
    torch.testing.assert_close(asked[0], x)
    assert torch.equal(asked[1], t)


def test_a_flows_latents_are_scored_as_those_of_the_trunks_process(
    folders: dict[str, Path],
) -> None:
    reward = build(pipeline_of(folders["sdxl"]), "base")
    x0, eps = torch.randn(2, 3, 4, 8, 8)
    alpha, sigma = VP.schedule(T)
    cond, flow_t = reward.encode_prompts(PROMPTS), 1000 * sigma / (alpha + sigma)
    with torch.no_grad():
        expected = reward(VP.add_noise(x0, eps, T), T, cond)
        reward.process = FLOW
        scores = reward(FLOW.add_noise(x0, eps, flow_t), flow_t, cond)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", tiny_reward.KINDS)
def test_what_is_recomputed_has_the_same_gradients(kind: str, folders: dict[str, Path]) -> None:
    reward = build(pipeline_of(folders[kind]), "base")
    reward.learned().train()
    x = torch.randn(3, 4, 8, 8)

    def gradients() -> dict[str, Tensor]:
        reward.zero_grad()
        reward.network(x, T, reward.words(PROMPTS)).square().sum().backward()
        return {k: p.grad.clone() for k, p in reward.named_parameters() if p.grad is not None}

    def saved() -> tuple[int, int]:
        return elements_of(lambda: reward.network(x, T, reward.encode_prompts(PROMPTS))), (
            elements_of(lambda: reward.words(PROMPTS))
        )

    kept, before = gradients(), saved()
    reward.save_memory()
    again, after = gradients(), saved()
    assert kept.keys() == again.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-5, rtol=1e-4)
    assert after[0] < 0.8 * before[0]
    assert after[1] < 0.8 * before[1] or kind == "sd3"
    taught = {k.split(".")[0] for k in kept}
    assert taught == ({"network"} if kind == "sd3" else {"network", "words"})


def elements_of(forward: Callable[[], object]) -> int:
    """How many the graph of a forward holds."""
    sizes: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        forward()
    return sum(sizes)


def test_training_does_not_change_the_pipeline_it_was_built_from(
    folders: dict[str, Path],
) -> None:
    pipeline = pipeline_of(folders["sdxl"])
    parts = [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]
    before = [p.clone() for part in parts for p in part.parameters()]
    stirred(build(pipeline, "base").learned())
    assert all(map(torch.equal, before, [p for part in parts for p in part.parameters()]))


@pytest.mark.parametrize("learns_words", [None, False])
@pytest.mark.parametrize("kind", tiny_reward.KINDS)
def test_a_reward_is_read_as_it_was_written(
    kind: str, learns_words: bool | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Into a moved tree: what is not in its folder is found beside it."""
    base = tmp_path / "runs/base"
    shutil.copytree(folders[kind], base)
    reward = build(pipeline_of(base), str(base), learns_words)
    stirred(reward.learned())
    write(reward, tmp_path / "runs/reward")
    (tmp_path / "runs").rename(tmp_path / "moved")
    vae = AutoencoderKL.from_pretrained(tmp_path / "moved/base/vae")
    loaded = load(tmp_path / "moved/reward", process_of(kind), vae)
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        scores = loaded(x, T, loaded.encode_prompts(PROMPTS))
        torch.testing.assert_close(scores, reward(x, T, reward.encode_prompts(PROMPTS)))
    state = reward.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert loaded.state_dict().keys() == state.keys()
    assert not any(p.requires_grad for p in loaded.parameters())
    assert str(tmp_path) not in (tmp_path / "moved/reward/config.json").read_text()
    if reward.facts.learns_words:
        shutil.rmtree(tmp_path / "moved/base")
        load(tmp_path / "moved/reward", process_of(kind), vae)
        return
    base_again = open_base(loaded.facts.base)
    shared = load(tmp_path / "moved/reward", process_of(kind), vae, encoders_of=base_again)
    assert shared.words.encoders[0] is base_again.text_encoder
    with torch.no_grad():
        torch.testing.assert_close(shared(x, T, shared.encode_prompts(PROMPTS)), scores)
    write(loaded, tmp_path / "elsewhere/reward")
    load(tmp_path / "elsewhere/reward", process_of(kind), vae)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_stage_2_may_ask_it(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The candidates of a real teacher's walk, best and worst by this reward."""
    write(build(pipeline_of(folders[kind]), str(folders[kind])), tmp_path / "reward")
    teacher = load_pipeline(folders[kind])
    reward = load(tmp_path / "reward", teacher.process, teacher.pipeline.vae)
    steps = teacher.default_steps
    generator = teacher.denoiser.twin("student").requires_grad_(True)
    algorithm = networks.flash(
        teacher.process,
        split(steps),
        generator=generator,
        reference=teacher.denoiser,
        reward=reward,
    )
    noise, cond = torch.randn(3, *teacher.latent_shape), teacher.encode_prompts(PROMPTS)
    reward_cond = reward.encode_prompts(PROMPTS)
    loss = algorithm.preference_loss(noise, cond, reward_cond)
    assert loss.watch["reward/best"] > loss.watch["reward/worst"] + 0.01
    loss.terms["preference"].backward()
    assert networks.has_gradient(generator)


def test_half_precision_scores_nearly_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    reward = build(pipeline_of(folders["sdxl"]), str(folders["sdxl"]))
    write(reward, tmp_path / "reward")
    vae = AutoencoderKL.from_pretrained(folders["sdxl"] / "vae")
    half = load(tmp_path / "reward", VP, vae, dtype=torch.float16)
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        expected = reward(x, T, reward.encode_prompts(PROMPTS))
        scores = half(x, T, half.encode_prompts(PROMPTS))
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=0.05, rtol=0)  # of up to 14


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_other_latents_are_refused(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    write(build(pipeline_of(folders[kind]), str(folders[kind])), tmp_path / "reward")
    vae = AutoencoderKL.from_pretrained(folders[kind] / "vae")
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2)
    load(tmp_path / "reward", process_of(kind), vae)
    if kind == "sd3":
        with pytest.raises(UserError, match="of a flow and this teacher is not"):
            load(tmp_path / "reward", VP, vae)
    vae.register_to_config(shift_factor=0.5)
    with pytest.raises(UserError, match=r"are of .*0\.5"):
        load(tmp_path / "reward", process_of(kind), vae)
    vae.register_to_config(scaling_factor=0.13)
    with pytest.raises(UserError, match=r"scores latents of .*0\.7.* are of .*0\.13"):
        load(tmp_path / "reward", process_of(kind), vae)


def test_the_text_projection_of_a_whole_clip_may_be_the_start(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    weight = torch.randn(32, 32)
    save_file({"text_projection.weight": weight}, tmp_path / "clip.safetensors")
    pipeline = pipeline_of(folders["sd"])
    given = build(pipeline, "base", text_projection=tmp_path / "clip.safetensors")
    assert torch.equal(given.network.text.weight, weight)
    assert torch.equal(build(pipeline, "base").network.text.weight, torch.eye(32))
    save_file({"text_projection.weight": weight[:, :5].clone()}, tmp_path / "other.safetensors")
    for kind, name in (("sd", "other"), ("sd", "none"), ("sdxl", "clip")):
        base = pipeline_of(folders[kind])
        with pytest.raises(UserError, match=r"holds no text_projection\.weight for this"):
            build(base, "base", text_projection=tmp_path / f"{name}.safetensors")


def test_what_is_no_base_or_no_reward_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pipeline, a folder with model_index"):
        open_base(str(tmp_path))
    with pytest.raises(UserError, match="no pipeline, a folder with model_index"):
        open_base(str(tmp_path / "gone"))
    index = {"_class_name": "FluxPipeline", "_diffusers_version": "0.42.1"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is a FluxPipeline; latent reward models are of Stable"):
        open_base(str(tmp_path))
    vae = AutoencoderKL.from_pretrained(folders["sd"] / "vae")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path, VP, vae)
    write(build(pipeline_of(folders["sd"]), "base"), tmp_path / "reward")
    state = load_file(tmp_path / "reward/model.safetensors")
    state.pop("visual.weight")
    save_file(state, tmp_path / "reward/model.safetensors")
    with pytest.raises(UserError, match=r"(?s)cannot be read .*visual\.weight"):
        load(tmp_path / "reward", VP, vae)


def test_a_unet_that_is_fed_what_nothing_here_gives_is_refused() -> None:
    unet = tiny_reward.unet(xl=False)
    unet.class_embedding = torch.nn.Embedding(3, 32)
    with pytest.raises(UserError, match="class_embedding cannot be the trunk"):
        EncoderHalf(unet)
