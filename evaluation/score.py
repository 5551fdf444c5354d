"""Scores from predictions alone: `python -m evaluation.score FILE.jsonl` needs no model, no audio and no
network.

A prediction row holds `id`, `reference`, `prediction`, `raw`, and `corpus`, `task`, `lang`, `duration`
(seconds), and where known `label`, `choices`, `frames` (adapter frames of the audio), `kept` (frames the LLM
saw), `tokens` (generated).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import jiwer
import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Score
from tabulate import tabulate

from core.command_line import program_name
from core.languages import (
    CHINESE,
    UNDETERMINED,
    UNSPACED,
    effective_language,
    is_known,
    language_code,
    writes_no_spaces,
)
from core.text import (
    MARKS,
    RATES,
    Errors,
    Marks,
    Unit,
    count_errors,
    describe,
    normalise,
    says_nothing,
    units,
)
from data_tools.normalise import plain_label
from evaluation.predictions import PredictionError, read_predictions, read_rows
from evaluation.resampling import interval
from evaluation.tasks import (
    METRICS,
    label_among,
    metric_of,
    parse_choice,
    parse_letter,
    same_label,
    split_chain,
    target_language,
)

BOOTSTRAP = 1000  # resamples behind each 95 % interval


def counted(rows: list[dict], unit: Unit = "word", marks: Marks = "script") -> Errors:
    """References and predictions aligned after normalisation, by core.text.count_errors."""
    references, predictions = ([row[key] for row in rows] for key in ("reference", "prediction"))
    return count_errors(references, predictions, [row.get("lang") for row in rows], unit, marks)


def aligned(rows: list[dict], *, characters: bool = False) -> jiwer.WordOutput | jiwer.CharacterOutput:
    """References and predictions after normalisation, aligned in words or characters."""
    return counted(rows, "character" if characters else "word").output


def word_counts(
    rows: list[dict], *, characters: bool = False
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Errors and reference units per utterance after normalisation, and the totals by kind of error.

    Units are words, or characters with `characters` (spaces count where the language writes them, as in
    jiwer's CER). An utterance whose reference is empty after normalisation adds its insertions as errors and
    no units.
    """
    found = counted(rows, "character" if characters else "word")
    return found.errors, found.units, found.kinds


def spoken(rows: list[dict]) -> list[dict]:
    """The rows whose reference says something: silence and noise have no error rate."""
    return [row for row in rows if not says_nothing(row["reference"])]


def score_wer(rows: list[dict], marks: Marks = "script") -> dict:
    """Error rates by words, characters and both mixed (core/text.py), over the utterances in which something
    is said; what a model writes for silence is counted by the minute. A rate is None where the references
    hold no words."""
    said, scores = spoken(rows), {}
    counts = {name: counted(said, unit, marks) for name, unit in RATES.items()}
    for name, found in counts.items():
        scores[name] = float(found.errors.sum() / found.units.sum()) if found.units.sum() else None
        if scores[name] is not None and name != "mer":
            scores[f"{name}_ci95"] = interval(found.errors, found.units, samples=BOOTSTRAP)
    words = counts["wer"]
    languages = {row.get("lang") or effective_language(None, row["reference"]) for row in rows}
    return {
        **scores,
        "words": int(words.units.sum()),
        **words.kinds,
        "sentence_errors": float((words.errors > 0).mean()) if said else None,
        **silence(rows, marks),
        "normaliser": {lang: describe(lang, marks) for lang in sorted(languages)},
    }


def silence(rows: list[dict], marks: Marks = "script") -> dict:
    """{"silence": {utterances, insertions, minutes, insertions_per_minute}} of the rows whose reference says
    nothing; {} without any. Minutes are None where durations are missing."""
    silent = [row for row in rows if says_nothing(row["reference"])]
    if not silent:
        return {}
    insertions = int(counted(silent, marks=marks).errors.sum())
    minutes = (
        sum(row["duration"] for row in silent) / 60 if all(row.get("duration") for row in silent) else None
    )
    return {
        "silence": {
            "utterances": len(silent),
            "insertions": insertions,
            "minutes": minutes,
            "insertions_per_minute": insertions / minutes if minutes else None,
        }
    }


