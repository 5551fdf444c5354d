"""Corpora whose rows would become wrong training data without a word: each is read right, or reported."""

import csv
import gzip
import io
import json
import shutil
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from data_tools import pack
from data_tools.corpora import Corpus, CorpusError, Entry, Fault
from data_tools.shards import ShardIndex
from tests.data_tools.test_corpora import sound, sound_bytes, text


def read(specification):
    """(entries, faults)"""
    items = list(Corpus(specification))
    return [item for item in items if isinstance(item, Entry)], [item for item in items if isinstance(item, Fault)]


def lines(path, rows):
    return text(path, "".join(json.dumps(row) + "\n" for row in rows))


def cut(name, recording, **more):
    words = {"id": f"s-{name}", "start": 0.0, "duration": 0.4, "text": name}
    return {"id": name, "type": "MonoCut", "start": 0.2, "duration": 0.4, "recording": recording, "supervisions": [words], **more}


def recording(*sources, **more):
    return {
        "id": "rec",
        "duration": 1.0,
        "sources": [{"type": "file", "source": "a.wav", **source} for source in sources],
        **more,
    }


def test_lhotse_a_channel_of_a_call_is_not_the_average_of_both(tmp_path):
    call, files = recording({"channels": [0, 1]}), recording({"channels": [0]}, {"channels": [1]})
    cuts = [
        cut("a", call, channel=0),
        cut("b", call, channel=1),
        cut("c", files, channel=1),
        cut("d", recording({"channels": [0]})),
    ]
    found, faults = read(f"lhotse:{lines(tmp_path / 'cuts.jsonl', cuts)}")
    assert [entry.id for entry in found] == ["d"] and [fault.id for fault in faults] == ["a", "b", "c"]
    assert {(fault.reason, fault.detail) for fault in faults} == {
        ("bad_row", "a channel of a recording with 2: extract the channels to files first")
    }


def test_lhotse_perturbed_cuts_are_not_cut_from_the_original(tmp_path):
    fast = {"name": "Speed", "kwargs": {"factor": 1.1}}
    other_rate = {"name": "Resample", "kwargs": {"source_sampling_rate": 8000, "target_sampling_rate": 16000}}
    mono = {"channels": [0]}
    cuts = [
        cut("fast", recording(mono, transforms=[fast])),
        cut("both", recording(mono, transforms=[other_rate, fast])),
        cut("rate", recording(mono, transforms=[other_rate])),
        cut("plain", recording(mono, transforms=[])),
        cut("odd", recording(mono, transforms=["Speed"])),
    ]
    found, faults = read(f"lhotse:{lines(tmp_path / 'cuts.jsonl', cuts)}")
    assert [entry.id for entry in found] == ["rate", "plain"]
    assert [fault.reason for fault in faults] == ["bad_row", "bad_row", "bad_json"]
    assert faults[0].detail.startswith("a recording with transforms: give the original cuts")


