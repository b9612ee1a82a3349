"""Pictures side by side: contact sheets, and the labelled comparison of arms."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels between the pictures of a sheet
PICTURE = 128  # least width of a picture in a comparison, in pixels
SPACE = 8
LABEL_SIZE, PROMPT_SIZE = 17, 14
INK, QUIET = (31, 35, 40), (89, 99, 110)


def contact_sheet(images: UInt8[np.ndarray, "N 3 H W"], columns: int) -> Image.Image:
    """All pictures in rows of `columns`, pixel by pixel, on white."""
    if columns < 1 or not len(images):
        raise ValueError(f"columns={columns} of {len(images)} pictures: both must be 1 or more")
    n, _, h, w = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * (w + GAP) - GAP, rows * (h + GAP) - GAP), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(picture_of(image), (column * (w + GAP), row * (h + GAP)))
    return sheet


def comparison(
    rows: Mapping[str, UInt8[np.ndarray, "N 3 H W"]], prompts: Sequence[str]
) -> Image.Image:
    """One row of pictures an arm, one column a prompt, with labels; small pictures are enlarged."""
    for arm, images in rows.items():
        if len(images) != len(prompts):
            raise ValueError(f"{arm!r} has {len(images)} pictures for {len(prompts)} prompts")
    if not rows or not prompts:
        raise ValueError("a comparison needs one arm and one prompt or more")
    largest = max(images.shape[3] for images in rows.values())
    side = largest * max(1, round(PICTURE / largest))
    label_font = ImageFont.load_default(LABEL_SIZE)
    prompt_font = ImageFont.load_default(PROMPT_SIZE)
    margin = max(text_size(arm, label_font)[0] for arm in rows) + 3 * SPACE
    captions = [wrapped(prompt, prompt_font, side) for prompt in prompts]
    head = max(text_size(c, prompt_font)[1] for c in captions) + 2 * SPACE
    size = (margin + len(prompts) * (side + SPACE) + SPACE, head + len(rows) * (side + SPACE))
    figure = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(figure)
    for column, caption in enumerate(captions):
        x = margin + column * (side + SPACE)
        draw.multiline_text((x, head - SPACE), caption, QUIET, prompt_font, anchor="ld")
    for row, (arm, images) in enumerate(rows.items()):
        y = head + row * (side + SPACE)
        draw.multiline_text((SPACE, y + side / 2), arm, INK, label_font, anchor="lm")
        for column, image in enumerate(images):
            picture = picture_of(image).resize((side, side), Image.Resampling.NEAREST)
            figure.paste(picture, (margin + column * (side + SPACE), y))
    return figure


def picture_of(image: UInt8[np.ndarray, "3 H W"]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0)))


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def text_size(text: str, font: Font) -> tuple[int, int]:
    left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox(
        (0, 0), text, font
    )
    return round(right - left), round(bottom - top)


def wrapped(text: str, font: Font, width: int) -> str:
    """`text` in as few lines as fit into `width` pixels; words that do not fit are broken."""
    letters = max(1, min(len(text), width))
    while letters > 1 and text_size("\n".join(textwrap.wrap(text, letters)), font)[0] > width:
        letters -= 1
    return "\n".join(textwrap.wrap(text, letters))
