"""What test files of several folders share."""

from __future__ import annotations

import signal

import pytest

#: What programs handle or ignore; a program that a test starts inherits what is ignored.
HANDLED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

pytest_plugins = ["tests.ci_skips"]


@pytest.fixture(autouse=True)
def signals_are_set_back():
    """A program's `main` that a test calls may handle or ignore signals; the next test's processes must not."""
    before = [(number, signal.getsignal(number)) for number in HANDLED]
    yield
    for number, handler in before:
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def server():
    """A process that forks ranks; it imports everything once for all files that a worker runs
    (tests/train/ranks.py)."""
    from tests.train.ranks import Server

    with Server() as started:
        yield started


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files so that those with many slow tests start first: workers take whole files
    (`--dist loadfile`), and a long file at the end would run on one worker only."""
    slow: dict[str, int] = {}
    for item in items:
        file = item.nodeid.partition("::")[0]
        weight = 20 if item.get_closest_marker("slurm") else 1 if item.get_closest_marker("slow") else 0
        slow[file] = slow.get(file, 0) + weight
    items.sort(key=lambda item: -slow[item.nodeid.partition("::")[0]])
