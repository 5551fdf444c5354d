"""Scores from predictions alone: `python -m evaluation.score FILE.jsonl` needs no model, no audio and no network.

A prediction row holds `id`, `reference`, `prediction`, `raw`, and `corpus`, `task`, `lang`, `duration` (seconds), and where known
`label`, `choices`, `frames` (adapter frames of the audio), `kept` (frames the LLM saw), `tokens` (generated).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import jiwer
import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Score
from tabulate import tabulate

from data_tools.languages import UNSPACED, language_code
from evaluation.normalise import describe, normalise
from evaluation.predictions import PredictionError, read_rows
from evaluation.resampling import interval
from evaluation.tasks import METRICS, label_among, metric_of, parse_choice, parse_letter, split_chain, target_language

BOOTSTRAP = 1000  # resamples behind each 95 % interval


def aligned(rows: list[dict], *, characters: bool = False) -> jiwer.WordOutput | jiwer.CharacterOutput:
    """References and predictions after normalisation, aligned in words or characters."""
    references = [normalise(row["reference"], row.get("lang")) for row in rows]
    predictions = [normalise(row["prediction"], row.get("lang")) for row in rows]
    if characters:  # the spaces of an unspaced language are the normaliser's
        unspaced = [language_code(row.get("lang")) in UNSPACED for row in rows]
        for texts in (references, predictions):
            texts[:] = [text.replace(" ", "") if joined else text for text, joined in zip(texts, unspaced, strict=True)]
    process = jiwer.process_characters if characters else jiwer.process_words
    return process(references, predictions)


def word_counts(rows: list[dict], *, characters: bool = False) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Errors and reference units per utterance after normalisation, and the totals by kind of error.

    Units are words, or characters with `characters` (spaces count where the language writes them, as in jiwer's CER). An
    utterance whose reference is empty after normalisation adds its insertions as errors and no units.
    """
    output = aligned(rows, characters=characters)
    errors, units = np.zeros(len(rows)), np.zeros(len(rows))
    for i, (reference, alignment) in enumerate(zip(output.references, output.alignments, strict=True)):
        units[i] = len(reference)
        errors[i] = sum(max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                        for chunk in alignment if chunk.type != "equal")
    kinds = {name: getattr(output, name) for name in ("substitutions", "deletions", "insertions")}
    return errors, units, kinds


def score_wer(rows: list[dict]) -> dict:
    errors, words, kinds = word_counts(rows)
    wrong, characters, _ = word_counts(rows, characters=True)
    languages = sorted({row.get("lang") or "en" for row in rows})
    return {"wer": float(errors.sum() / max(words.sum(), 1)), "wer_ci95": interval(errors, words, samples=BOOTSTRAP),
            "cer": float(wrong.sum() / max(characters.sum(), 1)), "cer_ci95": interval(wrong, characters, samples=BOOTSTRAP),
            "words": int(words.sum()), **kinds, "sentence_errors": float((errors > 0).mean()),
            "normaliser": {lang: describe(lang) for lang in languages}}


def bleu_tokenizer(row: dict) -> str:
    """sacrebleu's tokenizer for the target language: `zh`, characters where no spaces are written, else `13a`."""
    target = target_language(row)
    return "zh" if target == "zh" else "char" if target in UNSPACED else "13a"


def as_float(score: Score) -> Score:
    score.score = float(score.score)
    return score


