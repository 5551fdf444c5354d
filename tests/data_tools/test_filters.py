"""Filters, text forms and splits: what is refused and under which word, what is kept."""

import json
from collections import Counter

import jiwer
import pytest
import soundfile

from core.text import error_rate
from data_tools import pack
from data_tools.corpora import Entry
from data_tools.filters import OTHER_SPLIT, Filters, SampleFilter, SplitKey, ctc_frames_needed
from data_tools.normalise import NORMALISERS, label_sentence
from data_tools.shards import ShardIndex
from tests.data_tools.conftest import tone


def judged(filters=None, sieve=None, **fields):
    entry = Entry(
        **({"id": "a", "audio": "/a.wav", "text": "hello there", "duration": 1.0, "lang": "en"} | fields)
    )
    fault = (sieve or SampleFilter(filters or Filters())).judge(entry)
    return fault.reason if fault else entry


def test_a_sound_is_judged_by_what_the_cut_leaves():
    """Told by the corpus or found when decoded: the same."""
    long = {"task": "sound", "label": "rain", "duration": 10.0}
    assert judged(Filters(max_seconds=5), **long) == "too_long"
    assert isinstance(judged(sieve=SampleFilter(Filters(max_seconds=5), clearest_seconds=3.0), **long), Entry)
    assert (
        judged(sieve=SampleFilter(Filters(max_seconds=5), clearest_seconds=3.0), duration=10.0) == "too_long"
    ), "speech is not cut"


@pytest.mark.parametrize(
    "reason, filters, fields",
    [
        ("too_short", {"min_seconds": 1.5}, {}),
        ("too_long", {"max_seconds": 0.5}, {}),
        ("too_slow", {"min_rate": 12.0}, {}),
        ("too_fast", {"max_rate": 10.0}, {}),
        ("language", {"langs": ["de", "fr"]}, {}),
        ("wer", {"max_wer": 0.10}, {"hypothesis": "hello their"}),
        ("no_hypothesis", {"max_wer": 0.10}, {}),
        ("no_sound_hash", {"drop_duplicates": True}, {}),
        ("no_text", {}, {"text": "  "}),
        ("no_target", {}, {"text": None, "task": "translation"}),
        ("no_target", {}, {"task": "translation"}),  # its transcript is no translation,
        ("no_target", {}, {"task": "gender"}),  # nor anybody's gender
        ("no_audio", {}, {"audio": None, "text": "a"}),
        ("pipe", {}, {"audio": "pipe:cat /a.wav"}),
    ],
)
def test_each_reason(reason, filters, fields):
    assert judged(Filters(**filters), **fields) == reason


@pytest.mark.parametrize(
    "filters, fields",
    [
        ({"min_seconds": 1.0, "max_seconds": 1.0, "min_rate": 11.0, "max_rate": 11.0, "langs": ["en"]}, {}),
        ({"max_wer": 0.10}, {"hypothesis": "Hello, there!"}),
        ({"langs": ["sv"]}, {"lang": "sv-SE"}),
        ({"langs": ["sv-SE"]}, {"lang": "sv-SE"}),
        (
            {"max_wer": 0.10},
            {"lang": "cmn", "text": "今天天气很好我们去公园", "hypothesis": "今天天气很好我们去公圆"},
        ),
        ({"max_wer": 0.10}, {"task": "translation", "response": "hallo"}),
        ({}, {"task": "emotion", "label": "happy", "text": None}),
        (
            {},
            {
                "audio": None,
                "text": None,
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            },
        ),
    ],
)
def test_bounds_are_kept_samples_at_them_too(filters, fields):
    assert isinstance(judged(Filters(**filters), **fields), Entry)


def test_default_tasks():
    assert judged().task == "asr"
    assert judged(response="yes").task == "chat"
    assert judged(audio=None, text=None, prompt="a", response="b").task == "text"
    sound = judged(task="sound", label="Dog_bark", text=None)
    assert sound.text == "the sound is dog bark" and sound.label == "Dog_bark"


