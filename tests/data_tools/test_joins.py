"""Readers that join two files: matched by id in any order, what is left over is named or counted. Never a
neighbour's text."""

import gzip
import io
import json
import random
import tarfile

import numpy as np
import pytest
import soundfile

from data_tools.corpora import Corpus, CorpusError, Entry, Ignored, Rejection
from data_tools.sources import read_bytes
from tests.data_tools.conftest import tone


def sound(hertz, kind="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(0.3, hertz=hertz, noise=0), 16000, format=kind)
    return buffer.getvalue()


def hertz_of(entry):
    """The pitch of an entry's audio, as it is stored."""
    wave, rate = soundfile.read(io.BytesIO(read_bytes(entry.audio)))
    return round(float(np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)), -1)


def tar(path, members, mode="w"):
    """members: (name, bytes)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write(path, content, opener=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


def read(specification):
    """({id: entry}, {id: reason}, {heading: count})"""
    items = list(Corpus(specification))
    entries = {item.id: item for item in items if isinstance(item, Entry)}
    assert len(entries) == sum(isinstance(item, Entry) for item in items)
    faults = {item.id: item.reason for item in items if isinstance(item, Rejection)}
    return entries, faults, {item.what: item.count for item in items if isinstance(item, Ignored)}


def pitches(entries):
    return {name: (hertz_of(entry), entry.text) for name, entry in entries.items()}


PITCH = {f"c.{n}": 200 + 100 * n for n in range(6)}
SAID = {name: (pitch, f"tone {pitch}") for name, pitch in PITCH.items()}


def shar(folder, cuts, audio, extension="flac"):
    def cut(name):
        words = {"id": name, "start": 0.0, "duration": 0.3, "text": f"tone {PITCH[name]}"}
        recording = {
            "id": name,
            "duration": 0.3,
            "sources": [{"type": "shar", "channels": [0], "source": ""}],
        }
        return {
            "id": name,
            "type": "MonoCut",
            "start": 0.0,
            "duration": 0.3,
            "recording": recording,
            "supervisions": [words],
        }

    write(folder / "cuts.000000.jsonl.gz", "".join(json.dumps(cut(name)) + "\n" for name in cuts), gzip.open)
    members = [
        m
        for name in audio
        for m in ((f"{name}.{extension}", sound(PITCH[name], "FLAC")), (f"{name}.json", b"{}"))
    ]
    tar(folder / "recording.000000.tar", members)
    return f"lhotse:{folder}"


@pytest.mark.parametrize("extension", ["flac", "original"])
def test_shar_cuts_are_matched_with_the_tar_by_id(extension, tmp_path):
    names = list(PITCH)
    random.Random(1).shuffle(names)
    cuts, audio = [name for name in PITCH if name != "c.1"], [name for name in names if name != "c.4"]
    entries, faults, ignored = read(shar(tmp_path / "s", cuts, audio, extension))
    assert pitches(entries) == {name: SAID[name] for name in ("c.0", "c.2", "c.3", "c.5")}
    assert faults == {"c.1": "unmatched", "c.4": "missing_file"} and not ignored


def test_shar_tars_of_a_mac_and_placeholders(tmp_path):
    specification = shar(tmp_path / "s", ["c.0", "c.1"], ["c.0"])
    with tarfile.open(tmp_path / "s" / "recording.000000.tar", "a") as archive:
        for name in ("._c.0.flac", "c.1.nodata", "c.1.nometa"):
            archive.addfile(tarfile.TarInfo(name))
    entries, faults, ignored = read(specification)
    assert list(entries) == ["c.0"] and faults == {"c.1": "no_audio"} and list(ignored.values()) == [1]


def test_kaldi_files_are_joined_by_utterance(tmp_path):
    folder = tmp_path / "data"
    for name, pitch in PITCH.items():
        (tmp_path / f"{name}.wav").write_bytes(sound(pitch))
    write(folder / "wav.scp", "".join(f"{name} {tmp_path}/{name}.wav\n" for name in PITCH if name != "c.3"))
    write(
        folder / "text",
        "a.0 nothing's\n"
        + "".join(f"{n} tone {p}\n" for n, p in PITCH.items() if n != "c.1")
        + "z.9 nothing's\n",
    )
    write(folder / "utt2spk", "c.0 s0\nc.2 s2\nd.7 s7\n")
    entries, faults, ignored = read(f"kaldi:{folder}")
    assert pitches({n: e for n, e in entries.items() if e.text}) == {
        n: SAID[n] for n in ("c.0", "c.2", "c.4", "c.5")
    }
    assert entries["c.1"].text is None, "refused as no_text when it is planned"
    assert faults == {"a.0": "unmatched", "c.3": "unmatched", "z.9": "unmatched"}
    assert {n: e.speaker for n, e in entries.items()} == {
        "c.0": "s0",
        "c.1": None,
        "c.2": "s2",
        "c.4": None,
        "c.5": None,
    }
    assert ignored == {
        "lines of utt2spk without an utterance": 1,
        "gaps in utt2spk: utterances without a line there, which are kept": 3,
    }


def test_kaldi_lines_that_are_none_cost_their_utterance(tmp_path):
    folder = tmp_path / "data"
    write(folder / "wav.scp", f"r1 {tmp_path}/a.wav\nr2\nr3 {tmp_path}/b.wav\n")
    write(folder / "segments", "u1 r1 0 1\nu2 r1 zero 1\nu3 r2 0 1\nu4 r1\nu5 r1 0.5 1\n")
    (folder / "text").write_bytes("u1 one\nu2 two\nu3 three\nu4 four\nu5 señor\n".encode("latin-1"))
    entries, faults, ignored = read(f"kaldi:{folder}")
    assert list(entries) == ["u1"] and faults == {
        "u2": "bad_row",
        "u3": "bad_row",
        "u4": "bad_row",
        "u5": "encoding",
    }
    assert ignored == {"recordings of wav.scp without a segment": 2}


def test_nemo_lines_are_matched_with_the_members_of_tars(tmp_path):
    names = list(PITCH)
    for number in range(2):
        members = [(f"{name}.wav", sound(PITCH[name])) for name in names[number::2] if name != "c.4"]
        tar(tmp_path / f"audio_{number}.tar", [*members, ("._x.wav", b"")])
    rows = [
        {"audio_filepath": f"{n}.wav", "duration": 0.3, "text": f"tone {PITCH[n]}", "shard_id": 0}
        for n in reversed(names)
    ]
    write(
        tmp_path / "m.json",
        "".join(json.dumps(row) + "\n" for row in rows if row["audio_filepath"] != "c.1.wav"),
    )
    for tars in ("audio_{0..1}.tar", "audio__OP_0..1_CL_.tar", "."):
        entries, faults, ignored = read(f"nemo:{tmp_path / 'm.json'},tars={tars}")
        assert pitches(entries) == {name: SAID[name] for name in ("c.0", "c.2", "c.3", "c.5")}
        assert faults == {"c.1": "unmatched", "c.4.wav": "missing_file"} and list(ignored.values()) == [2]
    for tars, message in (
        ("nothing", "there are no such tars"),
        ("audio_{0..2}.tar", "audio_2.tar does not exist"),
    ):
        with pytest.raises(CorpusError, match=message):
            Corpus(f"nemo:{tmp_path / 'm.json'},tars={tars}")


def test_librispeech_clips_without_a_line_are_named(tmp_path):
    chapter = tmp_path / "LS" / "train-clean-100" / "19" / "198"
    for number in range(3):
        write(chapter / f"19-198-000{number}.flac", "")
    write(chapter / "19-198.trans.txt", "19-198-0000 ONE\n19-198-0002 THREE\n")
    entries, faults, _ = read(f"librispeech:{tmp_path / 'LS'}")
    assert list(entries) == ["19-198-0000", "19-198-0002"] and faults == {"19-198-0001": "unmatched"}


@pytest.mark.parametrize("kind", ["mls", "fleurs", "esc50"])
def test_clips_that_a_table_does_not_have_are_counted(kind, tmp_path):
    if kind == "mls":
        write(tmp_path / "mls_german" / "train" / "transcripts.txt", "1_2_3\teins\n")
        for name in ("1_2_3", "1_2_4"):
            write(tmp_path / "mls_german" / "train" / "audio" / "1" / "2" / f"{name}.flac", "")
        specification = f"mls:{tmp_path / 'mls_german'}"
    elif kind == "fleurs":
        write(tmp_path / "en_us" / "train.tsv", "1\ta.wav\tA\ta\ta |\t4800\tMALE\n")
        for name in ("a.wav", "b.wav"):
            write(tmp_path / "en_us" / "audio" / "train" / name, "")
        specification = f"fleurs:{tmp_path / 'en_us'}"
    else:
        write(tmp_path / "meta" / "esc50.csv", "filename,category\na.wav,dog\n")
        for name in ("a.wav", "b.wav"):
            write(tmp_path / "audio" / name, "")
        specification = f"esc50:{tmp_path}"
    entries, faults, ignored = read(specification)
    assert len(entries) == 1 and not faults and list(ignored.values()) == [1]


# --- a folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["commonvoice", "covost", "table", "gigaspeech", "wenetspeech", "audioset", "vggsound"]
)
def test_audio_beside_that_of_a_table_is_counted(kind, tmp_path):
    for name in ("abc_1.wav", "abc_000001.wav", "left.mp3", "over.FLAC", "._abc_1.wav", "notes.txt"):
        write(tmp_path / "clips" / name, "")
    audios = {"audios": [{"path": "clips/abc_1.wav", "segments": []}, {"path": "clips/abc_000001.wav"}]}
    content = {
        "commonvoice": ("train.tsv", "path\tsentence\tlocale\nabc_1.wav\tx\ten\nabc_000001.wav\ty\ten\n"),
        "covost": (
            "covost_v2.en_de.train.tsv",
            "path\tsentence\ttranslation\nabc_1.wav\tx\tx\nabc_000001.wav\ty\t\n",
        ),
        "table": ("t.csv", "audio,offset,duration\nabc_1.wav,0,1\nabc_1.wav,1,1\nabc_000001.wav,0,1\n"),
        "gigaspeech": ("GigaSpeech.json", json.dumps(audios)),
        "wenetspeech": ("WenetSpeech.json", json.dumps(audios)),
        "audioset": ("s.csv", 'abc, 1.0, 11.0, "m"\ngone, 1.0, 11.0, "m"\n'),
        "vggsound": ("v.csv", "abc,1,dog,train\ngone,1,dog,train\n"),
    }
    write(tmp_path / "class_labels_indices.csv", "mid,display_name\nm,dog\n")
    path = write(tmp_path / content[kind][0], content[kind][1])
    specification = {
        "commonvoice": f"commonvoice:{tmp_path}",
        "table": f"table:{path},root={tmp_path / 'clips'}",
        "audioset": f"audioset:{path},clips={tmp_path / 'clips'}",
        "vggsound": f"vggsound:{path},clips={tmp_path / 'clips'},split=train",
    }.get(kind, f"{kind}:{path}")
    corpus = Corpus(specification)
    heading = f"audio files beside those of {path.name}" + (", split train" if kind == "vggsound" else "")
    for _ in range(2):  # a corpus may be read twice
        ignored = [(item.what, item.count) for item in corpus if isinstance(item, Ignored)]
        assert ignored == [(heading, 3 if kind in ("audioset", "vggsound") else 2)]


def clips(folder, *names):
    for name in names:
        stem = name.rpartition("/")[2].partition(".")[0]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sound(PITCH[f"c.{stem[-1]}"]))


def test_a_folder_of_clips_with_texts_beside_them(tmp_path):
    clips(tmp_path, "a/x0.wav", "a/b/x1.wav", "x2.flac", "x3.wav", "x4.wav")
    write(tmp_path / "a" / "x0.txt", "tone 200\n")
    write(tmp_path / "a" / "b" / "x1.lab", "\ufefftone 300")
    write(tmp_path / "x2.json", json.dumps({"text": "tone 400", "speaker": 7, "lang": "de"}))
    (tmp_path / "x4.txt").write_bytes("señor".encode("latin-1"))
    write(tmp_path / "a" / "left.txt", "nothing's")
    write(tmp_path / "notes.pdf", "")
    write(tmp_path / "a" / "._x0.txt", "")
    entries, faults, ignored = read(f"folder:{tmp_path}")
    said = {
        "a/x0": (200, "tone 200"),
        "a/b/x1": (300, "tone 300"),
        "x2": (400, "tone 400"),
        "x3": (500, None),
    }
    assert pitches(entries) == said and (entries["x2"].speaker, entries["x2"].lang) == ("7", "de")
    assert faults == {"x4": "encoding", "a/left": "unmatched"} and sorted(ignored.values()) == [1, 1]


METADATA = {
    "metadata.csv": "file_name,transcription,speaker_id\n{0},tone 200,s1\n{1},tone 300,s2\n{2},lost,s3\n",
    "metadata.tsv": "path\tsentence\tspeaker\n{0}\ttone 200\ts1\n{1}\ttone 300\ts2\n{2}\tlost\ts3\n",
    "metadata.jsonl": '{{"file_name": "{0}", "text": "tone 200", "speaker": "s1"}}\n{{"file_name": "{1}", "text": "tone 300", '
    '"speaker": "s2"}}\n{{"file_name": "{2}", "text": "lost", "speaker": "s3"}}\n',
    "metadata.json": '[{{"audio": "{0}", "text": "tone 200", "speaker": "s1"}},\n{{"audio": "{1}", "text": "tone 300", '
    '"speaker": "s2"}},\n{{"audio": "{2}", "text": "lost", "speaker": "s3"}}]\n',
    "transcripts.txt": "{0}\ttone 200\n{1}\ttone 300\n{2}\tlost\n",
    "transcript.txt": "{0} tone 200\n{1} tone 300\n{2} lost\n",
    "a-b.trans.txt": "{0} tone 200\n{1} tone 300\n{2} lost\n",
    "metadata-bar.csv": "{0}|tone 200|TONE 200\n{1}|tone 300|TONE 300\n{2}|lost|LOST\n",
}


@pytest.mark.parametrize(
    "named", [("a/x0.wav", "a/x1.wav", "a/x9.wav"), ("x0.wav", "x1.wav", "x9.wav"), ("x0", "x1", "x9")]
)
@pytest.mark.parametrize("file", METADATA)
def test_a_folder_of_clips_with_one_metadata_file(file, named, tmp_path):
    clips(tmp_path, "a/x0.wav", "a/x1.wav", "a/x2.wav")
    write(tmp_path / file.replace("-bar", ""), METADATA[file].format(*named))
    entries, faults, _ = read(f"folder:{tmp_path}")
    assert pitches(entries) == {"a/x0": (200, "tone 200"), "a/x1": (300, "tone 300"), "a/x2": (400, None)}
    assert faults == {named[2]: "missing_file"}
    if file.startswith("metadata.") and "bar" not in file:
        assert [entry.speaker for entry in entries.values()] == ["s1", "s2", None]
    assert list(read(f"folder:{tmp_path},metadata={file.replace('-bar', '')}")[0]) == list(entries)


def test_a_name_that_fits_two_clips_of_a_folder_is_an_error(tmp_path):
    clips(tmp_path, "a/x0.wav", "b/x0.wav")
    write(tmp_path / "metadata.csv", "file_name,text\nx0.wav,tone\n")
    with pytest.raises(CorpusError, match="'x0.wav' fits a/x0.wav and b/x0.wav"):
        list(Corpus(f"folder:{tmp_path}"))


def test_several_texts_of_one_clip_are_chosen_from_by_their_ending(tmp_path):
    clips(tmp_path, "x0.wav")
    for ending in ("original", "normalized"):
        write(tmp_path / f"x0.{ending}.txt", ending)
    assert read(f"folder:{tmp_path}")[1] == {"x0": "bad_row"}
    entries, faults, ignored = read(f"folder:{tmp_path},text=normalized.txt,label=folder,speaker=me")
    assert entries["x0"].text == "normalized" and not faults and list(ignored.values()) == [1]
    assert (entries["x0"].label, entries["x0"].speaker) == (tmp_path.name, "me")


def test_links_to_folders_are_followed_once(tmp_path):
    clips(tmp_path / "real", "x0.wav")
    write(tmp_path / "real" / "x0.txt", "tone")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "a").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "top")
    assert list(read(f"folder:{tmp_path / 'top'}")[0]) == ["a/x0"]


# --- tars ---------------------------------------------------------------------------------------------------


def test_every_member_of_a_tar_is_in_a_sample_refused_or_counted(tmp_path):
    members = [(f"{name}.wav", sound(pitch)) for name, pitch in PITCH.items()]
    members += [(f"{name}.txt", words.encode()) for name, (_, words) in SAID.items()]
    strange = b'{"task": "translation", "prompt": "p", "response": "r"}'
    odd = [
        (name, b"x")
        for name in (
            "two.wav",
            "two.flac",
            "two.txt",
            "list.wav",
            "latin.wav",
            "q.npy",
            "._c.0.wav",
            "README",
            "s.xyz",
        )
    ]
    odd += [
        ("lone.json", b'{"text": "x"}'),
        ("list.json", b"[1]"),
        ("latin.txt", "señor".encode("latin-1")),
        ("s.json", strange),
    ]
    path = tar(tmp_path / "t-0.tar", members + odd)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("linked.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        info = tarfile.TarInfo("linked.json")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"{}"))
    corpus = Corpus(f"shards:{path},lang=en")
    items = list(corpus)
    entries = {item.id: item for item in items if isinstance(item, Entry)}
    assert pitches({n: e for n, e in entries.items() if n in PITCH}) == SAID and set(entries) == set(PITCH)
    details = {
        item.id.partition(":")[2]: (item.reason, item.detail) for item in items if isinstance(item, Rejection)
    }
    assert {name: reason for name, (reason, _) in details.items()} == {
        "two": "bad_row", "lone": "bad_row", "list": "bad_json", "latin": "encoding", "s": "bad_row", "linked": "bad_row",
    }  # fmt: skip
    assert "s.xyz" in details["s"][1] and "linked.wav is a link" in details["linked"][1]
    ignored = sum(item.count for item in items if isinstance(item, Ignored))
    (fact,) = corpus.reader.facts()
    assert ignored == 5 and fact.endswith(
        f"27 members in 1 tar: 12 in 6 samples, 10 in 6 refused groups, {ignored} ignored"
    )


@pytest.mark.parametrize(
    "mode, suffix",
    [("w", "tar"), ("w:gz", "tar.gz"), ("w:gz", "tgz"), ("w:bz2", "tar.bz2"), ("w:xz", "tar.xz")],
)
def test_compressed_tars_are_read_in_any_order(mode, suffix, tmp_path):
    members = [(f"{name}.wav", sound(pitch)) for name, pitch in PITCH.items()]
    members += [(f"{name}.txt", SAID[name][1].encode()) for name in reversed(PITCH)]
    tar(tmp_path / "in" / f"t-0.{suffix}", members, mode)
    entries, faults, _ = read(f"shards:{tmp_path / 'in'}")
    order = list(entries)
    random.Random(3).shuffle(order)
    assert pitches({name: entries[name] for name in order}) == SAID and not faults
    groups = {entry.group for entry in entries.values()}
    assert len(groups) == 1 and (groups == {None}) == (suffix == "tar"), (
        "a compressed tar is opened once for all its members"
    )


@pytest.mark.parametrize("where", ["empty", "header", "inside", "boundary"])
def test_a_tar_that_ends_early_is_named(where, tmp_path):
    path = tar(
        tmp_path / "t.tar", [(f"{name}.{kind}", b"x" * 100) for name in "abc" for kind in ("wav", "txt")]
    )
    with tarfile.open(path) as archive:
        place = archive.getmembers()[4].offset
    with open(path, "r+b") as file:
        file.truncate({"empty": 0, "header": place + 100, "inside": place + 560, "boundary": place}[where])
    entries, faults, _ = read(f"shards:{path}")
    assert faults == {"t.tar": "truncated"} and list(entries)[:2] == ([] if where == "empty" else ["a", "b"])
