"""Two processes that make the same caches at the same time, on two machines by their numbers."""

import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from faults import Lost, contents, lost_files
from PIL import Image
from test_cache import folder

from flashdmd import cache
from flashdmd.batches import as_tensor
from flashdmd.cache import Embeddings, Latents
from flashdmd.data import TeacherSamples, open_data
from flashdmd.models.teacher import Teacher, load_pipeline

ROUNDS = 3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_pipeline(tiny.score_folder(tmp_path_factory.mktemp("teacher")))


def at_once(work: Callable[[], Any], processes: int = 2) -> list[Any]:
    """What it gives in each, begun at the same time and under the same process number."""
    gate, ends = os.pipe(), []
    for _ in range(processes):
        end = os.pipe()
        ends.append(end[0])
        if os.fork():
            os.close(end[1])
            continue
        try:
            os.close(gate[1])
            os.read(gate[0], 1)  # until all are there
            os.getpid = lambda: 7
            answer: Any = work()
        except BaseException:
            answer = traceback.format_exc()
        finally:
            with open(end[1], "wb") as f:
                f.write(pickle.dumps(answer))
            os._exit(0)
    os.close(gate[1])
    answers = []
    for end in ends:
        with open(end, "rb") as f:
            answers.append(pickle.loads(f.read()))
    for _ in range(processes):
        os.wait()
    os.close(gate[0])
    return answers


def drawn(prompts: list[str], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (len(prompts), 3, 32, 32), dtype=np.uint8)


@pytest.mark.fault("processes: two make a cache at once", "begun together, each in its own process")
def test_caches_that_two_make_at_once_are_those_of_one(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: Lost
) -> None:
    monkeypatch.setattr(cache, "PROMPTS", 2)
    monkeypatch.setattr(cache, "PICTURES", 2)
    pictures = folder(tmp_path / "pictures")
    prompts = [f"a dog number {i}" for i in range(12)]

    def work(root: Path) -> tuple[Any, ...]:
        source = open_data(pictures, 64, multiple=16, cache=root)
        latents = Latents(root / "latents", "x")
        source = latents.make(source, lambda x: teacher.encode(as_tensor(x)))
        embeddings = Embeddings(root / "embeddings", "x")
        with torch.no_grad():
            embeddings.make(prompts, teacher.read)
        pool = TeacherSamples(drawn, tuple(prompts), 20, "x", batch=2).make(root)
        samples = [np.asarray(Image.open(p)).tobytes() for p in sorted(pool.glob("[0-9]*.png"))]
        indices = source.draw(np.random.default_rng(0), 3).indices
        found = [latents(indices).numpy().tobytes()]
        found += [v.numpy().tobytes() for v in embeddings(prompts).values()]
        return source.catalogue.fingerprint, indices.tolist(), found, pool.name, samples

    alone = work(tmp_path / "alone")
    expected = contents(tmp_path / "alone")
    for k in range(ROUNDS):
        root = tmp_path / f"{k}"
        for answer in at_once(lambda root=root: work(root)):
            assert answer == alone, answer if isinstance(answer, str) else "other contents"
        lost(lost_files(expected, root), "files")
        assert contents(root) == expected  # and nothing half written is left
