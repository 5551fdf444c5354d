"""BLEU and chrF, by sacrebleu."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Score
from sacrebleu.significance import PairedTest

from core.languages import CHINESE, UNDETERMINED, UNSPACED, is_known, language_code, writes_no_spaces
from core.samples import target_language
from core.text import Marks, units
from evaluation.metrics.base import BOOTSTRAP, Metric, register_metric


def bleu_tokenizer(row: dict) -> str:
    """sacrebleu's tokenizer for a translation: `zh` for Chinese, `char` for other scripts without spaces,
    else `13a`; by its `target_lang` where the table of languages has it, else by the script of its reference.
    (with_tokenizers asks all of a corpus.)"""
    if "tokenizer" in row:
        return row["tokenizer"]
    if is_known(row.get("target_lang")):
        target = language_code(row["target_lang"])
    else:
        characters = units(row.get("reference") or "", UNDETERMINED, "mixed")
        unspaced = [unit for unit in characters if writes_no_spaces(unit[0])]
        if 2 * len(unspaced) <= len(characters):
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
    scores: dict[str, Any] = {}
    metrics: dict[str, Any] = {"chrf": CHRF()}
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


def paired_bleu(first: list[dict], second: list[dict]) -> dict[str, dict]:
    """Compare two systems by sacrebleu's paired approximate randomisation; rows of one BLEU tokenizer."""
    systems: list[tuple[str, Sequence[str]]] = [
        ("first", [row["prediction"] for row in first]),
        ("second", [row["prediction"] for row in second]),
    ]
    references = [[row["reference"] for row in first]]
    bleu = BLEU(tokenize=bleu_tokenizer(first[0]))
    _, scores = PairedTest(systems, {"bleu": bleu, "chrf": CHRF()}, references, test_type="ar")()
    results: dict[str, dict] = {}
    pairs: dict[str, Any] = scores  # of names under "System", of results under the metrics
    for name, pair in pairs.items():
        if name != "System":
            a, b = pair
            results[name.lower().removesuffix("2")] = {
                "first": float(a.score),
                "second": float(b.score),
                "difference": float(b.score - a.score),
                "p_value": float(b.p_value),
            }
    return results


@register_metric("bleu")
class Translation(Metric):
    columns = ("bleu", "chrf")
    tasks = ("translation",)

    def score(self, rows: list[dict], marks: Marks) -> dict:
        return score_bleu(rows, marks)

    def paired(self, first: list[dict], second: list[dict]) -> dict[str, dict]:
        return paired_bleu(first, second)

    def show(self, name: str, value: object) -> str:
        shown = "by direction" if value is None else value
        return super().show(name.upper() if name == "bleu" else name, shown)
