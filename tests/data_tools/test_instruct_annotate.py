"""Instruction samples keep their origin and are the same in every run; annotations are what the audio
says."""

import json
import sys

import numpy as np
import pytest
import soundfile
from jiwer import wer
from msgspec.structs import replace

from data_tools import annotate, instruct, pack
from data_tools.corpora import Entry
from data_tools.instruct import TEMPLATES, chained, load_templates, text_sample, wrap
from data_tools.shards import ShardIndex
from tests.data_tools.conftest import tone


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def labelled(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.3), 16000)
    rows = [
        {"id": f"u{i}", "audio": "a.wav", "text": f"words {i}", "label": "Very_Happy", "lang": "en"}
        for i in range(60)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
        + json.dumps({"id": "bare", "audio": "a.wav", "text": "x"})
        + "\n"
    )
    return path


def test_a_transcript_is_asked_for_and_given_in_the_form_that_is_named():
    templates = load_templates(TEMPLATES / "asr.txt")
    entry = Entry(id="a", audio="/a", text="HELLO THERE", response="Guten Morgen", label="angry")
    assert wrap(entry, "asr", templates, [], 0.0, None, 0).response == "HELLO THERE", (
        "neither a translation nor a label"
    )
    sample = wrap(entry, "asr", templates, [], 0.0, None, 0, "sentence")
    assert sample.response == sample.text == "Hello there"
    assert wrap(replace(entry, text=None), "asr", templates, [], 0.0, None, 0).reason == "no_target"


def test_labels_are_wrapped_under_many_wordings_and_pack(labelled, tmp_path):
    command = ["wrap", "--corpus", f"manifest:{labelled}", "--task", "emotion", "--chain", "0.3", "--out"]
    assert (
        instruct.main([*command, str(tmp_path / "m.jsonl")]) == 0
        and instruct.main([*command, str(tmp_path / "n.jsonl")]) == 0
    )
    rows = lines(tmp_path / "m.jsonl")
    assert rows == lines(tmp_path / "n.jsonl") and len(rows) == 60
    assert {row["reason"] for row in lines(tmp_path / "m.jsonl.rejected.jsonl")} == {"no_target"}
    wordings = {template.instruction for template in load_templates(TEMPLATES / "emotion.txt")}
    plain, chains = (
        [row for row in rows if row["task"] == "emotion"],
        [row for row in rows if row["task"] == "chain"],
    )
    assert len({row["prompt"] for row in plain}) >= 6 and {row["prompt"] for row in plain} <= wordings
    assert all(row["response"].rstrip(".").endswith("very happy") for row in plain)
    assert 5 < len(chains) < 35
    for row in chains:
        assert row["response"].startswith(f"Transcription: {row['text']}\nAnswer: ") and any(
            w in row["prompt"] for w in wordings
        )
        assert "emotion template emotion:" in row["origin"] and row["origin"].endswith(
            f"chain:{row['origin'].rsplit(':')[-1]}"
        )
    assert (
        pack.main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"])
        == 0
    )
    index = ShardIndex.load(tmp_path / "out")
    assert (
        index.tasks == ["chain", "emotion"]
        and index.read(0)[1]["origin"]
        and index.samples["target_characters"].min() > 10
    )


@pytest.mark.parametrize(
    "task, fields, answer",
    [
        ("asr", {"text": "so it is"}, "so it is"),
        ("translation", {"text": "so it is", "response": "so ist es"}, "so ist es"),
        ("gender", {"label": "female"}, "female"),
        ("sound", {"label": "Dog_bark"}, "dog bark"),
    ],
)
def test_each_shipped_task(task, fields, answer):
    templates, chains = load_templates(TEMPLATES / f"{task}.txt"), load_templates(TEMPLATES / "chain.txt")
    samples = [
        wrap(Entry(id=str(i), audio="/a", corpus="c", **fields), task, templates, chains, 0.0, "German", 0)
        for i in range(200)
    ]
    assert {sample.prompt for sample in samples} == {
        template.instruction.replace("{target}", "German") for template in templates
    }
    assert all(
        answer in sample.response and sample.task == task and "{" not in sample.prompt + sample.response
        for sample in samples
    )


