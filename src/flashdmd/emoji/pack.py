"""`flashdmd emoji data`: packs three freely licensed emoji sets into one zip of 64 px pictures.

The pictures come from four npm packages, named in `PACKAGES`. The zip is an image folder as
Hugging Face's loaders read them: WebP pictures and one metadata.jsonl with their records.
"""

import hashlib
import io
import json
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from flashdmd.errors import UserError
from flashdmd.files import replace_file

SIZE = 64
PACKAGES = (
    "emoji-datasource-google@16.0.0",  # images Apache-2.0
    "emoji-datasource-twitter@16.0.0",  # images CC-BY-4.0, Twemoji
    "@lobehub/fluent-emoji-3d@1.1.0",  # images MIT, Microsoft Fluent Emoji
    "emojilib@4.0.3",  # keywords, MIT
)
CATEGORIES = {  # in every set, and drawn as things; no flags, symbols or skin tones
    "Objects": "object",
    "Travel & Places": "travel",
    "Smileys & Emotion": "smiley",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Activities": "activity",
}
SKIPPED_SUBCATEGORIES = {"time"}  # 31 clock faces that differ by a few pixels at this size
HELD_OUT = 12  # one (concept, style) pair in HELD_OUT is kept from training


def code(text: str) -> str:
    """Code points in one spelling: lower case, no leading zeros, no variation selector."""
    parts = (p.lower().lstrip("0") for p in text.replace("_", "-").split("-"))
    return "-".join(p for p in parts if p != "fe0f")


def split_of(concept: str, style: str) -> str:
    """At most one style of a concept is held out, so every held-out concept is seen in another."""
    digest = hashlib.sha256(concept.encode()).digest()
    unlucky = ("noto", "twemoji", "fluent")[digest[1] % 3]
    return "test" if digest[0] % (HELD_OUT // 3) == 0 and style == unlucky else "train"


def install(folder: Path) -> Path:
    """Runs `npm install` for the four packages in `folder`; returns its node_modules."""
    folder.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("the pictures come from npm packages, and there is no npm here; install it")
    to = ("--ignore-scripts", "--no-audit", "--prefix", str(folder))
    if subprocess.run([npm, "install", *to, *PACKAGES], check=False).returncode:
        raise UserError("npm could not install the packages of pictures; it says why above")
    return folder / "node_modules"


def examples(modules: Path) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """(record, RGBA picture of SIZE px) of every concept that is kept, style by style."""
    table = json.loads((modules / "emoji-datasource-google/emoji.json").read_text("utf-8"))
    words = json.loads((modules / "emojilib/dist/emoji-en-US.json").read_text("utf-8"))
    keywords = {code("-".join(f"{ord(c):x}" for c in k)): v for k, v in words.items()}
    fluent = modules / "@lobehub/fluent-emoji-3d/assets"
    fluent_files = {code(p.stem): p for p in fluent.glob("*.webp")}
    for entry in sorted(table, key=lambda e: e["unified"]):
        concept = code(entry["unified"])
        if entry["category"] not in CATEGORIES or entry["subcategory"] in SKIPPED_SUBCATEGORIES:
            continue
        name, *others = (k.replace("_", " ").lower() for k in keywords[concept])
        files = {
            "noto": modules / f"emoji-datasource-google/img/google/64/{entry['image']}",
            "twemoji": modules / f"emoji-datasource-twitter/img/twitter/64/{entry['image']}",
            "fluent": fluent_files.get(concept),
        }
        for style, path in files.items():
            if path is None:
                continue
            with Image.open(path) as picture:
                yield (
                    {
                        "file_name": f"{style}/{concept}.webp",
                        "concept": concept,
                        "style": style,
                        "name": name,
                        "keywords": sorted({k for k in others if k.replace(" ", "").isalpha()}),
                        "category": CATEGORIES[entry["category"]],
                        "subcategory": entry["subcategory"],
                        "split": split_of(concept, style),
                    },
                    picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS),
                )


def pack(modules: Path, destination: Path) -> int:
    """Writes the zip; the same packages give the same bytes. Returns the number of pictures."""
    records = []
    with replace_file(destination) as beside, zipfile.ZipFile(beside, "w") as folder:
        for record, picture in examples(modules):
            webp = io.BytesIO()
            picture.save(webp, "WEBP", quality=92, method=6)
            folder.writestr(zipfile.ZipInfo(record["file_name"]), webp.getvalue())
            records.append(json.dumps(record, ensure_ascii=False))
        folder.writestr(zipfile.ZipInfo("metadata.jsonl"), "\n".join(records), zipfile.ZIP_DEFLATED)
    return len(records)
