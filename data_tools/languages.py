"""Languages by whatever name a corpus has for them, as Whisper's codes, and what Whisper's scorer makes of their text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

# Scripts without spaces between words: their "word" is the character.
UNSPACED = {"zh", "yue", "nan", "ja", "th", "lo", "my", "km"}
# Codes that corpora use in place of Whisper's.
ALIASES = {
    "eng": "en",
    "cmn": "zh",
    "zho": "zh",
    "chi": "zh",
    "jpn": "ja",
    "tha": "th",
    "mya": "my",
    "bur": "my",
    "khm": "km",
    "nb": "no",
    "fil": "tl",
}


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


def language_name(lang: str) -> str:
    """As an instruction names the language: German for de, de-DE or german; what is not known stays as it is."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    name = LANGUAGES.get(language_code(lang) or "")
    return name.title() if name else lang


@cache
def normaliser(lang: str | None) -> Callable[[str], str]:
    """Whisper's text normaliser for a language, by code or name; a missing one counts as English, the language of most data."""
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    code = language_code(lang) or "en"
    return EnglishTextNormalizer() if code == "en" else BasicTextNormalizer(split_letters=code in UNSPACED)
