"""What others' readers make of our shards: wids, lhotse, Hugging Face datasets (webdataset and tar are in
test_pack)."""

import io
import json

import numpy as np
import pytest
import soundfile

from data_tools import pack, show
from data_tools.shards import ShardIndex
from tests.data_tools.conftest import tone


@pytest.fixture
def packed(corpus, tmp_path):
    out = tmp_path / "packed"
    assert (
        pack.main(["--manifest", str(corpus), "--out", str(out), "--workers", "1", "--shard-mb", "0.3"]) == 0
    )
    return out


def records(folder):
    index = ShardIndex.load(folder)
    return [index.read(row) for row in range(len(index))]


def test_wids(packed, tmp_path):
    wids = pytest.importorskip("wids", reason="requirements-dev.txt has it")
    dataset = wids.ShardListDataset(
        str(packed / "index.json"), base=str(packed), cache_dir=str(tmp_path / "cache"), transformations=[]
    )
    found = [dataset[row] for row in range(len(dataset))]
    for sample, (audio, record) in zip(found, records(packed), strict=True):
        assert json.loads(sample[".json"].read()) == record
        assert audio is None or sample[".flac"].read() == audio
    assert len(found) == len(records(packed)) == 13


def test_huggingface_datasets(packed):
    datasets = pytest.importorskip("datasets", reason="requirements-bench.txt has it")
    files = sorted(str(path) for path in packed.glob("*.tar"))
    loaded = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    loaded = (
        loaded.cast_column("flac", datasets.Value("binary"))
        if "flac" in (loaded.features or {})
        else loaded.decode(False)
    )
    found = {sample["json"]["id"]: sample for sample in loaded}
    for audio, record in records(packed):
        sample = found[record["id"]]
        assert sample["json"]["text"] == record["text"]
        if audio is not None:
            flac = sample["flac"]
            assert (flac["bytes"] if isinstance(flac, dict) else flac) == audio


def test_lhotse_loads_audio_out_of_the_tars(packed, tmp_path):
    lhotse = pytest.importorskip("lhotse", reason="requirements-bench.txt has it")
    assert show.main([str(packed), "--lhotse", str(tmp_path / "cuts.jsonl.gz")]) == 0
    cuts = {cut.id: cut for cut in lhotse.CutSet.from_file(tmp_path / "cuts.jsonl.gz")}
    spoken = [(audio, record) for audio, record in records(packed) if audio is not None]
    assert len(cuts) == len(spoken) == 12
    for audio, record in spoken:
        cut = cuts[f"{record['corpus']}/{record['id']}"]
        assert cut.supervisions[0].text == record["text"]
        assert np.array_equal(
            np.rint(cut.load_audio()[0] * 32768), soundfile.read(io.BytesIO(audio), dtype="int16")[0]
        )


def test_lhotse_shar_can_be_packed(tmp_path):
    lhotse = pytest.importorskip("lhotse", reason="requirements-bench.txt has it")
    cuts = []
    for number in range(12):
        soundfile.write(tmp_path / f"{number}.wav", tone(0.5 + 0.1 * number, seed=number), 16000)
        recording = lhotse.Recording.from_file(tmp_path / f"{number}.wav")
        supervision = lhotse.SupervisionSegment(
            f"s{number}", recording.id, 0.0, recording.duration, text=f"words {number}"
        )
        cut = lhotse.MonoCut(
            f"c{number}", 0.0, recording.duration, 0, recording=recording, supervisions=[supervision]
        )
        cuts.append(cut.truncate(offset=0.1, preserve_id=True))
    cuts = lhotse.CutSet.from_cuts(cuts)
    (tmp_path / "shar").mkdir()
    cuts.to_shar(tmp_path / "shar", fields={"recording": "flac"}, shard_size=5)
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    for name, source in (("from_shar", tmp_path / "shar"), ("from_manifest", tmp_path / "cuts.jsonl.gz")):
        assert (
            pack.main(["--corpus", f"lhotse:{source}", "--out", str(tmp_path / name), "--workers", "1"]) == 0
        )
        packed = {record["id"]: (audio, record) for audio, record in records(tmp_path / name)}
        assert len(packed) == 12
        for cut in cuts:
            audio, record = packed[cut.id]
            wave = soundfile.read(io.BytesIO(audio), dtype="int16")[0]
            assert record["text"] == cut.supervisions[0].text
            assert np.array_equal(wave, np.rint(cut.load_audio()[0] * 32768)), "the cut, not its recording"


def test_a_benchmark_does_not_take_the_clips_of_other_options(tmp_path):
    from benchmarks.pack import prepare

    manifest, cuts, hours = prepare(tmp_path / "b", None, 0.001)
    before = manifest.stat().st_mtime_ns
    assert prepare(tmp_path / "b", None, 0.001)[2] == hours and manifest.stat().st_mtime_ns == before
    real = tmp_path / "m.jsonl"
    real.write_text('{"audio": "a.wav", "text": "x"}\n')
    for options in ((None, 0.002), (real, 0.001)):
        with pytest.raises(
            SystemExit, match="made with another --manifest or --hours: remove it, or give another --cache"
        ):
            prepare(tmp_path / "b", *options)
    (tmp_path / "b" / "source.json").unlink()
    with pytest.raises(SystemExit, match="made with another"):
        prepare(tmp_path / "b", None, 0.001)
