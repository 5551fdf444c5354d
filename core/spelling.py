"""The words of a text as it is written, and the CTC targets that spell each word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import regex

from core.ctc_text import ctc_target_ids, keep_characters, spaced
from core.languages import UNDETERMINED, UNSPACED, effective_language, writes_no_spaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAID = regex.compile(r"[\p{L}\p{N}]")
_OPENING = regex.compile(r"[\p{Ps}\p{Pi}¿¡]+")


@dataclass(frozen=True)
class Part:
    """A target of a word, or the share of it that the word has: characters of a script without spaces may
    have one target in common."""

    place: int  # in the targets
    begin: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Spelling:
    words: list[str]  # as they are written
    ids: list[int]  # the CTC targets of the text
    parts: list[list[Part]]  # of each word; empty where the normalisation drops all of it


def word_spans(text: str, lang: str | None) -> list[tuple[int, int]]:
    """Return (begin, end) of each word in a text as it is written.

    Words are separated by spaces. In languages whose scripts write none, and where the language is not known,
    each character of such a script is a word. What has no letter or digit belongs to the word before it;
    opening brackets and quotes to the word after them.
    """
    cut = effective_language(lang, text) in UNSPACED | {UNDETERMINED}
    spans: list[tuple[int, int]] = []
    waiting: int | None = None  # where signs begin that belong to the next word
    for begin, end in _runs(text, cut):
        piece = text[begin:end]
        if _SAID.search(piece):
            spans.append((begin if waiting is None else waiting, end))
            waiting = None
        elif waiting is None and spans and not _OPENING.fullmatch(piece):
            spans[-1] = (spans[-1][0], end)
        elif waiting is None:
            waiting = begin
    if waiting is not None:  # no word comes after them
        begin = spans.pop()[0] if spans else waiting
        spans.append((begin, len(text.rstrip())))
    return spans


def _runs(text: str, cut: bool) -> Iterator[tuple[int, int]]:
    """(begin, end) of what stands between spaces; with `cut`, characters of scripts without spaces and the
    signs beside them by themselves."""
    for run in regex.finditer(r"\S+", text):
        if not cut:
            yield run.span()
            continue
        begin = place = run.start()
        before = opened = False  # whether the last character is a word by itself, or opens something
        signs = False  # whether the stretch so far is nothing but signs
        for grapheme in regex.findall(r"\X", run.group()):
            alone, is_spoken = writes_no_spaces(grapheme[0]), bool(_SAID.search(grapheme))
            opens = not grapheme.isascii() and _OPENING.fullmatch(grapheme) and not opened
            if place > begin and (alone or before or opens or (signs and is_spoken)):
                yield begin, place
                begin = place
            signs = not is_spoken and (place == begin or signs)
            before, opened = alone, bool(_OPENING.fullmatch(grapheme))
            place += len(grapheme)
        yield begin, place


def join_words(words: Sequence[str]) -> str:
    """Return words as running text: without a space between two characters of scripts that write none."""
    text = ""
    for word in words:
        before = regex.search(r"[\p{L}\p{N}](?=[^\p{L}\p{N}]*$)", text)
        after = _SAID.search(word)
        close = before and after and writes_no_spaces(before.group()) and writes_no_spaces(after.group())
        text += word if close or not text else f" {word}"
    return text


def spell(
    tokenizer: PreTrainedTokenizerBase, text: str, normalisation: str, lang: str | None = None
) -> Spelling:
    """Return the words of a text with the CTC targets of each. A run of white space is one space."""
    spans = word_spans(text, lang)
    words = [" ".join(text[begin:end].split()) for begin, end in spans]
    plain, owners = _plain(text, spans, normalisation)
    ids = ctc_target_ids(tokenizer, plain, "raw")
    parts: list[list[Part]] = [[] for _ in spans]
    place = 0
    for begin, end, its_ids in _stretches(tokenizer, plain, ids):
        if len(set(owners[begin:end])) == 1:
            token_spans = [(begin, end)] * len(its_ids)
        else:
            token_spans = [
                (begin + first, begin + last)
                for first, last in _token_spans(tokenizer, plain[begin:end], its_ids)
            ]
        for first, last in token_spans:
            letters = [i for i in range(first, last) if plain[i] != " "] or [first]
            for number in dict.fromkeys(owners[i] for i in letters):
                own = [rank for rank, i in enumerate(letters) if owners[i] == number]
                parts[number].append(Part(place, own[0] / len(letters), (own[-1] + 1) / len(letters)))
            place += 1
    return Spelling(words, ids, parts)


def _plain(text: str, spans: list[tuple[int, int]], normalisation: str) -> tuple[str, list[int]]:
    """The normalised text, and the number of the word that each of its characters belongs to (a space: to
    the word after it)."""
    lowered = text if normalisation == "raw" else text.lower()
    sizes = [1 if normalisation == "raw" else len(c.lower()) for c in text]
    numbers = [-1] * len(text)
    for number, (begin, end) in enumerate(spans):
        numbers[begin:end] = [number] * (end - begin)
    origin = [number for number, size in zip(numbers, sizes, strict=False) for _ in range(size)]
    plain: list[str] = []
    owners: list[int] = []
    gap = False
    for character, number in zip(keep_characters(lowered, normalisation), origin, strict=True):
        if character.isspace():
            gap = bool(plain)
            continue
        plain += [" ", character] if gap else [character]
        owners += [number, number] if gap else [number]
        gap = False
    return "".join(plain), owners


def _stretches(
    tokenizer: PreTrainedTokenizerBase, plain: str, ids: list[int]
) -> list[tuple[int, int, list[int]]]:
    """(begin, end, targets) of what stands between spaces; of the whole text, where targets cross spaces."""
    stretches = [
        (run.start(), run.end(), ctc_target_ids(tokenizer, run.group(), "raw"))
        for run in regex.finditer(r"[^ ]+", plain)
    ]
    if [i for *_, its_ids in stretches for i in its_ids] == ids:
        return stretches
    return [(0, len(plain), ids)] if plain else []


def _token_spans(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[tuple[int, int]]:
    """(begin, end) of each target in the text that they spell; at least one character each."""
    shift = int(spaced(tokenizer))
    text, size = " " * shift + text, len(text)
    spans: list[tuple[int, int]] | None = None
    if tokenizer.is_fast:
        encoding = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        spans = encoding["offset_mapping"] if encoding["input_ids"] == ids else None
        # bytes of several unknown characters come with the span of all these characters
        if spans and any(a == b and a[1] - a[0] > 1 for a, b in pairwise(spans)):
            spans = None
    if spans is None:
        spans, before = [], 0
        for count in range(1, len(ids) + 1):
            prefix = str(tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)).rstrip("\ufffd")
            spans.append((before, max(len(prefix), before + 1)))
            before = max(before, len(prefix))
    inside = [(min(max(begin - shift, 0), size - 1), end - shift) for begin, end in spans]
    return [(begin, min(max(end, begin + 1), size)) for begin, end in inside]
