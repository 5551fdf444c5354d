"""Hugging Face `datasets`: Parquet as the hub stores it, and folders written by save_to_disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.console import one_line
from data_tools.corpora import CorpusError, Entry, Reader, is_held_out
from data_tools.corpora.columns import check_same_meaning, columns_and_values, number, time_columns
from data_tools.sources import may_hold_audio, record_batches

TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_transcription")
_TEXTS = ("text", "label", "prompt", "response", "lang")


class HuggingFace(Reader):
    """PATH is a .parquet file, a folder of such files, or a save_to_disk folder (data-*.arrow).

    audio, text, id, speaker, label, prompt, response, lang_column, duration (seconds): names of columns;
    audio and text are found where they bear usual names. Numbers of classes become the names that the file
    has for them; a list of classes or strings under label, these joined by commas. speaker, label and prompt
    may also be the value of all entries: whatever is no column's name. Without id=COLUMN, an id is made of
    file and row (a column `id` may be a sentence's, which several clips share). split: only files whose name
    begins with it, or whose folder has it; without it, all but those of dev, test and validation. Where audio
    is a column of paths, columns named like beginnings and ends (start, end_time) are refused, unless ignore
    names them (ignore=start+end_time): clips of stretches are not cut here. What Dataset.map leaves in a
    saved folder (cache-*, tmp*) is not read. Rows of one Parquet row group stay together in the shuffle,
    since a row cannot be read without its group.
    """

    COLUMNS = ("text", "id", "speaker", "label", "prompt", "response", "duration")

    def __init__(
        self,
        path: Path,
        audio: str | None = None,
        text: str | None = None,
        id: str | None = None,
        speaker: str | None = None,
        label: str | None = None,
        prompt: str | None = None,
        response: str | None = None,
        lang_column: str | None = None,
        duration: str | None = None,
        split: str | None = None,
        ignore: str | None = None,
    ):
        arguments = locals()
        self.named = {column: arguments[column] for column in self.COLUMNS if arguments[column]}
        if lang_column:
            self.named["lang"] = lang_column
        self.audio, self.columns_read = audio, ""
        self.first_columns: tuple[dict[str, str], dict[str, str]] | None = None
        self.ignored = frozenset(ignore.split("+")) if ignore else frozenset()
        self.root = path.parent if path.is_file() else path
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _holds_data(p))
        if split is None and path.is_dir():
            self.files = [p for p in files if not any(map(is_held_out, p.relative_to(path).parts))]
            if files and not self.files:
                raise CorpusError(f"{path} holds test sets alone: name one with split=")
        else:
            self.files = [
                p for p in files if split is None or p.name.startswith(split) or p.parent.name == split
            ]
        if not self.files:
            raise CorpusError(
                f"{path} holds no .parquet or .arrow file" + (f" of split {split}" if split else "")
            )

    def records(self) -> Iterator[tuple[str, Any]]:
        for file in self.files:
            with _readable(file):
                yield from self._parquet(file) if file.suffix == ".parquet" else self._arrow(file)

    def sample(self, record: tuple[dict[str, list], int, str, dict[str, Any]], where: str) -> Entry:
        columns, row, sample_id, constant = record
        values: dict[str, Any] = {
            field: None if column[row] is None else str(column[row]) for field, column in columns.items()
        }
        values["duration"] = number(values.get("duration"))
        values["id"] = values.get("id") or sample_id
        return Entry(**constant, **values)

    def facts(self) -> list[str]:
        return [f"{self.root.name}: {self.columns_read}"] if self.columns_read else []

    def _name(self, file: Path) -> str:
        """Of the file in its rows' ids: folders of one dataset (languages, say) have files of the same
        name."""
        return file.relative_to(self.root).with_suffix("").as_posix()

    def _columns(self, schema, file: Path) -> tuple[str, dict[str, str], dict[str, str]]:
        """The audio column, {entry field: column} and {entry field: value of all} for one file."""
        names = list(schema.names)
        column_options = self.named | ({"audio": self.audio} if self.audio else {})
        fields, values = columns_and_values(column_options, names, file)
        fields.pop("audio", None)
        self.first_columns = self.first_columns or (dict(fields), values)
        check_same_meaning(self.first_columns, (fields, values), file)
        audio = self.audio or next(
            (name for name in names if name == "audio" or _is_audio_struct(schema.field(name).type)), None
        )
        if audio is None:
            raise CorpusError(
                f"{file} has no audio column: name it with audio=COLUMN (columns: {', '.join(names)})"
            )
        kind = schema.field(audio).type
        if not may_hold_audio(kind):
            raise CorpusError(
                f"{file}: column '{audio}' holds {kind}: audio is bytes, a path, {{bytes, path}} or {{array, "
                f"sampling_rate}}"
            )
        if "text" not in fields and (text := next((name for name in TEXT_COLUMNS if name in names), None)):
            fields["text"] = text
        if _holds_paths(kind):
            others = time_columns(names, {audio, *fields.values(), *self.ignored})
            if stretch := [name for name, meaning in others.items() if meaning in ("start", "end")]:
                raise CorpusError(
                    f"{file}: {' and '.join(stretch)} would be left out, and '{audio}' is a column of paths: "
                    f"each clip would be "
                    f"the whole file. ignore={'+'.join(stretch)} if that is right, else write a table "
                    f"(table:FILE.csv)"
                )
        used = ", ".join(
            f"{column} (as {field})" if column != field else field
            for field, column in {"audio": audio, **fields}.items()
        )
        unused = [name for name in names if name != audio and name not in fields.values()]
        self.columns_read = f"reads {used}" + (f"; leaves out {', '.join(unused)}" if unused else "")
        for field, column in fields.items():
            _check_type(field, column, schema.field(column).type, _class_names(schema, column), file)
        return audio, fields, values

    def _parquet(self, file: Path) -> Iterator[tuple[str, Any]]:
        import pyarrow.parquet

        parquet, first = pyarrow.parquet.ParquetFile(file), 0
        audio, fields, constant = self._columns(parquet.schema_arrow, file)
        for group in range(parquet.num_row_groups):
            metadata = parquet.metadata.row_group(group)
            leaves = [metadata.column(number) for number in range(metadata.num_columns)]
            size = sum(
                leaf.total_compressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] == audio
            )
            columns = {}
            if fields:
                table = parquet.read_row_group(group, columns=sorted(set(fields.values())))
                columns = {
                    field: _values(table.column(column), parquet.schema_arrow, column)
                    for field, column in fields.items()
                }
            columns |= {field: [value] * metadata.num_rows for field, value in constant.items()}
            place, name = f"parquet:{file}#{group}", self._name(file)
            yield from _rows(
                columns,
                metadata.num_rows,
                size // max(1, metadata.num_rows),
                place,
                audio,
                name,
                first,
                group=place,
            )
            first += metadata.num_rows

    def _arrow(self, file: Path) -> Iterator[tuple[str, Any]]:
        first = 0
        for place, batch in enumerate(record_batches(str(file))):
            audio, fields, constant = self._columns(batch.schema, file)
            columns = {
                field: _values(batch.column(column), batch.schema, column) for field, column in fields.items()
            }
            columns |= {field: [value] * batch.num_rows for field, value in constant.items()}
            size, name = batch.column(audio).nbytes // max(1, batch.num_rows), self._name(file)
            yield from _rows(
                columns, batch.num_rows, size, f"arrow:{file}#{place}", audio, name, first, group=None
            )
            first += batch.num_rows


def _holds_data(file: Path) -> bool:
    """Dataset.map leaves its results in the folder of a saved dataset, as cache-*.arrow: the same clips, or
    some, again."""
    return (
        file.suffix == ".parquet" or file.suffix == ".arrow" and not file.name.startswith(("cache-", "tmp"))
    )


def _holds_paths(kind) -> bool:
    from pyarrow import types

    return not types.is_binary(kind) and not types.is_large_binary(kind) and not _is_audio_struct(kind)


def _is_audio_struct(kind) -> bool:
    """Whether a column holds Hugging Face's Audio: {bytes, path}, or {array, sampling_rate, path} once it was
    decoded."""
    from pyarrow import types

    return types.is_struct(kind) and ("bytes" in kind.names or {"array", "sampling_rate"} <= set(kind.names))


def _class_names(schema, column: str) -> list[str] | None:
    """What `datasets` noted in the file: names of the classes that a column, or the lists in it, holds the
    numbers of."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        while (
            isinstance(feature, list) or feature["_type"] != "ClassLabel"
        ):  # [...] is how older versions wrote a list
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        return feature["names"] if isinstance(feature["names"], list) else None
    except (
        TypeError,
        LookupError,
        ValueError,
    ):  # no metadata, not datasets' own, or no classes in this column
        return None