def test_a_duration_of_zero_is_not_known_and_a_stretch_of_zero_holds_nothing(tmp_path):
    assert judged(duration=0).duration is judged(duration=0.0).duration is None
    assert judged(duration=0, offset=0.0) == "zero_length"
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    rows = [{"id": "whole", "audio": "a.wav", "text": "x", "duration": 0}]
    rows.append({"id": "stretch", "audio": "a.wav", "text": "x", "offset": 0.1, "duration": 0})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        pack.main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"])
        == 0
    )
    index = ShardIndex.load(tmp_path / "out")
    assert [index.read(row)[1]["id"] for row in range(len(index))] == ["whole"] and index.samples["duration"][
        0
    ] == 0.5
    (refused,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(refused)["id"] == "stretch" and json.loads(refused)["reason"] == "zero_length"


def test_word_error_rate_is_jiwers_after_whispers_normaliser():
    assert error_rate("Mr. Smith's colour, okay?", "mister smith's color okay", "en") == 0
    assert (
        error_rate("one two three four", "one too three", "de")
        == jiwer.wer("one two three four", "one too three")
        == 0.5
    )
    assert error_rate("你好吗", "你好", "zh") == pytest.approx(1 / 3)
    assert error_rate("(laughs)", "", "en") == 0 and error_rate("(laughs)", "words", "en") == 1


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE tokenizer without merges: every character is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


def test_ctc_feasibility_counts_repeats(tokenizer_folder):
    assert [ctc_frames_needed(ids) for ids in ([], [1], [1, 1], [1, 2, 1], [3, 3, 3, 4])] == [0, 1, 3, 3, 6]
    filters = Filters(ctc_frame_rate=25, tokenizer=tokenizer_folder)
    sieve = SampleFilter(filters)
    needed = ctc_frames_needed(sieve.token_ids("hello there"))
    assert needed == len("hello there") + 1 + (len(sieve.token_ids("hello there")) - len("hello there"))
    assert (
        isinstance(judged(filters, duration=needed / 25), Entry)
        and judged(filters, duration=(needed - 0.5) / 25) == "ctc_infeasible"
    )


def test_filters_judge_what_the_clip_turns_out_to_be(tokenizer_folder, tmp_path):
    rows = []
    for name, seconds, words in (
        ("short", 0.2, "a"),
        ("long", 3.0, "a b"),
        ("dense", 0.5, "much too much for such a clip"),
        ("good", 1.0, "fine words"),
    ):
        soundfile.write(tmp_path / f"{name}.wav", tone(seconds), 16000)
        rows.append({"id": name, "audio": f"{name}.wav", "text": words})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bounds = [
        "--min-seconds",
        "0.3",
        "--max-seconds",
        "2",
        "--tokenizer",
        tokenizer_folder,
        "--ctc-frame-rate",
        "25",
    ]
    pack.main(
        ["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1", *bounds]
    )
    refused = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in refused} == {
        "short": "too_short",
        "long": "too_long",
        "dense": "ctc_infeasible",
    }
    index = ShardIndex.load(tmp_path / "out")
    assert (
        len(index) == 1
        and index.samples["tokens"][0]
        == len(SampleFilter(Filters(tokenizer=tokenizer_folder)).token_ids("fine words"))
        > 0
    )
    hours = json.loads((tmp_path / "out" / "index.json").read_text())["rejected_hours"]
    assert hours == pytest.approx(
        {"ctc_infeasible": 0.5 / 3600, "too_long": 3 / 3600, "too_short": 0.2 / 3600}, abs=1e-5
    )


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("raw", " A\u00a0b ", " A\u00a0b "),
        ("clean", "\ufeffI\u2019m\u00a0here\u200b,\n  e\u0301t\u00e9 ", "I'm here, été"),
        (
            "clean",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
        ("sentence", "I THINK I'M RIGHT", "I think I'm right"),
        ("sentence", "Already Written iPhone", "Already Written iPhone"),
        ("sentence", "MIDI INN", "Midi inn"),
        ("lower", "Über ALLES, Straße!", "über alles, straße!"),
        ("lower_no_punctuation", "Don\u2019t -- (you) say: \u201cno\u201d?", "don't you say no"),
        ("lower_no_punctuation", "3,5 % \u00bfqu\u00e9?", "3 5 qué"),
    ],
)
def test_text_forms(name, text, expected):
    assert NORMALISERS[name](text) == expected
    assert NORMALISERS[name](expected) == expected, "a second time changes nothing"


