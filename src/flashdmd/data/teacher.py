"""Where there are prompts and no pictures: the teacher's samples take the place of real ones."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from flashdmd.data.folder import METADATA
from flashdmd.errors import UserError
from flashdmd.files import digest, replace_file, write_text

log = logging.getLogger(__name__)
Draw = Callable[[list[str], int], UInt8[np.ndarray, "B 3 H W"]]  # prompts, seed


@dataclass(frozen=True)
class TeacherSamples:
    """A pool of pictures that a teacher draws once, kept in a folder as pictures with metadata."""

    draw: Draw  # the same prompts and seed give the same pictures
    prompts: tuple[str, ...]  # picture i is of prompt i, and again from the first
    n: int
    fingerprint: str  # of all that the pictures depend on but the prompts and seeds
    seed: int = 0  # of the first picture; of the k-th seed + k
    batch: int = 8

    @property
    def statement(self) -> str:
        """What a run on this pool has to say of itself."""
        return (
            "There are no real pictures: the discriminator's are "
            f"{self.n} samples of the teacher for {min(self.n, len(self.prompts))} prompts, so the "
            "student is held to the teacher's pictures and cannot become better than these."
        )

    def make(self, root: Path) -> Path:
        """The pool's folder under `root`, drawn where it is not there yet.

        What was stopped halfway goes on after the last whole batch.
        """
        if not self.prompts or self.n < 1:
            raise UserError("samples of the teacher need one prompt or more, and to be one or more")
        asked = json.dumps([self.fingerprint, self.prompts, self.n, self.seed, self.batch])
        folder = root / f"teacher-{digest(asked.encode())}"
        if (folder / METADATA[0]).is_file():  # it is written last
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        log.warning("%s", self.statement)
        names = [f"{i:06d}.png" for i in range(self.n)]
        captions = [self.prompts[i % len(self.prompts)] for i in range(self.n)]
        for start in tqdm(
            range(0, self.n, self.batch), "drawing pictures of the teacher", leave=False
        ):
            part = slice(start, start + self.batch)
            paths = [folder / name for name in names[part]]
            if all(map(whole, paths)):
                continue
            pictures = self.draw(captions[part], self.seed + start)
            for path, picture in zip(paths, pictures, strict=True):
                if whole(path):  # of another process: nothing that was listed changes
                    continue
                with replace_file(path) as beside:
                    Image.fromarray(picture.transpose(1, 2, 0)).save(beside)
        lines = (
            json.dumps({"file_name": name, "text": caption}) + "\n"
            for name, caption in zip(names, captions, strict=True)
        )
        write_text(folder / METADATA[0], "".join(lines))
        return folder


def whole(path: Path) -> bool:
    """Whether a PNG is there with every checksum right; one that is torn is named."""
    try:
        with Image.open(path) as picture:
            picture.verify()
    except FileNotFoundError:
        return False
    except (OSError, SyntaxError, ValueError) as e:
        log.warning("%s is torn and drawn again: %s", path, e)
        return False
    return True
