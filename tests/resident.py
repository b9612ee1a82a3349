"""What the kernel counts for this process, and the most of it while a part of a course runs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def resident(what: str) -> float:
    """MiB of a line of /proc/self/status: VmRSS now, VmHWM the most, RssAnon without files."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(f"{what}:")) / 1024


class Course:
    """Peaks of its parts, in MiB, and their seconds."""

    def __init__(self) -> None:
        self.baseline = resident("VmRSS")
        self.anonymous = resident("RssAnon")
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is now what is resident
        anonymous, ended, started = [resident("RssAnon")], threading.Event(), time.perf_counter()

        def watch() -> None:
            while not ended.wait(0.005):
                anonymous.append(resident("RssAnon"))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        self.parts[name] = {
            "peak_mib": round(resident("VmHWM")),
            "anonymous_mib": round(max(anonymous)),
            "after_mib": round(resident("VmRSS")),
            "seconds": round(time.perf_counter() - started, 1),
        }
