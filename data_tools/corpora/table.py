"""Tables with a column map: CSV, TSV and JSONL of any origin."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from data_tools.corpora import CorpusError, Entry, Fault, check_same_meaning, columns_and_values, number

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def open_text(path: Path):
    """A text file, gzipped or not; undecodable bytes become marks rather than errors."""
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", errors="replace", newline="")


def usual_delimiter(path: Path) -> str:
    return "," if ".csv" in path.suffixes else "\t"


def rows(
    path: Path,
    delimiter: str | None = None,
    quoted: bool = True,
    header: list[str] | None = None,
    escape: str | None = None,
) -> Iterator[tuple[int, dict]]:
    """(line number, row) of a CSV or TSV, one at a time. header: column names of a file without a line of them; escape: the
    sign before signs that would mean something else."""
    delimiter = delimiter or usual_delimiter(path)
    with open_text(path) as file:
        reader = csv.DictReader(
            file,
            fieldnames=header,
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            escapechar=escape,
        )
        for row in reader:
            yield reader.line_num, row


class Table:
    """FILE.csv, .tsv or .jsonl (also .gz) whose columns are named by options: audio=path,text=sentence,label=emotion.

    Columns: id, audio, text, duration, offset, end (instead of duration, with offset), lang_column, target_lang, speaker,
    prompt, response, label, recording, hypothesis, sound_hash. A column that is not named and exists under its own name is
    taken. target_lang, speaker, prompt and label may also be a value, which entries without one of their own get: whatever is
    no column's name. root: folder that relative audio paths start from (default: the table's); suffix: appended to them.
    delimiter: between cells (default: a comma in .csv, else a tab). quoting: whether cells may stand in double quotes, as CSV
    has them, yes or no (default: no between tabs, where a quote is a sign like any other, as in Common Voice; else yes).
    """

    COLUMNS = (
        "id",
        "audio",
        "text",
        "duration",
        "offset",
        "end",
        "target_lang",
        "speaker",
        "prompt",
        "response",
        "label",
        "recording",
        "hypothesis",
        "sound_hash",
    )

    def __init__(
        self,
        path: Path,
        id: str | None = None,
        audio: str | None = None,
        text: str | None = None,
        duration: str | None = None,
        offset: str | None = None,
        end: str | None = None,
        lang_column: str | None = None,
        target_lang: str | None = None,
        speaker: str | None = None,
        prompt: str | None = None,
        response: str | None = None,
        label: str | None = None,
        recording: str | None = None,
        hypothesis: str | None = None,
        sound_hash: str | None = None,
        root: str | None = None,
        suffix: str = "",
        delimiter: str | None = None,
        quoting: str | None = None,
        task: str | None = None,
        lang: str | None = None,
    ):
        self.path, self.suffix, self.task, self.lang = path, suffix, task, lang
        self.delimiter = delimiter or usual_delimiter(path)
        if quoting not in (None, "yes", "no"):
            raise CorpusError(f"quoting={quoting}: yes or no")
        self.quoted = quoting == "yes" if quoting else self.delimiter != "\t"
        self.root = Path(root).absolute() if root else path.parent
        given = locals()
        self.named = {column: given[column] for column in self.COLUMNS if given[column]}
        if lang_column:
            self.named["lang"] = lang_column
        self.jsonl = ".jsonl" in path.suffixes or ".json" in path.suffixes

    def _rows(self) -> Iterator[tuple[int, dict | None]]:
        if not self.jsonl:
            yield from rows(self.path, self.delimiter, self.quoted)
            return
        with open_text(self.path) as file:
            for place, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield place, json.loads(line)
                    except ValueError:
                        yield place, None

    def __iter__(self) -> Iterator[Entry | Fault]:
        columns, meant = None, None
        for place, row in self._rows():
            where = f"{self.path.name}:{place}"
            if not isinstance(row, dict):
                yield Fault(where, "bad_json", "not a JSON object")
                continue
            if row.keys() != columns:  # of JSONL, every line may have its own
                columns, before = row.keys(), meant
                meant = columns_and_values(self.named, columns, self.path)
                if before is not None:
                    check_same_meaning(before, meant, where)
                named, values = meant
            if self.delimiter == "\t" and not self.jsonl and _has_line_break(row, self.quoted):
                yield Fault(where, "bad_row", "a line break in a cell, or a quote that is not closed: write the cell without")
                continue
            cells = {column: row.get(named.get(column, column)) for column in (*self.COLUMNS, "lang")}
            cells = {column: value for column, value in cells.items() if value not in (None, "")}
            yield self._entry(values | cells, where, f"{self.path.stem}-{place:09d}")

    def _entry(self, cells: dict, where: str, default_id: str) -> Entry | Fault:
        times = {column: (number(cells.get(column)), str(cells.pop(column, ""))) for column in ("offset", "end", "duration")}
        for column, (seconds, told) in times.items():
            if seconds is None and told.strip():  # without its number, a segment would be the whole recording
                name = self.named.get(column, column)
                return Fault(str(cells.get("id", where)), "bad_row", f"{where}: {name} is '{told}', not a number")
        offset, end, duration = (seconds for seconds, _ in times.values())
        if end is not None:
            offset = offset or 0.0
            duration = end - offset
        cells = {column: str(value) for column, value in cells.items()}
        if "audio" in cells:
            cells["audio"] = str(self.root / (cells["audio"] + self.suffix))
        elif not (cells.get("prompt") and cells.get("response")):
            return Fault(cells.get("id", where), "bad_row", f"{where}: no audio path")
        cells.setdefault("id", default_id)
        if self.lang:
            cells.setdefault("lang", self.lang)
        return Entry(**cells, task=self.task, offset=offset, duration=duration)


def _has_line_break(row: dict, quoted: bool) -> bool:
    """Whether a TSV's row swallowed lines that follow, or is the first half of one that a quoted cell's line break cut."""
    cells = [cell for cell in row.values() if isinstance(cell, str)]
    if quoted:
        return any("\n" in cell or "\r" in cell for cell in cells)
    return bool(cells) and len(cells) < len(row) and cells[-1][:1] == '"' and (len(cells[-1]) == 1 or cells[-1][-1] != '"')
