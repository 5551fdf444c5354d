"""Normalise transcripts and labels before they are packed. Each choice has a name, which the packed folder
records.

What CTC is trained on is settled later, by the recipe's data.ctc_text (core.ctc_text.normalise); the choices
here repair what a corpus did to its text, before training ever sees it.
"""

from __future__ import annotations

import re
import unicodedata

from core.ctc_text import normalise

# Control, format and private-use characters, but for the joiners that Indic and Persian spelling needs.
_INVISIBLE_CATEGORIES, _JOINERS = {"Cc", "Cf", "Co", "Cs"}, {"\u200c", "\u200d"}
_QUOTES = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u00a0": " "}
)
_ENGLISH_I = re.compile(r"\bi(?=$|[\s',.?!;:])")


def raw(text: str) -> str:
    """As the corpus has it."""
    return text


def clean(text: str) -> str:
    """NFC, plain quotation marks, no invisible characters, single spaces: the same words, written one way."""
    text = unicodedata.normalize("NFC", text).translate(_QUOTES)
    text = "".join(
        " " if c in "\t\n\r" else c
        for c in text
        if c in "\t\n\r" or c in _JOINERS or unicodedata.category(c) not in _INVISIBLE_CATEGORIES
    )
    return " ".join(text.split())


def sentence(text: str) -> str:
    """clean, and text in capitals alone (LibriSpeech, GigaSpeech) as a sentence: an LLM knows "hello", hardly
    "HELLO"."""
    text = clean(text)
    if not text.isupper():
        return text
    text = _ENGLISH_I.sub("I", text.lower())
    return text[:1].upper() + text[1:]


def lower(text: str) -> str:
    """clean and lower case."""
    return clean(text).lower()


def lower_no_punctuation(text: str) -> str:
    """lower, with no punctuation or symbols but apostrophes inside words."""
    return normalise(clean(text), "lower_no_punctuation")


NORMALISERS = {
    function.__name__: function for function in (raw, clean, sentence, lower, lower_no_punctuation)
}


def plain_label(label: str) -> str:
    """A class name as words: "Dog_bark", "dog-bark" and "Dog bark" are all "dog bark"; "Speech, human" keeps
    its comma."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    return " ".join(re.sub(r"[_\-]+", " ", clean(words)).lower().split())


def label_sentence(label: str) -> str:
    """A sound's label in the one format that stage 1 learns sounds in."""
    return f"the sound is {plain_label(label)}"