def bleu_tokenizer(row: dict) -> str:
    """sacrebleu's tokenizer for a translation: `zh` for Chinese, `char` for other scripts without spaces,
    else `13a`; by its `target_lang` where the table of languages has it, else by the script of its reference.
    (with_tokenizers asks all of a corpus.)"""
    if "tokenizer" in row:
        return row["tokenizer"]
    if is_known(row.get("target_lang")):
        target = language_code(row["target_lang"])
    else:
        found = units(row.get("reference") or "", UNDETERMINED, "mixed")
        unspaced = [unit for unit in found if writes_no_spaces(unit[0])]
        if 2 * len(unspaced) <= len(found):
            return "13a"
        target = (
            "zh"
            if all(unicodedata.name(unit[0], "").startswith(("CJK", "BOPOMOFO")) for unit in unspaced)
            else "ja"
        )
    return "zh" if target in CHINESE else "char" if target in UNSPACED else "13a"


def with_tokenizers(rows: list[dict], among: list[dict]) -> list[dict]:
    """Translations get the `tokenizer` that nine of ten rows of their corpus and direction in `among` have,
    so that one answer in Latin letters does not split a Chinese test set in two; where rows disagree further,
    each keeps its own."""

    def group(row: dict) -> tuple:
        return row.get("corpus"), row.get("lang"), target_language(row)

    votes: dict[tuple, Counter] = defaultdict(Counter)
    for row in among:
        if row.get("task") == "translation":
            votes[group(row)][bleu_tokenizer(row)] += 1
    usual = {}
    for key, counts in votes.items():
        [(name, number)] = counts.most_common(1)
        if number >= 0.9 * counts.total():
            usual[key] = name
    return [
        row | {"tokenizer": usual.get(group(row)) or bleu_tokenizer(row)}
        if row.get("task") == "translation"
        else row
        for row in rows
    ]


def as_float(score: Score) -> Score:
    score.score = float(score.score)
    return score


def score_bleu(rows: list[dict], marks: Marks = "script") -> dict:
    """BLEU and chrF; `bleu` is None, with a `bleu_note`, where the directions need several tokenizers."""
    predictions, references = [row["prediction"] for row in rows], [[row["reference"] for row in rows]]
    scores, metrics = {}, {"chrf": CHRF()}
    tokenizers = sorted({bleu_tokenizer(row) for row in rows})
    if len(tokenizers) == 1:
        metrics = {"bleu": BLEU(tokenize=tokenizers[0])} | metrics
    # one tokenizer for all would be wrong for some, and which one would depend on the order of the rows
    else:
        note = f"needs tokenizers {', '.join(tokenizers)}: see the groups by direction, or give the data its target_lang"  # noqa: E501
        scores = {"bleu": None, "bleu_note": note}
    for name, metric in metrics.items():
        # Of its resamples sacrebleu makes np.float32, or float where nothing matches, and then cannot average
        # the two.
        compute = metric._compute_score_from_stats
        metric._compute_score_from_stats = lambda stats, compute=compute: as_float(compute(stats))
        # One sentence has no distribution to draw from.
        result = metric.corpus_score(predictions, references, n_bootstrap=BOOTSTRAP if len(rows) > 1 else 1)
        scores[name] = float(result.score)
        if len(rows) > 1:
            scores[f"{name}_ci95"] = [float(result._mean - result._ci), float(result._mean + result._ci)]
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores


def label_of(row: dict) -> str:
    return str(row.get("label") or row["reference"])


