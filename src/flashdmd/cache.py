"""What frozen encoders give, computed once: text embeddings and latents of pictures, on disk.

A chunk of examples is a file of safetensors whose name is a fingerprint of all that it depends on:
what is there is right, what changed has another name, and what was stopped halfway goes on.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from flashdmd import distributed
from flashdmd.data.listing import MOST_LEFT_OUT, TELL_AFTER
from flashdmd.data.source import PictureSource
from flashdmd.errors import GOES_ON, UserError
from flashdmd.files import digest, replace_file
from flashdmd.sampler import Cond

PROMPTS = 256  # a file: 160 MB of SDXL's embeddings in float32
PICTURES = 64  # a file: 17 MB of SDXL's latents at 1024 pixels in float32
SAMPLED = 64  # values of a tensor whose bytes are in its fingerprint, besides the sum of all
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

log = logging.getLogger(__name__)
Place = tuple[Path, int]  # a file and a row in it


def fingerprint(*parts: str | Mapping[str, Tensor]) -> str:
    """Tells networks' weights, given as state dicts, and settings, given as texts, from others.

    Of each tensor: name, type, shape, the bytes of some values and the sum of all as integers,
    which is exact, so that the order and device of the summation do not matter. Of sharded ones
    all processes have to call, and each is whole for as long as it is looked at.
    """
    told = [
        part.encode() if isinstance(part, str) else b"".join(map(fact, sorted(part.items())))
        for part in parts
    ]
    return digest(*(f"{len(one)}:".encode() + one for one in told))


def fact(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    flat = (
        distributed.gathered(tensor.detach())
        .contiguous()
        .flatten()
        .view(INTEGERS[tensor.element_size()])
    )
    some = flat[:: max(1, len(flat) // SAMPLED)].cpu().numpy().tobytes()
    total = int(flat.sum(dtype=torch.int64))
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {total} ".encode() + some


def whole(path: Path) -> bool:
    """Whether a file is there from head to end; one that is torn is named."""
    try:
        with safe_open(path, "pt"):
            return True
    except FileNotFoundError:
        return False
    except (SafetensorError, OSError) as e:
        log.warning("%s is torn and made again: %s", path, e)
        return False


def make(
    folder: Path,
    kind: str,
    key: str,
    groups: Sequence[Sequence[str]],
    encode: Callable[[int], dict[str, Tensor]],
) -> list[Path]:
    """A file for each group of examples, made by `encode` of the group's index if not there.

    A file's name is of `key` and what its group is called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = (json.dumps([key, *group]).encode() for group in groups)
    paths = [folder / f"{kind}-{digest(part)}.safetensors" for part in parts]
    todo = [i for i, path in enumerate(paths) if not whole(path)]
    for i in tqdm(todo, f"{kind} to {folder}", disable=not todo, leave=False):
        tensors = {k: v.detach().cpu().contiguous() for k, v in encode(i).items()}
        with replace_file(paths[i]) as beside:
            save_file(tensors, beside)
    return paths


def rows(places: Sequence[Place]) -> Cond:
    """The rows at `places`, stacked in their order; only they are read.

    Raises UserError for a file that is gone or torn since it was made.
    """
    by_file: dict[Path, list[int]] = {}
    for i, (path, _) in enumerate(places):
        by_file.setdefault(path, []).append(i)
    found: dict[str, list[Tensor]] = {}
    for path, indices in by_file.items():
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    read = found.setdefault(name, [torch.empty(0)] * len(places))
                    for i in indices:
                        read[i] = file.get_slice(name)[places[i][1]]
        except (SafetensorError, OSError) as e:
            raise UserError(
                f"{path}, which was made when the run began, cannot be read any more ({e}); "
                f"{GOES_ON} when it has made the file again"
            ) from e
    return {name: torch.stack(values) for name, values in found.items()}


