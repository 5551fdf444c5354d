"""Transcripts as CTC targets: the recipe's data.ctc_text, and the ids of the LLM's vocabulary that spell
them."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

from core.samples import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMALISATIONS = ("raw", "lower", "lower_no_punctuation")


def normalise(text: str, normalisation: str) -> str:
    """raw: as it is | lower | lower_no_punctuation: lower case, Unicode punctuation and symbols dropped but
    for apostrophes inside words; in both, white space runs become one space."""
    letters = keep_characters(text if normalisation == "raw" else text.lower(), normalisation)
    return letters if normalisation == "raw" else " ".join(letters.split())


def keep_characters(text: str, normalisation: str) -> str:
    """Return a text (in lower case unless raw) with a space for each character that the normalisation drops:
    as many characters as before."""
    if normalisation not in NORMALISATIONS:
        raise PromptError(f"data.ctc_text is '{normalisation}': {' or '.join(NORMALISATIONS)}")
    if normalisation != "lower_no_punctuation":
        return text
    text = text.replace("\u2019", "'")
    return "".join(
        c
        if unicodedata.category(c)[0] not in "PS"
        or c == "'"
        and text[i - 1 : i].isalnum()
        and text[i + 1 : i + 2].isalnum()
        else " "
        for i, c in enumerate(text)
    )


@lru_cache(maxsize=16)
def spaced(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word has a form of its own behind a space, of one token, as in byte-level BPE."""
    bare, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", " a"))
    return len(bare) == len(spaced) and bare != spaced


def ctc_target_ids(tokenizer: PreTrainedTokenizerBase, text: str, normalisation: str = "lower") -> list[int]:
    """A transcript as CTC targets. Words that look like special tokens are text here. Where the tokenizer
    tells words behind a space from words at the beginning, the first word takes the form that all others
    have: one target type a word."""
    text = normalise(text, normalisation).strip()
    if not text:
        return []
    from core.control_tokens import (
        text_ids,
    )  # not at the top: it loads transformers, for which filters need not wait

    return text_ids(tokenizer, " " + text if spaced(tokenizer) else text)
