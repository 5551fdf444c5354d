"""Corpora whose rows would become wrong training data without a word: each is read right, or reported."""

import csv
import gzip
import io
import json
import shutil
import tarfile
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest

from data_tools import pack
from data_tools.corpora import Corpus, CorpusError, Entry, Rejection
from data_tools.shards import ShardIndex
from tests.data_tools.test_corpora import sound, sound_bytes, text


def read(specification):
    """(entries, faults)"""
    items = list(Corpus(specification))
    return [item for item in items if isinstance(item, Entry)], [
        item for item in items if isinstance(item, Rejection)
    ]


def lines(path, rows):
    return text(path, "".join(json.dumps(row) + "\n" for row in rows))


def cut(name, recording, **more):
    words = {"id": f"s-{name}", "start": 0.0, "duration": 0.4, "text": name}
    return {
        "id": name,
        "type": "MonoCut",
        "start": 0.2,
        "duration": 0.4,
        "recording": recording,
        "supervisions": [words],
        **more,
    }


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
    entries, faults = read(f"lhotse:{lines(tmp_path / 'cuts.jsonl', cuts)}")
    assert [entry.id for entry in entries] == ["d"] and [fault.id for fault in faults] == ["a", "b", "c"]
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
    entries, faults = read(f"lhotse:{lines(tmp_path / 'cuts.jsonl', cuts)}")
    assert [entry.id for entry in entries] == ["rate", "plain"]
    assert [fault.reason for fault in faults] == ["bad_row", "bad_row", "bad_json"]
    assert faults[0].detail.startswith("a recording with transforms: give the original cuts")


def shar(folder, count):
    """A Shar folder of perturbed cuts of one channel of a call, which Shar holds as they shall sound; -> its
    tar."""
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
def test_lhotse_a_truncated_shar_tar_is_reported(where, tmp_path):
    tar = shar(tmp_path / "shar", 4)
    entries, faults = read(f"lhotse:{tar.parent}")
    assert [entry.id for entry in entries] == ["c0", "c1", "c2", "c3"] and not faults
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
    entries, faults = read(f"lhotse:{tar.parent}")
    assert [entry.id for entry in entries] == ["c0", "c1", "c2", "c3"][:kept]
    assert [(fault.id, fault.reason) for fault in faults] == [
        (f"c{number}", "truncated") for number in range(kept, 4)
    ]
    assert all("recording.000000.tar ends before the cuts" in fault.detail for fault in faults)


def kaldi(root, **files):
    wav = sound(root / "long.wav", 1.0)
    text(root / "data" / "wav.scp", f"rec1 {wav}\n")
    for name, content in files.items():
        text(root / "data" / name, content)
    return f"kaldi:{root / 'data'}"


def test_kaldi_a_channel_of_a_call_is_not_the_average_of_both(tmp_path):
    segments = "utt1 rec1 0.1 0.4 1\nutt2 rec1 0.1 0.4\nutt3 rec1 0.5 0.9 A\n"
    entries, faults = read(kaldi(tmp_path, segments=segments, text="utt1 one\nutt2 two\nutt3 three\n"))
    assert [(entry.id, entry.text) for entry in entries] == [("utt2", "two")]
    assert [(fault.id, fault.reason) for fault in faults] == [("utt1", "bad_row"), ("utt3", "bad_row")]
    assert "channel A of recording 'rec1': extract the channels to files first" in faults[1].detail


def test_kaldi_a_tab_in_a_transcript_does_not_move_the_key(tmp_path):
    segments = "utt1 rec1 0.1 0.4\nutt2\trec1 0.1 0.4\nutt3  \t rec1\t0.1\t0.4\n"
    entries, faults = read(
        kaldi(tmp_path, segments=segments, text="utt1 one\ttwo\nutt2\tthree four\nutt3 \tfive\n")
    )
    assert [(entry.id, entry.text) for entry in entries] == [
        ("utt1", "one\ttwo"),
        ("utt2", "three four"),
        ("utt3", "five"),
    ]
    assert not faults


VALIDATED = (
    'path\tsentence\tgender\na.mp3\t"Il dit bonjour.\tmale\nb.mp3\tOui.\tfemale\nc.mp3\tNon", dit-il.\tmale\n'
)


