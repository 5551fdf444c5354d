"""Who is trained on, tuned on, tested on: the demo's splits and its instruction data. Changes when the demo's
data does.

    dialogues-{train,valid,test}.jsonl   task asr; split by whole dialogue (descriptions: train)
    prompts-{train,valid,test}.jsonl     task translation (into and from English), in valid and test asr
                                         (English) too; by prompt, in all languages alike; prompts with the
                                         same words in some language stay together
    instruct-{train,valid,test}.jsonl    what stage 3 learns, made by code out of the dialogues'
                                         transcripts, below

No sentence that valid or test asks a model to write down or to translate into is a target in training,
whatever the manifest: such rows leave valid and test ("Yes.", "Good bye."), and those of test leave valid.

Instruction samples need no other model and no hand-written answer: each is a rule on the transcript (words,
letters, questions, capital letters). `instruct` asks for the answer alone, `chain` for "transcribe, then
answer", `text` puts the same sort of question about a typed sentence, without audio. They show the machinery;
they do not make an assistant.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

MAX_SECONDS = 30.0  # the longest clip a Whisper encoder takes
HELD_OUT_DIALOGUES = 8  # for valid, and as many for test
PROMPT_SHARES = {
    "test": 0.30,
    "valid": 0.15,
    "train": 0.18,
}  # the rest is left out: the demo's few steps would not get to it
LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "ru": "Russian"}
CHAIN = "Please transcribe the following audio and then answer based on the audio's transcription. "


def draw(*of: object) -> float:
    """A number in [0, 1) that depends on its arguments alone, so that every run and every machine splits
    alike."""
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=7).digest()) / 2**56


def plain(text: str) -> str:
    """Lower case, letters, digits and single spaces alone: two texts with the same words compare equal."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def split_dialogues(rows: list[dict]) -> dict[str, list[dict]]:
    """train, valid, test by whole dialogue."""
    names = sorted({row["dialogue"] for row in rows} - {"JOE"}, key=lambda name: draw("dialogue", name))
    where = dict.fromkeys(names[:HELD_OUT_DIALOGUES], "test")
    where |= dict.fromkeys(names[HELD_OUT_DIALOGUES : 2 * HELD_OUT_DIALOGUES], "valid")
    splits: dict[str, list[dict]] = {"train": [], "valid": [], "test": []}
    for row in rows:
        splits[where.get(row["dialogue"], "train")].append({**row, "task": "asr"})
    return splits


