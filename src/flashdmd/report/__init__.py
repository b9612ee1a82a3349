"""One self-contained page a run: pictures first, then figures, curves and health verdicts."""

from flashdmd.report.page import write

__all__ = ["write"]
