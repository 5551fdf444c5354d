"""Text before it is compared: Whisper's normalisers, so that error rates mean what published ones mean.

English goes through Whisper's English normaliser (contractions, numbers, British spellings), every other language through
its basic one (lower case, no punctuation; scripts written without spaces are split into characters). Both, and the
spelling map, come from the package `whisper-normalizer`, so scoring needs no model and no network. (Radford et al., "Robust
Speech Recognition via Large-Scale Weak Supervision", appendix C.)
"""

from __future__ import annotations

from importlib.metadata import version

from whisper_normalizer.english import EnglishTextNormalizer

from data_tools.languages import normaliser


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
