"""Error rates by language of a validation: CER for languages that write no spaces, WER for the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tabulate import tabulate

from core.distributed import from_main, gather
from core.languages import UNSPACED, language_code
from core.text import RATES, count_errors, says_nothing
from model.batch import Batch
from stream.plan import NO_LANGUAGE


def rate_of(language: str) -> str:
    """Return the error rate by which transcripts of a language are scored: cer or wer."""
    return "cer" if language in UNSPACED else "wer"


@dataclass
class LanguageErrors:
    """Errors, units and utterances of this rank by language, of what is transcribed."""

    errors: Counter[str] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)
    utterances: Counter[str] = field(default_factory=Counter)

    def add(self, batch: Batch, references: list[str], hypotheses: list[str], *, all_tasks: bool) -> None:
        """Count a batch. all_tasks: the references are the transcripts of every task (CTC); else only rows of
        the task `asr` are counted. References that say nothing are left out."""
        languages = batch.languages or [None] * len(references)
        for task, lang, reference, hypothesis in zip(
            batch.tasks, languages, references, hypotheses, strict=False
        ):
            if says_nothing(reference) or not (all_tasks or task in ("", "asr")):
                continue
            code = language_code(lang) or NO_LANGUAGE
            counted = count_errors([reference], [hypothesis], [lang], RATES[rate_of(code)])
            self.errors[code] += int(counted.errors.sum())
            self.units[code] += int(counted.units.sum())
            self.utterances[code] += 1

    def total(self) -> LanguageErrors:
        """Return the sums over all ranks. Collective."""
        result = LanguageErrors()
        for errors, units, utterances in from_main(gather((self.errors, self.units, self.utterances))):
            result.errors.update(errors)
            result.units.update(units)
            result.utterances.update(utterances)
        return result

    def scores(self) -> dict[str, float]:
        """Return {"language/de/wer": share, ...}; nothing of a single language."""
        if len(self.utterances) < 2:
            return {}
        return {
            f"language/{code}/{rate_of(code)}": self.errors[code] / self.units[code]
            for code in sorted(self.utterances)
            if self.units[code]
        }


def language_table(scores: dict[str, float], utterances: dict[str, int]) -> str:
    """Return the table of `LanguageErrors.scores`, the largest error rate first; empty without any."""
    rows = []
    for name, value in sorted(scores.items(), key=lambda item: -item[1]):
        _, code, rate = name.split("/")
        rows.append((code, utterances[code], rate.upper(), f"{100 * value:.1f} %"))
    headers = ("language", "utterances", "rate", "value")
    return tabulate(rows, headers=headers, disable_numparse=True) if rows else ""
