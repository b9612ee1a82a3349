"""Commands in a process of their own in which nobody may speak to the network; what they tried.

python watched.py FOLDER COMMANDS.json: each a list of words; writes FOLDER/watched.json.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind",
           "socket.sendto", "urllib.Request", "http.client.connect", "webbrowser.open")  # fmt: skip
tried: list[str] = []


def hook(event: str, args: tuple[Any, ...]) -> None:
    at_home = event == "socket.bind" and args[1][0] in ("127.0.0.1", "::1")
    if event in NETWORK and not at_home:  # urllib3 asks so whether there is IPv6
        tried.append(f"{event} {args[1:]}")
        raise ConnectionError(f"{event}: nobody may speak to the network")


def run(words: Sequence[str]) -> dict[str, Any]:
    from flashdmd import cli

    out, err, begun, before = StringIO(), StringIO(), time.monotonic(), len(tried)
    sys.argv = ["flashdmd", *words]
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
        except Exception as e:  # a traceback, which a person should not see
            code = repr(e)
    return {
        "words": list(words),
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "seconds": time.monotonic() - begun,
        "tried": tried[before:],
    }


if __name__ == "__main__":
    sys.addaudithook(hook)
    folder = Path(sys.argv[1])
    os.chdir(folder)
    done = [run(words) for words in json.loads(Path(sys.argv[2]).read_text())]
    Path("watched.json").write_text(json.dumps(done))
