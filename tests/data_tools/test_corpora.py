"""Every reader on a small corpus in its format's own layout: what it yields, and that its audio can be
packed."""

import bz2
import gzip
import io
import json
import lzma
import math
import re
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools import pack, sources
from data_tools.audio import make_clip
from data_tools.corpora import ENTRY_FIELDS, READERS, Corpus, CorpusError, Entry, Ignored, Rejection
from data_tools.filters import Filters, SampleFilter
from data_tools.packing import Packing
from data_tools.plan import Layout, make_plan, shard_entries
from data_tools.shards import ShardIndex
from data_tools.sources import ClipError
from tests.data_tools.conftest import tone


def sound(path, seconds=0.3, rate=16000, hertz=440.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, rate, hertz), rate)
    return path


def sound_bytes(seconds=0.3, kind="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(seconds), 16000, format=kind)
    return buffer.getvalue()


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def librispeech(root):
    for speaker, chapter in ((19, 198), (26, 495)):
        folder = root / "LibriSpeech" / "train-clean-100" / str(speaker) / str(chapter)
        names = [f"{speaker}-{chapter}-{number:04d}" for number in range(2)]
        for name in names:
            sound(folder / f"{name}.flac")
        text(folder / f"{speaker}-{chapter}.trans.txt", "".join(f"{name} HELLO THERE\n" for name in names))
    (root / "LibriSpeech" / "train-clean-100" / "40" / "222").mkdir(
        parents=True
    )  # a chapter without transcripts
    return (
        f"librispeech:{root / 'LibriSpeech'}",
        4,
        1,
        {"text": "HELLO THERE", "speaker": "19", "lang": "en", "id": "19-198-0000"},
    )


def mls(root):
    folder = root / "mls_german" / "train"
    sound(folder / "audio" / "10" / "20" / "10_20_000001.flac")
    text(folder / "transcripts.txt", "10_20_000001\tguten tag\nbroken line\n")
    return (
        f"mls:{root / 'mls_german'}",
        1,
        1,
        {"text": "guten tag", "lang": "de", "speaker": "10", "recording": "10_20"},
    )


def commonvoice(root):
    sound(root / "cv" / "fr" / "clips" / "common_voice_fr_1.mp3")
    header = "client_id\tpath\tsentence\tup_votes\tdown_votes\n"
    text(
        root / "cv" / "fr" / "train.tsv",
        header + 'abc\tcommon_voice_fr_1.mp3\tIl dit "bonjour.\t2\t0\nabc\t\tx\t0\t0\n',
    )
    return (
        f"commonvoice:{root / 'cv' / 'fr'}",
        1,
        1,
        {"text": 'Il dit "bonjour.', "lang": "fr", "speaker": "abc", "id": "common_voice_fr_1"},
    )


def covost(root):
    sound(root / "clips" / "common_voice_en_7.mp3")
    table = text(
        root / "covost_v2.en_de.train.tsv",
        "path\tsentence\ttranslation\tclient_id\ncommon_voice_en_7.mp3\tGood morning\tGuten "
        "Morgen\tx\ngone.mp3\ta\t\ty\n",
    )
    told = {"text": "Good morning", "response": "Guten Morgen", "task": "translation", "lang": "en"}
    asked = {"target_lang": "German", "prompt": "Please translate the following audio into German."}
    return f"covost:{table}", 1, 1, told | asked


def _giga(name):
    segments = [
        {
            "sid": "A-0",
            "begin_time": 0.1,
            "end_time": 0.5,
            "subsets": ["{XL}", "{S}"],
            "speaker": "N/A",
            "text_tn": "YES <COMMA> I DO <PERIOD>",
        },
        {"sid": "A-1", "begin_time": 0.5, "end_time": 0.9, "subsets": ["{XL}"], "text_tn": "NO"},
        {"sid": "A-2", "begin_time": 0.5, "end_time": 0.9, "subsets": ["{S}"], "text_tn": "<MUSIC>"},
        {"sid": "A-3", "subsets": ["{S}"], "text_tn": "WHEN"},
    ]
    if name == "WenetSpeech":
        segments = [{key.replace("_tn", ""): value for key, value in s.items()} for s in segments]
    return {
        "dataset": name,
        "audios": [{"aid": "A", "path": "audio/A.wav", "language": "EN", "segments": segments}],
    }


def gigaspeech(root):
    sound(root / "audio" / "A.wav", 1.0)
    path = text(root / "GigaSpeech.json", json.dumps(_giga("GigaSpeech"), indent=1))
    told = {
        "id": "A-0",
        "text": "YES, I DO.",
        "offset": 0.1,
        "duration": 0.4,
        "recording": "A",
        "lang": "en",
        "speaker": None,
    }
    return f"gigaspeech:{path},subset=S", 1, 2, told


def wenetspeech(root):
    sound(root / "audio" / "A.wav", 1.0)
    text(root / "WenetSpeech.json", json.dumps(_giga("WenetSpeech")))
    return f"wenetspeech:{root},subset=XL", 2, 0, {"id": "A-0", "lang": "zh", "offset": 0.1}


def fleurs(root):
    sound(root / "en_us" / "audio" / "dev" / "1077.wav")
    row = "1077\t1077.wav\tHello, World\thello world\th e l l o | w o r l d |\t4800\tMALE\n"
    text(root / "en_us" / "dev.tsv", row + "broken\n")
    return (
        f"fleurs:{root / 'en_us'},split=dev",
        1,
        1,
        {"text": "Hello, World", "duration": 0.3, "lang": "en", "recording": "sentence-1077"},
    )


def kaldi(root):
    wav = sound(root / "long.wav", 1.0)
    ark = root / "data.ark"
    ark.write_bytes(b"utt1 " + sound_bytes(0.5))
    folder = root / "data"
    text(folder / "wav.scp", f"rec1 {wav}\nrec2 {ark}:5\nrec3 cat {wav} |\n")
    text(folder / "segments", "utt1 rec1 0.10 0.40\nutt2 rec2 0 -1\nutt3 rec3 0.5 1.0\nutt4 rec9 0 1\n")
    text(folder / "text", "utt1 one\nutt2 two\nutt3 three\nutt4 four\n")
    text(folder / "utt2spk", "utt1 A\nutt2 B\nutt3 B\nutt4 B\n")
    return (
        f"kaldi:{folder},lang=cs",
        3,
        1,
        {"id": "utt1", "text": "one", "speaker": "A", "offset": 0.1, "lang": "cs", "recording": "rec1"},
    )


def nemo(root):
    sound(root / "wavs" / "a.wav", 1.0)
    lines = [
        {"audio_filepath": "wavs/a.wav", "duration": 0.4, "offset": 0.2, "text": "hi", "pred_text": "hey"},
        {"duration": 1},
    ]
    path = text(root / "manifest.json", "".join(json.dumps(line) + "\n" for line in lines))
    return (
        f"nemo:{path},lang=en",
        1,
        1,
        {
            "id": "wavs/a@0.200",
            "text": "hi",
            "offset": 0.2,
            "duration": 0.4,
            "hypothesis": "hey",
            "lang": "en",
        },
    )


def lhotse(root):
    wav = sound(root / "rec.wav", 1.0)
    recording = {
        "id": "rec",
        "sources": [{"type": "file", "channels": [0], "source": str(wav)}],
        "duration": 1.0,
    }
    first = {"id": "s1", "start": 0.0, "duration": 0.4, "text": "one", "language": "English", "speaker": "x"}
    cuts = [
        {
            "id": "c1",
            "type": "MonoCut",
            "start": 0.2,
            "duration": 0.4,
            "supervisions": [first],
            "recording": recording,
        },
        {
            "id": "c2",
            "type": "MonoCut",
            "start": 0.0,
            "duration": 1.0,
            "recording": recording,
            "supervisions": [first, {**first, "id": "s2", "start": 0.5, "text": "two"}],
        },
        {"id": "c3", "type": "MixedCut", "tracks": []},
    ]
    path = root / "cuts.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(cut) + "\n" for cut in cuts))
    return f"lhotse:{path}", 3, 1, {"id": "c1", "text": "one", "offset": 0.2, "duration": 0.4, "speaker": "x"}


def huggingface(root):
    rows = {
        "audio": [{"bytes": sound_bytes(0.2 + 0.1 * i), "path": None} for i in range(3)],
        "sentence": ["a", "b", "c"],
        "client": ["x", "y", "z"],
    }
    table = pyarrow.table(rows)
    pyarrow.parquet.write_table(table, root / "train-00000.parquet", row_group_size=2)
    (root / "saved").mkdir()
    with pyarrow.ipc.new_stream(root / "saved" / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return f"huggingface:{root},speaker=client", 6, 0, {"text": "a", "speaker": "x"}


def features(**columns):
    """Schema metadata as `datasets` writes it."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


CLASSES = {"names": ["anger", "joy", "fear", "calm"], "_type": "ClassLabel"}


def write_both(root, columns, metadata=None):
    """The columns as Parquet and as save_to_disk leaves them, two clips each."""
    table = pyarrow.table({"audio": [sound_bytes(0.2), sound_bytes(0.3)], **columns}).replace_schema_metadata(
        metadata
    )
    pyarrow.parquet.write_table(table, root / "train-0.parquet")
    (root / "saved").mkdir()
    with pyarrow.ipc.new_stream(root / "saved" / "data-0.arrow", table.schema) as stream:
        stream.write_table(table)


@pytest.mark.parametrize(
    "column, feature, expected",
    [
        ([3, 0], CLASSES, ["calm", "anger"]),
        ([3, -1], CLASSES, ["calm", None]),
        ([[1, 2], []], {"feature": CLASSES, "_type": "Sequence"}, ["joy, fear", None]),
        ([[1, 2], [0]], {"feature": CLASSES, "length": -1, "_type": "List"}, ["joy, fear", "anger"]),
        ([[1], [0]], [CLASSES], ["joy", "anger"]),
        (
            [["Dog", "Bark"], None],
            {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
            ["Dog, Bark", None],
        ),
        (["happy", "sad"], {"dtype": "string", "_type": "Value"}, ["happy", "sad"]),
        (["happy", "sad"], None, ["happy", "sad"]),
    ],
)
def test_classes_of_a_hub_dataset_are_their_names(column, feature, expected, tmp_path):
    write_both(tmp_path, {"emotion": column}, None if feature is None else features(emotion=feature))
    found = [entry.label for entry in Corpus(f"huggingface:{tmp_path},label=emotion")]
    assert found == expected * 2, "of the Arrow file and of the Parquet file"


@pytest.mark.parametrize(
    "field, column, metadata, message",
    [
        ("label", [3, 0], None, "no class names"),
        ("text", [3, 0], {b"pandas": b"{}"}, "no class names"),
        ("label", [3, 0], {b"huggingface": b"broken"}, "no class names"),
        ("label", [3, 0], features(x={"dtype": "int64", "_type": "Value"}), "no class names"),
        ("label", [3, 0], features(x={"names": None, "_type": "ClassLabel"}), "no class names"),
        (
            "label",
            [[3], [0]],
            features(x={"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"}),
            "no class names",
        ),
        ("lang_column", [3, 0], None, "lang_column=COLUMN"),
        ("text", [{"de": "a"}, {"de": "b"}], None, "which is no text"),
        ("response", [["a"], ["b"]], None, "which is no response"),
    ],
)
@pytest.mark.parametrize("kind", ["train-0.parquet", "saved"])
def test_a_column_that_holds_no_words_is_no_training_target(field, column, metadata, message, kind, tmp_path):
    write_both(tmp_path, {"x": column}, metadata)
    with pytest.raises(CorpusError, match=f"'x' holds .*{message}"):
        list(Corpus(f"huggingface:{tmp_path / kind},{field}=x"))


def test_numbers_of_speakers_and_durations_are_taken(tmp_path):
    write_both(tmp_path, {"who": [7, 8], "text": ["a", "b"], "seconds": [0.2, None]})
    found = list(Corpus(f"huggingface:{tmp_path},speaker=who,duration=seconds"))
    assert [(entry.speaker, entry.duration) for entry in found] == [("7", 0.2), ("8", None)] * 2


def test_stretches_of_files_that_a_hub_dataset_names_are_not_the_whole_files(tmp_path):
    sound(tmp_path / "a.wav")
    columns = {"audio": ["a.wav", "a.wav"], "begin_time": [0.0, 0.1], "end_time": [0.1, 0.2]}
    for kind in (columns, {**columns, "audio": [{"path": "a.wav"}] * 2}):
        pyarrow.parquet.write_table(pyarrow.table(kind), tmp_path / "train.parquet")
        with pytest.raises(CorpusError, match="begin_time and end_time would be left out"):
            list(Corpus(f"huggingface:{tmp_path},audio=audio"))
        assert len(list(Corpus(f"huggingface:{tmp_path},audio=audio,ignore=begin_time+end_time"))) == 2
    pyarrow.parquet.write_table(
        pyarrow.table({**columns, "audio": [sound_bytes()] * 2}), tmp_path / "train.parquet"
    )
    assert len(list(Corpus(f"huggingface:{tmp_path}"))) == 2, "bytes are clips"


def table(root):
    sound(root / "wavs" / "a.wav", 1.0)
    path = text(root / "emotions.csv", 'file,start,stop,emotion\n"a",0.25,0.75,Very_Happy\n,0,1,sad\n')
    specification = f"table:{path},audio=file,offset=start,end=stop,label=emotion,task=emotion,suffix=.wav,root={root / 'wavs'}"
    return specification, 1, 1, {"label": "Very_Happy", "task": "emotion", "offset": 0.25, "duration": 0.5}


def folder(root):
    sound(root / "talks" / "a" / "one.wav", 0.4)
    text(root / "talks" / "a" / "one.txt", "hello")
    sound(root / "talks" / "b" / "two.flac")
    text(root / "talks" / "b" / "metadata.csv", "file_name,transcription\ntwo.flac,good bye\n")
    text(root / "talks" / "README.txt", "what these are")
    return f"folder:{root / 'talks'},speaker=folder", 2, 1, {"id": "a/one", "text": "hello", "speaker": "a"}


def shards(root):
    def member(tar, name, data):
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(root / "other-0.tar", "w") as tar:
        member(tar, "dir/utt1.wav", sound_bytes(0.4))
        member(tar, "dir/utt1.txt", b"hello")
        member(tar, "dir/utt2.flac", sound_bytes(0.5, "FLAC"))
        member(
            tar,
            "dir/utt2.json",
            json.dumps({"id": "two", "text": "world", "lang": "en", "task": "asr"}).encode(),
        )
        member(tar, "utt3.json", b"[]")
    return f"shards:{root}", 2, 1, {"id": "dir/utt1", "text": "hello"}


def audioset(root):
    sound(root / "clips" / "abc_30.000.wav", 1.0)
    text(
        root / "class_labels_indices.csv", 'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/0bt9lr,"Dog"\n'
    )
    path = text(
        root / "eval.csv",
        '# a comment\nabc, 30.000, 40.000, "/m/09x0r,/m/0bt9lr"\ngone, 0.000, 10.000, "/m/09x0r"\n',
    )
    return (
        f"audioset:{path},clips={root / 'clips'}",
        1,
        1,
        {"label": "Speech, Dog", "task": "sound", "id": "abc_30"},
    )


def vggsound(root):
    sound(root / "clips" / "xyz_000012.flac", 1.0)
    path = text(root / "vggsound.csv", 'xyz,12,"playing harp, plucked",train\nxyz,30,dog barking,test\n')
    told = {"label": "playing harp, plucked", "task": "sound", "recording": "xyz"}
    return f"vggsound:{path},clips={root / 'clips'},split=train", 1, 0, told


def esc50(root):
    sound(root / "audio" / "1-100-A-0.wav", 1.0)
    header = "filename,fold,target,category,esc10,src_file,take\n"
    text(
        root / "meta" / "esc50.csv",
        header + "1-100-A-0.wav,1,0,sea_waves,True,100,A\n5-9-A-1.wav,5,1,dog,True,9,A\n",
    )
    return f"esc50:{root},folds=1+2", 1, 0, {"label": "sea_waves", "task": "sound", "recording": "100"}


def nsynth(root):
    notes = {
        "bass_synthetic_033-022-050": {
            "note_str": "bass_synthetic_033-022-050",
            "instrument_str": "bass_synthetic_033",
            "instrument_family": 0,
            "instrument_family_str": "bass",
            "qualities_str": ["dark"],
            "pitch": 22,
            "sample_rate": 16000,
        },
        "organ_electronic_1-60-25": {
            "instrument_family_str": "organ",
            "instrument_str": "organ_electronic_1",
        },
        "flute_9": {"pitch": 3},
    }
    sound(root / "nsynth-valid" / "audio" / "bass_synthetic_033-022-050.wav", 0.5)
    text(root / "nsynth-valid" / "examples.json", json.dumps(notes, indent=2))
    told = {"task": "instrument", "label": "bass", "speaker": "bass_synthetic_033"}
    return f"nsynth:{root / 'nsynth-valid'}", 1, 2, told


def gtzan(root):
    for name in ("blues/blues.00000.wav", "blues/blues.00001.wav", "disco/disco.00000.wav"):
        sound(root / "genres_original" / name, 1.0)
    return f"gtzan:{root}", 3, 0, {"task": "genre", "label": "blues", "id": "blues.00000"}


def musiccaps(root):
    header = "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,is_balanced_subset,is_audioset_eval\n"
    rows = [
        '-0Gj8-vB1q4,30,40,"/m/0140xf,/m/02cjck","[\'ballad\', \'piano\']","A low voice, with ""piano"".",4,False,True\n',
        "gone,10,20,/m/04rlf,['rock'],Loud guitars.,4,False,True\n",
        "-0SdAVK79lg,30,40,/m/04rlf,['rock'],Drums.,0,False,False\n",
    ]
    sound(root / "clips" / "[-0Gj8-vB1q4]-[30-40].wav", 1.0)
    path = text(root / "musiccaps-public.csv", header + "".join(rows))
    told = {"task": "caption", "response": 'A low voice, with "piano".', "recording": "-0Gj8-vB1q4"}
    return f"musiccaps:{path},clips={root / 'clips'},split=eval", 1, 1, told


def jamendo(root):
    lines = [
        "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS\n",
        "track_0000214\tartist_000014\talbum_000031\t14/214.mp3\t2.0\tgenre---punkrock\tinstrument---drums\tinstrument---bass\n",
        "track_0000216\tartist_000014\talbum_000031\t16/216.mp3\t2.0\tinstrument---bass\n",
        "track_0000217\tartist_000014\n",
    ]
    sound(root / "audio" / "14" / "214.low.mp3", 2.0)
    path = text(root / "autotagging.tsv", "".join(lines))
    told = {
        "task": "instrument",
        "label": "drums, bass",
        "speaker": "artist_000014",
        "offset": 0.5,
        "duration": 1.0,
    }
    return f"jamendo:{path},clips={root / 'audio'},tags=instrument,seconds=1", 1, 2, told


def manifest(root):
    sound(root / "a.wav")
    rows = [{"audio": "a.wav", "text": "hi", "lang": "en"}, {"audio": 3}]
    path = text(root / "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return f"manifest:{path}", 1, 1, {"text": "hi", "id": "m-000000001"}


MAKERS = {name: globals()[name] for name in READERS}


def test_gtzan_takes_the_clips_of_a_list(tmp_path):
    gtzan(tmp_path)
    listed = text(
        tmp_path / "train_filtered.txt", "blues/blues.00000.wav\n\ndisco/disco.00000.wav\npop/pop.42.wav\n"
    )
    items = list(Corpus(f"gtzan:{tmp_path},list={listed}"))
    assert [item.id for item in items if isinstance(item, Entry)] == ["blues.00000", "disco.00000"]
    assert [(item.id, item.reason) for item in items if isinstance(item, Rejection)] == [
        ("pop/pop.42", "missing_file")
    ]
    assert [item.count for item in items if isinstance(item, Ignored)] == [1]


def test_nsynth_names_letters_of_another_encoding(tmp_path):
    specification = nsynth(tmp_path)[0]
    path = tmp_path / "nsynth-valid" / "examples.json"
    path.write_bytes(path.read_bytes().replace(b'"bass"', b'"bass\xe9"'))
    assert [item.reason for item in Corpus(specification) if isinstance(item, Rejection)][0] == "encoding"
    [entry] = [item for item in Corpus(specification + ",encoding=latin-1") if isinstance(item, Entry)]
    assert entry.label == "bassé"


def test_gtzan_gives_the_tempo_of_its_annotations(tmp_path):
    gtzan(tmp_path)
    for name, tempo in (("blues_00000", "129.5\n"), ("disco_00000", "fast")):
        text(tmp_path / "tempo" / f"gtzan_{name}.bpm", tempo)
    items = list(Corpus(f"gtzan:{tmp_path},tempo={tmp_path / 'tempo'}"))
    [entry] = [item for item in items if isinstance(item, Entry)]
    assert (entry.id, entry.task, entry.label) == ("blues.00000", "tempo", "130")
    assert [item.reason for item in items if isinstance(item, Rejection)] == ["missing_file", "bad_row"]


def test_jamendo_counts_tracks_that_are_left_out(tmp_path):
    specification = jamendo(tmp_path)[0] + ",one=yes"
    items = list(Corpus(specification))
    assert not [item for item in items if isinstance(item, Entry)]
    [ignored] = [item for item in items if isinstance(item, Ignored)]
    assert (ignored.what, ignored.count) == ("tracks with other than one tag of instrument", 1)


@pytest.mark.parametrize(
    ("maker", "options", "words"),
    [
        (jamendo, ",tags=era", "tags=era: genre, instrument, mood"),
        (jamendo, ",one=maybe", "one=maybe: yes or no"),
        (jamendo, ",seconds=-3", "seconds=-3: a number above 0"),
        (musiccaps, ",split=test", "split=test: train or eval"),
        (gtzan, ",tempo=/nowhere", "/nowhere does not exist"),
    ],
)
def test_options_of_music_readers_are_checked(maker, options, words, tmp_path):
    specification = maker(tmp_path)[0]
    name = options.split("=")[0]
    kept = ",".join(part for part in specification.split(",") if not part.startswith(name[1:] + "="))
    with pytest.raises(CorpusError, match=words):
        list(Corpus(kept + options))


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("nsynth", "examples.json", "[1]", "holds a list, not an object of notes"),
        ("nsynth", "examples.json", "{", "is not valid JSON"),
        ("jamendo", "autotagging.tsv", "TRACK_ID\tTAGS\n", "the first line is not TRACK_ID ARTIST_ID"),
        ("jamendo", "autotagging.tsv", "", "is empty"),
        ("musiccaps", "musiccaps-public.csv", "ytid,caption\na,b\n", "start_s"),
        ("gtzan", "blues.txt", "", "has no audio"),
    ],
)
def test_files_that_are_of_another_corpus_are_refused(name, file, content, words, tmp_path):
    path = text(tmp_path / file, content)
    more = f",clips={tmp_path}" if name in ("jamendo", "musiccaps") else ""
    with pytest.raises(CorpusError, match=words):
        list(Corpus(f"{name}:{tmp_path if name == 'gtzan' else path}{more}"))


@pytest.mark.parametrize("name", READERS)
def test_reader_yields_what_the_corpus_holds(name, tmp_path):
    specification, entries, faults, told = MAKERS[name](tmp_path)
    items = list(Corpus(specification))
    found = [item for item in items if isinstance(item, Entry)]
    assert (len(found), sum(isinstance(item, Rejection) for item in items)) == (entries, faults), items
    for key, value in told.items():
        assert getattr(found[0], key) == (pytest.approx(value) if isinstance(value, float) else value), key
    assert len({(entry.corpus, entry.id) for entry in found}) == entries
    assert [item.to_json() for item in Corpus(specification)] == [item.to_json() for item in items], (
        "the order must not change"
    )


def metadata_of(root):
    """The files of a corpus that hold its texts, by their bytes."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        if (
            path.suffix not in (".wav", ".mp3", ".flac", ".tar", ".ark", ".parquet", ".arrow")
            and path.stem != "README"
        ):
            data = path.read_bytes()
            found[path] = gzip.decompress(data) if path.suffix == ".gz" else data
    return found


def told_of(specification):
    """What entries hold but for ids of line numbers, and why others do not."""
    items = list(Corpus(specification))
    entries = [{**item.fields(), "id": None, "corpus": None} for item in items if isinstance(item, Entry)]
    return entries, [item.reason for item in items if isinstance(item, Rejection)]


SPELLINGS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "bom": b"\xef\xbb\xbf".__add__,
    "crlf": lambda data: data.replace(b"\n", b"\r\n"),
    "utf-16": lambda data: data.decode().encode("utf-16"),
    "no last line end": bytes.rstrip,
}
WITH_METADATA = [name for name in READERS if name not in ("shards", "huggingface", "gtzan")]


