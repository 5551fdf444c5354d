"""The predictions file: JSON lines that an interruption cannot spoil, one part a rank, merged at the end.

NAME.jsonl             all rows, in the order of their keys, once every rank is done
NAME.rank-R.jsonl      what rank R has so far (appended and flushed batch by batch; deleted after the merge)
NAME.run.json          the settings that the predictions depend on: a second run with others is refused
NAME.rejected.jsonl    samples that could not be read: id and why
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.console import OneLine, shown
from core.decode_names import decode_name


class PredictionError(OneLine, ValueError):
    """A predictions file that cannot be used; the message is one line: what, where, what to do."""


def read_rows(path: Path) -> list[dict]:
    """All complete rows. A last line cut short by a kill is dropped; a broken line elsewhere is an error."""
    return [row for _, row in _numbered_rows(path)]


def _numbered_rows(path: Path) -> Iterator[tuple[int, dict]]:
    if not path.exists():
        raise PredictionError(f"{path} does not exist: give a file written by evaluation.run")
    lines = path.read_bytes().split(b"\n")  # as bytes: a kill may cut a character, too
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the write was cut
                break
            raise PredictionError(
                f"{path}, line {number} is not JSON ({error}): restore the file or delete it"
            ) from None


_TEXTS = ("corpus", "task", "lang", "target_lang", "label", "prompt", "raw", "transcript")
_NUMBERS = ("duration", "frames", "kept", "tokens", "wall")


def read_predictions(path: Path) -> tuple[list[dict], list[str]]:
    """Rows to be scored, whoever wrote them, and what is to be said about them.

    A row that is there twice is counted once. Errors: PredictionError for a row that lacks what scoring
    needs, and for two rows of the same id that differ.
    """
    rows: dict[str, tuple[int, dict]] = {}
    repeated = 0
    for number, content in _numbered_rows(path):
        row = _checked(content, f"{path}, line {number}")
        first, earlier = rows.setdefault(prediction_key(row), (number, row))
        if earlier is row:
            continue
        if any(earlier[key] != row[key] for key in ("reference", "prediction")):
            raise PredictionError(
                f"{path}, line {number}: {prediction_key(row)} is there twice and differs from line {first}: "
                "keep one"
            )
        repeated += 1
    notes = [f"{repeated} rows are there twice and counted once"] if repeated else []
    return [row for _, row in rows.values()], notes


def _checked(row: object, where: str) -> dict:
    """The row with its texts as text. Errors: PredictionError."""
    if not isinstance(row, dict):
        raise PredictionError(f"{where} is no JSON object: a prediction has id, reference and prediction")
    if row.get("id") is None:
        raise PredictionError(f"{where} has no id")
    row = dict(row)
    for key in ("reference", "prediction"):
        if row.get(key) is None:
            raise PredictionError(f'{where} ({row["id"]}) has no {key}: give text, "" where nothing was said')
    for key in ("reference", "prediction", *_TEXTS):
        if isinstance(row.get(key), (dict, list)):
            raise PredictionError(f"{where} ({row['id']}): {key} is no text")
        if row.get(key) is not None:
            row[key] = str(row[key])
    for key in _NUMBERS:
        if row.get(key) is not None and (
            isinstance(row[key], bool) or not isinstance(row[key], (int, float))
        ):
            raise PredictionError(f"{where} ({row['id']}): {key} is {shown(row[key])}, not a number")
    choices = row.get("choices")
    if choices is not None and not (
        isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    ):
        raise PredictionError(f"{where} ({row['id']}): choices is no list of texts")
    return row


class PredictionFile:
    """One run's predictions: knows what is done, appends what comes, merges the ranks' parts."""

    def __init__(self, path: Path, settings: dict, rank: int = 0, restart: bool = False):
        """Open (or start) `path`; PredictionError when it was made with other settings and `restart` is not
        given."""
        self.path, self.settings, self.rank = path, settings, rank
        self.part = path.with_suffix(f".rank-{rank}.jsonl")
        self.rejected_part = path.with_suffix(f".rank-{rank}.rejected.jsonl")
        self.run_file = path.with_suffix(".run.json")
        self.restart = restart

    def parts(self) -> list[Path]:
        files = self.path.parent.glob(f"{self.path.stem}.rank-*.jsonl")
        return sorted(file for file in files if not file.name.endswith(".rejected.jsonl"))

    def prepare(self) -> None:
        """Rank 0, before any rank reads: check or write the settings, and clear old rows on restart."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before, job = (
            json.loads(self.run_file.read_text()) if self.run_file.exists() else None,
            os.environ.get("SOUNDWAVE_JOB"),
        )
        if self.restart and not (
            job and before and before.get("job") == job
        ):  # a job that is requeued throws nothing away twice
            whole = [self.path, self.run_file, self.path.with_suffix(".rejected.jsonl")]
            for old in [*self.parts(), *self._rejected_parts(), *whole]:
                old.unlink(missing_ok=True)
            before = None
        if before is None and (existing := [*self.parts(), *([self.path] if self.path.exists() else [])]):
            raise PredictionError(
                f"{existing[0]} is there, but not {self.run_file.name}, which records its settings: give "
                f"another "
                "--out, or --restart to throw it away"
            )
        if before is not None:
            if "decode" in before:
                before["decode"] = decode_name(before["decode"])
            now = json.loads(json.dumps(self.settings))
            changed = [
                key
                for key in sorted((before.keys() | now.keys()) - {"job"})
                if before.get(key) != now.get(key)
            ]
            if changed:
                what = ", ".join(
                    f"{key} was {shown(before.get(key))}, is {shown(now.get(key))}" for key in changed
                )
                raise PredictionError(
                    f"{self.path} was made with other settings ({what}): give another --out, or --restart to "
                    "throw these predictions away"
                )
        else:
            record = {**self.settings, **({"job": job} if job else {})}
            self.run_file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def done(self) -> set[str]:
        """Keys of the rows that some rank has finished."""
        files = [*self.parts(), *([self.path] if self.path.exists() else [])]
        return {row_key(row) for file in files for row in read_rows(file)}

    def append(self, rows: list[dict], rejected: Sequence[dict] = ()) -> None:
        """Add rows; they are on disk when this returns."""
        for file, new in ((self.part, rows), (self.rejected_part, rejected)):
            if not new:
                continue
            end_last_line(file)
            with file.open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)

    def merge(self) -> list[dict]:
        """Rank 0, after every rank is done: one file in the order of the keys; the parts are deleted after it
        is written."""
        rows = {
            row_key(row): row
            for file in [self.path, *self.parts()]
            if file.exists()
            for row in read_rows(file)
        }
        ordered = [rows[key] for key in sorted(rows)]
        _replace(self.path, ordered)
        target = self.path.with_suffix(".rejected.jsonl")
        rejected = {
            row_key(row): row
            for file in [target, *self._rejected_parts()]
            if file.exists()
            for row in read_rows(file)
            if row_key(row) not in rows
        }
        if rejected:
            _replace(target, list(rejected.values()))
        else:
            target.unlink(missing_ok=True)
        for part in [*self.parts(), *self._rejected_parts()]:
            part.unlink()
        return ordered

    def _rejected_parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.rank-*.rejected.jsonl"))


def row_key(row: dict) -> str:
    """Corpus and id together are unique; ids alone may repeat between corpora."""
    return f"{row.get('corpus') or ''}/{row['id']}"


def prediction_key(row: dict) -> str:
    """What a prediction is known by among those of one file: one clip may be asked for several tasks."""
    return f"{row_key(row)} of task {row.get('task') or 'asr'}"


def end_last_line(file: Path) -> None:
    """Before appending: end a last line that lacks its newline alone (it counts as a row), and cut a
    half-written one off."""
    if file.exists() and file.stat().st_size:
        content = file.read_bytes()
        if not content.endswith(b"\n"):
            begin = content.rfind(b"\n") + 1
            with file.open("r+b") as out:
                try:
                    json.loads(content[begin:])
                except ValueError:
                    out.truncate(begin)
                else:
                    out.seek(len(content))
                    out.write(b"\n")


def _replace(path: Path, rows: list[dict]) -> None:
    scratch = path.with_suffix(path.suffix + ".new")
    scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    scratch.replace(path)
