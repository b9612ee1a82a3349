"""Prompt files as people have them."""

from pathlib import Path

import pytest

from flashdmd.data import read_prompts
from flashdmd.errors import UserError


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", b"one\ntwo\n", ["one", "two"]),
        ("p.txt", b"\xef\xbb\xbfone\r\n\r\n  two  \r\n", ["one", "two"]),
        ("p.txt", "ein Hündchen".encode(), ["ein Hündchen"]),
        ("p.jsonl", b'{"prompt": "one"}\n\n{"prompt": " two ", "seed": 1}', ["one", "two"]),
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
