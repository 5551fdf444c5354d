"""What was thrown out and why: named, counted, and the run stopped when it is too much."""

from __future__ import annotations

from pathlib import Path

from core.console import OneLine, one_line
from core.files import append_lines, read_lines
from core.options import RecipeError

# A share is judged over at least this many utterances: one broken clip among the first three is not a third
# of a corpus.
LEAST_UTTERANCES = 1000


class BrokenSample(OneLine, ValueError):
    """One utterance that cannot be used; the message gives the reason."""


class UnreadableSample(BrokenSample):
    """... because the file system refused it, again and again."""


def broken_by(error: Exception) -> BrokenSample:
    """Turn whatever one utterance raised, on its way from the shard to its tokens, into the reject that names
    it."""
    return error if isinstance(error, BrokenSample) else BrokenSample(f"it cannot be used: {one_line(error)}")


class TooManyRejected(RecipeError):
    """More than `data.max_rejected_share` of the utterances were broken; the message lists them."""


class RejectedLog:
    """Names broken utterances, one JSON line each in `path` (None: nowhere), and judges their share."""

    def __init__(self, path: str | Path | None, share: float):
        self.path, self.share = None if path is None else Path(path), share
        self._named: set[tuple] = set()

    def write(self, records: list[dict]) -> None:
        if self.path is not None and records:
            append_lines(self.path, records)

    def _broken(self) -> list[dict]:
        """Lines about broken utterances, not about what the index rules out."""
        return [record for record in (read_lines(self.path) if self.path else []) if "replaced_by" in record]

    def add(self, records: list[dict]) -> None:
        """Write those that were not named before: not by this rank, not by another one, not before an
        interruption."""
        new = {
            (r["corpus"], r["id"]): r for r in reversed(records) if (r["corpus"], r["id"]) not in self._named
        }
        if new:
            self._named |= new.keys()
            logged = {(r["corpus"], r["id"]) for r in self._broken()}
            self.write([record for name, record in reversed(new.items()) if name not in logged])

    def too_many(self, rejected: int, samples: int) -> TooManyRejected | None:
        """What stops the run where `rejected` utterances beside `samples` good ones are past the share.
        Numbers over all ranks, so that all decide alike; a broken utterance counts each time it is met."""
        read = rejected + samples
        if rejected <= self.share * max(read, LEAST_UTTERANCES):
            return None
        last = "; ".join(f"{r['id']} ({r['reason']})" for r in self._broken()[-10:])
        listed = f"all in {self.path}, the last: {last}. " if last else ""
        return TooManyRejected(
            f"{rejected} of {read} utterances could not be used, more than data.max_rejected_share="
            f"{self.share:g}: {listed}Fix the shards (python -m data_tools.verify DIR) or raise the share"
        )