@pytest.mark.parametrize("name", WITH_METADATA)
def test_metadata_is_the_same_in_every_spelling(name, tmp_path):
    specification, *_ = MAKERS[name](tmp_path)
    expected, files = told_of(specification), metadata_of(tmp_path)
    assert files
    for path in files:
        path.unlink()
    for spelling, spell in SPELLINGS.items():
        end, now, written = f".{spelling}" if spelling in ("gz", "bz2", "xz") else "", specification, []
        for path, data in files.items():
            single = path.name == "one.txt"  # one clip's own text: those are not compressed
            written.append(path if single else path.with_name(path.name.removesuffix(".gz") + end))
            written[-1].write_bytes(data if single and end else spell(data))
            now = now.replace(str(path), str(written[-1]))
        assert told_of(now) == expected, spelling
        for path in written:
            path.unlink()


@pytest.mark.parametrize("name", [name for name in WITH_METADATA if name != "nsynth"])
def test_letters_of_another_encoding_are_named_unless_it_is_given(name, tmp_path):
    specification, _, _, told = MAKERS[name](tmp_path)
    word = next(
        word
        for word in re.findall(
            "[A-Za-z]{2,}", told.get("text") or told.get("label") or told.get("response") or "YES"
        )
    )
    for path, data in metadata_of(tmp_path).items():
        data = data.replace(word.encode(), word.encode() + b"\xe9")
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    try:
        entries, reasons = told_of(specification)
        assert "encoding" in reasons and not any(
            word in (entry.get("text"), entry.get("label")) for entry in entries
        )
    except CorpusError as error:
        assert "encoding=" in str(error)
    entries, reasons = told_of(f"{specification},encoding=latin-1")
    assert any(f"{word}é" in str(entry) for entry in entries) and "encoding" not in reasons