def score_bleu(rows: list[dict]) -> dict:
    """BLEU and chrF; `bleu` is None, with a `bleu_note`, where the directions need several tokenizers."""
    predictions, references = [row["prediction"] for row in rows], [[row["reference"] for row in rows]]
    scores, metrics = {}, {"chrf": CHRF()}
    tokenizers = sorted({bleu_tokenizer(row) for row in rows})
    if len(tokenizers) == 1:
        metrics = {"bleu": BLEU(tokenize=tokenizers[0])} | metrics
    else:  # one tokenizer for all would be wrong for some, and which one would depend on the order of the rows
        scores = {"bleu": None, "bleu_note": f"needs tokenizers {', '.join(tokenizers)}: see the groups by direction"}
    for name, metric in metrics.items():
        # Of its resamples sacrebleu makes np.float32, or float where nothing matches, and then cannot average the two.
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
    """Rows of closed tasks without `choices` get `labels`, what can be answered: all labels of their corpus and task in `among`
    (of a task without any, as METRICS has it, the references), so that a part of the rows is scored as it is within the whole."""
    found: dict[tuple, set[str]] = defaultdict(set)
    bare: dict[tuple, set[str]] = defaultdict(set)
    for row in among:
        key = row.get("corpus"), row.get("task")
        if row.get("label"):
            found[key].add(str(row["label"]))
        elif METRICS.get(row.get("task")) == "accuracy":
            bare[key].add(row["reference"])
    labels = {key: sorted(names) for key, names in {**bare, **found}.items()}
    return [row if row.get("choices") else row | {"labels": labels.get((row.get("corpus"), row.get("task")), [])} for row in rows]


def correct_answers(rows: list[dict]) -> tuple[np.ndarray, int, int]:
    """1 where the choice read from the answer is the label, else 0; how many answers named no single choice; and how many labels
    are none of their row's choices, which no answer can get right.

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
        correct[i] = choice is not None and choice == label
    return correct, unparsed, mislabelled


def score_accuracy(rows: list[dict]) -> dict:
    correct, unparsed, mislabelled = correct_answers(rows)
    by_label = defaultdict(list)
    for row, hit in zip(rows, correct, strict=True):
        by_label[label_of(row)].append(hit)
    recalls = {label: float(np.mean(hits)) for label, hits in sorted(by_label.items())}
    scores = {"accuracy": float(correct.mean()),
              "accuracy_ci95": interval(correct, np.ones(len(rows)), samples=BOOTSTRAP), "unparsed": unparsed,
              **({"labels_not_among_choices": mislabelled} if mislabelled else {})}
    if len(recalls) <= 50 and not any(row.get("choices") for row in rows):
        scores |= {"unweighted_recall": float(np.mean(list(recalls.values()))), "recall": recalls}
    return scores


def exact_answers(rows: list[dict]) -> np.ndarray:
    """1 where the answer equals the reference's after normalisation (of the row's language), else 0."""
    answers = [[normalise(split_chain(row[key])[1], row.get("lang")) for key in ("prediction", "reference")] for row in rows]
    return np.array([float(prediction == reference) for prediction, reference in answers])


def score_answer(rows: list[dict]) -> dict:
    """Free answers with a reference: the share that equals it, chrF, and accuracy over the rows that carry a label."""
    chrf, exact = CHRF(), exact_answers(rows)
    answers, references = [split_chain(row["prediction"])[1] for row in rows], [split_chain(row["reference"])[1] for row in rows]
    scores = {"exact": float(exact.mean()), "exact_ci95": interval(exact, np.ones(len(rows)), samples=BOOTSTRAP),
              "chrf": float(chrf.corpus_score(answers, [references]).score), "chrf_signature": str(chrf.get_signature())}
    labelled = [row for row in rows if row.get("label")]
    if labelled:
        scores |= {"labelled": len(labelled), **score_accuracy(labelled)}
    return scores


def score_chain(rows: list[dict]) -> dict:
    """"Transcription: ... Answer: ...": WER of the first part, the second part as an answer. A missing part counts as wrong."""
    transcripts = [row | {key: split_chain(row[key])[0] or "" for key in ("reference", "prediction")} for row in rows]
    whole = score_wer(transcripts)
    malformed = sum(split_chain(row["prediction"])[0] is None for row in rows)
    shown = {key: whole[key] for key in ("wer", "wer_ci95", "words", "normaliser")}
    return {**shown, "malformed": malformed, **score_answer(rows)}


SCORERS = {"wer": score_wer, "bleu": score_bleu, "accuracy": score_accuracy, "answer": score_answer, "chain": score_chain}


def lengths(rows: list[dict]) -> dict:
    """Length statistics over the rows that carry them; rates are per second of audio."""
    known = [row for row in rows if row.get("frames") and row.get("duration")]
    seconds = sum(row["duration"] for row in known)
    if not known or not seconds:
        return {}
    stats = {"audio_seconds": seconds, "kept_share": sum(row["kept"] for row in known) / sum(row["frames"] for row in known),
             "kept_per_second": sum(row["kept"] for row in known) / seconds}
    if all("tokens" in row for row in known):
        stats["generated_tokens_per_second_of_audio"] = sum(row["tokens"] for row in known) / seconds
    return stats


def direction(row: dict) -> str:
    return f"{row.get('lang') or '?'}-{target_language(row) or '?'}"


def groups(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows by corpus, by language and, for translations, by direction: every grouping that has more than one group."""
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


