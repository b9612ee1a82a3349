"""What others wrote is text: on the page of a run and on the card of a student it is no markup."""

import ast
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from PIL import Image

from flashdmd import export
from flashdmd.algorithm import Method, split
from flashdmd.export import Notes
from flashdmd.models.teacher import Teacher, load_pipeline
from flashdmd.report import write

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</title></style></script><script src=//x.example></script>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- ]]> --><svg onload=alert(1)>",
    "\u2028\u2029\u202e\0\x1b[31m&lt;b&gt;",
    "data:text/html,<b>x</b>",
)
PLAIN = tuple(f"plain {i}" for i in range(len(HOSTILE)))


class Shape(HTMLParser):
    """Elements and the names of their attributes; the values that a browser would follow."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.shape: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.followed: list[str] = []
        self.styles: set[str] = set()
        self.values: list[str] = []
        self.text: list[str] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape[tag, tuple(sorted(k for k, _ in attrs))] += 1
        for key, value in attrs:
            if key in ("src", "href", "action", "data", "srcset", "xlink:href", "content"):
                self.followed.append(value or "")
            elif key in ("style", "class", "id"):
                self.styles.add(value or "")
            else:
                self.values.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def run_of(folder: Path, words: tuple[str, ...]) -> Path:
    """A run in which every text that a page shows is one of the words."""
    arms = [f"student-{w.replace('/', '|')}".replace("\0", "") for w in words[:3]]
    arms = ["teacher-50", *arms]
    for arm in arms:
        (folder / "samples" / arm).mkdir(parents=True)
        for i in range(len(words)):
            Image.new("RGB", (8, 8)).save(folder / "samples" / arm / f"{i:02d}.png")

    def dump(name: str, value: Any) -> None:
        (folder / name).write_text(json.dumps(value))

    dump("samples/samples.json", {"prompts": words, "arms": arms, "columns": 4})
    (folder / "recipe.yaml").write_text("\n".join(f"{w!r}: {w}" for w in words))
    rows = [{"arm": arm, "nfe": 4, "kid": 0.1, **{w: 1.5 for w in words}} for arm in arms]
    health = [{"name": w, "verdict": "bad", "value": 1.0, "limit": 0.5, "says": w} for w in words]
    health.append({"name": "blur", "verdict": words[0], "value": words[1], "says": words[2]})
    dump("metrics.json", {"fingerprint": {w: w for w in words}, "rows": rows, "health": health})
    lines = [
        {"iteration": i, "stage": "distill", "arm": words[0], "matching": 0.1, "diffusion": 0.2,
         "hinge": 1.0, "seconds": 1.0, words[1]: words[2], words[3]: 1.0, "images": 2}
        for i in range(60)
    ]  # fmt: skip
    lines += [{"iteration": i, "stage": words[4], "arm": words[5]} for i in range(60)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + f"\n{words[0]}\n")
    dump("data.json", {"caveat": words[0], "says": words, "counts": {}})
    dump("timing.json", {"milliseconds": {w: 3.0 for w in words}, "iterations": 3})
    dump("versions.json", {w: w for w in words})
    return folder


def test_a_page_of_hostile_texts_has_the_elements_of_a_page_of_plain_ones(tmp_path: Path) -> None:
    """None is added and none is lost, no attribute either, and nothing that a browser follows."""
    plain = Shape(write(run_of(tmp_path / "plain", PLAIN)))
    name = HOSTILE[1].replace("/", "|")
    hostile = Shape(write(run_of(tmp_path / name, HOSTILE)))
    assert hostile.shape == plain.shape
    assert hostile.styles == plain.styles
    assert sorted(hostile.followed) == sorted(plain.followed)
    assert not any("alert" in v or "javascript" in v for v in hostile.followed)
    shown = "".join(hostile.text)
    for words in HOSTILE[:6]:
        assert words in shown  # as it was written, and not left out
    assert "49" not in shown


# ---- cards

NAMES = (
    "x\nlicense: mit\nevil: true",
    "x: [y, z]",
    "!!python/object/apply:os.system [id]",
    "--- \n...",
    "'x\" # y",
    '"); import os; os.mkdir("pwned',
    "<script>alert(1)<|script>",
    "[click](javascript:alert(1))",
    "``` \n# evil\n```python",
    "# heading\n\n- list",
    "yes",
    "1e5",
    "\u2028license: mit",
    "*{&anchor}",
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_pipeline(tiny.score_folder(tmp_path_factory.mktemp("card") / "teacher"))


def card_of(teacher: Teacher, base: str, name: str, lora: str) -> str:
    method = Method(**split(teacher.default_steps))
    teacher.folder = Path(base)
    notes = Notes(method.student_timesteps, 3.0)
    return export.model_card(name, teacher, notes, "Trained.", lora)


@pytest.mark.parametrize("lora", ["", "lora.safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_on_a_card_is_a_name(teacher: Teacher, name: str, lora: str) -> None:
    """In the head for machines, in the code to copy, and in the prose."""
    plain, card = card_of(teacher, "base", "student", lora), card_of(teacher, name, name, lora)
    _, head, body = card.split("---\n", 2) if "---" not in name else parted(card)
    _, plain_head, plain_body = plain.split("---\n", 2)
    expected = yaml.safe_load(plain_head) | {"base_model": name}
    assert yaml.safe_load(head) == expected

    pieces, plain_pieces = (re.split("^```(?:python)?$", b, flags=re.M) for b in (body, plain_body))
    assert len(pieces) == len(plain_pieces) == 3
    code, plain_code = (ast.parse(p[1]) for p in (pieces, plain_pieces))
    assert [type(n) for n in ast.walk(code)] == [type(n) for n in ast.walk(plain_code)]
    assert name in [n.value for n in ast.walk(code) if isinstance(n, ast.Constant)]

    for said, plainly in ((pieces[0], plain_pieces[0]), (pieces[2], plain_pieces[2])):
        assert said.count("\n") == plainly.count("\n")
        assert not re.search(r"(?<!\\)[<\[*]", said.replace("`", ""))
        assert said.count("`") - said.count("\\`") == plainly.count("`")


def parted(card: str) -> tuple[str, str, str]:
    """By the first and the second line that is a rule alone, as the hub reads it."""
    lines = card.split("\n")
    rules = [i for i, line in enumerate(lines) if line == "---"]
    first, second = rules[:2]
    return "", "\n".join(lines[first + 1 : second]), "\n".join(lines[second + 1 :])


def test_a_card_names_a_base_that_is_elsewhere_by_its_name_alone(teacher: Teacher) -> None:
    for lora in ("", "lora.safetensors"):
        assert "/srv" not in card_of(teacher, "/srv/somebody/models/sd15", "student", lora)
        assert "acme/sd15" in card_of(teacher, "acme/sd15", "student", lora)