def shar(folder, count):
    """A Shar folder of perturbed cuts of one channel of a call, which Shar holds as they shall sound; -> its tar."""
    folder.mkdir()
    audio = recording({"type": "shar", "source": "", "channels": [0, 1]}, transforms=[{"name": "Speed"}])
    with gzip.open(folder / "cuts.000000.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(cut(f"c{number}", audio)) + "\n" for number in range(count)))
    with tarfile.open(folder / "recording.000000.tar", "w") as tar:
        for number in range(count):
            data, member = sound_bytes(0.4, "FLAC"), tarfile.TarInfo(f"c{number}.flac")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder / "recording.000000.tar"


@pytest.mark.parametrize("where", ["nowhere", "between", "inside", "header", "start"])
def test_lhotse_a_shar_tar_that_was_cut_short_is_told(where, tmp_path):
    tar = shar(tmp_path / "shar", 4)
    found, faults = read(f"lhotse:{tar.parent}")
    assert [entry.id for entry in found] == ["c0", "c1", "c2", "c3"] and not faults
    with tarfile.open(tar) as archive:
        third = archive.getmembers()[2].offset
    size, kept = {
        "nowhere": (tar.stat().st_size, 4),
        "between": (third, 2),
        "inside": (third + 600, 3),  # its audio is found to be truncated when it is decoded
        "header": (third + 100, 2),
        "start": (0, 0),
    }[where]
    with open(tar, "r+b") as file:
        file.truncate(size)
    found, faults = read(f"lhotse:{tar.parent}")
    assert [entry.id for entry in found] == ["c0", "c1", "c2", "c3"][:kept]
    assert [(fault.id, fault.reason) for fault in faults] == [(f"c{number}", "truncated") for number in range(kept, 4)]
    assert all("recording.000000.tar ends before the cuts" in fault.detail for fault in faults)


def kaldi(root, **files):
    wav = sound(root / "long.wav", 1.0)
    text(root / "data" / "wav.scp", f"rec1 {wav}\n")
    for name, content in files.items():
        text(root / "data" / name, content)
    return f"kaldi:{root / 'data'}"


def test_kaldi_a_channel_of_a_call_is_not_the_average_of_both(tmp_path):
    segments = "utt1 rec1 0.1 0.4 1\nutt2 rec1 0.1 0.4\nutt3 rec1 0.5 0.9 A\n"
    found, faults = read(kaldi(tmp_path, segments=segments, text="utt1 one\nutt2 two\nutt3 three\n"))
    assert [(entry.id, entry.text) for entry in found] == [("utt2", "two")]
    assert [(fault.id, fault.reason) for fault in faults] == [("utt1", "bad_row"), ("utt3", "bad_row")]
    assert "channel A of recording 'rec1': extract the channels to files first" in faults[1].detail


def test_kaldi_a_tab_in_a_transcript_does_not_move_the_key(tmp_path):
    segments = "utt1 rec1 0.1 0.4\nutt2\trec1 0.1 0.4\nutt3  \t rec1\t0.1\t0.4\n"
    found, faults = read(kaldi(tmp_path, segments=segments, text="utt1 one\ttwo\nutt2\tthree four\nutt3 \tfive\n"))
    assert [(entry.id, entry.text) for entry in found] == [("utt1", "one\ttwo"), ("utt2", "three four"), ("utt3", "five")]
    assert not faults


VALIDATED = 'path\tsentence\tgender\na.mp3\t"Il dit bonjour.\tmale\nb.mp3\tOui.\tfemale\nc.mp3\tNon", dit-il.\tmale\n'


def test_a_quote_in_a_tsv_swallows_no_rows(tmp_path):
    path = text(tmp_path / "validated.tsv", VALIDATED)
    found, faults = read(f"table:{path},audio=path,text=sentence,label=gender")
    assert [(entry.text, entry.label) for entry in found] == [
        ('"Il dit bonjour.', "male"),
        ("Oui.", "female"),
        ('Non", dit-il.', "male"),
    ]
    assert not faults
    found, faults = read(f"table:{path},audio=path,text=sentence,quoting=yes")
    assert not found and [(fault.id, fault.reason) for fault in faults] == [("validated.tsv:4", "bad_row")]
    assert "a quote that is not closed" in faults[0].detail


def test_quoting_is_as_told_and_a_csv_has_it(tmp_path):
    content = 'audio{0}text\na.wav{0}"one ""two"""\n"b.wav"{0}"{0}\nx"\nc.wav{0}three\n'
    csv_path, tsv_path = text(tmp_path / "t.csv", content.format(",")), text(tmp_path / "t.tsv", content.format("\t"))
    assert [entry.text for entry in read(f"table:{csv_path}")[0]] == ['one "two"', ",\nx", "three"]
    found, faults = read(f"table:{tsv_path},quoting=yes")
    assert [entry.text for entry in found] == ['one "two"', "three"] and len(faults) == 1
    found, _ = read(f"table:{tsv_path.rename(tmp_path / 'u.csv')},quoting=no,delimiter=\t")
    assert found[0].text == '"one ""two"""'
    with pytest.raises(CorpusError, match="quoting=maybe: yes or no"):
        Corpus(f"table:{csv_path},quoting=maybe")


def test_a_quoted_cell_with_a_line_break_in_a_tsv_is_no_half_transcript(tmp_path):
    path = text(tmp_path / "t.tsv", 'audio\ttext\tspeaker\na.wav\t"one\ntwo"\tx\nb.wav\t"three"\nc.wav\tfour\ty\n')
    found, faults = read(f"table:{path}")
    assert [entry.text for entry in found if entry.audio.endswith(".wav")] == ['"three"', "four"]
    assert [(fault.id, fault.reason) for fault in faults] == [("t.tsv:2", "bad_row")]


@pytest.mark.parametrize("column", ["offset", "end", "duration"])
@pytest.mark.parametrize("value", ["1,5", "0:01.5", "soon", "[1]", "NA"])
def test_a_time_that_is_no_number_does_not_give_the_whole_recording(column, value, tmp_path):
    quoted = f'"{value}"'
    path = text(tmp_path / "t.csv", f"id,audio,text,{column}\nx,a.wav,one,{quoted}\ny,a.wav,two,1.5\nz,a.wav,three, \n")
    found, faults = read(f"table:{path}")
    assert [entry.id for entry in found] == ["y", "z"]
    assert [(fault.id, fault.reason) for fault in faults] == [("x", "bad_row")]
    assert faults[0].detail == f"t.csv:2: {column} is '{value}', not a number"


def test_a_time_that_is_a_list_costs_its_line_alone(tmp_path):
    path = lines(
        tmp_path / "t.jsonl", [{"audio": "a.wav", "text": "a", "offset": [1]}, {"audio": "a.wav", "text": "b", "offset": 1}]
    )
    found, faults = read(f"table:{path}")
    assert [entry.offset for entry in found] == [1.0] and [fault.reason for fault in faults] == ["bad_row"]


def covost(root, pair, *sentences):
    """A table as the official script writes it: pandas' to_csv with QUOTE_NONE and a backslash."""
    path = root / f"covost_v2.{pair}.train.tsv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\", lineterminator="\n")
        writer.writerow(["path", "sentence", "translation", "client_id"])
        writer.writerows([f"clip_{n}.mp3", sentence, f'Er sagte "{n}".', "x"] for n, sentence in enumerate(sentences))
    return path


@pytest.mark.parametrize(
    "written, read_as",
    [
        ('He said "yes" to it.', 'He said "yes" to it.'),
        ('"All of it."', "All of it."),
        ('"Yes," he said, "no."', '"Yes," he said, "no."'),
        ('He said "no."', 'He said "no."'),
        ('"No," he said.', '"No," he said.'),
        ('"He said ""no"" to it."', 'He said "no" to it.'),
        ('a back\\slash and a "', 'a back\\slash and a "'),
        ('""', None),
        ("plain", "plain"),
    ],
)
def test_covost_quotes_are_those_of_the_sentence(written, read_as, tmp_path):
    found, faults = read(f"covost:{covost(tmp_path, 'en_de', written, 'next')}")
    assert [entry.text for entry in found] == [read_as, "next"] and not faults
    assert [entry.response for entry in found] == ['Er sagte "0".', 'Er sagte "1".']


def test_covost_pairs_of_one_source_are_two_corpora(tmp_path):
    german, arabic = covost(tmp_path, "en_de", "one"), covost(tmp_path, "en_ar", "one")
    assert [read(f"covost:{path}")[0][0].corpus for path in (german, arabic)] == ["covost_v2.en_de", "covost_v2.en_ar"]
    assert read(f"covost:{german},corpus=mine")[0][0].corpus == "mine"
    options = ["--corpus", f"covost:{german}", "--corpus", f"covost:{arabic}", "--out", str(tmp_path / "out"), "--workers", "1"]
    sound(tmp_path / "clips" / "clip_0.mp3")
    assert pack.main(options) == 0 and len(ShardIndex.load(tmp_path / "out")) == 2


def test_nemo_a_line_in_another_language_is_a_translation(tmp_path):
    both = [("en", "en"), ("en", "de"), ("en", "xx"), ("en-US", "en"), ("en", None), (None, "fr")]
    rows = [{"audio_filepath": "a.wav", "duration": 1, "offset": 0.0, "text": "t", "pred_text": "p"} for _ in both]
    rows = [row | {"source_lang": source, "target_lang": target} for row, (source, target) in zip(rows, both, strict=True)]
    found, faults = read(f"nemo:{lines(tmp_path / 'm.json', rows)}")
    told = [(e.id, e.task, e.lang, e.target_lang, e.text, e.response, e.hypothesis) for e in found]
    asr = ("a@0.000", "asr", "en", None, "t", None, "p")
    assert told[:3] == [
        asr,
        ("a@0.000-de", "translation", "en", "German", None, "t", None),
        ("a@0.000-xx", "translation", "en", "xx", None, "t", None),
    ]
    assert told[3:] == [asr, asr, ("a@0.000", "asr", "fr", None, "t", None, "p")] and not faults


def saved(path, **columns):
    """A Parquet or Arrow file of clips that have these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values())))
    table = pyarrow.table({"audio": [sound_bytes(0.1)] * rows, **columns})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_huggingface_files_of_one_name_in_two_folders_have_ids_of_their_own(suffix, tmp_path):
    for lang in ("de", "fr"):
        file = saved(tmp_path / lang / f"train-00000.{suffix}", text=["a", "b"])
    names = [entry.id for entry in read(f"huggingface:{tmp_path}")[0]]
    assert names == [f"{lang}/train-00000-{row:09d}" for lang in ("de", "fr") for row in range(2)]
    assert read(f"huggingface:{file}")[0][0].id == "train-00000-000000000"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_huggingface_a_column_id_is_the_clips_only_when_it_is_named(suffix, tmp_path):
    file = saved(tmp_path / f"a.{suffix}", text=["one", "one"], id=[1077, 1077])
    assert [entry.id for entry in read(f"huggingface:{file}")[0]] == ["a-000000000", "a-000000001"]
    assert [entry.id for entry in read(f"huggingface:{file},id=id")[0]] == ["1077", "1077"]


def test_huggingface_what_map_left_beside_a_saved_dataset_is_not_read_again(tmp_path):
    for name in ("data-00000-of-00001", "cache-1f0e9a", "cache-1f0e9a_00000_of_00002", "tmp8x1_q"):
        saved(tmp_path / f"{name}.arrow", text=["a"])
    assert [entry.id for entry in read(f"huggingface:{tmp_path}")[0]] == ["data-00000-of-00001-000000000"]
    assert len(read(f"huggingface:{tmp_path / 'cache-1f0e9a.arrow'}")[0]) == 1, "a file that is named is read"


def columns_of(kind, root, **columns):
    if kind in ("parquet", "arrow"):
        return f"huggingface:{saved(root / f't.{kind}', **columns)}"
    rows = [dict(zip(columns, values, strict=True)) | {"audio": "a.wav"} for values in zip(*columns.values(), strict=True)]
    if kind == "jsonl":
        return f"table:{lines(root / 't.jsonl', rows)}"
    content = [list(rows[0]), *(row.values() for row in rows)]
    return f"table:{text(root / 't.csv', ''.join(','.join(line) + chr(10) for line in content))}"


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "csv"])
def test_what_is_no_column_is_the_value_of_all(kind, tmp_path):
    specification = columns_of(kind, tmp_path, text=["a", "b"], mood=["joy", "fear"], who=["x", "y"])
    for _ in range(2):
        found, _ = read(f"{specification},label=mood,prompt=How does it sound, and why?,speaker=who,target_lang=German")
        assert [(e.label, e.speaker) for e in found] == [("joy", "x"), ("fear", "y")]
        assert {(e.prompt, e.target_lang) for e in found} == {("How does it sound, and why?", "German")}
    found, _ = read(f"{specification},label=calm,speaker=s1,prompt=text")
    assert [(e.label, e.speaker, e.prompt) for e in found] == [("calm", "s1", "a"), ("calm", "s1", "b")]
    for option in ("label=Mood", "label=moods", "response=calm", "id=calm", "lang_column=en"):
        with pytest.raises(CorpusError, match=f"has no column '{option.split('=')[1]}'.*columns are "):
            read(f"{specification},{option}")


def test_a_value_of_a_table_is_for_rows_without_their_own(tmp_path):
    path = text(tmp_path / "t.csv", "audio,label,response\na.wav,joy,\na.wav,,\n,,yes\n")
    found, faults = read(f"table:{path},label=calm,prompt=Well?")
    assert [entry.label for entry in found] == ["joy", "calm", "calm"] and not faults
    assert found[2].audio is None and found[2].prompt == "Well?"


def test_a_column_of_some_lines_alone_is_no_value(tmp_path):
    rows = [{"audio": "a.wav", "text": "a"}, {"audio": "a.wav", "text": "b", "mood": "joy"}]
    for ordered in (rows, rows[::-1]):
        with pytest.raises(CorpusError, match="t.jsonl:2: 'mood' is a column in some places and none in others"):
            read(f"table:{lines(tmp_path / 't.jsonl', ordered)},label=mood")
    saved(tmp_path / "a.parquet", text=["a"])
    saved(tmp_path / "b.parquet", text=["b"], mood=["joy"])
    with pytest.raises(CorpusError, match="b.parquet: 'mood' is a column in some places"):
        read(f"huggingface:{tmp_path},label=mood")
    assert [entry.label for entry in read(f"huggingface:{tmp_path},label=calm")[0]] == ["calm", "calm"]


def test_test_sets_are_given_when_they_are_asked_for(tmp_path):
    for subset in ("train-clean-100", "dev-clean", "test-clean"):
        folder = tmp_path / "LibriSpeech" / subset / "19" / "198"
        folder.mkdir(parents=True)
        (folder / "19-198.trans.txt").write_text(f"19-198-{subset} HELLO\n")
    root = tmp_path / "LibriSpeech"
    assert [entry.id for entry in Corpus(f"librispeech:{root}")] == ["19-198-train-clean-100"]
    assert len(list(Corpus(f"librispeech:{root},subset=dev-clean+test-clean"))) == 2
    assert len(list(Corpus(f"librispeech:{root / 'test-clean'}"))) == 1
    shutil.rmtree(root / "train-clean-100")
    with pytest.raises(CorpusError, match="test sets alone: name them, subset=dev-clean.test-clean"):
        Corpus(f"librispeech:{root}")
    segments = [
        {"sid": name, "begin_time": 0.0, "end_time": 1.0, "text_tn": "HI", "subsets": subsets}
        for name, subsets in (("a", ["{XL}", "{L}"]), ("b", ["{DEV}"]), ("c", ["{TEST}"]), ("d", []))
    ]
    (tmp_path / "GigaSpeech.json").write_text(json.dumps({"audios": [{"path": "a.opus", "segments": segments}]}))
    assert [entry.id for entry in Corpus(f"gigaspeech:{tmp_path / 'GigaSpeech.json'}")] == ["a", "d"]
    assert [entry.id for entry in Corpus(f"gigaspeech:{tmp_path / 'GigaSpeech.json'},subset=TEST")] == ["c"]
    for name in ("train-0", "validated/0", "device/0", "test-0", "de/validation/0", "data/0"):
        name = f"hf/{name}.parquet"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    taken = [path.relative_to(tmp_path / "hf").as_posix() for path in Corpus(f"huggingface:{tmp_path / 'hf'}").reader.files]
    assert taken == ["data/0.parquet", "device/0.parquet", "train-0.parquet", "validated/0.parquet"]
    assert [path.name for path in Corpus(f"huggingface:{tmp_path / 'hf'},split=test").reader.files] == ["test-0.parquet"]