def score_rows(rows: list[dict]) -> dict:
    """{task: {metric, utterances, the scores, length, groups: {group: the same}}}, from prediction rows."""
    by_task = defaultdict(list)
    for row in with_labels(rows, rows):
        by_task[row.get("task") or "asr"].append(row)
    result = {}
    for task, members in sorted(by_task.items()):
        metric = metric_of(members)

        def one(part: list[dict], metric: str = metric) -> dict:
            return {"utterances": len(part), "empty_predictions": sum(not row["prediction"].strip() for row in part),
                    **SCORERS[metric](part), "length": lengths(part)}

        result[task] = {"metric": metric, **one(members), "groups": {name: one(part) for name, part in groups(members).items()}}
    return result


COLUMNS = {"wer": ("wer", "cer"), "bleu": ("bleu", "chrf"), "accuracy": ("accuracy", "unparsed"), "answer": ("exact", "chrf"),
           "chain": ("wer", "exact")}


def table(scores: dict) -> str:
    """The scores as text, one line a task and group, intervals in brackets."""
    lines = []
    for task, whole in scores.items():
        for group, part in [("all", whole), *whole["groups"].items()]:
            shown = []
            for name in COLUMNS[whole["metric"]]:
                value, bounds = part[name], part.get(f"{name}_ci95")
                text = f"{name.upper() if name in ('wer', 'cer', 'bleu') else name} "
                text += f"{value:.3f}" if isinstance(value, float) else "by direction" if value is None else str(value)
                shown.append(text + (f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""))
            if stray := part.get("labels_not_among_choices"):
                shown[-1] += f", {stray} labels are no choice"
            kept = part["length"].get("kept_per_second")
            lines.append([task, group, part["utterances"], *shown, "" if kept is None else f"{kept:.1f}"])
    return tabulate(lines, headers=["task", "group", "utterances", "score", "second score", "kept/s"], tablefmt="github",
                    disable_numparse=True)


def score_file(path: Path) -> dict:
    """Score a predictions file and write FILE.scores.json beside it; returns what was written."""
    rows = read_rows(path)
    if not rows:
        raise PredictionError(f"{path} holds no predictions: run evaluation.run first")
    rejected = path.with_suffix(".rejected.jsonl")
    result = {"file": path.name, "utterances": len(rows), "bootstrap": BOOTSTRAP,
              "rejected": len(read_rows(rejected)) if rejected.exists() else 0, "tasks": score_rows(rows)}
    target = path.with_suffix(".scores.json")
    target.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.score", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="predictions written by evaluation.run")
    options = parser.parse_args(arguments)
    for path in options.files:
        try:
            result = score_file(path)
        except PredictionError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{path} ({result['utterances']} predictions, {result['rejected']} samples rejected)")
        print(table(result["tasks"]))
        print(f"scores: {path.with_suffix('.scores.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
