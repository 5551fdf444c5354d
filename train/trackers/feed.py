"""All trackers of a run, each in a thread of its own: none delays or ends training."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from core.console import one_line
from core.files import write_atomically
from train.trackers.base import TRACKERS, RunInfo, Tracker

logger = logging.getLogger("soundwave")
IDS = "trackers.json"  # in the run's folder: the trackers' ids of the run
WAITING = 10_000  # entries of a tracker that falls behind; further ones are dropped
CLOSING_SECONDS = 60.0
HURRIED_SECONDS = 5.0  # where the job's time limit is near
MOST_FAILURES = 3


class Feed:
    """One tracker behind a queue. It starts in its thread: a server that does not answer delays nothing.

    A call that fails is logged; after MOST_FAILURES failures, or a failed start, nothing more is recorded.
    """

    def __init__(self, name: str, run: RunInfo, save_id: Callable[[str, str], None]):
        self.name, self.dropped = name, 0
        self.waiting: queue.Queue[tuple[str, tuple]] = queue.Queue(WAITING)
        self._save_id = save_id
        self.thread = threading.Thread(target=self._work, args=(run,), name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def put(self, method: str, *arguments) -> None:
        if not self.thread.is_alive():
            return
        try:
            self.waiting.put_nowait((method, arguments))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning("tracker %s is too slow: entries are dropped from it", self.name)

    def close(self, deadline: float) -> None:
        """Wait for what is queued, up to a time of time.monotonic()."""
        self.put("close")
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            logger.warning("tracker %s does not end: its last entries may be missing", self.name)

    def _work(self, run: RunInfo) -> None:
        tracker = self._started(run)
        failures = 0
        while tracker is not None:
            method, arguments = self.waiting.get()
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                failures += 1
                logger.warning("tracker %s: %s failed (%s)", self.name, method, one_line(error))
                if failures == MOST_FAILURES:
                    logger.warning("tracker %s records nothing more in this process", self.name)
                    return
            if method == "close":
                return

    def _started(self, run: RunInfo) -> Tracker | None:
        try:
            kind = TRACKERS[self.name]
            if run.run_id is None and (new := kind.new_run_id()) is not None:
                self._save_id(self.name, new)  # first: the start may be interrupted
                run = replace(run, run_id=new)
            tracker = kind(run)
            if tracker.run_id is not None and tracker.run_id != run.run_id:
                self._save_id(self.name, tracker.run_id)
            return tracker
        except BaseException as error:  # SystemExit too, which a library's login may raise
            logger.warning("tracker %s does not start (%s): training continues", self.name, one_line(error))
            return None


class Trackers:
    """The trackers of a run, on rank 0."""

    def __init__(self, names: list[str], run: RunInfo):
        self.path = run.folder / IDS
        self._lock = threading.Lock()
        self.ids = _read_ids(self.path)
        self.feeds = [Feed(name, replace(run, run_id=self.ids.get(name)), self._save_id) for name in names]

    def scalars(self, step: int, prefix: str, values: dict) -> None:
        numbers = {
            f"{prefix}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        self._put("scalars", step, numbers)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._put("picture", step, name, path)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[str]]) -> None:
        self._put("table", step, name, columns, rows)

    def close(self, hurry: bool = False) -> None:
        deadline = time.monotonic() + (HURRIED_SECONDS if hurry else CLOSING_SECONDS)
        for feed in self.feeds:
            feed.close(deadline)

    def _put(self, *entry) -> None:
        for feed in self.feeds:
            feed.put(*entry)

    def _save_id(self, name: str, run_id: str) -> None:
        with self._lock:
            self.ids[name] = run_id
            write_atomically(self.path, json.dumps(self.ids, indent=1))


def _read_ids(path: Path) -> dict[str, str]:
    try:
        ids = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or damaged: the trackers begin new runs
        return {}
    if not isinstance(ids, dict):
        return {}
    return {name: run_id for name, run_id in ids.items() if isinstance(run_id, str)}
