"""What test files of several folders share."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.ci_skips"]


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
