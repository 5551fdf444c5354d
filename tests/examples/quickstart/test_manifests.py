"""The demo's splits keep their promise, and its instruction answers are right."""

import json
import re
from collections import Counter

import pytest

from examples.quickstart import manifests


def dialogue_rows() -> list[dict]:
    rows = []
    for dialogue in range(24):
        for line in range(12):
            text = (
                f"Line {line} of talk {dialogue}, captain?" if line else "Yes."
            )  # the same sentence in every dialogue
            rows.append(
                {
                    "id": f"{dialogue:02d}{line:04X}J1",
                    "audio": "x.mp3",
                    "text": text,
                    "lang": "en",
                    "duration": 2.0,
                    "speaker": "joe",
                    "dialogue": f"{dialogue:02d}",
                }
            )
    rows.append(
        {
            "id": "JOE00011",
            "audio": "x.mp3",
            "text": "A heavy door.",
            "lang": "en",
            "duration": 1.0,
            "speaker": "joe",
            "dialogue": "JOE",
        }
    )
    return rows


def prompt_rows() -> list[dict]:
    rows = []
    for lang in manifests.LANGUAGES:
        for number in range(60):
            # Keys 0 and 1 share their words in Spanish alone: that ties them together in all languages.
            text = f"{lang} words {0 if (number == 1 and lang == 'es') else number}."
            rows.append(
                {
                    "id": f"{lang}-{number}",
                    "audio": "x.wav",
                    "text": text,
                    "lang": lang,
                    "duration": 1.5,
                    "speaker": lang,
                    "key": str(number),
                }
            )
    rows.append(
        {
            "id": "en-long",
            "audio": "x.wav",
            "text": "far too long",
            "lang": "en",
            "duration": 31.0,
            "speaker": "en",
            "key": "long",
        }
    )
    return rows


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("manifests")
    counts = manifests.build(dialogue_rows(), prompt_rows(), folder)
    found = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }
    assert {f"{name}.jsonl": len(rows) for name, rows in found.items()} == counts
    return found


def test_splits_share_no_dialogue_and_no_prompt(built):
    for corpus, field in (("dialogues", "dialogue"), ("prompts", "key")):
        names = {
            split: {row[field] for row in built[f"{corpus}-{split}"]} for split in ("train", "valid", "test")
        }
        assert all(names.values())
        assert not (
            names["train"] & names["test"]
            or names["train"] & names["valid"]
            or names["valid"] & names["test"]
        )
    assert len({row["dialogue"] for row in built["dialogues-test"]}) == manifests.HELD_OUT_DIALOGUES
    assert "JOE" in {row["dialogue"] for row in built["dialogues-train"]}


def test_prompts_with_the_same_words_stay_together(built):
    where = {row["key"]: split for split in ("train", "valid", "test") for row in built[f"prompts-{split}"]}
    assert where["0"] == where["1"]


def test_no_sentence_to_be_written_is_a_target_in_training(built):
    def plain(text):
        return re.sub(r"[^a-z0-9 ]", "", text.lower()).split()

    learnt = [
        plain(row[key])
        for name in built
        if name.endswith("train")
        for row in built[name]
        for key in ("text", "response")
        if row.get(key)
    ]
    for name in ("dialogues-valid", "dialogues-test", "prompts-valid", "prompts-test"):
        for row in built[name]:
            assert plain(row["response"] if row["task"] == "translation" else row["text"]) not in learnt


def test_prompts_are_translated_into_english_and_out_of_it_once(built):
    rows = built["prompts-train"]
    assert {row["task"] for row in rows} == {"translation"}
    per_key = Counter((row["key"], row["lang"] == "en") for row in rows)
    assert {count for (_, english), count in per_key.items() if not english} == {4}
    assert {count for (_, english), count in per_key.items() if english} == {1}
    for row in rows:
        target = next(name for name, language in manifests.LANGUAGES.items() if language in row["prompt"])
        assert row["response"].startswith(f"{target} words") and "en" in (target, row["lang"])
    assert "long" not in {row["key"] for name in built if name.startswith("prompts") for row in built[name]}


def test_splits_do_not_depend_on_order_or_run(built, tmp_path):
    manifests.build(dialogue_rows()[::-1], prompt_rows()[::-1], tmp_path)
    for name, rows in built.items():
        again = [json.loads(line)["id"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert sorted(again) == sorted(row["id"] for row in rows)


@pytest.mark.parametrize(
    "text, answers",
    [
        (
            "What's in the box, Joe?",
            {
                "first": "what's",
                "last": "joe",
                "count": "5",
                "spell": "J-O-E",
                "question": "yes",
                "shout": "WHAT'S IN THE BOX, JOE?",
                "repeat": "What's in the box, Joe?",
            },
        ),
        (
            "I have 3.",
            {
                "first": "i",
                "last": "3",
                "count": "3",
                "spell": None,
                "question": "no",
                "shout": "I HAVE 3.",
                "repeat": "I have 3.",
            },
        ),
        (
            "...",
            {
                "first": None,
                "last": None,
                "count": None,
                "spell": None,
                "question": "no",
                "shout": "...",
                "repeat": "...",
            },
        ),
    ],
)
def test_rules_answer_rightly(text, answers):
    assert {name: answer(text) for name, (_, answer) in manifests.RULES.items()} == answers


def test_instruction_samples(built):
    rows = built["instruct-train"]
    sources = {row["id"]: row for row in built["dialogues-train"]}
    tasks = Counter(row["task"] for row in rows)
    assert set(tasks) == {"instruct", "chain", "text"}
    assert tasks["instruct"] + tasks["chain"] == len(sources)  # one sample with audio for each clip
    for row in rows:
        source, _, name = row["id"].split("-")
        answer = manifests.RULES[name][1](sources[source]["text"])
        if row["task"] == "chain":
            assert row["response"] == f"Transcription: {sources[source]['text']}\nAnswer: {answer}"
            assert row["prompt"].startswith(manifests.CHAIN) and name != "repeat"
        else:
            assert row["response"] == answer
        if row["task"] == "text":
            assert row["text"] is None and "audio" not in row and sources[source]["text"] in row["prompt"]
        assert ("label" in row) == (name in manifests.CLOSED)