@dataclass
class Embeddings:
    """Encodings of a finite list of prompts, looked up by prompt."""

    folder: Path
    fingerprint: str  # of the encoders; see `fingerprint`
    dtype: torch.dtype = torch.float32  # of floats on the disk; what is looked up is float32
    places: dict[str, Place] = field(default_factory=dict)

    def make(
        self, prompts: Sequence[str], encode: Callable[[list[str]], Cond], batch: int = 16
    ) -> None:
        """Encodes what is not there yet, `batch` prompts at a time.

        Raises UserError when the encodings are not of one length.
        """
        different = list(dict.fromkeys(prompts))
        groups = [different[i : i + PROMPTS] for i in range(0, len(different), PROMPTS)]

        def chunk(k: int) -> dict[str, Tensor]:
            group = groups[k]
            parts = [encode(group[i : i + batch]) for i in range(0, len(group), batch)]
            check_lengths([{name: v.shape for name, v in part.items()} for part in parts])
            joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            assert all(len(v) == len(group) for v in joined.values()), "encode gives batches"
            return {
                name: v.to(self.dtype) if v.is_floating_point() else v for name, v in joined.items()
            }

        key = f"{self.fingerprint} {self.dtype}"
        paths = make(self.folder, "embeddings", key, groups, chunk)
        check_lengths([shapes(path) for path in paths])
        self.places = {
            prompt: (path, row)
            for path, group in zip(paths, groups, strict=True)
            for row, prompt in enumerate(group)
        }

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Batch first. Raises KeyError for a prompt that was not encoded."""
        found = rows([self.places[prompt] for prompt in prompts])
        return {name: v.float() if v.is_floating_point() else v for name, v in found.items()}


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def check_lengths(parts: Sequence[Mapping[str, Sequence[int]]]) -> None:
    """Raises UserError when the shapes of parts differ in more than how many examples they hold."""
    told = {json.dumps({name: list(shape[1:]) for name, shape in sorted(p.items())}) for p in parts}
    if len(told) > 1:
        raise UserError(
            f"the prompts are encoded to different shapes, {' and '.join(sorted(told)[:2])}, and "
            "cannot be kept: only encoders that pad all prompts to one length can"
        )


@dataclass
class Latents:
    """Latents of a source's pictures, each cut to its bucket, looked up by catalogue index."""

    folder: Path
    fingerprint: str  # of the VAE and its scale; see `fingerprint`
    dtype: torch.dtype = torch.float32  # on the disk; what is looked up is float32
    places: dict[int, Place] = field(default_factory=dict)
    missing: frozenset[int] = frozenset()  # could not be read when they were encoded

    def make(
        self,
        source: PictureSource,
        encode: Callable[[UInt8[np.ndarray, "n 3 H W"]], Float[Tensor, "n C h w"]],
        batch: int = 8,
    ) -> PictureSource:
        """Encodes what is not there yet, `batch` pictures at a time.

        Gives the source without the pictures that are missing. Raises UserError when these are more
        than one in a hundred, or their folder is gone.
        """
        entries = source.catalogue.listing.entries
        parts = [
            (members[i : i + PICTURES], shape)
            for bucket, shape in enumerate(source.buckets)
            for members in [np.flatnonzero(source.nearest == bucket)]
            for i in range(0, len(members), PICTURES)
        ]
        groups = [
            [f"{shape}", *(f"{entries[i].name} {entries[i].stamp}" for i in part)]
            for part, shape in parts
        ]

        def chunk(k: int) -> dict[str, Tensor]:
            part, shape = parts[k]
            latents, read = [], []
            for start in range(0, len(part), batch):
                found = source.attempts(part[start : start + batch], shape)
                for i, picture in zip(part[start : start + batch].tolist(), found, strict=True):
                    if isinstance(picture, str):
                        source.check_there(i, picture)  # else black ones would be kept as read
                read += [not isinstance(picture, str) for picture in found]
                black = np.zeros((3, *shape), dtype=np.uint8)
                pictures = [black if isinstance(picture, str) else picture for picture in found]
                latents.append(encode(np.stack(pictures)).to(self.dtype))
            return {"latents": torch.cat(latents), "read": torch.tensor(read)}

        paths = make(self.folder, "latents", f"{self.fingerprint} {self.dtype}", groups, chunk)
        missing = set()
        for path, (part, _) in zip(paths, parts, strict=True):
            self.places |= {int(i): (path, row) for row, i in enumerate(part)}
            with safe_open(path, "pt") as file:
                missing |= set(part[~file.get_tensor("read").numpy()].tolist())
        self.missing = frozenset(missing)
        if missing:
            some = ", ".join(entries[i].name for i in sorted(missing)[:TELL_AFTER])
            told = (
                f"{len(missing)} of {len(entries)} pictures of {source.catalogue.listing.where} "
                f"could not be read when they were encoded ({some})"
            )
            if len(missing) > MOST_LEFT_OUT * len(entries):
                raise UserError(
                    f"{told}, more than one in a hundred; repair or remove them, and {self.folder}"
                )
            log.warning("%s and are left out", told)
        return replace(source, without=source.without | self.missing)

    def __call__(self, indices: Int[np.ndarray, "n"]) -> Float[Tensor, "n C h w"]:
        """Of pictures of one bucket."""
        return rows([self.places[i] for i in indices.tolist()])["latents"].float()