@pytest.mark.parametrize(
    "label, sentence",
    [
        ("Dog_bark", "dog bark"),
        ("dog-barking", "dog barking"),
        ("airConditioner", "air conditioner"),
        ("Speech, Human", "speech, human"),
    ],
)
def test_labels_have_one_format(label, sentence):
    assert label_sentence(label) == f"the sound is {sentence}"


def test_splits_keep_speakers_apart_and_shares_about(tmp_path):
    splits = {"train": 0.8, "valid": 0.1, "test": 0.1}
    taken = {name: set() for name in splits}
    for name in splits:
        sieve = SampleFilter(splits=splits, split_by="speaker", take=name, seed=3)
        for speaker in range(2000):
            verdicts = [
                sieve.judge(Entry(id=f"{speaker}-{i}", audio="/a", text="x", speaker=str(speaker)))
                for i in range(2)
            ]
            assert verdicts in ([None] * 2, [OTHER_SPLIT] * 2)
            if verdicts[0] is None:
                taken[name].add(speaker)
    assert sum(map(len, taken.values())) == 2000 and len(set.union(*taken.values())) == 2000
    assert {name: len(speakers) / 2000 for name, speakers in taken.items()} == pytest.approx(splits, abs=0.03)
    sieve = SampleFilter(splits={"a": 1, "b": 3})
    found = Counter(sieve.split_of(SplitKey("id", f"k{i}"))[0] for i in range(1000))
    assert found["b"] == pytest.approx(750, abs=50)


def test_taken_splits_of_one_corpus_share_nothing(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.2), 16000)
    rows = [{"id": f"u{i}", "audio": "a.wav", "text": "x", "speaker": f"s{i % 9}"} for i in range(45)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    speakers = {}
    for name in ("train", "test"):
        options = ["--splits", "train=0.6,test=0.4", "--split", name, "--workers", "1"]
        pack.main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / name), *options])
        index = ShardIndex.load(tmp_path / name)
        speakers[name] = Counter(index.read(row)[1]["speaker"] for row in range(len(index)))
        assert len(index) + json.loads((tmp_path / name / "index.json").read_text())["other_splits"] == 45
    assert not set(speakers["train"]) & set(speakers["test"]) and set(
        (speakers["train"] + speakers["test"]).values()
    ) == {5}


def test_a_packed_folder_still_knows_what_its_clips_were_cut_from(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(2.0), 16000)
    row = {"audio": "a.wav", "duration": 0.1, "text": "x", "recording": "a"}
    rows = [{"id": f"u{i}", "offset": i / 10, **row} for i in range(20)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        pack.main(["--manifest", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "all"), "--workers", "1"])
        == 0
    )
    found = []
    for name in ("train", "valid"):
        options = [
            "--splits",
            "train=0.5,valid=0.5",
            "--split-by",
            "recording",
            "--split",
            name,
            "--workers",
            "1",
        ]
        code = pack.main(["--corpus", f"shards:{tmp_path / 'all'}", "--out", str(tmp_path / name), *options])
        found.append(len(ShardIndex.load(tmp_path / name)) if code == 0 else 0)
    assert sorted(found) == [0, 20], "all on one side"
    assert SampleFilter(split_by="recording").split_key(
        Entry(id="a", audio="tar:/x.tar#512+10.flac")
    ) == SplitKey("id", "a")
