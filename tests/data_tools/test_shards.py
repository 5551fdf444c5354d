"""The format itself: headers, rows, the index, and what an index refuses."""

import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.shards import (
    ShardError,
    ShardIndex,
    ShardWriter,
    audio_hash,
    fingerprint,
    id_hash,
    tar_header,
    write_index,
)


@given(
    name=st.from_regex(r"[a-zA-Z0-9_-]{1,90}\.[a-z0-9]{1,8}", fullmatch=True), size=st.integers(0, 2**32 - 1)
)
def test_headers_are_what_tarfile_writes(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert tar_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_names_that_do_not_fit_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "x")
    record = {"id": "a", "corpus": "c", "task": "asr", "text": "", "lang": None, "duration": 1.0}
    for key in ("a.b", "a/b", "", "x" * 100):
        with pytest.raises(ValueError):
            writer.add(key, b"1", "flac", record)


samples = st.lists(
    st.tuples(
        st.binary(max_size=1500) | st.none(),
        st.text(max_size=40),
        st.sampled_from(["asr", "chat"]),
        st.sampled_from([None, "en", "zh"]),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(shards=st.lists(samples, min_size=1, max_size=3))
def test_what_was_written_is_read(tmp_path_factory, shards):
    folder, summaries, written = tmp_path_factory.mktemp("shards"), [], []
    for number, content in enumerate(shards):
        writer = ShardWriter(folder / f"x-{number}.tar")
        for place, (audio, text, task, lang) in enumerate(content):
            record = {
                "id": f"{number}/{place}",
                "corpus": "c",
                "task": task,
                "text": text,
                "lang": lang,
                "duration": float(place),
            }
            writer.add(f"{place:03d}", audio or None, "flac", record, tokens=place)
            written.append((audio or None, record))
        summaries.append(writer.close(f"x-{number}.tar"))
    told = write_index(folder, "x", summaries)
    index = ShardIndex.load(folder)
    assert [index.read(row) for row in range(len(index))] == written
    assert (
        index.fingerprint
        == told["fingerprint"]
        == fingerprint(index.samples, [summary.sha256 for summary in summaries])
    )
    for row, (audio, record) in enumerate(written):
        sample = index.samples[row]
        assert index.tasks[sample["task"]] == record["task"] and index.langs[sample["lang"]] == (
            record["lang"] or ""
        )
        assert sample["id_hash"] == id_hash("c", record["id"]) and sample["audio_hash"] == audio_hash(audio)
        assert sample["characters"] == len(record["text"]) and sample["tokens"] == row - np.searchsorted(
            index.samples["shard"], sample["shard"]
        )
    index.close()
    with tarfile.open(folder / "x-0.tar") as tar:
        assert [m.name for m in tar] == [
            f"{p:03d}.{e}"
            for p, (audio, *_) in enumerate(shards[0])
            for e in (["flac"] if audio else []) + ["json"]
        ]


def packed(folder, count=3):
    writer = ShardWriter(folder / "x-0.tar")
    for number in range(count):
        record = {"id": str(number), "corpus": "c", "task": "asr", "text": "t", "lang": None, "duration": 1.0}
        writer.add(str(number), bytes(100), "flac", record)
    write_index(folder, "x", [writer.close("x-0.tar")])
    return folder


def test_an_index_of_another_version_is_refused(tmp_path):
    packed(tmp_path)
    table = np.load(tmp_path / "samples.npy")
    np.save(
        tmp_path / "samples.npy",
        table[list(table.dtype.names[:-1])].astype([(n, table.dtype[n]) for n in table.dtype.names[:-1]]),
    )
    with pytest.raises(ShardError, match="pack the corpus again"):
        ShardIndex.load(tmp_path)


def test_a_table_of_another_length_is_refused(tmp_path):
    packed(tmp_path)
    np.save(tmp_path / "samples.npy", np.load(tmp_path / "samples.npy")[:2])
    with pytest.raises(ShardError, match="2 rows"):
        ShardIndex.load(tmp_path)


def test_few_files_stay_open_and_all_are_read(tmp_path):
    summaries = []
    for number in range(6):
        writer = ShardWriter(tmp_path / f"x-{number}.tar")
        record = {"id": str(number), "corpus": "c", "task": "asr", "text": "t", "lang": None, "duration": 1.0}
        writer.add("0", bytes([number]), "flac", record)
        summaries.append(writer.close(f"x-{number}.tar"))
    write_index(tmp_path, "x", summaries)
    index = ShardIndex.load(tmp_path)
    index._open_files = 2
    for row in [0, 1, 2, 3, 4, 5, 0, 3]:
        assert index.read(row)[0] == bytes([row]) and len(index._files) <= 2


def test_local_copies_are_preferred_when_complete(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    far = packed(tmp_path / "far")
    index = ShardIndex.load(far)
    near = tmp_path / "near" / index.fingerprint
    near.mkdir(parents=True)
    data = bytearray((far / "x-0.tar").read_bytes())
    data[int(index.samples["audio_offset"][0])] = 7  # so that it shows which one is read
    (near / "x-0.tar").write_bytes(bytes(data))
    monkeypatch.setenv("SOUNDWAVE_LOCAL_SHARDS", str(tmp_path / "near"))
    assert ShardIndex.load(far).read(0)[0][0] == 7
    (near / "x-0.tar").write_bytes(bytes(data[:-1]))
    assert ShardIndex.load(far).read(0)[0][0] == 0


def test_json_is_kept_as_given(tmp_path):
    writer = ShardWriter(tmp_path / "x-0.tar")
    record = {
        "id": "a",
        "corpus": "c",
        "task": "chat",
        "text": None,
        "lang": "en",
        "duration": 0.0,
        "messages": [{"role": "user", "content": "é\n"}],
    }
    writer.add("a", None, "", record)
    write_index(tmp_path, "x", [writer.close("x-0.tar")])
    index = ShardIndex.load(tmp_path)
    assert (
        index.read(0) == (None, record)
        and index.samples["target_characters"][0] == 2
        and index.codecs == [""]
    )
    with tarfile.open(tmp_path / "x-0.tar") as tar:
        assert json.load(io.TextIOWrapper(tar.extractfile("a.json"), "utf-8")) == record
