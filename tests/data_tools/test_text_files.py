"""Text of corpora: rows, encodings, compression and JSON as they really are; nothing is guessed, cut or
lost."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools import text_files
from data_tools.text_files import CorpusError, Problem, json_array, json_items, lines, table_rows, text_lines

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)


def rows_of(path, *arguments, **options):
    """(rows, {line: problem})"""
    rows = list(table_rows(path, *arguments, **options))
    problems = {place: item for place, item in rows if isinstance(item, Problem)}
    return [row for _, row in rows if isinstance(row, dict)], problems


@settings(max_examples=150, deadline=None)
@given(
    table=st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=6),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@example(table=[['a.wav,"x', "1\nb.wav,2,3", ""]], quoting=csv.QUOTE_ALL)
def test_what_a_csv_writer_writes_is_read_back(tmp_path_factory, table, quoting):
    """But for cells that hold rows of the table themselves: a quote that was not closed looks the same."""
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=quoting).writerows([["p", "q", "r"], *table])
    rows, problems = rows_of(path)
    if not problems:
        assert [list(row.values()) for row in rows] == table
    assert all("quote" in problem.detail for problem in problems.values())


@settings(max_examples=100, deadline=None)
@given(row=st.lists(st.text('ab ,"', max_size=6), min_size=1, max_size=6))
def test_a_row_written_without_quoting_is_whole_or_refused(tmp_path_factory, row):
    """Of a table of two columns: cells come as they were written, or the row is a problem; a cell never loses
    a part."""
    path = tmp_path_factory.mktemp("raw") / "t.csv"
    path.write_text("audio,text\n" + ",".join(row) + "\nz.wav,last\n")
    rows, problems = rows_of(path, quoted=False)
    cells = ",".join(row).split(",")
    if cells == [""]:
        assert len(rows) == 1
    elif len(cells) == 2:
        assert [list(r.values()) for r in rows] == [cells, ["z.wav", "last"]]
    else:
        assert [list(r.values()) for r in rows] == [["z.wav", "last"]] and list(problems) == [2]


@pytest.mark.parametrize(
    "body, texts, refused",
    [
        ("a.wav,And then, she said\nb.wav,two\n", ["two"], {2: "3 cells"}),
        ("a.wav,ends with a comma,\nb.wav,two\n", ["two"], {2: "3 cells"}),
        ("a.wav\nb.wav,two\n", ["two"], {2: "1 cells"}),
        ("a.wav,one\nb.wa", ["one"], {3: "1 cells"}),
        ('a.wav,"he said\nb.wav,two\nc.wav,"three"\n', ["two", "three"], {2: "quote"}),
        ('a.wav,"he said\nb.wav,two\nc.wav,three\n', ["two", "three"], {2: "not closed"}),
        ('a.wav,"Yes" he said\nb.wav,two\n', ["two"], {2: "double it"}),
        ('a.wav,"an inch\nb.wav,5"\nc.wav,three\n', ['5"', "three"], {2: "not closed"}),
        ('a.wav,"one\nstill, one"\nb.wav,two\n', ["one\nstill, one", "two"], {}),
        ('a.wav,he said "no"\nb.wav,"two ""2"""\n', ['he said "no"', 'two "2"'], {}),
        ("\n\na.wav,one\n\n", ["one"], {}),
        ("a.wav,one\r\nb.wav,two\r\n", ["one", "two"], {}),
    ],
)
def test_rows_that_do_not_fit_the_header(body, texts, refused, tmp_path):
    (tmp_path / "t.csv").write_text("audio,text\n" + body)
    rows, problems = rows_of(tmp_path / "t.csv")
    assert [row["text"] for row in rows] == texts
    assert problems.keys() == refused.keys() and all(
        words in problems[line].detail for line, words in refused.items()
    )


def test_an_unclosed_quote_does_not_take_the_rest_of_a_large_file(tmp_path):
    body = 'a.wav,"open\n' + "".join(f"{n}.wav,text {n}\n" for n in range(1000))
    (tmp_path / "t.csv").write_text("audio,text\n" + body)
    rows, problems = rows_of(tmp_path / "t.csv")
    assert [row["text"] for row in rows] == [f"text {n}" for n in range(1000)] and list(problems) == [2]


@pytest.mark.parametrize(
    "header, message",
    [
        ("audio;text", "give delimiter=semicolon"),
        ("audio\ttext", "give delimiter=tab"),
        ("text,audio,text", "two columns named 'text'"),
    ],
)
def test_headers_that_cannot_be_meant(header, message, tmp_path):
    (tmp_path / "t.csv").write_text(f"{header}\na.wav,b,c\n")
    with pytest.raises(CorpusError, match=message):
        list(table_rows(tmp_path / "t.csv"))


BODY = "audio,text\n0.wav,mañana iré\n1.wav,señor\n2.wav,hola\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("squeeze", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_encodings_and_compressions_are_known_by_their_first_bytes(encoding, squeeze, tmp_path):
    path = tmp_path / "t.csv"
    mark = b"\xff\xfe" if encoding == "utf-16-le" else b""
    path.write_bytes(squeeze(mark + BODY.encode(encoding)))
    wanted = ["mañana iré", "señor", "hola"]
    assert [row["text"] for row in rows_of(path)[0]] == wanted
    assert [line.partition(",")[2] for _, line in text_lines(path)][1:] == wanted
    path.write_bytes(
        squeeze(
            mark
            + "".join(json.dumps({"a": text}, ensure_ascii=False) + "\n" for text in wanted).encode(encoding)
        )
    )
    assert [row for _, row in json_items(path)] == [{"a": text} for text in wanted]
    path.write_bytes(
        squeeze(
            mark + json.dumps([{"a": text} for text in wanted], indent=1, ensure_ascii=False).encode(encoding)
        )
    )
    assert [row for _, row in json_items(path)] == [{"a": text} for text in wanted]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "gbk", "shift_jis"])