def _check_type(field: str, column: str, kind, names: list[str] | None, file: Path) -> None:
    """Refuse unusable training targets: the bare number of a class, a list or struct as Python
    prints it."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    value = kind.value_type if is_list else kind
    option = "lang_column" if field == "lang" else field
    if types.is_nested(value) or is_list and field != "label":
        raise CorpusError(
            f"{file}: column '{column}' holds {kind}, which is no {field}: name another with {option}=COLUMN"
        )
    if field in _TEXTS and not types.is_integer(value) and not _holds_text(value):
        raise CorpusError(
            f"{file}: column '{column}' holds {kind}, which is no {field}: name another with {option}=COLUMN"
        )
    if field in _TEXTS and types.is_integer(value) and names is None:
        raise CorpusError(
            f"{file}: column '{column}' holds numbers, and the file has no class names for them: name a "
            f"column of words with "
            f"{option}=COLUMN, or write the words into one"
        )


def _holds_text(kind) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    is_view = getattr(types, "is_string_view", lambda kind: False)
    return types.is_string(kind) or types.is_large_string(kind) or is_view(kind) or types.is_null(kind)


def _values(array, schema, column: str) -> list:
    """A column's values; classes by their names, and None for a number that has none (-1: the class is not
    known)."""
    values, names = array.to_pylist(), _class_names(schema, column)
    if names is not None:
        names_by_number = dict(enumerate(names))
        values = [
            [names_by_number.get(v) for v in value] if isinstance(value, list) else names_by_number.get(value)
            for value in values
        ]
    return [
        ", ".join(str(v) for v in value if v is not None) or None if isinstance(value, list) else value
        for value in values
    ]


def _rows(
    columns: dict[str, list],
    rows: int,
    size: int,
    place: str,
    audio: str,
    name: str,
    first: int,
    group: str | None,
) -> Iterator[tuple[str, Any]]:
    for row in range(rows):
        sample_id = f"{name}-{first + row:09d}"
        constant = {"audio": f"{place}/{row}/{audio}", "size": size, "group": group, "source": name}
        yield sample_id, (columns, row, sample_id, constant)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Errors: CorpusError for a file that pyarrow cannot read."""
    import pyarrow

    try:
        yield
    except CorpusError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        detail = one_line(error)[:200]
        raise CorpusError(
            f"{file} cannot be read, it may be damaged or no Parquet or Arrow file: {detail}"
        ) from None