def test_a_translation_without_target_goes_into_the_language_of_its_entry():
    entry = Entry(id="a", audio="/a", text="hi", response="hallo", target_lang="German")
    templates = load_templates(TEMPLATES / "translation.txt")
    for target, expected in ((None, "German"), ("Deutsch", "Deutsch")):
        sample = wrap(entry, "translation", templates, [], 0.0, target, 0)
        assert expected in sample.prompt and sample.target_lang == expected
    sample = wrap(Entry(id="a", audio="/a", response="hi"), "translation", templates, [], 0.0, None, 0)
    assert "English" in sample.prompt and sample.target_lang == "English"


def test_a_transcript_with_braces_is_left_alone():
    templates = [instruct.Template("Write {label}", "{answer}", "t:1")]
    sample = wrap(
        Entry(id="a", audio="/a", text="use {label} and {answer}"), "asr", templates, [], 0.0, "English", 0
    )
    assert sample.response == "use {label} and {answer}"


@pytest.mark.parametrize(
    "row, prompt, response",
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2", "3"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "Hi", "Hello"),
        ({"prompt": "Q", "response": "A"}, "Q", "A"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "Q", "A"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, "Q", "A"),
    ],
)
def test_text_sets_of_each_shape(row, prompt, response):
    sample = text_sample(row, "x")
    assert (sample.prompt, sample.response, sample.task, sample.audio) == (prompt, response, "text", None)


def test_longer_chats_stay_chats_and_odd_ones_are_refused():
    turns = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert [turn["role"] for turn in text_sample({"conversations": turns}, "x").messages] == [
        "system",
        "user",
        "assistant",
    ]
    assert text_sample({"conversations": turns[:2]}, "x").reason == "no_target"
    assert text_sample({"conversations": [{"from": "tool", "value": "Q"}]}, "x").reason == "bad_row"
    assert text_sample({"instruction": "only"}, "x").reason == "no_target"
    for content in (None, [{"type": "text", "text": "A"}]):  # a call of a tool, a list of parts
        chat = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": content}]}
        assert text_sample(chat, "x").reason == "bad_row"


SPEAKER = """
import sys, numpy, soundfile
text = sys.stdin.read()
if "silence" in text: sys.exit("no voice for this")
soundfile.write(sys.argv[1], numpy.full(160 * len(text), 0.1), 16000)
"""


def test_instructions_are_spoken_once(tmp_path, capsys):
    (tmp_path / "tts.py").write_text(SPEAKER)
    rows = [{"instruction": f"Question {i}?", "output": f"Answer {i}."} for i in range(6)] + [
        {"instruction": "silence", "output": "x"}
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "speak",
        "--manifest",
        str(tmp_path / "set.jsonl"),
        "--tts",
        f"{sys.executable} {tmp_path / 'tts.py'} {{out}}",
        "--language",
        "en",
    ]
    command += [
        "--audio",
        str(tmp_path / "spoken"),
        "--out",
        str(tmp_path / "m.jsonl"),
        "--chain",
        "0.5",
        "--workers",
        "2",
    ]
    assert instruct.main(command) == 0
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "spoken").iterdir()}
    found = lines(tmp_path / "m.jsonl")
    assert len(made) == len(found) == 6 and [row["text"] for row in found] == [
        f"Question {i}?" for i in range(6)
    ]
    assert lines(tmp_path / "m.jsonl.rejected.jsonl")[0]["detail"].endswith("no voice for this")
    for row in found:
        assert soundfile.info(row["audio"]).frames == 160 * len(row["text"]) and "spoken by" in row["origin"]
        assert (
            row["task"] == "chat"
            and "prompt" not in row
            or row["task"] == "chain"
            and row["response"].startswith("Transcription: Q")
        )
    assert (
        instruct.main(command) == 0
        and {path.name: path.stat().st_mtime_ns for path in (tmp_path / "spoken").iterdir()} == made
    )
    assert (
        instruct.main([*command[:4], "nothing", *command[5:]]) == 2
        and "must hold {out}" in capsys.readouterr().err
    )


def test_chains_need_a_transcript():
    sample = Entry(id="a", audio="/a", prompt="p", response="r")
    assert chained(sample, load_templates(TEMPLATES / "chain.txt"), 1.0, 0) is sample