def test_all_formats_pack_together(tmp_path):
    specifications, expected = [], 0
    for name, maker in MAKERS.items():
        (tmp_path / name).mkdir()
        specification, entries, _, _ = maker(tmp_path / name)
        specifications += ["--corpus", f"{specification},corpus={name}"]
        expected += entries
    out = tmp_path / "packed"
    # One faulty share: readers' faults are metadata and do not stop the run.
    assert pack.main([*specifications, "--out", str(out), "--workers", "1", "--allow-pipes"]) == 0
    index = ShardIndex.load(out)
    told = json.loads((out / "index.json").read_text())["rejected"]
    assert len(index) == expected and set(told) == {
        "bad_row",
        "bad_json",
        "missing_file",
        "no_speech",
        "unmatched",
    }
    seconds = {}
    for row in range(len(index)):
        record = index.read(row)[1]
        seconds[record["corpus"], record["id"]] = record["duration"]
    wanted = {
        ("kaldi", "utt1"): 0.3,
        ("kaldi", "utt2"): 0.5,
        ("kaldi", "utt3"): 0.5,
        ("gigaspeech", "A-0"): 0.4,
        ("lhotse", "c1"): 0.4,
    }
    wanted |= {
        ("lhotse", "c2@s2"): 0.4,
        ("nemo", "wavs/a@0.200"): 0.4,
        ("shards", "two"): 0.5,
        ("huggingface", "train-00000-000000002"): 0.4,
    }
    assert {key: seconds[key] for key in wanted} == pytest.approx(wanted, abs=1e-3)


