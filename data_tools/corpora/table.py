"""Tables with a column map: CSV, TSV and JSON lines or lists of any origin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.corpora import Entry, Reader, Rejection, as_name, kind_of_value
from data_tools.corpora.beside import Beside
from data_tools.corpora.columns import (
    as_options,
    check_same_meaning,
    columns_and_values,
    number,
    proposal,
    time_columns,
    unused_times,
)
from data_tools.corpora.manifest import FACTS_OF, key_facts
from data_tools.text_files import (
    DELIMITERS,
    CorpusError,
    Problem,
    bare_suffixes,
    json_items,
    table_rows,
    usual_delimiter,
)

_TIMES = ("offset", "end", "duration")
_NAMES = ("id", "speaker", "recording", "sound_hash")


class Table(Reader):
    """FILE.csv, .tsv, .jsonl, .json (also compressed), its columns named by options:
    audio=path,text=sentence,label=emotion.

    Columns: id, audio, text, duration, offset, end (instead of duration, with offset), lang_column,
    target_lang, speaker, prompt, response, label, recording, hypothesis, sound_hash. A column that is not
    named and exists under its own name is taken. target_lang, speaker, prompt and label may also be a value,
    which entries without one of their own get: whatever is no column's name. root: folder that relative audio
    paths start from (default: the table's); suffix: appended to them. columns: names of the columns of a file
    that has no header line, joined by + (audio+text+normalised). delimiter: between cells, a sign or comma,
    tab, semicolon, bar (default: a comma in .csv, else a tab). quoting: whether cells may be in double
    quotes, yes or no (default: yes between commas and semicolons; no between tabs and bars, where a quote is
    a literal character, as in Common Voice and LJSpeech). Columns that are named like times (start, stop_ms)
    and not used are refused, unless ignore names them (ignore=start+stop_ms). A row with another number of
    cells than there are columns is refused. Audio files that lie beside the named ones are counted.
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
        columns: str | None = None,
        delimiter: str | None = None,
        quoting: str | None = None,
        ignore: str | None = None,
        task: str | None = None,
        lang: str | None = None,
    ):
        self.path, self.suffix, self.task, self.lang = path, suffix, task, lang
        signs = {name: sign for sign, name in DELIMITERS.items()}
        self.delimiter = signs.get(delimiter, delimiter) if delimiter else usual_delimiter(path)
        if len(self.delimiter) != 1:
            raise CorpusError(f"delimiter={delimiter}: one sign, or {', '.join(signs)}")
        if quoting not in (None, "yes", "no"):
            raise CorpusError(f"quoting={quoting}: yes or no")
        self.quoted = quoting == "yes" if quoting else self.delimiter not in "\t|"
        self.root = Path(root).absolute() if root else path.parent
        self.header = columns.split("+") if columns else None
        if self.header and len(set(self.header)) < len(self.header):
            raise CorpusError(f"columns={columns}: two columns have one name")
        self.ignored = frozenset(ignore.split("+")) if ignore else frozenset()
        arguments = locals()
        self.named = {column: arguments[column] for column in self.COLUMNS if arguments[column]}
        if lang_column:
            self.named["lang"] = lang_column
        self.jsonl = ".jsonl" in bare_suffixes(path) or ".json" in bare_suffixes(path)
        self.keys: Counter[str] = Counter()
        self.beside = Beside()
        self._of_columns: tuple | None = None  # columns, what they mean, and which are unused times
        self._rows = 0

    def records(self) -> Iterator[tuple[str, Any]]:
        self.keys.clear()
        self.beside.clear()
        self._of_columns, self._rows = None, 0
        if self.jsonl:
            rows = json_items(self.path, self.encoding)
        else:
            rows = table_rows(self.path, self.delimiter, self.quoted, self.header, encoding=self.encoding)
        for place, row in rows:
            if (
                not self.jsonl
                and self.delimiter == "\t"
                and self.quoted
                and isinstance(row, dict)
                and _has_line_break(row)
            ):
                row = Problem("bad_row", "a line break in a cell of a TSV: write the cell without")
            yield f"{self.path.name}:{place}", row
        yield from self.beside.left(self.path.name)

    def _meaning(self, row: dict, where: str) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
        """(column of each field, values of all entries, times that are not used), of a row with these
        columns."""
        if self._of_columns is not None and (not self.jsonl or self._of_columns[0] == row.keys()):
            return self._of_columns[1]
        columns = row.keys()
        columns_of_fields, values = columns_and_values(self.named, columns, self.path)
        if self._of_columns is not None:
            check_same_meaning(self._of_columns[1][:2], (columns_of_fields, values), where)
        usable_columns = columns - (self.ignored - set(columns_of_fields.values()))
        fields = {
            field: columns_of_fields.get(field, field)
            for field in (*self.COLUMNS, "lang")
            if columns_of_fields.get(field, field) in usable_columns
        }
        for field in _TIMES:  # a time that another option names is not also one by its own name
            if field not in columns_of_fields and field in columns_of_fields.values():
                fields.pop(field, None)
        if not self.jsonl:
            self._check_columns(fields, list(columns))
        times = time_columns(columns, {*fields.values(), *self.ignored})
        self._of_columns = dict(row).keys(), (fields, values, times)
        return self._of_columns[1]

    def _check_columns(self, fields: dict[str, str], columns: list[str]) -> None:
        if "audio" in fields or "prompt" in fields and "response" in fields:
            return
        proposed = proposal(columns, ("audio", "text", "speaker"))
        hint = (
            f"; perhaps {as_options(self.named | proposed)}"
            if "audio" in proposed
            else "; name it: audio=COLUMN"
        )
        if not self.header and "audio" not in proposed:
            hint += ". If the first line is no line of names, give columns=audio+text and so on"
        raise CorpusError(f"{self.path} has no column 'audio': its columns are {', '.join(columns)}{hint}")

    def sample(self, row: Any, where: str) -> Entry | Rejection:
        if not isinstance(row, dict):
            return Rejection(where, "bad_json", f"{kind_of_value(row)}, not a JSON object")
        self._rows += 1
        if self._rows <= FACTS_OF:
            self.keys.update(row.keys())
        fields, values, times = self._meaning(row, where)
        cells = {field: row[column] for field, column in fields.items() if row[column] not in (None, "")}
        sample_id = str(cells.get("id", where))
        if problem := self._times_problem(row, cells, times):
            if not self.jsonl:
                raise CorpusError(f"{self.path}: {problem}")
            return Rejection(sample_id, "bad_row", f"{where}: {problem}")
        seconds: dict[str, float | None] = {}
        for field in _TIMES:
            cell = cells.pop(field, None)
            seconds[field] = number(cell)
            if (
                seconds[field] is None and str(cell or "").strip()
            ):  # without it, a segment would be the whole recording
                cell_text = f"'{cell}'" if isinstance(cell, str | list) else kind_of_value(cell)
                return Rejection(
                    sample_id,
                    "bad_row",
                    f"{where}: {self.named.get(field, field)} is {cell_text}, not a number",
                )
        if seconds["end"] is not None and seconds["offset"] is not None:
            seconds["duration"] = seconds["end"] - seconds["offset"]
        if self.jsonl and (strange := _strange(cells)):
            return Rejection(sample_id, "bad_row", f"{where}: {strange}")
        cells = {**values, **cells}
        if "audio" in cells:
            cells["audio"] = str(self.root / (cells["audio"] + self.suffix))
            self.beside.name(cells["audio"])
        elif not (cells.get("prompt") and cells.get("response")):
            proposed = proposal(row, ("audio", "text"))
            hint = f"; perhaps {as_options(proposed)}" if self.jsonl and "audio" in proposed else ""
            return Rejection(sample_id, "bad_row", f"{where}: no audio path{hint}")
        cells.setdefault("id", f"{self.path.stem}-{int(where.rpartition(':')[2]):09d}")
        if self.lang:
            cells.setdefault("lang", self.lang)
        return Entry(**cells, task=self.task, offset=seconds["offset"], duration=seconds["duration"])

    def _times_problem(self, row: dict, cells: dict, times: dict[str, str]) -> str | None:
        """Why a row's times cannot be understood; None where they can."""
        unused = (
            unused_times(row, times, "offset" in cells, "end" in cells or "duration" in cells)
            if times
            else []
        )
        if unused:
            proposed = {"offset": next((n for n in unused if times[n] == "start"), None)}
            proposed["end"] = next((n for n in unused if times[n] == "end"), None)
            proposed["duration"] = next((n for n in unused if times[n] == "length"), None)
            options = as_options(
                {field: name for field, name in proposed.items() if name and field not in cells}
            )
            hint = f"give {options} if they are seconds, or " if options else ""
            names = " and ".join(f"'{name}'" for name in unused)
            return f"{names} would be left out: {hint}ignore={'+'.join(unused)} if they are not times in the file"  # noqa: E501
        if "end" in cells and "offset" not in cells:
            end = self.named.get("end", "end")
            return f"'{end}' without a beginning: name its column with offset=COLUMN, or give ignore={end} to leave it out"  # noqa: E501
        return None

    def facts(self) -> list[str]:
        used = set(self._of_columns[1][0].values()) if self._of_columns else set()
        fields = {column: field for field, column in self.named.items()}
        keys = Counter(
            {f"{key} (as {fields[key]})" if key in fields else key: n for key, n in self.keys.items()}
        )
        used = {f"{key} (as {fields[key]})" if key in fields else key for key in used}
        have = set(self._of_columns[1][0]) if self._of_columns else set()
        missing_fields = [field for field in ("audio", "text", "speaker", "label") if field not in have]
        return key_facts(self.path.name, keys, used, proposal(self.keys, missing_fields))


def _strange(cells: dict) -> str | None:
    """What is no text among a JSON row's cells; numbers of names become text."""
    for field, value in cells.items():
        if isinstance(value, str):
            continue
        if field in _NAMES and isinstance(as_name(value), str):
            cells[field] = as_name(value)
            continue
        return f"{field} is {kind_of_value(value)}, not text"
    return None


def _has_line_break(row: dict) -> bool:
    return any("\n" in cell or "\r" in cell for cell in row.values())
