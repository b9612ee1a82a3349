"""Prompt files as people have them."""

from pathlib import Path

import pytest

from flashdmd import config, run, sources
from flashdmd.data import read_prompts
from flashdmd.data.prompts import LONGEST
from flashdmd.errors import UserError


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", b"one\ntwo\n", ["one", "two"]),
        ("p.txt", b"\xef\xbb\xbfone\r\n\r\n  two  \r\n", ["one", "two"]),
        ("p.txt", "ein Hündchen".encode(), ["ein Hündchen"]),
        ("p.jsonl", b'{"prompt": "one"}\n\n{"prompt": " two ", "seed": 1}', ["one", "two"]),
        ("p.JSONL", b'{"prompt": "one"}', ["one"]),
        ("p", b"one", ["one"]),
        ("p.TXT", b"x" * LONGEST, ["x" * LONGEST]),
    ],
)
def test_prompts_are_read(name: str, content: bytes, prompts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b" \n\n", "is empty"),
        ("p.txt", b"one\n\xff", r"not UTF-8 \(byte 4\)"),
        ("p.jsonl", b'{"prompt": "one"}\n{"text": "two"}', "line 2"),
        ("p.jsonl", b'{"prompt": 3}', "line 1"),
        ("p.jsonl", b"[" * 5000, "line 1"),
        ("p.jsonl", b'{"prompt": " "}', "not empty"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1: the key 'prompt' is given twice"),
        ("p.jsonl", b'{"prompt": "a", "x": {"y": 1, "y": 1}}', "line 1: the key 'y' is given"),
        ("p.json", b'[{"prompt": "a"}]', r"ends in \.json; give a \.txt"),
        ("p.csv", b"prompt\na", r"ends in \.csv; give a \.txt"),
        ("p.txt", b"one\n" + b"x" * (LONGEST + 1), "line 2 has 10001 characters"),
        ("p.jsonl", b'{"prompt": "%s"}' % (b"x" * (LONGEST + 1)), 'line 1: "prompt" has 10001'),
    ],
)
def test_what_is_wrong_with_a_prompt_file_is_said(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_prompts(tmp_path / name)


def test_a_folder_and_a_missing_file_are_no_prompt_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match="cannot be read"):
            read_prompts(path)


@pytest.mark.parametrize("prompt", ["a\udcff", "a\0", "x" * (LONGEST + 1)])
def test_prompts_that_are_given_by_hand_are_looked_at_as_well(prompt: str, tmp_path: Path) -> None:
    """Before there is a folder or a model."""
    out = tmp_path / "out/s.png"
    with pytest.raises(UserError, match="prompt 2 h"):
        run.sample("nowhere", ["a cat", prompt], None, 0, None, out)
    assert not out.parent.exists()
    recipe = config.read("emoji-score", [])
    shown = recipe.validation.model_copy(update={"prompts": ("a cat", prompt)})
    with pytest.raises(UserError, match=r"validation\.prompts\[1\] h"):
        sources.prompts_of(recipe.model_copy(update={"validation": shown}))
