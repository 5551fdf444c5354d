"""Languages by whatever name a corpus has for them, as Whisper's codes."""

from __future__ import annotations

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