def test_a_quote_in_a_tsv_swallows_no_rows(tmp_path):
    path = text(tmp_path / "validated.tsv", VALIDATED)
    entries, faults = read(f"table:{path},audio=path,text=sentence,label=gender")
    assert [(entry.text, entry.label) for entry in entries] == [
        ('"Il dit bonjour.', "male"),
        ("Oui.", "female"),
        ('Non", dit-il.', "male"),
    ]
    assert not faults
    entries, faults = read(f"table:{path},audio=path,text=sentence,quoting=yes")
    assert [entry.text for entry in entries] == ["Oui.", 'Non", dit-il.'], (
        "rows that a quote would swallow are read"
    )
    assert [(fault.id, fault.reason) for fault in faults] == [("validated.tsv:2", "bad_row")]
    assert "a quote inside a quoted cell" in faults[0].detail


def test_quoting_is_as_told_and_a_csv_has_it(tmp_path):
    content = 'audio{0}text\na.wav{0}"one ""two"""\n"b.wav"{0}"{0}\nx"\nc.wav{0}three\n'
    csv_path, tsv_path = (
        text(tmp_path / "t.csv", content.format(",")),
        text(tmp_path / "t.tsv", content.format("\t")),
    )
    assert [entry.text for entry in read(f"table:{csv_path}")[0]] == ['one "two"', ",\nx", "three"]
    entries, faults = read(f"table:{tsv_path},quoting=yes")
    assert [entry.text for entry in entries] == ['one "two"', "three"] and len(faults) == 1
    entries, _ = read(f"table:{tsv_path.rename(tmp_path / 'u.csv')},quoting=no,delimiter=\t")
    assert entries[0].text == '"one ""two"""'
    with pytest.raises(CorpusError, match="quoting=maybe: yes or no"):
        Corpus(f"table:{csv_path},quoting=maybe")


def test_a_quoted_cell_with_a_line_break_in_a_tsv_is_no_half_transcript(tmp_path):
    path = text(
        tmp_path / "t.tsv", 'audio\ttext\tspeaker\na.wav\t"one\ntwo"\tx\nb.wav\t"three"\tz\nc.wav\tfour\ty\n'
    )
    entries, faults = read(f"table:{path}")
    assert [entry.text for entry in entries if entry.audio.endswith(".wav")] == ['"three"', "four"]
    assert [(fault.id, fault.reason) for fault in faults] == [("t.tsv:2", "bad_row"), ("t.tsv:3", "bad_row")]
    assert len(entries) == 2


@pytest.mark.parametrize("column", ["offset", "end", "duration"])
@pytest.mark.parametrize("value", ["1,5", "0:01.5", "soon", "[1]", "NA"])
def test_a_time_that_is_no_number_does_not_give_the_whole_recording(column, value, tmp_path):
    quoted = f'"{value}"'
    begin = {"end": ["offset", "0", "0", "0"]}.get(column, ["x", "", "", ""])
    rows = [f"id,audio,text,{column}", f"x,a.wav,one,{quoted}", "y,a.wav,two,1.5", "z,a.wav,three, "]
    path = text(tmp_path / "t.csv", "".join(f"{row},{more}\n" for row, more in zip(rows, begin, strict=True)))
    entries, faults = read(f"table:{path}")
    assert [entry.id for entry in entries] == ["y", "z"]
    assert [(fault.id, fault.reason) for fault in faults] == [("x", "bad_row")]
    assert faults[0].detail == f"t.csv:2: {column} is '{value}', not a number"


def test_a_time_that_is_a_list_costs_its_line_alone(tmp_path):
    path = lines(
        tmp_path / "t.jsonl",
        [{"audio": "a.wav", "text": "a", "offset": [1]}, {"audio": "a.wav", "text": "b", "offset": 1}],
    )
    entries, faults = read(f"table:{path}")
    assert [entry.offset for entry in entries] == [1.0] and [fault.reason for fault in faults] == ["bad_row"]


def covost(root, pair, *sentences):
    """A table as the official script writes it: pandas' to_csv with QUOTE_NONE and a backslash."""
    path = root / f"covost_v2.{pair}.train.tsv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(
            file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\", lineterminator="\n"
        )
        writer.writerow(["path", "sentence", "translation", "client_id"])
        writer.writerows(
            [f"clip_{n}.mp3", sentence, f'Er sagte "{n}".', "x"] for n, sentence in enumerate(sentences)
        )
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
    entries, faults = read(f"covost:{covost(tmp_path, 'en_de', written, 'next')}")
    assert [entry.text for entry in entries] == [read_as, "next"] and not faults
    assert [entry.response for entry in entries] == ['Er sagte "0".', 'Er sagte "1".']