def group_prompts(rows: list[dict]) -> dict[str, str]:
    """key -> group: keys that share their words in some language belong together (union-find over keys)."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            key = parent[key]
        return key

    first: dict[tuple[str, str], str] = {}
    for row in sorted(rows, key=lambda row: (row["key"], row["lang"])):
        other = first.setdefault((row["lang"], plain(row["text"])), row["key"])
        low, high = sorted((root(row["key"]), root(other)))
        parent[high] = low
    return {key: root(key) for key in parent}


def split_prompts(rows: list[dict]) -> dict[str, list[dict]]:
    """ASR rows (English) and translation rows (into English and from it), split by group of prompts.

    Training gets the translations alone: the English prompts stay out of the domain that ASR is trained on.
    """
    groups = group_prompts(rows)

    def split_of(key: str) -> str | None:
        x = draw("prompt", groups[key])
        bounds = accumulate(PROMPT_SHARES.values())
        return next((split for split, bound in zip(PROMPT_SHARES, bounds, strict=True) if x < bound), None)

    by_key: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        if row["duration"] <= MAX_SECONDS:
            by_key[row["key"]][row["lang"]] = row
    splits: dict[str, list[dict]] = {"train": [], "valid": [], "test": []}
    for key, speech in sorted(by_key.items()):
        split, english = split_of(key), speech.get("en")
        if english is None or split is None:
            continue
        if split != "train":
            splits[split].append({**english, "task": "asr"})
        others = [row for lang, row in sorted(speech.items()) if lang != "en"]
        pairs = [(row, english) for row in others]  # every language into English, English into one language
        pairs += [(english, others[int(draw("target", key) * len(others))])] if others else []
        for source, target in pairs:
            splits[split].append(
                {
                    **source,
                    "id": f"{source['id']}-to-{target['lang']}",
                    "task": "translation",
                    "prompt": f"Translate the speech into {LANGUAGES[target['lang']]}.",
                    "response": target["text"],
                }
            )
    return splits


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+(?:'[A-Za-z0-9]+)*", text)


# Each rule: the ways to ask, and the answer from the sentence (None where the rule does not fit it).
Rule = tuple[tuple[str, ...], Callable[[str], str | None]]
RULES: dict[str, Rule] = {
    "first": (
        ("What is the first word?", "Which word comes first?", "Say only the first word."),
        lambda text: words(text)[0].lower() if words(text) else None,
    ),
    "last": (
        ("What is the last word?", "Which word comes last?", "Say only the last word."),
        lambda text: words(text)[-1].lower() if words(text) else None,
    ),
    "count": (
        ("How many words are there?", "Count the words.", "Of how many words is it made?"),
        lambda text: str(len(words(text))) if 1 <= len(words(text)) <= 12 else None,
    ),
    "spell": (
        ("Spell the last word.", "Spell the last word, letter by letter."),
        lambda text: "-".join(words(text)[-1].upper()) if words(text) and words(text)[-1].isalpha() else None,
    ),
    "question": (
        ("Is it a question? Answer yes or no.", "Is something being asked? Answer yes or no."),
        lambda text: "yes" if text.rstrip(' "').endswith("?") else "no",
    ),
    "shout": (("Write it in capital letters.", "Write all of it in upper case."), lambda text: text.upper()),
    "repeat": (
        ("Repeat what is said.", "Say it again, word by word.", "Write down what you hear."),
        lambda text: text,
    ),
}
CLOSED = {"count", "question"}  # rules whose answer is one of a few: scored as right or wrong


def rule_samples(rows: list[dict]) -> list[dict]:
    """Per dialogue clip one sample with audio, `instruct` or `chain`; for a third a `text` sample by
    another rule."""
    samples = []
    for row in rows:
        text, ident = row["text"], row["id"]
        fitting = sorted(
            (name for name in RULES if RULES[name][1](text) is not None), key=lambda name: draw(ident, name)
        )
        tasks = ["instruct" if draw(ident, "task") < 0.5 else "chain"] + (
            ["text"] if draw(ident, "text") < 1 / 3 else []
        )
        for task in tasks:
            # To transcribe, or to read, and then repeat teaches nothing.
            name = fitting.pop(0) if task == "instruct" or fitting[0] != "repeat" else fitting.pop(1)
            ways, answer_of = RULES[name]
            question, answer = ways[int(draw(ident, task, "way") * len(ways))], answer_of(text)
            sample = {
                "id": f"{ident}-{task}-{name}",
                "lang": "en",
                "task": task,
                "origin": f"rule {name} on {ident}",
            }
            if name in CLOSED:
                sample["label"] = answer
            if task == "text":
                sample |= {"text": None, "prompt": f'{question}\n"{text}"', "response": answer}
            else:
                sample = {
                    **{k: row[k] for k in ("audio", "text", "duration", "speaker")},
                    **sample,
                    "prompt": question if task == "instruct" else CHAIN + question,
                    "response": answer if task == "instruct" else f"Transcription: {text}\nAnswer: {answer}",
                }
            samples.append(sample)
    return samples


def write(path: Path, rows: Iterable[dict]) -> int:
    """One JSON object a line; the file appears whole or not at all. Returns the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)
    return len(lines)


def targets(row: dict) -> set[str]:
    """The texts that training on this row teaches the model to write."""
    return {plain(row[key]) for key in ("text", "response") if row.get(key)}


def without(rows: list[dict], known: set[str]) -> list[dict]:
    """The rows whose sentence (a translation's: the one to be written) is not among the known ones."""
    return [
        row
        for row in rows
        if plain(row["response"] if row["task"] == "translation" else row["text"]) not in known
    ]


def build(dialogues: list[dict], prompts: list[dict], out: Path) -> dict[str, int]:
    """Write all manifests under OUT. Returns file name -> number of samples."""
    spoken = {"dialogues": split_dialogues(dialogues), "prompts": split_prompts(prompts)}
    made = rule_samples(spoken["dialogues"]["train"])
    known = set().union(
        *(targets(row) for row in [*spoken["dialogues"]["train"], *spoken["prompts"]["train"], *made])
    )
    for split in ("test", "valid"):
        for rows in spoken.values():
            rows[split] = without(rows[split], known)
        known |= set().union(*(targets(row) for rows in spoken.values() for row in rows[split]))
    manifests = {
        f"{name}-{split}.jsonl": rows for name, splits in spoken.items() for split, rows in splits.items()
    }
    manifests |= {
        f"instruct-{split}.jsonl": rule_samples(rows) for split, rows in spoken["dialogues"].items()
    }
    return {name: write(out / name, rows) for name, rows in sorted(manifests.items())}