def with_labels(rows: list[dict], among: list[dict]) -> list[dict]:
    """Rows of closed tasks without `choices` get `labels`, what can be answered: all labels of their corpus
    and task in `among` (of a task without any, as METRICS has it, the references), so that a part of the rows
    is scored as it is within the whole."""
    found: dict[tuple, set[str]] = defaultdict(set)
    bare: dict[tuple, set[str]] = defaultdict(set)
    for row in among:
        key = row.get("corpus"), row.get("task")
        if row.get("label"):
            found[key].add(str(row["label"]))
        elif METRICS.get(row.get("task")) == "accuracy":
            bare[key].add(row["reference"])
    labels = {key: sorted(names) for key, names in {**bare, **found}.items()}
    return [
        row if row.get("choices") else row | {"labels": labels.get((row.get("corpus"), row.get("task")), [])}
        for row in rows
    ]


def correct_answers(rows: list[dict]) -> tuple[np.ndarray, int, int]:
    """1 where the choice read from the answer is the label, else 0; how many answers named no single choice;
    and how many labels are none of their row's choices, which no answer can get right.

    The choices are the row's own (`choices`), else its `labels` (with_labels).
    """
    correct, unparsed, mislabelled = np.zeros(len(rows)), 0, 0
    for i, row in enumerate(rows):
        answer, label = split_chain(row["prediction"])[1], label_of(row)
        if choices := row.get("choices"):
            choice, label = parse_letter(answer, choices), label_among(label, choices)
            mislabelled += label is None
        else:
            choice = parse_choice(answer, row["labels"])
        unparsed += choice is None
        correct[i] = choice is not None and label is not None and same_label(choice, label)
    return correct, unparsed, mislabelled


def score_accuracy(rows: list[dict], marks: Marks = "script") -> dict:
    correct, unparsed, mislabelled = correct_answers(rows)
    by_label = defaultdict(list)
    for row, hit in zip(rows, correct, strict=True):
        by_label[plain_label(label_of(row))].append(hit)
    recalls = {label: float(np.mean(hits)) for label, hits in sorted(by_label.items())}
    scores = {
        "accuracy": float(correct.mean()),
        "accuracy_ci95": interval(correct, np.ones(len(rows)), samples=BOOTSTRAP),
        "unparsed": unparsed,
        **({"labels_not_among_choices": mislabelled} if mislabelled else {}),
    }
    if len(recalls) <= 50 and not any(row.get("choices") for row in rows):
        scores |= {"unweighted_recall": float(np.mean(list(recalls.values()))), "recall": recalls}
    return scores


_SIGN = re.compile(r"(?<![\w)\]])[-\u2212\u2013](?=[.,]?\d)")  # of a number; not the dash in 3-5
_SYMBOLS = re.compile(r"(?<!\w)\+(?=\d)|([+=<>\u2264\u2265\u2260\u00b1\u00d7\u00f7^#/\\])")


def same_answer(first: str, second: str, lang: str | None, marks: Marks = "script") -> bool:
    """Whether two answers are the same after normalisation. What Whisper's normaliser drops and an answer may
    consist of counts here: words in brackets, the sign of a number, symbols of arithmetic. Answers that it
    empties are compared as they are, case, spaces and outer punctuation aside."""
    plain = [
        " ".join(text.casefold().split()).strip(" .,;:!?\"'\u201c\u201d\u2018\u2019")
        for text in (first, second)
    ]
    if plain[0] == plain[1]:
        return True
    symbols = [[symbol for symbol in _SYMBOLS.findall(text) if symbol] for text in (first, second)]
    unbracketed = [re.sub(r"[()\[\]{}<>]", " ", _SIGN.sub(" minus ", text)) for text in (first, second)]
    found = [normalise(text, lang, marks) for text in unbracketed]
    return bool(found[0]) and found[0] == found[1] and symbols[0] == symbols[1]


def exact_answers(rows: list[dict], marks: Marks = "script") -> np.ndarray:
    """1 where the answer is the reference's (same_answer, by the row's language), else 0."""
    answers = [[split_chain(row[key])[1] for key in ("prediction", "reference")] for row in rows]
    return np.array(
        [float(same_answer(*pair, row.get("lang"), marks)) for pair, row in zip(answers, rows, strict=True)]
    )


