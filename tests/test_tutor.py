"""Tutors: the mean of a noisy latent's origin, whichever process asks and whichever answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gaussian import Gaussian

from flashdmd.emoji import flow, teacher
from flashdmd.emoji.tutor import Asked, Tutor
from flashdmd.emoji.world import ASSETS, World
from flashdmd.errors import UserError
from flashdmd.schedule import Process, RectifiedFlow, VariancePreserving

CURVED, STRAIGHT = Process(VariancePreserving(), "v"), Process(RectifiedFlow(), "flow")


def knows(process: Process, mean: float = 0.7) -> Asked:
    """A teacher of a Gaussian, whose mean at any noise is known."""
    return Asked(process, Gaussian(process, mean, 0.4).denoiser, lambda captions: {})


@pytest.mark.parametrize("asking", [CURVED, STRAIGHT], ids=["curved", "straight"])
@pytest.mark.parametrize("answering", [[CURVED], [STRAIGHT], [CURVED, STRAIGHT]], ids=len)
def test_the_mean_is_the_one_of_the_process_that_asks(
    asking: Process, answering: list[Process]
) -> None:
    tutor = Tutor([knows(process) for process in answering], asking)
    t = tutor.times(torch.tensor([60.0, 250.0, 500.0, 750.0, 900.0]))
    x0, eps = torch.randn(5, 3), torch.randn(5, 3)
    x_t = asking.add_noise(x0, eps, t)
    mean, noise = tutor(x_t, t, x0, [""] * 5)
    exact = Gaussian(asking, 0.7, 0.4).denoiser(x_t, t)
    torch.testing.assert_close(mean, exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(asking.add_noise(mean, noise, t), x_t)


def test_several_tutors_are_averaged() -> None:
    x_t, t = torch.randn(4, 3), torch.full((4,), 500.0)
    low, high, both = (
        Tutor([knows(STRAIGHT, m) for m in means], STRAIGHT)(x_t, t, x_t, [""] * 4)[0]
        for means in ([0.0], [1.0], [0.0, 1.0])
    )
    assert not torch.allclose(low, high)
    torch.testing.assert_close(both, (low + high) / 2)


def test_where_a_score_based_tutor_has_no_step_the_picture_is_learned() -> None:
    t = torch.tensor([5.0, 30.0, 250.0, 500.0, 930.0, 990.0])
    tutor = Tutor([knows(CURVED), knows(STRAIGHT)], STRAIGHT)
    moved = tutor.times(t)
    assert torch.equal(moved[[0, -1]], t[[0, -1]])
    assert moved.tolist() == pytest.approx(t.tolist(), abs=12)  # so far apart are the first steps
    x0 = torch.randn(6, 3)
    mean, _ = tutor(STRAIGHT.add_noise(x0, torch.randn(6, 3), moved), moved, x0, [""] * 6)
    assert torch.equal(mean[[0, -1]], x0[[0, -1]])
    assert not torch.isclose(mean[1:-1], x0[1:-1]).all(1).any()
    assert torch.equal(Tutor([knows(STRAIGHT)], STRAIGHT).times(t), t)  # which knows all times


def test_a_tutor_of_other_latents_is_refused() -> None:
    with pytest.raises(UserError, match=r"score: its latents are \(8, 8, 8\).*same autoencoder"):
        Tutor.load([ASSETS / "score"], STRAIGHT, (4, 8, 8))


@pytest.mark.parametrize("train", [flow.train_flow, teacher.train_score])
def test_a_tutored_teacher_learns_what_the_tutor_says(
    train: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (flow, teacher):
        monkeypatch.setattr(module, "RENDERINGS", 1)
        monkeypatch.setattr(module, "contact_sheet", lambda *_, **__: None)
    monkeypatch.setattr(World, "indices", lambda self, split: list(range(8)))
    monkeypatch.setattr("flashdmd.emoji.flow.fused", lambda network: network)  # takes a minute
    told, learned = [], []

    def tell(self: Tutor, x_t: torch.Tensor, t: torch.Tensor, *_: object) -> list[torch.Tensor]:
        told.append([torch.randn_like(x_t), torch.randn_like(x_t), t])
        return told[-1][:2]

    exact = Process.target
    monkeypatch.setattr(Tutor, "__call__", tell)
    monkeypatch.setattr(Process, "target", lambda *a: learned.append(a[1:]) or exact(*a))
    train(tmp_path, ASSETS / "score", 1, batch=2, tutors=[ASSETS / "score"])
    assert len(told) == len(learned) == 1
    assert all(torch.equal(a, b) for a, b in zip(told[0], learned[0], strict=True))
