"""From a name to pictures: which of the formats it is, and all of it looked at."""

import logging
from pathlib import Path

from flashdmd.data import folder, rows, tars
from flashdmd.data.buckets import buckets_of
from flashdmd.data.catalogue import Catalogue, check
from flashdmd.data.listing import Listing
from flashdmd.data.pictures import PICTURES
from flashdmd.data.source import PictureSource
from flashdmd.errors import UserError

log = logging.getLogger(__name__)


def open_data(
    where: str | Path,
    resolution: int,
    captions: bool = True,
    *,
    multiple: int | None = None,
    cache: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> PictureSource:
    """Pictures in squares of `resolution` pixels, or in shapes of that area whose sides are
    multiples of `multiple`. What became of them is logged, a warning where not all are used as
    they are. The rest is as in `open_pictures`.
    """
    catalogue = open_pictures(
        where, captions, cache=cache, image_column=image_column, caption_column=caption_column
    )
    square = ((resolution, resolution),)
    source = PictureSource(catalogue, buckets_of(resolution, multiple) if multiple else square)
    log.log(logging.WARNING if source.report.tells else logging.INFO, "%s", source.report)
    return source


def open_folder(folder: Path, size: int, captions: bool = True) -> PictureSource:
    """Pictures in squares of `size` pixels."""
    return open_data(folder, size, captions)


def open_pictures(
    where: str | Path,
    captions: bool = True,
    *,
    cache: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Catalogue:
    """The pictures of a folder, of webdataset tars, or of a Hugging Face data set on disk.

    `where` is a folder that holds any of these, or a pattern of tars. What the check of the
    pictures found is kept in the folder `cache`. Raises UserError when nothing is there, two
    formats are, or more than one in a hundred pictures is broken or has no caption though
    `captions` are wanted.
    """
    place = Path(where)
    check_place(where)
    if not place.is_dir():
        listing: Listing = tars.list_tars(str(where), tars.shards(str(where)), captions)
    elif (kind := kind_of(place)) == "tars":
        listing = tars.list_tars(str(where), tars.shards(str(where)), captions)
    elif kind == "tables":
        listing = rows.list_rows(place, captions, image_column, caption_column, cache)
    else:
        listing = folder.list_folder(place, captions)
    return check(listing, cache)


def check_place(where: str | Path) -> None:
    """Raises UserError for what is no folder and no pattern of tars that are there."""
    if Path(where).is_dir():
        return
    if Path(where).suffix != ".tar" and not set("*?[{") & set(str(where)):
        raise UserError(
            f"data.train_data_dir={str(where)!r} is not a folder; give a folder of pictures "
            f"({', '.join(PICTURES)}) with captions, of tars or of a Hugging Face data set, a "
            "pattern of tars (train-{000..012}.tar), or emoji for the embedded pictures"
        )
    tars.shards(str(where))


def kind_of(place: Path) -> str:
    """tars, tables or pictures. Raises UserError for a folder of more than one kind."""
    if any((place / name).is_file() for name in rows.SAVED):
        return "tables"
    endings = {"tars": (".tar",), "tables": rows.TABLES, "pictures": PICTURES}
    files = folder.walk(place)
    found = [k for k, ends in endings.items() if any(folder.suffix(f) in ends for f in files)]
    if len(found) > 1:
        raise UserError(
            f"{place} holds {' and '.join(found)}, and only one of these would be read; give each "
            "a folder of its own"
        )
    return found[0] if found else "pictures"
