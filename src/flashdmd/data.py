"""What people bring: prompts in a file."""

import json
from pathlib import Path

from flashdmd.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: .txt, one a line, or .jsonl, objects with a "prompt".

    Blank lines are skipped. Raises UserError for a file that cannot be read, is not UTF-8, holds
    no prompt, or has a line that is none.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"the prompt file {path} is not UTF-8 (byte {e.start}); save it as UTF-8 text"
        ) from e
    except OSError as e:
        raise UserError(
            f"the prompt file {path} cannot be read: {e.strerror or e}; give a .txt file with one "
            'prompt a line, or .jsonl with {"prompt": ...} a line'
        ) from e
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    prompts = [line for _, line in lines]
    if path.suffix == ".jsonl":
        prompts = [_prompt(path, i, line) for i, line in lines]
    if not prompts:
        raise UserError(f"the prompt file {path} is empty; write one prompt a line")
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f'{path}, line {number}: not an object with a "prompt"') from e
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{path}, line {number}: "prompt" must be a text that is not empty')
    return prompt.strip()