def test_covost_pairs_of_one_source_are_two_corpora(tmp_path):
    german, arabic = covost(tmp_path, "en_de", "one"), covost(tmp_path, "en_ar", "one")
    assert [read(f"covost:{path}")[0][0].corpus for path in (german, arabic)] == [
        "covost_v2.en_de",
        "covost_v2.en_ar",
    ]
    assert read(f"covost:{german},corpus=mine")[0][0].corpus == "mine"
    options = [
        "--corpus",
        f"covost:{german}",
        "--corpus",
        f"covost:{arabic}",
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    sound(tmp_path / "clips" / "clip_0.mp3")
    assert pack.main(options) == 0 and len(ShardIndex.load(tmp_path / "out")) == 2


def test_nemo_a_line_in_another_language_is_a_translation(tmp_path):
    both = [("en", "en"), ("en", "de"), ("en", "xx"), ("en-US", "en"), ("en", None), (None, "fr")]
    rows = [
        {"audio_filepath": "a.wav", "duration": 1, "offset": 0.0, "text": "t", "pred_text": "p"} for _ in both
    ]
    rows = [
        row | {"source_lang": source, "target_lang": target}
        for row, (source, target) in zip(rows, both, strict=True)
    ]
    entries, faults = read(f"nemo:{lines(tmp_path / 'm.json', rows)}")
    told = [(e.id, e.task, e.lang, e.target_lang, e.text, e.response, e.hypothesis) for e in entries]
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
    rows = [
        dict(zip(columns, values, strict=True)) | {"audio": "a.wav"}
        for values in zip(*columns.values(), strict=True)
    ]
    if kind == "jsonl":
        return f"table:{lines(root / 't.jsonl', rows)}"
    content = [list(rows[0]), *(row.values() for row in rows)]
    return f"table:{text(root / 't.csv', ''.join(','.join(line) + chr(10) for line in content))}"


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "csv"])
def test_what_is_no_column_is_the_value_of_all(kind, tmp_path):
    specification = columns_of(kind, tmp_path, text=["a", "b"], mood=["joy", "fear"], who=["x", "y"])
    for _ in range(2):
        entries, _ = read(
            f"{specification},label=mood,prompt=How does it sound, and why?,speaker=who,target_lang=German"
        )
        assert [(e.label, e.speaker) for e in entries] == [("joy", "x"), ("fear", "y")]
        assert {(e.prompt, e.target_lang) for e in entries} == {("How does it sound, and why?", "German")}
    entries, _ = read(f"{specification},label=calm,speaker=s1,prompt=text")
    assert [(e.label, e.speaker, e.prompt) for e in entries] == [("calm", "s1", "a"), ("calm", "s1", "b")]
    for option in ("label=Mood", "label=moods", "response=calm", "id=calm", "lang_column=en"):
        with pytest.raises(CorpusError, match=f"has no column '{option.split('=')[1]}'.*columns are "):
            read(f"{specification},{option}")


def test_a_value_of_a_table_is_for_rows_without_their_own(tmp_path):
    path = text(tmp_path / "t.csv", "audio,label,response\na.wav,joy,\na.wav,,\n,,yes\n")
    entries, faults = read(f"table:{path},label=calm,prompt=Well?")
    assert [entry.label for entry in entries] == ["joy", "calm", "calm"] and not faults
    assert entries[2].audio is None and entries[2].prompt == "Well?"


def test_a_column_of_some_lines_alone_is_no_value(tmp_path):
    rows = [{"audio": "a.wav", "text": "a"}, {"audio": "a.wav", "text": "b", "mood": "joy"}]
    for ordered in (rows, rows[::-1]):
        with pytest.raises(
            CorpusError, match="t.jsonl:2: 'mood' is a column in some places and none in others"
        ):
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
    (tmp_path / "GigaSpeech.json").write_text(
        json.dumps({"audios": [{"path": "a.opus", "segments": segments}]})
    )
    assert [entry.id for entry in Corpus(f"gigaspeech:{tmp_path / 'GigaSpeech.json'}")] == ["a", "d"]
    assert [entry.id for entry in Corpus(f"gigaspeech:{tmp_path / 'GigaSpeech.json'},subset=TEST")] == ["c"]
    for name in ("train-0", "validated/0", "device/0", "test-0", "de/validation/0", "data/0"):
        name = f"hf/{name}.parquet"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    taken = [
        path.relative_to(tmp_path / "hf").as_posix()
        for path in Corpus(f"huggingface:{tmp_path / 'hf'}").reader.files
    ]
    assert taken == ["data/0.parquet", "device/0.parquet", "train-0.parquet", "validated/0.parquet"]
    assert [path.name for path in Corpus(f"huggingface:{tmp_path / 'hf'},split=test").reader.files] == [
        "test-0.parquet"
    ]