def test_an_encoding_that_is_named_is_used(encoding, tmp_path):
    words = {"gbk": "你好", "shift_jis": "こんにちは"}.get(encoding, "mañana")
    (tmp_path / "t.csv").write_bytes(f"audio,text\n0.wav,{words}\n".encode(encoding))
    assert rows_of(tmp_path / "t.csv", encoding=encoding)[0] == [{"audio": "0.wav", "text": words}]
    (tmp_path / "t.txt").write_bytes(f"{words}\n".encode(encoding))
    assert [line for _, line in text_lines(tmp_path / "t.txt", encoding)] == [words]
    (tmp_path / "t.jsonl").write_bytes(f'{{"a": "{words}"}}\n'.encode(encoding))
    assert [row for _, row in json_items(tmp_path / "t.jsonl", encoding)] == [{"a": words}]


def test_lines_in_another_encoding_are_refused_and_shown(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(BODY.encode("latin-1"))
    rows, problems = rows_of(path)
    assert [row["text"] for row in rows] == ["hola"]
    assert {line: problem.reason for line, problem in problems.items()} == {2: "encoding", 3: "encoding"}
    assert (
        "byte 0xf1" in problems[2].detail
        and "'mañana iré'" in problems[2].detail
        and "encoding=cp1252" in problems[2].detail
    )
    found = [line for _, line in text_lines(path)]
    assert [isinstance(line, Problem) for line in found] == [False, True, True, False]
    path.write_bytes("audio,text\na.wav,x\n".encode("utf-16-le"))
    with pytest.raises(CorpusError, match="UTF-16"):
        list(table_rows(path))


@pytest.mark.parametrize("squeeze", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_compressed_file_is_named(squeeze, damage, tmp_path):
    content = squeeze("".join(f'{{"id": "{n * 7919 % 10007}"}}\n' for n in range(5000)).encode())
    half = len(content) // 2
    flipped = bytes(byte ^ 0xFF for byte in content[half : half + 2])
    content = content[:half] + (flipped + content[half + 2 :] if damage == "flipped" else b"")
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(content)
    for read in (lines, json_items, table_rows):
        with pytest.raises(CorpusError, match="m.jsonl.gz .*copy it again") as caught:
            list(read(path))
        assert "\n" not in str(caught.value)


def test_zstandard_is_named(tmp_path):
    (tmp_path / "m.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    with pytest.raises(CorpusError, match="zstd -d"):
        list(json_items(tmp_path / "m.jsonl.zst"))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(items=st.lists(VALUES, max_size=5), indent=st.sampled_from([None, 0, 2]), chunk=st.integers(8, 64))
def test_json_lists_and_lines_give_the_same_items(tmp_path_factory, items, indent, chunk):
    folder = tmp_path_factory.mktemp("json")
    (folder / "list.json").write_text(json.dumps(items, indent=indent), encoding="utf-8")
    (folder / "object.json").write_text(json.dumps({"x": 1, "items": items}, indent=indent), encoding="utf-8")
    (folder / "lines.jsonl").write_text(
        "".join(json.dumps(item) + "\n" for item in items) + "{}\n", encoding="utf-8"
    )
    before, text_files._CHUNK = text_files._CHUNK, chunk
    try:
        assert [item for _, item in json_items(folder / "list.json")] == items
        assert list(json_array(folder / "object.json", "items")) == items
    finally:
        text_files._CHUNK = before
    assert [item for _, item in json_items(folder / "lines.jsonl")] == [*items, {}]


@pytest.mark.parametrize("content", ["[1, 2", "[1, 2,", "[1, {]", "[", "[1] [2]", "[" * 50_000])
def test_a_json_list_that_is_not_whole_is_an_error(content, tmp_path):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(CorpusError, match="m.json"):
        list(json_items(tmp_path / "m.json"))


def test_lines_of_json_that_are_none_cost_their_line(tmp_path):
    odd = [
        '{"a": 1}',
        "{broken",
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "",
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        '{"a": 2}',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(odd))
    found = dict(json_items(tmp_path / "m.jsonl"))
    assert {place: value.reason for place, value in found.items() if isinstance(value, Problem)} == {
        2: "bad_json",
        3: "bad_json",
    }
    assert (
        found[1] == {"a": 1}
        and found[7] == {"a": 2}
        and found[6] == {"a": "\ud800"}
        and found[5]["a"] != found[5]["a"]
    )


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for read in (lines, json_items, table_rows):
        with pytest.raises(CorpusError, match="cannot be read: Is a directory"):
            list(read(tmp_path))


def test_reading_takes_no_memory_for_the_whole_file(tmp_path, monkeypatch):
    """A list is decoded element by element: what is read ahead stays small."""
    monkeypatch.setattr(text_files, "_CHUNK", 256)
    (tmp_path / "m.json").write_text(json.dumps([{"n": n, "t": "x" * 40} for n in range(500)]))
    read, most = io.TextIOWrapper.read, []

    class Watched(io.TextIOWrapper):
        def read(self, size=-1):
            most.append(size)
            return read(self, size)

    monkeypatch.setattr(text_files.io, "TextIOWrapper", Watched)
    assert len(list(json_items(tmp_path / "m.json"))) == 500 and max(most) <= 512
