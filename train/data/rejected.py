"""What was thrown out and why: named, counted, and the run stopped when it is too much."""

from __future__ import annotations

import json
import os
from pathlib import Path

from train.config import RecipeError

# A share is judged over at least this many utterances: one broken clip among the first three is not a third of a corpus.
LEAST_UTTERANCES = 1000


class BrokenSample(ValueError):
    """One utterance that cannot be used; the message says why."""


class UnreadableSample(BrokenSample):
    """... because the file system refused it, again and again."""


class TooManyRejected(RecipeError):
    """More than `data.max_rejected_share` of the utterances were broken; the message lists them."""


class RejectedLog:
    """Counts and names broken utterances of one rank, each once; appends one JSON line each to `path` (None: only counts).

    Every rank appends to the same file, one write() per line, so lines of different ranks do not mix.
    """

    def __init__(self, path: str | Path | None, share: float):
        self.path, self.share = None if path is None else Path(path), share
        self.seen = 0  # utterances asked for
        self.records: list[dict] = []
        self._names: set[tuple] = set()

    def write(self, records: list[dict]) -> None:
        """Name utterances without counting them against the share (the recipe's own limits)."""
        if self.path is None or not records:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, lines.encode())
        finally:
            os.close(descriptor)

    def add(self, records: list[dict], seen: int) -> None:
        """Errors: TooManyRejected past the share."""
        self.seen += seen
        new = []
        for record in records:
            name = (record["corpus"], record["id"])
            if name not in self._names:
                self._names.add(name)
                new.append(record)
        self.records += new
        self.write(new)
        if len(self.records) > self.share * max(self.seen, LEAST_UTTERANCES):
            last = "; ".join(f"{r['id']} ({r['reason']})" for r in self.records[-10:])
            where = f"all in {self.path}, " if self.path else ""
            raise TooManyRejected(f"{len(self.records)} of {self.seen} utterances could not be used, more than "
                                  f"data.max_rejected_share={self.share:g}: {where}the last: {last}. Mend the shards "
                                  "(python -m data_tools.verify DIR) or raise the share")