# --- times --------------------------------------------------------------------------------------------------

SEGMENTS = [("path", "{0}", "{1}", "sentence"), ("talk.wav", 0, 2, "one"), ("talk.wav", 2, 4, "two")]


def segments(path, begin, end):
    rows = [",".join(str(cell).format(begin, end) for cell in row) for row in SEGMENTS]
    return f"table:{text(path, ''.join(row + chr(10) for row in rows))},audio=path,text=sentence"


@pytest.mark.parametrize(
    "begin, end",
    [
        ("start", "end"),
        ("begin", "stop"),
        ("Start_Time", "End_Time"),
        ("start_ms", "end_ms"),
        ("t0", "t1"),
        ("seg.start", "seg.end"),
    ],
)
def test_times_that_no_option_names_stop_a_table(begin, end, tmp_path):
    specification = segments(tmp_path / "s.csv", begin, end)
    with pytest.raises(CorpusError, match=f"offset={begin}.*ignore="):
        list(Corpus(specification))
    for options in (f"offset={begin},end={end}", f"offset={begin},ignore={end},duration={end}"):
        entries, faults = read(f"{specification},{options}")
        wanted = [(0.0, 2.0), (2.0, 2.0)] if "ignore" not in options else [(0.0, 2.0), (2.0, 4.0)]
        assert [(entry.offset, entry.duration) for entry in entries] == wanted and not faults
    entries, faults = read(f"{specification},ignore={begin}+{end}")
    assert [(entry.offset, entry.duration) for entry in entries] == [(None, None)] * 2 and not faults


def test_an_end_alone_is_not_from_the_beginning(tmp_path):
    path = text(tmp_path / "t.csv", "audio,text,end\na.wav,one,2\n")
    with pytest.raises(
        CorpusError, match="'end' without a beginning: name its column with offset=COLUMN, or give ignore=end"
    ):
        list(Corpus(f"table:{path}"))
    assert read(f"table:{path},ignore=end")[0][0].duration is None


@pytest.mark.parametrize("reader", ["manifest", "nemo", "table"])
def test_times_under_other_keys_cost_a_line_of_json(reader, tmp_path):
    name, row = ("audio_filepath" if reader == "nemo" else "audio"), {"text": "x"}
    more = [
        {"start": 0.5, "end": 1.5},
        {"begin_time": "0.5"},
        {"offset": 1.0, "length": 2.0},
        {"offset": 1.0, "duration": 2.0, "num_samples": 32000},
        {"length": 2.0},
        {"start": None, "from": "en", "to": "de", "stop": "words", "offset": 0},
        {"start": True, "tone": 3, "end_user": 7},
    ]
    rows = [row | {name: f"{n}.wav"} | keys for n, keys in enumerate(more)]
    path = lines(tmp_path / "m.jsonl", rows)
    entries, faults = read(f"{reader}:{path}")
    kept = [int(entry.audio.rpartition("/")[2].partition(".")[0]) for entry in entries]
    assert kept == [3, 4, 5, 6] and [fault.reason for fault in faults] == ["bad_row"] * 3
    assert "'start'" in faults[0].detail and "ignore=start" in faults[0].detail
    assert len(read(f"{reader}:{path},ignore=start+end+begin_time+length")[0]) == 7


@pytest.mark.parametrize("value", [1e9, -1, 1e306, "1.5", True, [1]])
@pytest.mark.parametrize("field", ["offset", "duration"])
def test_numbers_that_are_no_times_cost_a_manifests_line(field, value, tmp_path):
    rows = [
        {"id": "bad", "audio": "a.wav", "text": "x", field: value},
        {"id": "good", "audio": "a.wav", "text": "x"},
    ]
    entries, faults = read(f"manifest:{lines(tmp_path / 'm.jsonl', rows)}")
    assert [entry.id for entry in entries] == ["good"] and [(f.id, f.reason) for f in faults] == [
        ("bad", "bad_row")
    ]


