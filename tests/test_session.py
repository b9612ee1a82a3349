"""What a recipe becomes: guided teacher, reference, optimizers, pictures, prompts, precision."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from flashdmd import checkpoint
from flashdmd.algorithm import Loss
from flashdmd.config import Recipe
from flashdmd.emoji import reward as emoji_reward
from flashdmd.errors import UserError
from flashdmd.files import alone_in, cut_torn_line
from flashdmd.models.teacher import Teacher, load_pipeline
from flashdmd.session import Session, number_of, open_session, save

PROMPTS = ("a cat emoji", "a red apple", "fluent emoji of a sad dog", "two hearts", "a ship")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """The tiny teacher, and beside its folder an untrained reward with its words."""
    folder = tmp_path_factory.mktemp("session")
    loaded = load_pipeline(tiny.score_folder(folder / "teacher"))
    network = emoji_reward.build(loaded.denoiser.network)
    emoji_reward.write(network, folder / "reward", str(loaded.folder))
    return loaded


def session(
    teacher: Teacher,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    **sections: Any,
) -> Session:
    """A session of the recipe's defaults but for these."""
    models = {
        "pretrained_model_name_or_path": str(teacher.folder),
        "reward_model_name_or_path": str(teacher.folder.with_name("reward")),
    }
    small = {"train_batch_size": 3, "mixed_precision": "no"}
    content = {"model": models | (model or {}), "train": small | (train or {}), **sections}
    return open_session(Recipe.model_validate(content))