def score_answer(rows: list[dict], marks: Marks = "script") -> dict:
    """Free answers with a reference: the share that equals it, chrF, and accuracy over the rows that carry a
    label."""
    chrf, exact = CHRF(), exact_answers(rows, marks)
    answers, references = (
        [split_chain(row["prediction"])[1] for row in rows],
        [split_chain(row["reference"])[1] for row in rows],
    )
    scores = {
        "exact": float(exact.mean()),
        "exact_ci95": interval(exact, np.ones(len(rows)), samples=BOOTSTRAP),
        "chrf": float(chrf.corpus_score(answers, [references]).score),
        "chrf_signature": str(chrf.get_signature()),
    }
    labelled = [row for row in rows if row.get("label")]
    if labelled:
        scores |= {"labelled": len(labelled), **score_accuracy(labelled)}
    return scores


def score_chain(rows: list[dict], marks: Marks = "script") -> dict:
    """ "Transcription: ... Answer: ...": WER of the first part, the second part as an answer. A missing part
    counts as wrong."""
    transcripts = [
        row | {key: split_chain(row[key])[0] or "" for key in ("reference", "prediction")} for row in rows
    ]
    whole = score_wer(transcripts, marks)
    malformed = sum(split_chain(row["prediction"])[0] is None for row in rows)
    shown = {key: whole[key] for key in ("wer", "wer_ci95", "words", "silence", "normaliser") if key in whole}
    return {**shown, "malformed": malformed, **score_answer(rows, marks)}


SCORERS = {
    "wer": score_wer,
    "bleu": score_bleu,
    "accuracy": score_accuracy,
    "answer": score_answer,
    "chain": score_chain,
}


def lengths(rows: list[dict]) -> dict:
    """Length statistics over the rows that carry them; rates are per second of audio."""
    known = [row for row in rows if row.get("frames") and row.get("duration") and row.get("kept") is not None]
    seconds = sum(row["duration"] for row in known)
    if not known or not seconds:
        return {}
    stats = {
        "audio_seconds": seconds,
        "kept_share": sum(row["kept"] for row in known) / sum(row["frames"] for row in known),
        "kept_per_second": sum(row["kept"] for row in known) / seconds,
    }
    if all(row.get("tokens") is not None for row in known):
        stats["generated_tokens_per_second_of_audio"] = sum(row["tokens"] for row in known) / seconds
    return stats


def direction(row: dict) -> str:
    return f"{row.get('lang') or '?'}-{target_language(row) or '?'}"