# --- names, kinds of values, languages ----------------------------------------------------------------------


ODD = [
    (float("nan"), "NaN"),
    (["a"], "a list"),
    ({"en": "a"}, "an object"),
    (True, "true or false"),
    (7, "a number"),
]


@pytest.mark.parametrize("value, said", ODD)
@pytest.mark.parametrize("reader", ["table", "manifest"])
@pytest.mark.parametrize("field", ["text", "prompt", "label"])
def test_json_that_is_no_text_is_not_written_out_as_text(field, reader, value, said, tmp_path):
    rows = [{"audio": "a.wav", "text": "x", field: value}, {"audio": "b.wav", "text": "fine"}]
    entries, faults = read(f"{reader}:{lines(tmp_path / 'm.jsonl', rows)}")
    assert [entry.text for entry in entries] == ["fine"] and f"{field} is {said}, not text" in faults[
        0
    ].detail


@pytest.mark.parametrize("reader", ["table", "manifest"])
def test_numbers_of_ids_and_speakers_are_names(reader, tmp_path):
    rows = [
        {"id": 7, "audio": "a.wav", "text": "x", "speaker": 12},
        {"id": 12345678901234567890123, "audio": "a.wav", "text": "x"},
    ]
    entries, faults = read(f"{reader}:{lines(tmp_path / 'm.jsonl', rows)}")
    assert [(entry.id, entry.speaker) for entry in entries] == [
        ("7", "12"),
        ("12345678901234567890123", None),
    ] and not faults


def test_text_that_a_wrong_conversion_spoilt_is_refused(tmp_path):
    rows = [
        {"id": "a", "audio": "a.wav", "text": "se\ufffdor"},
        {"id": "b", "audio": "a.wav", "text": "x", "hypothesis": "\ufffd"},
    ]
    entries, faults = read(f"manifest:{lines(tmp_path / 'm.jsonl', rows)}")
    assert [entry.id for entry in entries] == ["b"] and [(f.id, f.reason) for f in faults] == [
        ("a", "encoding")
    ]


def test_a_file_name_matches_in_either_unicode_form(tmp_path):
    from data_tools.sources import open_recording, read_bytes

    there = unicodedata.normalize("NFD", "caf\u00e9 \u00fc")
    sound(tmp_path / there / f"{there}.wav", 0.2)
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, there)
        mixed = unicodedata.normalize("NFD" if form == "NFC" else "NFC", there)
        for path in (tmp_path / name / f"{name}.wav", tmp_path / name / f"{mixed}.wav"):
            assert read_bytes(str(path))[:4] == b"RIFF" and open_recording(str(path)) is not None
        assert len(read(f"folder:{tmp_path / name}")[0]) == 1


@pytest.mark.parametrize(
    "folder, header, row, lang, wanted",
    [
        ("fr", "path\tsentence", "a.mp3\tx", "", "fr"),
        ("fy-NL", "path\tsentence", "a.mp3\tx", "", "fy-NL"),
        ("clips_and_more", "path\tsentence\tlocale", "a.mp3\tx\tde", "", "de"),
        ("data", "path\tsentence", "a.mp3\tx", ",lang=de", "de"),
        ("data", "path\tsentence", "a.mp3\tx", "", None),
        ("fr", "path\ttext", "a.mp3\tx", "", None),
    ],
)
def test_the_language_of_common_voice_is_not_any_folders_name(folder, header, row, lang, wanted, tmp_path):
    text(tmp_path / folder / "train.tsv", f"{header}\n{row}\n")
    if wanted is None:
        with pytest.raises(CorpusError, match="is no language of Common Voice|has no column sentence"):
            list(Corpus(f"commonvoice:{tmp_path / folder}{lang}"))
    else:
        assert [entry.lang for entry in Corpus(f"commonvoice:{tmp_path / folder}{lang}")] == [wanted]


def test_the_language_of_fleurs_and_mls_is_not_any_folders_name(tmp_path):
    text(tmp_path / "my_fleurs" / "train.tsv", "")
    text(tmp_path / "mls_data" / "train" / "transcripts.txt", "")
    for specification, words in (
        (f"fleurs:{tmp_path / 'my_fleurs'}", "as en_us"),
        (f"mls:{tmp_path / 'mls_data'}", "mls_german"),
    ):
        with pytest.raises(CorpusError, match=words):
            Corpus(specification)
        Corpus(f"{specification},lang=en")