@pytest.fixture
def clips(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for number in range(5):
        samples = (rng.standard_normal(4000 + 800 * number) * 3000).astype(np.int16)
        soundfile.write(tmp_path / f"{number}.wav", samples, 16000)
        soundfile.write(tmp_path / f"{number}.flac", samples, 16000)
        rows += [
            {"id": f"{number}{kind}", "audio": f"{number}.{kind}", "text": f"x {number}", "lang": "en"}
            for kind in ("wav", "flac")
        ]
    rows.append({"id": "gone", "audio": "gone.wav", "text": "x"})
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hashes_find_the_same_sound_in_other_files(clips, tmp_path):
    out = tmp_path / "annotated.jsonl"
    assert (
        annotate.main(["--corpus", f"manifest:{clips}", "--out", str(out), "--hash", "--workers", "1"]) == 0
    )
    rows = lines(out)
    assert [row["id"] for row in rows] == [f"{n}{kind}" for n in range(5) for kind in ("wav", "flac")]
    assert (
        all(rows[i]["sound_hash"] == rows[i + 1]["sound_hash"] for i in range(0, 10, 2))
        and len({r["sound_hash"] for r in rows}) == 5
    )
    assert (
        rows[2]["duration"] == pytest.approx(4800 / 16000)
        and lines(tmp_path / "annotated.jsonl.rejected.jsonl")[0]["id"] == "gone"
    )
    packed = tmp_path / "packed"
    assert (
        pack.main(["--manifest", str(out), "--out", str(packed), "--drop-duplicates", "--workers", "1"]) == 0
    )
    index = ShardIndex.load(packed)
    assert sorted(index.read(row)[1]["id"] for row in range(len(index))) == [f"{n}wav" for n in range(5)]
    assert json.loads((packed / "index.json").read_text())["rejected"] == {"duplicate_audio": 5}


def test_commands_in_place_of_files_are_run_only_when_asked_for(clips, tmp_path):
    (tmp_path / "kaldi").mkdir()
    (tmp_path / "kaldi" / "wav.scp").write_text(f"a touch {tmp_path}/kaldi-ran; cat {tmp_path}/0.wav |\n")
    (tmp_path / "kaldi" / "text").write_text("a x\n")
    piped = {
        "id": "b",
        "audio": f"pipe:touch {tmp_path}/manifest-ran; cat {tmp_path}/1.wav",
        "text": "x",
        "corpus": "m",
    }
    (tmp_path / "m.jsonl").write_text(json.dumps(piped) + "\n")
    command = [
        "--corpus",
        f"kaldi:{tmp_path / 'kaldi'}",
        "--corpus",
        f"manifest:{tmp_path / 'm.jsonl'}",
        "--workers",
        "1",
    ]
    assert annotate.main([*command, "--hash", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert not list(tmp_path.glob("*-ran")) and not lines(tmp_path / "out.jsonl")
    annotated = lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert [row["reason"] for row in annotated] == ["pipe", "pipe"]
    assert pack.main([*command, "--out", str(tmp_path / "packed")]) == 2, "nothing is left to pack"
    assert lines(tmp_path / "packed" / "rejected.jsonl") == annotated, "the same words as pack's"
    assert annotate.main([*command, "--allow-pipes", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert len(list(tmp_path.glob("*-ran"))) == 2
    assert [row["duration"] for row in lines(tmp_path / "out.jsonl")] == pytest.approx([0.25, 0.3])


def test_annotating_resumes_after_a_kill(clips, tmp_path, monkeypatch, capsys):
    command = ["--corpus", f"manifest:{clips}", "--hash", "--workers", "1", "--out"]
    assert annotate.main([*command, str(tmp_path / "whole.jsonl")]) == 0
    monkeypatch.setattr(annotate, "WINDOW", 2)
    out, looked = tmp_path / "again.jsonl", []
    whole_window = annotate.annotated

    def killed_after_two(*arguments):
        for number, window in enumerate(whole_window(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield window

    monkeypatch.setattr(annotate, "annotated", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        annotate.main([*command, str(out)])
    unfinished = tmp_path / "again.jsonl.unfinished"
    assert len(unfinished.read_text().splitlines()) == 5 and not out.exists()
    unfinished.write_bytes(unfinished.read_bytes()[:-20])  # a kill in the middle of a line
    monkeypatch.setattr(
        annotate,
        "annotated",
        lambda items, *more: (looked.append(w) or w for w in whole_window(items, *more)),
    )
    assert (
        annotate.main(["--corpus", f"manifest:{clips}", "--workers", "1", "--out", str(out)]) == 2
        and "other options" in capsys.readouterr().err
    )
    assert annotate.main([*command, str(out)]) == 0
    assert sum(map(len, looked)) == 11 - 3 and out.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_parts_of_annotations_are_the_whole(clips, tmp_path):
    found = []
    for part in range(3):
        out = tmp_path / f"part{part}.jsonl"
        annotate.main(
            ["--corpus", f"manifest:{clips}", "--out", str(out), "--part", f"{part}/3", "--workers", "1"]
        )
        found += [row["id"] for row in lines(out)]
    assert sorted(found) == sorted(f"{n}{kind}" for n in range(5) for kind in ("wav", "flac"))


def test_equal_questions_are_spoken_side_by_side(tmp_path):
    (tmp_path / "tts.py").write_text("import time\n" + SPEAKER + "time.sleep(0.5)\n")
    (tmp_path / "set.jsonl").write_text((json.dumps({"instruction": "Why?", "output": "So."}) + "\n") * 4)
    command = [
        "speak",
        "--manifest",
        str(tmp_path / "set.jsonl"),
        "--tts",
        f"{sys.executable} {tmp_path / 'tts.py'} {{out}}",
        "--language",
        "en",
        "--audio",
        str(tmp_path / "spoken"),
        "--out",
        str(tmp_path / "m.jsonl"),
        "--workers",
        "4",
    ]
    assert instruct.main(command) == 0
    assert len(lines(tmp_path / "m.jsonl")) == 4 and len(list((tmp_path / "spoken").iterdir())) == 1


@pytest.mark.parametrize(
    "program, code, words",
    [("true", 0, "wrote no file"), ("no-such-program", 2, "no-such-program cannot be run")],
)
def test_a_speaker_that_writes_nothing_or_is_not_there(tmp_path, capsys, program, code, words):
    (tmp_path / "set.jsonl").write_text(json.dumps({"instruction": "Why?", "output": "So."}) + "\n")
    command = [
        "speak",
        "--manifest",
        str(tmp_path / "set.jsonl"),
        "--tts",
        program + " {out} {text}",
        "--language",
        "en",
        "--audio",
        str(tmp_path / "spoken"),
        "--out",
        str(tmp_path / "m.jsonl"),
    ]
    assert instruct.main(command) == code
    rejected = tmp_path / "m.jsonl.rejected.jsonl"
    assert words in capsys.readouterr().err + (rejected.read_text() if rejected.exists() else "")


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory):
    """A Whisper of transformers with random weights and a small vocabulary: real shapes, no knowledge."""
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    folder = tmp_path_factory.mktemp("whisper")
    words = ["<|endoftext|>", "<|startoftranscript|>", *"abcdefghij", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    WhisperTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>"
    ).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    torch.manual_seed(0)
    size = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    config = WhisperConfig(
        vocab_size=len(words),
        num_mel_bins=8,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=12,
        **size,
        **special,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special, max_length=8)
    model.save_pretrained(folder)
    return folder


def test_whisper_transcribes_every_clip_and_bad_transcripts_are_refused(
    clips, whisper_folder, tmp_path, monkeypatch
):
    out = tmp_path / "transcribed.jsonl"
    command = [
        "--corpus",
        f"manifest:{clips}",
        "--whisper",
        str(whisper_folder),
        "--workers",
        "1",
        "--batch-seconds",
    ]
    assert annotate.main([*command, "90", "--out", str(out)]) == 0
    assert annotate.main([*command, "30", "--out", str(tmp_path / "one.jsonl")]) == 0
    rows = lines(out)
    assert len(rows) == 10 and all(isinstance(row["hypothesis"], str) for row in rows)
    assert [row["hypothesis"] for row in rows] == [
        row["hypothesis"] for row in lines(tmp_path / "one.jsonl")
    ], "batches change nothing"
    assert all(rows[i]["hypothesis"] == rows[i + 1]["hypothesis"] for i in range(0, 10, 2)), (
        "the same sound, the same text"
    )
    for number, row in enumerate(rows):
        row["text"] = row["hypothesis"] if number < 4 else "quite other words"
    good = {row["id"] for row in rows if row["text"] and wer(row["text"], row["hypothesis"]) <= 0.1}
    (tmp_path / "changed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack.main(
        [
            "--manifest",
            str(tmp_path / "changed.jsonl"),
            "--out",
            str(tmp_path / "out"),
            "--max-wer",
            "0.1",
            "--workers",
            "1",
        ]
    )
    refused = [line for line in lines(tmp_path / "out" / "rejected.jsonl")]
    assert {line["id"] for line in refused} == {row["id"] for row in rows} - good and {
        line["reason"] for line in refused
    } == {"wer"}


def test_a_language_that_whisper_does_not_know_is_left_to_it(whisper_folder, monkeypatch, capsys):
    transcriber, told = annotate.Transcriber(str(whisper_folder), 60), []
    transcriber.model.generation_config.is_multilingual = True
    transcriber.model.generation_config.lang_to_id = {"<|en|>": 2, "<|de|>": 3}
    monkeypatch.setattr(
        transcriber.model,
        "generate",
        lambda features, **options: (
            told.append(options.get("language")) or features.new_zeros((len(features), 1), dtype=int)
        ),
    )
    clip = np.zeros(1600, dtype=np.int16)
    transcriber([(clip, "en-US"), (clip, "german"), (clip, "zu"), (clip, None), (clip, "zu")])
    assert sorted(told, key=str) == [None, None, "de", "en"]
    assert capsys.readouterr().err.count("does not know language 'zu'") == 1


def test_long_clips_are_transcribed_in_pieces(whisper_folder, monkeypatch):
    transcriber = annotate.Transcriber(str(whisper_folder), 60)
    heard = []
    monkeypatch.setattr(
        transcriber,
        "_texts",
        lambda waves, lang: [heard.append(len(w)) or str(len(w) // 16000) for w in waves],
    )
    clips = [(np.zeros(seconds * 16000, dtype=np.int16), "en") for seconds in (70, 5, 30)]
    assert transcriber(clips) == ["30 30 10", "5", "30"] and max(heard) == 30 * 16000


UNSPEAKABLE = {
    "a\0b": "command_failed",
    "x" * 200_000: "command_failed",
    "\ud800": "encoding",
    7: "no_target",
    ("a",): "no_target",
}


@pytest.mark.parametrize("odd, reason", UNSPEAKABLE.items(), ids=range(5))
def test_a_text_that_cannot_be_spoken_costs_itself(odd, reason, tmp_path):
    rows = [{"instruction": text, "output": "y"} for text in ("good", odd, "--help", "$(touch PWNED)")]
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "[" * 50_000 + "\n")
    script = tmp_path / "tts"
    script.write_text(f'#!/bin/bash\nprintf "%s\\n" "$1" >> {tmp_path}/said; echo x > "$2"\n')
    script.chmod(0o755)
    options = [
        "--manifest",
        tmp_path / "i.jsonl",
        "--tts",
        f"{script} {{text}} {{out}}",
        "--audio",
        tmp_path / "wav",
    ]
    options += ["--workers", "1"]
    assert instruct.main(["speak", *map(str, options), "--out", str(tmp_path / "o.jsonl")]) == 0
    assert (tmp_path / "said").read_text().splitlines() == ["good", " --help", "$(touch PWNED)"], (
        "a text is no option"
    )
    refused = [json.loads(line) for line in (tmp_path / "o.jsonl.rejected.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in refused] == [reason, "bad_json"]
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 3 and not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), MemoryError(), RecursionError(), KeyError("x"), EOFError()]
)
def test_whatever_a_clip_raises_is_its_line_of_an_annotation(error, tmp_path, monkeypatch):
    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", tone(0.2), 16000)
    rows = [{"id": name, "audio": f"{name}.wav", "text": "x"} for name in "abc"]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    real = annotate.read_clip

    def sometimes(audio, *arguments):
        if audio.endswith("b.wav"):
            raise error
        return real(audio, *arguments)

    monkeypatch.setattr(annotate, "read_clip", sometimes)
    options = [
        "--corpus",
        f"manifest:{tmp_path / 'm.jsonl'}",
        "--out",
        str(tmp_path / "o.jsonl"),
        "--workers",
        "1",
    ]
    assert annotate.main(options) == 0
    assert [json.loads(line)["id"] for line in (tmp_path / "o.jsonl").read_text().splitlines()] == ["a", "c"]
    (line,) = (tmp_path / "o.jsonl.rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "b" and json.loads(line)["reason"] in ("failed", "too_large")