def groups(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows by corpus, by language and, for translations, by direction: every grouping that has more than
    one group."""
    keys = {"corpus": lambda row: row.get("corpus") or "", "lang": lambda row: row.get("lang") or ""}
    if rows[0].get("task") == "translation":
        keys["direction"] = direction
        del keys["lang"]
    found = {}
    for kind, key in keys.items():
        parts = defaultdict(list)
        for row in rows:
            parts[key(row)].append(row)
        if len(parts) > 1:
            found |= {f"{kind} {name}": part for name, part in sorted(parts.items())}
    return found


def score_rows(rows: list[dict], marks: Marks = "script") -> dict:
    """{task: {metric, utterances, the scores, length, groups: {group: the same}}}, from prediction rows.
    marks: what happens to combining marks (core/text.py)."""
    by_task = defaultdict(list)
    for row in with_tokenizers(with_labels(rows, rows), rows):
        by_task[row.get("task") or "asr"].append(row)
    result = {}
    for task, members in sorted(by_task.items()):
        metric = metric_of(members)

        def one(part: list[dict], metric: str = metric) -> dict:
            return {
                "utterances": len(part),
                "empty_predictions": sum(not row["prediction"].strip() for row in part),
                **SCORERS[metric](part, marks),
                "length": lengths(part),
            }

        result[task] = {
            "metric": metric,
            **one(members),
            "groups": {name: one(part) for name, part in groups(members).items()},
        }
    return result


COLUMNS = {
    "wer": ("wer", "cer"),
    "bleu": ("bleu", "chrf"),
    "accuracy": ("accuracy", "unparsed"),
    "answer": ("exact", "chrf"),
    "chain": ("wer", "exact"),
}
_UNSCORED = {"bleu": "by direction", "wer": "none: no words", "cer": "none: no words"}


def table(scores: dict) -> str:
    """The scores as text, one line a task and group, intervals in brackets."""
    lines = []
    for task, whole in scores.items():
        for group, part in [("all", whole), *whole["groups"].items()]:
            shown = []
            for name in COLUMNS[whole["metric"]]:
                value, bounds = part[name], part.get(f"{name}_ci95")
                text = f"{name.upper() if name in ('wer', 'cer', 'bleu') else name} "
                text += (
                    f"{value:.3f}"
                    if isinstance(value, float)
                    else _UNSCORED[name]
                    if value is None
                    else str(value)
                )
                shown.append(text + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""))
            if stray := part.get("labels_not_among_choices"):
                shown[-1] += f", {stray} labels are no choice"
            if silent := part.get("silence"):
                inserted = f"{silent['insertions']} words inserted"
                if (rate := silent["insertions_per_minute"]) is not None:
                    inserted = f"{rate:.1f} words inserted a minute"
                shown[-1] += f", {silent['utterances']} silent: {inserted}"
            kept = part["length"].get("kept_per_second")
            lines.append([task, group, part["utterances"], *shown, "" if kept is None else f"{kept:.1f}"])
    return tabulate(
        lines,
        headers=["task", "group", "utterances", "score", "second score", "kept/s"],
        tablefmt="github",
        disable_numparse=True,
    )


def language_notes(rows: list[dict]) -> list[str]:
    """What is to be said about languages that the table (core/languages.py) does not hold."""
    notes = []
    for key, consequence in (
        ("lang", "their text is split into words by its script"),
        ("target_lang", "BLEU's tokenizer is chosen by the script of the references"),
    ):
        unknown = Counter(row[key] for row in rows if row.get(key) and not is_known(row[key]))
        if unknown:
            named = ", ".join(f"'{lang}'" for lang in sorted(unknown))
            notes.append(f"{unknown.total()} rows have a {key} that is not known ({named}): {consequence}")
    return notes


def score_file(path: Path, marks: Marks = "script") -> dict:
    """Score a predictions file and write FILE.scores.json beside it; returns what was written."""
    rows, notes = read_predictions(path)
    if not rows:
        raise PredictionError(f"{path} holds no predictions: run evaluation.run first")
    rejected = path.with_suffix(".rejected.jsonl")
    result = {
        "file": path.name,
        "utterances": len(rows),
        "bootstrap": BOOTSTRAP,
        "marks": marks,
        "rejected": len(read_rows(rejected)) if rejected.exists() else 0,
        "notes": [*notes, *language_notes(rows)],
        "tasks": score_rows(rows, marks),
    }
    target = path.with_suffix(".scores.json")
    target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def print_notes(result: dict) -> None:
    for note in result["notes"]:
        print(f"note: {note}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("python -m evaluation.score"), description=__doc__.splitlines()[0]
    )
    parser.add_argument("files", nargs="+", type=Path, help="predictions written by evaluation.run")
    parser.add_argument(
        "--marks",
        choices=MARKS,
        default="script",
        help="combining marks: kept where a script needs them (default), all kept, or deleted as Whisper's "
        "normaliser does, for numbers that stand beside published ones",
    )
    options = parser.parse_args(arguments)
    for path in options.files:
        try:
            result = score_file(path, options.marks)
        except PredictionError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{path} ({result['utterances']} predictions, {result['rejected']} samples rejected)")
        print(table(result["tasks"]))
        print_notes(result)
        print(f"scores: {path.with_suffix('.scores.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