# --- tables and lists of other forms ------------------------------------------------------------------------


def test_a_table_without_a_line_of_names(tmp_path):
    path = text(tmp_path / "metadata.csv", 'LJ1|"Hello," there|hello\nLJ2|bye|bye\nLJ3|cut\n')
    entries, faults = read(
        f"table:{path},delimiter=bar,columns=audio+raw+text,suffix=.wav,root={tmp_path / 'wavs'}"
    )
    assert [(entry.audio, entry.text) for entry in entries] == [
        (str(tmp_path / f"wavs/LJ{n}.wav"), t) for n, t in ((1, "hello"), (2, "bye"))
    ]
    assert [fault.reason for fault in faults] == ["bad_row"]
    with pytest.raises(CorpusError, match="columns="):
        list(Corpus(f"table:{path},delimiter=|"))


def test_columns_that_are_not_named_are_proposed(tmp_path):
    path = text(tmp_path / "t.csv", "file_name,transcription,client_id\na.wav,hi,s\n")
    with pytest.raises(CorpusError, match="perhaps audio=file_name,text=transcription,speaker=client_id"):
        list(Corpus(f"table:{path}"))
    assert len(read(f"table:{path},audio=file_name,text=transcription")[0]) == 1


@pytest.mark.parametrize("pack_it", [str.encode, lambda content: gzip.compress(content.encode())])
@pytest.mark.parametrize(
    "reader, key", [("manifest", "audio"), ("nemo", "audio_filepath"), ("table", "audio")]
)
def test_json_lists_and_compressed_files_are_corpora(reader, key, pack_it, tmp_path):
    rows = [{key: f"{n}.wav", "text": f"t{n}"} for n in range(3)]
    suffix = ".gz" if pack_it is not str.encode else ""
    for name, content in (
        ("a.json", json.dumps(rows, indent=1)),
        ("b.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
    ):
        (tmp_path / (name + suffix)).write_bytes(pack_it(content))
        assert [entry.text for entry in read(f"{reader}:{tmp_path / (name + suffix)}")[0]] == [
            "t0",
            "t1",
            "t2",
        ]


def test_a_lhotse_list_and_other_manifests_of_lhotse(tmp_path):
    cuts = [cut("a", recording({"channels": [0]})), cut("b", recording({"channels": [0]}))]
    assert [e.id for e in read(f"lhotse:{text(tmp_path / 'cuts.json', json.dumps(cuts, indent=2))}")[0]] == [
        "a",
        "b",
    ]
    others = [
        recording({"channels": [0]}),
        {"id": "s", "recording_id": "rec", "start": 0, "duration": 1, "text": "x"},
    ]
    _, faults = read(f"lhotse:{lines(tmp_path / 'others.jsonl', others)}")
    assert [fault.detail.split(":")[0] for fault in faults] == [
        "a recording, not a cut",
        "a supervision, not a cut",
    ]


def test_a_path_with_signs_of_options_is_taken_as_it_is(tmp_path):
    path = tmp_path / "my,lang=x -- $(id).jsonl"
    path.write_text('{"audio": "a.wav", "text": "x"}\n')
    assert Corpus(f"manifest:{path}").path == path and len(read(f"manifest:{path}")[0]) == 1


def test_tags_of_gigaspeech_leave_no_trace(tmp_path):
    said = {
        "<COMMA> HELLO <PERIOD>": "HELLO.",
        "WELL<COMMA> YES <QUESTIONMARK>": "WELL, YES?",
        "A <NOISE> B": None,
        "<SIL>": None,
    }
    segs = [
        {"sid": str(n), "begin_time": 0, "end_time": 1, "text_tn": t, "subsets": ["{S}"]}
        for n, t in enumerate([*said, 7])
    ]
    path = text(
        tmp_path / "GigaSpeech.json",
        json.dumps({"audios": [{"path": "a.opus", "segments": [*segs, 5]}, {"path": 3}]}),
    )
    entries, faults = read(f"gigaspeech:{path}")
    assert [entry.text for entry in entries] == [words for words in said.values() if words]
    assert [fault.reason for fault in faults] == [
        "no_speech",
        "no_speech",
        "bad_json",
        "bad_json",
        "bad_json",
    ]
