"""Text before it is compared: Whisper's normalisers, so that error rates mean what published ones mean.

English goes through Whisper's English normaliser (contractions, numbers, British spellings), every other language through
its basic one (lower case, no punctuation; scripts written without spaces are split into characters). Both, and the
spelling map, come from the package `whisper-normalizer`, so scoring needs no model and no network. (Radford et al., "Robust
Speech Recognition via Large-Scale Weak Supervision", appendix C.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import version

from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

# Scripts without spaces between words: their "word" is the character.
UNSPACED = {"zh", "yue", "nan", "ja", "th", "lo", "my", "km"}
# Codes that corpora use in place of Whisper's.
ALIASES = {"eng": "en", "cmn": "zh", "zho": "zh", "chi": "zh", "jpn": "ja", "tha": "th", "mya": "my", "bur": "my", "khm": "km",
           "nb": "no", "fil": "tl"}


def language_code(lang: str | None) -> str | None:
    """Whisper's code of a language: of a code with or without a region (zh-CN, en_us), one of three letters, or a name in English
    that may have a word before it (Mandarin Chinese). What is not known comes back in lower case; None for None or ""."""
    if not lang:
        return None
    code = lang.lower().replace("_", "-").split("-")[0].strip()
    return ALIASES.get(code) or (code if len(code) <= 3 else named_language(code) or code)


@cache
def named_language(words: str) -> str | None:
    """The code of the last word that is a language's name in English; None where none is."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # only here: it takes seconds

    codes = [TO_LANGUAGE_CODE[word] for word in words.lower().split() if word in TO_LANGUAGE_CODE]
    return codes[-1] if codes else None


@cache
def normaliser(lang: str | None) -> Callable[[str], str]:
    """The normaliser for a language, by code or name; a missing one counts as English, the language of most of the data."""
    code = language_code(lang) or "en"
    if code == "en":
        return EnglishTextNormalizer()
    return BasicTextNormalizer(split_letters=code in UNSPACED)


def normalise(text: str | None, lang: str | None = "en") -> str:
    """Normalised text without surrounding spaces; empty for None."""
    return " ".join(normaliser(lang)(text or "").split())


def describe(lang: str | None) -> str:
    """One phrase for score files: which normaliser, from which version of the package."""
    kind = normaliser(lang)
    name = "whisper-english" if isinstance(kind, EnglishTextNormalizer) else "whisper-basic"
    if getattr(kind, "split_letters", False):
        name += " by character"
    return f"{name} (whisper-normalizer {version('whisper-normalizer')})"