def test_pipes_run_only_when_asked_for(tmp_path, capsys):
    specification, *_ = kaldi(tmp_path)
    out = tmp_path / "packed"
    pack.main(["--corpus", specification, "--out", str(out), "--workers", "1"])
    refused = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in refused} == {"utt3": "pipe", "utt4": "bad_row"}


def test_durations_of_a_kaldi_folder_reach_the_filters(tmp_path, capsys):
    wav = sound(tmp_path / "a.wav", 0.3)
    text(tmp_path / "data" / "wav.scp", "".join(f"{name} {wav}\n" for name in "abcd"))
    text(tmp_path / "data" / "text", "".join(f"{name} some words\n" for name in "abcd"))
    text(tmp_path / "data" / "utt2dur", "a 0.3\nb 0.05\nd 0\n")
    options = [
        "--corpus",
        f"kaldi:{tmp_path / 'data'}",
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--max-rate",
        "100",
    ]
    assert pack.main([*options, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "3 samples" in told and "too_fast" in told and "2 samples have no known duration" in told
    text(tmp_path / "data" / "utt2dur", "a 0.3\nb long\n")
    assert (
        pack.main([*options, "--dry-run"]) == 0
        and "'b long' is not UTTERANCE SECONDS" in capsys.readouterr().out
    )
    text(tmp_path / "data" / "utt2dur", "a 9\nb 9\nc 9\nd 9\n")
    text(tmp_path / "data" / "segments", "a a 0.1 0.2\nb b 0.1 -1\n")
    found = [item for item in Corpus(f"kaldi:{tmp_path / 'data'}") if isinstance(item, Entry)]
    assert [(e.offset, e.duration) for e in found] == [(0.1, pytest.approx(0.1)), (0.1, None)]


def test_a_command_that_fails_costs_its_clip(tmp_path):
    manifest_path = text(
        tmp_path / "m.jsonl",
        json.dumps({"id": "a", "audio": "pipe:echo no >&2; exit 3", "text": "x"})
        + "\n"
        + json.dumps({"id": "b", "audio": str(sound(tmp_path / "b.wav")), "text": "y"}),
    )
    out = tmp_path / "packed"
    assert (
        pack.main(["--manifest", str(manifest_path), "--out", str(out), "--workers", "1", "--allow-pipes"])
        == 0
    )
    fault = json.loads((out / "rejected.jsonl").read_text())
    assert fault["reason"] == "command_failed" and "ended with 3: no" in fault["detail"]


def test_common_voice_takes_durations_from_its_table(tmp_path, capsys):
    specification, *_ = commonvoice(tmp_path)
    folder = tmp_path / "cv" / "fr"
    text(
        folder / "validated.tsv",
        "client_id\tpath\tsentence\n" + "".join(f"s{i}\t{i}.mp3\tun deux\n" for i in range(5)),
    )
    for i in range(5):
        sound(folder / "clips" / f"{i}.mp3")
    durations = text(
        folder / "clip_durations.tsv",
        "clip\tduration[ms]\n4.mp3\t1500\n0.mp3\t7200000\n2.mp3\tlong\n3.mp3\t0\n",
    )
    validated = specification.replace("train", "validated") + ",split=validated"
    found = {entry.id: entry.duration for entry in Corpus(validated) if isinstance(entry, Entry)}
    assert found == {"0": 7200.0, "1": None, "2": None, "3": None, "4": 1.5}
    options = ["--corpus", validated, "--out", str(tmp_path / "out"), "--workers", "1", "--max-seconds", "30"]
    assert pack.main([*options, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"refused +1 +2.00 h  too_long", told), told
    assert "3 samples have no known duration: --max-seconds apply" in told
    durations.write_text("clip\tseconds\n")
    with pytest.raises(CorpusError, match=r"clip_durations.tsv.*duration\[ms\]"):
        list(Corpus(validated))


def test_a_dry_run_measures_hours_by_the_clips_that_it_decodes(tmp_path, capsys):
    """A file's size gives another duration for 8-bit audio at 8 kHz than for 16-bit audio at 16 kHz."""
    for i in range(12):
        path = tmp_path / "mine" / f"{i}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.sin(np.arange(8000 * 5) / 9) / 3, 8000, subtype="PCM_U8")
        text(path.with_suffix(".txt"), "some words")
    options = ["--corpus", f"folder:{tmp_path / 'mine'},lang=en", "--out", str(tmp_path / "out")]
    assert pack.main([*options, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "12 samples, about 60.0 s and" in told and "no known duration" not in told


def test_shares_of_splits_that_large_speakers_miss_are_named(tmp_path, capsys):
    rows = "".join(f"{i}.wav,hi,{'joe' if i < 25 else f's{i}'}\n" for i in range(100))
    table = text(tmp_path / "t.csv", "audio,text,speaker\n" + rows)
    for i in range(100):
        sound(tmp_path / f"{i}.wav")
    options = ["--corpus", f"table:{table},lang=en", "--splits", "train=0.75,valid=0.25", "--dry-run"]
    options += ["--out", str(tmp_path / "out")]
    notes = set()
    for seed in range(8):
        assert pack.main([*options, "--seed", str(seed)]) == 0
        told = capsys.readouterr().out
        counts = dict(re.findall(r"(train|valid) \d+ \((\d+) samples\)", told))
        noted = re.search(
            r"few speakers, or large ones, miss the shares \(.*valid (\d+)% instead of 25%", told
        )
        assert (noted is not None) == (not 25 / 1.5 < int(counts["valid"]) < 25 * 1.5), told
        assert noted is None or noted[1] == counts["valid"]
        notes.add(noted is not None)
    assert notes == {True, False}
    assert pack.main([*options, "--split-by", "id"]) == 0
    assert "miss the shares" not in capsys.readouterr().out


def test_every_reader_takes_a_target_language_and_tables_have_a_column_of_it(tmp_path):
    specification, *_ = commonvoice(tmp_path)
    found = [item for item in Corpus(f"{specification},target_lang=German") if isinstance(item, Entry)]
    assert [entry.target_lang for entry in found] == ["German"]
    path = text(
        tmp_path / "t.csv", "audio,text,response,target_lang\na.wav,hi,hallo,German\nb.wav,hi,salut,French\n"
    )
    assert [entry.target_lang for entry in Corpus(f"table:{path},task=translation")] == ["German", "French"]


def test_reading_again_what_was_packed_keeps_every_field(corpus, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    pack.main(["--manifest", str(corpus), "--out", str(first), "--workers", "1"])
    pack.main(
        [
            "--corpus",
            f"shards:{first}",
            "--out",
            str(second),
            "--workers",
            "1",
            "--codec",
            "copy",
            "--seed",
            "5",
        ]
    )
    contents = []
    for folder in (first, second):
        index = ShardIndex.load(folder)
        contents.append(
            sorted(
                (record["id"], audio, json.dumps(record))
                for audio, record in map(index.read, range(len(index)))
            )
        )
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "specification, message",
    [
        ("librispech:/tmp", "did you mean 'librispeech'?"),
        ("librispeech:/nowhere", "/nowhere does not exist"),
        ("commonvoice:{tmp},splt=train", "did you mean 'split'?"),
        ("commonvoice:{tmp}", "train.tsv does not exist: give the language's folder"),
        ("commonvoice:{tmp}/cv", "train.tsv does not exist: give the language's folder: .*/cv/fr"),
        ("commonvoice:{tmp}/cv/fr", "train.tsv does not exist: split= is one of dev, validated"),
        ("folder:{tmp},foo=1", r"unknown option 'foo' \(folder takes metadata, text, speaker, label, corpus"),
        ("kaldi:{tmp}", "no wav.scp"),
        ("audioset:{tmp}/x.csv", "clips"),
        ("nothing", "NAME:PATH"),
    ],
)
def test_wrong_specifications_say_what_to_do(specification, message, tmp_path):
    (tmp_path / "x.csv").write_text("a\n")
    for name in ("dev", "validated", "clip_durations"):
        text(tmp_path / "cv" / "fr" / f"{name}.tsv", "path\tsentence\n")
    with pytest.raises(CorpusError, match=message.replace("?", r"\?")):
        Corpus(specification.format(tmp=tmp_path))


def test_unsorted_kaldi_folder_is_refused(tmp_path):
    specification, *_ = kaldi(tmp_path)
    text(tmp_path / "data" / "text", "utt2 two\nutt1 one\n")
    with pytest.raises(CorpusError, match="sort"):
        list(Corpus(specification))


def test_large_json_is_read_piece_by_piece(tmp_path, monkeypatch):
    from data_tools import text_files as module

    monkeypatch.setattr(module, "_CHUNK", 16)
    path = text(
        tmp_path / "g.json",
        json.dumps({"x": {"audios2": []}, "audios": [{"n": i, "s": "], }" * i} for i in range(30)]}),
    )
    assert [element["n"] for element in module.json_array(path, "audios")] == list(range(30))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CorpusError, match="ends in the middle"):
        list(module.json_array(path, "audios"))


def test_parquet_row_groups_stay_together_and_are_read_once(tmp_path, monkeypatch):
    rows = {"audio": [sound_bytes(0.1)] * 40, "text": [str(i) for i in range(40)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet", row_group_size=10)
    sources._row_group.cache_clear()
    out = tmp_path / "out"
    pack_options = [
        "--corpus",
        f"huggingface:{tmp_path / 'a.parquet'},audio=audio",
        "--out",
        str(out),
        "--shard-mb",
        "0.08",
    ]

    reads = []
    monkeypatch.setattr(
        Packing,
        "run",
        lambda self, shards, hours, workers: [reads.append(self.write_shard(shard)) for shard in shards],
    )
    assert pack.main(pack_options) == 0
    index = ShardIndex.load(out)
    groups = [
        [int(index.read(row)[1]["text"]) // 10 for row in np.flatnonzero(index.samples["shard"] == shard)]
        for shard in range(len(index.shards))
    ]
    assert len(index.shards) > 1 and sum(len(set(group)) for group in groups) == 4, (
        "no row group is in two shards"
    )
    assert sources._row_group.cache_info().misses == 4, "each row group is read once"


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-5, 10**12)
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from([*ENTRY_FIELDS, "other"]), anything, max_size=6) | anything,
        max_size=4,
    )
)
@example(rows=[{"corpus": math.inf}, {"corpus": "\ud800"}, {"id": "\ud800", "text": 7}])
def test_any_content_of_a_line_costs_at_most_that_line(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = make_plan(
        folder / "plan",
        [Corpus(f"manifest:{folder / 'm.jsonl'}")],
        SampleFilter(Filters(0.1, 20, 1, 30)),
        Layout(),
        {},
    )
    kept = [entry for shard in range(plan["shards"]) for entry in shard_entries(folder / "plan", shard)[1]]
    is_list = len(rows) == 1 and isinstance(rows[0], list)  # a file that is one list holds its elements
    count = len(rows[0]) if is_list else len(rows)
    assert len(kept) + sum(plan["rejected"].values()) == count == plan["items"]
    for entry in kept:
        if entry.audio:
            with pytest.raises(ClipError):
                make_clip(entry.audio, entry.offset, entry.duration)


KEYS = [
    *ENTRY_FIELDS,
    *"audio_filepath start end length recording supervisions sources type source_lang".split(),
]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(KEYS), anything, max_size=6) | anything, min_size=1, max_size=3
    )
)
@pytest.mark.parametrize("reader", ["manifest", "table", "nemo", "lhotse"])
def test_every_reader_of_json_gives_an_item_a_line(reader, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {}]))
    items = [item for item in Corpus(f"{reader}:{folder / 'm.jsonl'}") if isinstance(item, Entry | Rejection)]
    assert len(items) >= len(rows) + 1, "lhotse may give several samples of a cut"
    for item in items:
        assert item.to_json().encode() and (
            isinstance(item, Entry) or item.reason and "\n" not in item.detail
        )


@settings(max_examples=60, deadline=None)
@given(value=anything, text=st.none() | st.binary(max_size=6), audio=st.booleans())
def test_every_json_in_a_tar_gives_a_sample_or_a_fault(value, text, audio, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "t.tar"
    members = (
        [("k.json", json.dumps(value).encode())]
        + [("k.txt", text)] * (text is not None)
        + [("k.wav", b"x")] * audio
    )
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (item,) = Corpus(f"shards:{path}")
    assert isinstance(item, Entry | Rejection) and item.to_json().encode()
