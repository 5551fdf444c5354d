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
