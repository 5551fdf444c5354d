"""The one text normaliser for scores, and error rates by words, characters and both: validation, evaluation
and quality filters.

English goes through Whisper's English normaliser (contractions, numbers, British spellings), every other
language through its basic one (lower case, no brackets, no punctuation; Radford et al., "Robust Speech
Recognition via Large-Scale Weak Supervision", appendix C). One thing differs from Whisper: its basic
normaliser replaces combining marks by spaces, so that Hindi words that differ in their vowels are equal and
words are torn apart. Here `marks` decides:

    script   marks stay, but for Arabic and Hebrew vowel points and Cyrillic stress, which most text leaves
             out: those are removed
    keep     all marks stay
    whisper  Whisper's own rule, for comparison with published numbers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Literal, get_args

import jiwer
import numpy as np
import regex
from whisper_normalizer.basic import BasicTextNormalizer, remove_symbols
from whisper_normalizer.english import EnglishTextNormalizer

from core.languages import UNDETERMINED, UNSPACED, effective_language, writes_no_spaces

Marks = Literal["script", "keep", "whisper"]
MARKS: tuple[str, ...] = get_args(Marks)
Unit = Literal["word", "character", "mixed"]
#: Error rates by name, and what each counts.
RATES: dict[str, Unit] = {"wer": "word", "cer": "character", "mer": "mixed"}

_ENGLISH = EnglishTextNormalizer()
# Points of Arabic (harakat, Quranic signs) and Hebrew; tatweel only stretches a word; an acute accent on
# Cyrillic marks stress.
_OPTIONAL_MARKS = regex.compile(
    r"[\u0591-\u05BD\u05BF\u05C1\u05C2\u05C4\u05C5\u05C7\u0610-\u061A\u0640\u064B-\u065F\u0670"
    r"\u06D6-\u06DC\u06DF-\u06E8\u06EA-\u06ED]|(?<=\p{Cyrillic})\u0301"
)
# Marks that belong to no word: variation selectors, enclosing circles and keycaps, separate accents.
_STRAY_MARKS = regex.compile(r"[\uFE00-\uFE0F\U000E0100-\U000E01EF\p{Me}]|(?<![\p{L}\p{M}\p{N}])\p{M}+")


@cache
def _basic(marks: Marks) -> BasicTextNormalizer:
    normaliser = BasicTextNormalizer()
    if marks != "whisper":

        def clean(text: str) -> str:
            text = _STRAY_MARKS.sub("", remove_symbols(text, preserve_marks=True))
            text = text.replace("i\u0307", "i")  # what lower-casing makes of the Turkish dotted capital
            return _OPTIONAL_MARKS.sub("", text) if marks == "script" else text

        normaliser.clean = clean
    return normaliser


def normalise(text: str | None, lang: str | None = "en", marks: Marks = "script") -> str:
    """Return the text in the form in which it is compared, without surrounding spaces; empty for None. In
    scripts without spaces every character (grapheme) is a word of its own."""
    text = text or ""
    return " ".join(words(text, effective_language(lang, text), marks))


@lru_cache(maxsize=1 << 15)  # the same text is counted in words, characters and both
def _plain(text: str, code: str, marks: Marks) -> str:
    return (_ENGLISH if code == "en" else _basic(marks))(text)


def words(text: str, code: str, marks: Marks = "script") -> list[str]:
    """Return the words of a text after normalisation. code: of `core.languages.effective_language`."""
    plain = _plain(text, code, marks)
    if code in UNSPACED:
        plain = " ".join(regex.findall(r"\X", plain))
    return plain.split() if code != UNDETERMINED else _mixed(plain.split())


def _mixed(parts: list[str]) -> list[str]:
    """Cut words at the characters of scripts without spaces, which stand by themselves: "iPhone手机" is three
    units."""
    cut: list[str] = []
    for word in parts:
        joined = False
        for grapheme in regex.findall(r"\X", word):
            alone = writes_no_spaces(grapheme[0])
            if joined and not alone:
                cut[-1] += grapheme
            else:
                cut.append(grapheme)
            joined = not alone
    return cut


def units(text: str, code: str, unit: Unit = "word", marks: Marks = "script") -> list[str]:
    """Return what a text is counted in: its words; its characters, spaces included where the language writes
    them; or, mixed, its words with every character of a script without spaces by itself."""
    if unit == "word":
        return words(text, code, marks)
    if unit == "mixed":
        return _mixed(_plain(text, code, marks).split())
    return list(("" if code in UNSPACED else " ").join(words(text, code, marks)))


def describe(lang: str | None, marks: Marks = "script") -> str:
    """Return one phrase for score files: which normaliser, its package's version, and what happens to
    combining marks."""
    code = effective_language(lang, "")
    name = "whisper-english" if code == "en" else "whisper-basic"
    if code in UNSPACED:
        name += " by character"
    elif code == UNDETERMINED:
        name += " by script"
    if code != "en":
        name += {"script": ", combining marks kept", "keep": ", all combining marks kept", "whisper": ""}[
            marks
        ]
    return f"{name} (whisper-normalizer {version('whisper-normalizer')})"


@dataclass
class Errors:
    """Errors and reference units of each utterance, the totals by kind, and jiwer's alignments of the
    units."""

    errors: np.ndarray  # [utterances]
    units: np.ndarray  # [utterances]; 0 where the reference holds none
    kinds: dict[str, int]  # substitutions, deletions, insertions
    output: jiwer.WordOutput | jiwer.CharacterOutput | None  # None of no utterances


def count_errors(
    references: Sequence[str],
    hypotheses: Sequence[str],
    langs: Sequence[str | None],
    unit: Unit = "word",
    marks: Marks = "script",
) -> Errors:
    """Align texts after normalisation and count what differs. langs: the language of each reference, None
    where it is not said.

    An utterance whose reference is empty after normalisation has its insertions as errors and no units.
    """
    kinds = ("substitutions", "deletions", "insertions")
    if not references:
        return Errors(np.zeros(0), np.zeros(0), dict.fromkeys(kinds, 0), None)
    pairs = []
    for reference, hypothesis, lang in zip(references, hypotheses, langs, strict=True):
        code = effective_language(lang, reference)  # both sides by the reference's
        pairs.append([units(text, code, unit, marks) for text in (reference, hypothesis)])
    separator, process = ("", jiwer.process_characters) if unit == "character" else (" ", jiwer.process_words)
    output = process([separator.join(r) for r, _ in pairs], [separator.join(h) for _, h in pairs])
    wrong = [
        sum(
            max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
            for chunk in chunks
            if chunk.type != "equal"
        )
        for chunks in output.alignments
    ]
    sizes = [len(reference) for reference in output.references]
    totals = {kind: getattr(output, kind) for kind in kinds}
    return Errors(np.array(wrong, dtype=float), np.array(sizes, dtype=float), totals, output)


def error_rate(reference: str, hypothesis: str, lang: str | None) -> float:
    """Return the word error rate of one utterance; 0 or 1 where the reference holds no word."""
    counted = count_errors([reference], [hypothesis], [lang])
    return float(counted.errors[0] / counted.units[0]) if counted.units[0] else float(counted.errors[0] > 0)


def says_nothing(reference: str) -> bool:
    """Return whether a reference means silence or noise: no letter or digit outside of brackets."""
    return not regex.search(r"[\p{L}\p{N}]", regex.sub(r"\[[^\]]*\]|<[^>]*>|\([^)]*\)", " ", reference))
