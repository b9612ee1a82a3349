"""Prompts and no pictures: a pool of a real teacher's samples."""

from pathlib import Path

import numpy as np
import pytest
from tiny import score_folder

from flashdmd.data import TeacherSamples, open_data
from flashdmd.errors import UserError
from flashdmd.models.teacher import Teacher, load_pipeline

PROMPTS = ("a dog", "a cat", "a pig")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_pipeline(score_folder(tmp_path_factory.mktemp("teacher")))


class Draws:
    """The teacher's own sampler, counted, that may be stopped."""

    def __init__(self, teacher: Teacher, stop_at: int | None = None) -> None:
        self.teacher, self.stop_at, self.asked = teacher, stop_at, []

    def __call__(self, prompts: list[str], seed: int) -> np.ndarray:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append((prompts, seed))
        noise = self.teacher.noise(len(prompts), 1000 * seed)
        return self.teacher.sample(prompts, noise, steps=2, guidance=1.0)


def pool(draws: Draws, n: int = 7, fingerprint: str = "x", seed: int = 0) -> TeacherSamples:
    return TeacherSamples(draws, PROMPTS, n, fingerprint, seed=seed, batch=3)


def test_the_pool_is_the_teacher_s_pictures_of_the_prompts(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draws = Draws(teacher)
    samples = pool(draws)
    folder = samples.make(tmp_path)
    assert [seed for _, seed in draws.asked] == [0, 3, 6]
    source = open_data(folder, teacher.image_size)
    found = source.catalogue
    assert [found.caption(i) for i in range(7)] == [PROMPTS[i % 3] for i in range(7)]
    drawn = np.concatenate([Draws(teacher)(*asked) for asked in draws.asked])
    for i in range(7):
        assert np.array_equal(np.asarray(found.open(i)).transpose(2, 0, 1), drawn[i])
    assert "no real pictures: the discriminator's are 7 samples of the teacher" in caplog.text
    assert samples.statement in caplog.text


def test_a_pool_is_drawn_once(teacher: Teacher, tmp_path: Path) -> None:
    draws = Draws(teacher)
    folder = pool(draws).make(tmp_path)
    assert pool(draws).make(tmp_path) == folder
    assert len(draws.asked) == 3
    others = {pool(draws, n=4), pool(draws, fingerprint="y"), pool(draws, seed=1)}
    assert len({other.make(tmp_path) for other in others} | {folder}) == 4
    assert len(draws.asked) == 3 + 2 + 3 + 3


def test_a_pool_that_was_stopped_goes_on(
    teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = pool(Draws(teacher)).make(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        pool(Draws(teacher, stop_at=2)).make(tmp_path / "stopped")
    [stopped] = (tmp_path / "stopped").iterdir()
    torn = stopped / "000004.png"
    torn.write_bytes(torn.read_bytes()[:-20])
    draws = Draws(teacher)
    assert pool(draws).make(tmp_path / "stopped") == stopped
    assert [seed for _, seed in draws.asked] == [3, 6]
    assert f"{torn} is torn and drawn again" in caplog.text
    names = sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in stopped.iterdir()) == names
    assert len(names) == 8
    for name in names:
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_a_pool_of_nothing_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one prompt or more"):
        TeacherSamples(Draws(teacher), (), 3, "x").make(tmp_path)
    with pytest.raises(UserError, match="one or more"):
        pool(Draws(teacher), n=0).make(tmp_path)
