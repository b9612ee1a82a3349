import json
import os
import random
import signal
from collections.abc import Callable

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals():
    """Commands that are called in this process leave theirs, and Ctrl-C is for all tests."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)  # before -m is asked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What benchmarks/reliability.py selects and reads, also of a test that fails."""
    for item in items:
        for mark in item.iter_markers("fault"):
            item.user_properties.append(("fault", json.dumps(mark.args)))
        if "figure" in getattr(item, "fixturenames", ()):
            item.add_marker("figure")


@pytest.fixture
def lost(record_property: Callable[[str, object], None]) -> Callable[[int, str], None]:
    """Records what a fault cost as counted by the test, e.g. lost(2, "iterations")."""
    return lambda count, of: record_property("lost", json.dumps((count, of)))


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, float, str], None]:
    """Records what a test measured for docs/reliability.md: a name, a number and its unit."""
    return lambda name, value, unit: record_property("figure", json.dumps((name, value, unit)))


@pytest.fixture
def chance() -> random.Random:
    """The moments of faults: the same each time, but not in the tries of the reliability table."""
    return random.Random(int(os.environ.get("FLASHDMD_TRY", "0")))