def weights(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def disturb(network: nn.Module) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize(
    ("before", "after"), [("a\nb\n", "a\nb\n"), ("a\nb", "a\n"), ("b", ""), ("", ""), (None, None)]
)
def test_a_torn_line_is_cut(before: str | None, after: str | None, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    if before is not None:
        log.write_text(before)
    cut_torn_line(log)
    assert (log.read_text() if log.exists() else None) == after


def test_a_folder_is_left_when_its_process_is_killed(tmp_path: Path) -> None:
    held = f"""
from pathlib import Path
from flashdmd.files import alone_in
with alone_in(Path({str(tmp_path)!r})):
    print("in", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", held], stdin=-1, stdout=-1) as other:
        assert other.stdout
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match="another process is writing to"), alone_in(tmp_path):
            pass
        other.kill()
    with alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_the_teacher_is_guided_as_the_recipe_says(teacher: Teacher) -> None:
    run = session(teacher, method={"teacher_guidance_scale": 3.5})
    disturb(run.generator)
    trainer = run.trainer("distill")
    x_t, t = torch.randn(2, *teacher.latent_shape), torch.tensor([249.0, 749.0])
    cond, nothing = teacher.encode_prompts(list(PROMPTS[:2])), teacher.encode_prompts(["", ""])
    with torch.no_grad():
        x_c, x_u = (teacher.denoiser(x_t, t, c) for c in (cond, nothing))
        ours = trainer.algorithm.teacher(x_t, t, cond)
    torch.testing.assert_close(ours, x_u + 3.5 * (x_c - x_u), atol=1e-4, rtol=1e-4)


def test_the_reference_is_the_student_of_stage_1_and_stays_it(teacher: Teacher) -> None:
    run = session(teacher, train={"preference_learning_rate": 1e-2}, method={"beta": 5.0})
    assert run.trainer("distill").algorithm.reference is None
    disturb(run.generator)  # stage 1
    trainer, start = run.trainer("joint"), weights(run.generator)
    reference = trainer.algorithm.reference
    assert equal(weights(reference), start)
    trainer.order = (("preference",),)
    trainer.iterate()
    assert not equal(weights(run.generator), start)
    assert equal(weights(reference), start)
    assert not any(p.requires_grad for p in reference.parameters())


def test_stage_2_goes_on_from_the_averaged_student(teacher: Teacher) -> None:
    run = session(teacher, train={"learning_rate": 1e-2, "ema_decay": 0.5})
    first = run.trainer("distill")
    first.iterate()
    first.iterate()
    first.iterate()  # the second generator update: the average is neither it nor the first
    left, last = weights(run.student), weights(run.generator)
    assert not equal(left, last)
    run.take_over()
    reference = run.trainer("joint").algorithm.reference
    assert equal(weights(run.generator), left)
    assert equal(weights(reference), left)


def test_without_averaging_the_student_is_the_generator(teacher: Teacher) -> None:
    run = session(teacher, train={"ema_decay": 0.0})
    assert run.student is run.generator
    assert "student" not in run.trainer("distill").networks()


def test_each_learner_has_a_rate_and_moments_of_its_own(teacher: Teacher) -> None:
    numbers = {
        "learning_rate": 1e-3,
        "fake_score_learning_rate": 2e-3,
        "discriminator_learning_rate": 3e-3,
        "preference_learning_rate": 4e-3,
        "adam_beta1": 0.5,
        "adam_beta2": 0.6,
        "adam_weight_decay": 0.07,
        "adam_epsilon": 1e-5,
        "max_grad_norm": 8.0,
        "discriminator_max_grad_norm": 7.0,
        "preference_max_grad_norm": 6.0,
        "lr_warmup_steps": 9,
    }
    run = session(teacher, train=numbers)
    networks = {
        "generator": (run.generator, 1e-3, 8.0),
        "score": (run.score, 2e-3, 8.0),
        "discriminator": (run.discriminator.heads, 3e-3, 7.0),  # its backbone is no one's to train
        "preference": (run.generator, 4e-3, 6.0),
    }
    assert run.learners.keys() == networks.keys()
    for name, (network, rate, clip) in networks.items():
        learner = run.learners[name]
        assert (learner.learning_rate, learner.warmup, learner.max_grad_norm) == (rate, 9, clip)
        assert isinstance(learner.optimizer, torch.optim.AdamW)
        (group,) = learner.optimizer.param_groups
        assert (group["lr"], group["betas"]) == (rate, (0.5, 0.6))
        assert (group["weight_decay"], group["eps"]) == (0.07, 1e-5)
        assert {id(p) for p in group["params"]} == {id(p) for p in network.parameters()}
    assert len({id(learner.optimizer) for learner in run.learners.values()}) == 4


@pytest.mark.parametrize(("asked", "rate"), [(None, 1e-3), (0.0, 0.0), (5e-4, 5e-4)])
def test_the_generator_may_distil_at_another_rate_in_stage_2(
    teacher: Teacher, asked: float | None, rate: float
) -> None:
    run = session(teacher, train={"learning_rate": 1e-3, "stage2_learning_rate": asked})
    first, second = run.trainer("distill").learners, run.trainer("joint").learners
    assert first["generator"].learning_rate == 1e-3
    assert second["generator"].learning_rate == rate
    assert second["generator"].optimizer is first["generator"].optimizer  # its moments go on
    assert all(second[name] is first[name] for name in ("score", "discriminator", "preference"))


@pytest.mark.parametrize("real_images", ["decoded", "raw"])
def test_real_pictures_are_as_they_are_or_as_the_decoder_would_draw_them(
    teacher: Teacher, real_images: str
) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64)).astype(np.uint8)
    run = session(teacher, method={"real_images": real_images})
    drawn = run.source.draw(np.random.default_rng(0), 3)
    run.source.draw = lambda *_, **__: replace(drawn, pictures=pictures)
    expected, vae = torch.from_numpy(pictures) / 127.5 - 1, teacher.pipeline.vae
    if real_images == "decoded":
        with torch.no_grad():
            expected = vae.decode(vae.encode(expected).latent_dist.mode()).sample
    real = run.trainer("distill").batches(0, ("discriminator",)).real
    torch.testing.assert_close(real, expected, atol=1e-4, rtol=1e-4)


def test_what_is_frozen_is_known_part_by_part(teacher: Teacher) -> None:
    """So that a run does not go on with another; without a reward, or a backbone, there is none."""
    own, reward = session(teacher), teacher.folder.with_name("reward")
    parts = {"network", "noise schedule", "text_encoder", "vae"}
    assert own.frozen.keys() == parts | {"reward", "backbone"}
    model = {"reward_model_name_or_path": None}
    arm = {"arm": "dmd2", "joint_train_steps": 0}
    assert session(teacher, model, arm).frozen == {name: own.frozen[name] for name in parts}
    network = emoji_reward.build(teacher.denoiser.network)
    emoji_reward.write(network, reward.with_name("another"), str(teacher.folder))
    model = {"reward_model_name_or_path": str(reward.with_name("another"))}
    changed = session(teacher, model).frozen
    assert {name for name in own.frozen if changed[name] != own.frozen[name]} == {"reward"}


def test_weights_that_are_not_finite_are_not_saved(teacher: Teacher, tmp_path: Path) -> None:
    own = session(teacher, output_dir=str(tmp_path))
    trainer = own.trainer("distill")
    save(own, trainer)
    trainer.state.iteration = 1
    next(own.student.parameters()).data.view(-1)[0] = math.nan
    with pytest.raises(FloatingPointError, match="weights of student after iteration 1"):
        save(own, trainer)
    assert [p.name for p in checkpoint.all_of(tmp_path)] == ["checkpoint-0"]


def test_what_ends_on_skipped_updates_removes_no_checkpoint(
    teacher: Teacher, tmp_path: Path
) -> None:
    """It may have led there, and the ones before are what is left to go on from."""
    own = session(teacher, train={"checkpoints_total_limit": 1}, output_dir=str(tmp_path))
    trainer = own.trainer("distill")
    for n, skipped in enumerate(({}, {"score": 1}, {})):
        trainer.state.iteration, trainer.state.skipped = n, skipped
        save(own, trainer)
        names = [p.name for p in checkpoint.all_of(tmp_path)]
        assert names == (["checkpoint-0", "checkpoint-1"] if skipped else [f"checkpoint-{n}"])


@pytest.mark.parametrize(
    ("updates", "number"), [(100, 1_000_007), (449_999, 1_000_007), (600_000, 2_000_007)]
)
def test_a_checkpoint_of_stage_2_comes_after_all_of_stage_1(
    updates: int, number: int, teacher: Teacher
) -> None:
    trainer = session(teacher, method={"ttur": 2}).trainer("joint")
    trainer.state.iteration, trainer.state.before = 7, {"generator": updates}
    assert number_of(trainer) == number


@pytest.mark.parametrize("own_prompts", [False, True])
def test_the_reward_is_asked_about_the_prompts_that_the_student_was_given(
    teacher: Teacher, tmp_path: Path, own_prompts: bool
) -> None:
    """Teacher and reward read with one text encoder here, so the words can be compared."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    data = {"prompts": str(tmp_path / "prompts.txt")} if own_prompts else {}
    batch = session(teacher, data=data).trainer("joint").batches(0, ("preference",))
    words, ours = batch.cond["encoder_hidden_states"], batch.reward_cond
    assert not any(torch.equal(words[i], words[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    torch.testing.assert_close(ours["tokens"], words)
    known = teacher.encode_prompts(list(PROMPTS))["encoder_hidden_states"]
    assert own_prompts == all(any(torch.allclose(w, k) for k in known) for w in words)


def test_student_and_score_estimator_start_from_the_student_that_is_named(
    teacher: Teacher, tmp_path: Path
) -> None:
    student = teacher.denoiser.twin("student").requires_grad_(True)
    disturb(student)
    student.network.save_pretrained(tmp_path / "student/unet")
    notes = {"student_timesteps": [999], "teacher_guidance_scale": 2, "averaged_updates": 7}
    (tmp_path / "student/flashdmd.json").write_text(json.dumps(notes))
    run = session(teacher, model={"student_model_name_or_path": str(tmp_path / "student")})
    assert run.trainer("distill").state.in_average == 7
    assert equal(weights(run.generator), weights(student))
    assert equal(weights(run.score), weights(student))
    assert equal(weights(run.teacher.denoiser), weights(teacher.denoiser))
    plain = session(teacher)
    assert plain.trainer("distill").state.in_average == 0
    assert equal(weights(plain.generator), weights(teacher.denoiser))
    assert equal(weights(plain.score), weights(teacher.denoiser))


@pytest.mark.parametrize(
    ("mixed_precision", "dtype", "vae"),
    [
        ("no", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_networks_compute_in_the_recipes_precision_and_losses_in_float32(
    teacher: Teacher, mixed_precision: str, dtype: torch.dtype, vae: torch.dtype
) -> None:
    own = {"vae_precision": "fp32" if vae == torch.float32 else "run"}
    run = session(teacher, model=own, train={"mixed_precision": mixed_precision})
    trainer = run.trainer("joint")
    networks = {
        "teacher": run.teacher.denoiser,
        "generator": run.generator,
        "score": run.score,
        "discriminator": run.discriminator,
        "encoder": run.teacher.pipeline.vae.encoder,
        "decoder": run.teacher.pipeline.vae.decoder,
        "reward": run.reward.network,
        "reference": trainer.algorithm.reference,
    }
    seen: dict[str, set[torch.dtype]] = {name: set() for name in networks}
    for name, network in networks.items():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(lambda *a, name=name: seen[name].add(a[-1].dtype))
    losses: list[Loss] = []
    loss = trainer.loss

    def watch(*update: Any) -> Loss:
        losses.append(loss(*update))
        return losses[-1]

    trainer.loss = watch
    trainer.order = (trainer.order[0], ("preference",))
    for _ in trainer.order:
        trainer.iterate()
    coded = {"encoder", "decoder"}
    assert seen == {name: {vae if name in coded else dtype} for name in networks}
    terms = {name: term.dtype for loss in losses for name, term in loss.terms.items()}
    names = ("matching", "adversarial", "diffusion", "hinge", "preference")
    assert terms == dict.fromkeys(names, torch.float32)
