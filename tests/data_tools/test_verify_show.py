"""verify finds what was changed behind the index's back; show prints what is there."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from core.console import duration
from data_tools import pack, show, verify
from data_tools.shards import TABLE_NAME, ShardError, ShardIndex


@pytest.fixture
def packed(corpus, tmp_path):
    out = tmp_path / "packed"
    assert (
        pack.main(["--manifest", str(corpus), "--out", str(out), "--workers", "1", "--shard-mb", "0.3"]) == 0
    )
    return out


def verdict(folder, capsys, *options):
    capsys.readouterr()
    code = verify.main([str(folder), "--workers", "1", *options])
    return code, capsys.readouterr().out


def rewrite(folder, change):
    """Pack members anew, with `change(name, data)`, and let the index believe it (size, checksum, offsets
    stay as they were)."""
    index = json.loads((folder / "index.json").read_text())
    path = folder / index["shardlist"][0]["url"]
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        for member in tar:
            start, end = member.offset_data, member.offset_data + member.size
            data[start:end] = change(member.name, bytes(data[start:end])).ljust(member.size, b" ")
    path.write_bytes(bytes(data))
    index["shardlist"][0]["sha256"] = verify.file_sha256(path)
    (folder / "index.json").write_text(json.dumps(index))


def test_a_good_folder_has_no_problems(packed, capsys):
    assert verdict(packed, capsys, "--decode", "all") == (0, f"{packed}: as its index says\n")


def test_a_flipped_bit_is_found(packed, capsys):
    path = packed / ShardIndex.load(packed).shards[0]["url"]
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))
    code, report = verdict(packed, capsys)
    assert code == 1 and f"{path.name}: content differs" in report


def test_a_truncated_shard_is_named_and_the_rest_is_served(packed, capsys):
    index = ShardIndex.load(packed)
    path = packed / index.shards[0]["url"]
    path.write_bytes(path.read_bytes()[:1500])
    damaged = ShardIndex.load(packed)
    assert len(damaged.damaged) == 1 and str(path) in damaged.damaged[0]
    lost = [row for row in range(len(index)) if index.samples["shard"][row] == 0]
    for row in range(len(index)):
        if row in lost:
            with pytest.raises(ShardError, match="ends inside"):
                damaged.read(row)
        else:
            damaged.read(row)
    code, report = verdict(packed, capsys)
    assert code == 1 and path.name in report
    path.unlink()
    with pytest.raises(ShardError, match="missing"):
        ShardIndex.load(packed)


def test_wrong_records_are_named(packed, capsys):
    def change(name, data):
        if not name.endswith(".json"):
            return data
        record = json.loads(data)
        record["text"] = None
        record["duration"] = 99.0
        return json.dumps(record, ensure_ascii=False).encode()[: len(data)]

    rewrite(packed, change)
    _, report = verdict(packed, capsys)
    assert "characters is 0 in the JSON" in report and "duration is 99.0 in the JSON" in report


def test_audio_that_does_not_decode_is_found_by_decoding(packed, capsys):
    rewrite(packed, lambda name, data: data if name.endswith(".json") else bytes(len(data)))
    assert "does not decode" in verdict(packed, capsys, "--decode", "all")[1]
    assert "does not decode" not in verdict(packed, capsys, "--decode", "0")[1]


def test_a_changed_table_is_found(packed, capsys):
    table = np.load(packed / TABLE_NAME)
    table["characters"][0] += 1
    np.save(packed / TABLE_NAME, table)
    code, report = verdict(packed, capsys)
    assert code == 1 and "fingerprint" in report and "characters" in report


def test_without_an_index_there_is_nothing_to_go_by(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 2 and "holds no index.json" in capsys.readouterr().err
    assert show.main([str(tmp_path / "gone")]) == 2 and "does not exist" in capsys.readouterr().err


def test_show_counts_what_is_there(packed, tmp_path, capsys):
    assert show.main([str(packed), "--histograms", str(tmp_path / "h.png")]) == 0
    output = capsys.readouterr().out
    index = ShardIndex.load(packed)
    assert f"{len(index)} samples, {duration(index.hours * 3600)} in {len(index.shards)} shards" in output
    assert index.fingerprint in output
    rows = [
        line.split() for line in output.splitlines() if line.split()[:1] and line.split()[0] in index.tasks
    ]
    assert sum(int(row[3]) for row in rows) == len(index), "samples by task, language and codec"
    seconds = index.samples["duration"][index.samples["duration"] > 0]
    percentages = [
        float(line.split("%")[0].split()[-1])
        for line in output.split("duration\n")[1].splitlines()
        if "%" in line
    ][:12]
    assert sum(percentages) == pytest.approx(100, abs=0.6) and len(seconds) == 12
    assert "zero_length" in output, "what was refused is part of the report"
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"


def test_listen_writes_the_clip(packed, tmp_path, capsys):
    index = ShardIndex.load(packed)
    row = next(row for row in range(len(index)) if index.read(row)[1]["id"] == "stereo")
    for wanted, target in ((str(row), "a.flac"), ("manifest/stereo", "b.wav")):
        assert show.main([str(packed), "--index", wanted, "--out", str(tmp_path / target)]) == 0
        assert '"two channels"' in capsys.readouterr().out
    assert (tmp_path / "a.flac").read_bytes() == index.read(row)[0]
    expected = soundfile.read(io.BytesIO(index.read(row)[0]), dtype="int16")[0]
    assert np.array_equal(soundfile.read(tmp_path / "b.wav", dtype="int16")[0], expected)
    assert show.main([str(packed), "--index", "manifest/unknown"]) == 2
