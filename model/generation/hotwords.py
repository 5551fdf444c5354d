"""Hotwords: words and phrases that a request expects, and what joint search gives for them.

The CTC head first spots which phrases the audio may hold. Those become a prefix tree over the LLM's
tokens: each phrase in several spellings (with and without a leading space, lower case, capitalised, upper
case). A hypothesis that walks along the tree earns its phrase's bonus step by step, and loses it where it
leaves the phrase, ends inside it, or continues the same word ("cat" in "category").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from core.control_tokens import text_ids
from core.ctc_text import ctc_target_ids
from core.languages import writes_no_spaces

MOST_SPOTTED = 8  # phrases of one utterance that the search may favour, the likeliest
# Nats a token that a phrase may be behind the CTC head's best path on the same frames. On 40 validation clips
# of the quick start it passes 43 % of 69 rare words that are said, and 4.8 of 500 others a clip.
MARGIN = 4.0
# For each token. On 80 validation clips of the quick start with 50 distractors: recall of rare words 16 %
# without hotwords, 20 % at 3, 25 % at 6, 29 % at 7; WER of the other words 30.8, 31.0, 31.0, 31.5 %.
BONUS = 6.0


class HotwordError(ValueError):
    """A list of hotwords that cannot be used; one line."""


@dataclass
class Node:
    """A place in the tree. share: of the phrase's bonus that is earned here; value: of a phrase that ends
    here."""

    share: float = 0.0
    value: float | None = None
    children: dict[int, Node] = field(default_factory=dict)


class Progress(NamedTuple):
    """What a token sequence has earned. done: by phrases that are complete, of the best choice without
    overlaps; ending: the same, with a phrase that the last token ends, should its word end there;
    unfinished: places in the tree, each with what was done before its phrase; at_border: whether the last
    character ends a word."""

    done: float = 0.0
    ending: float = 0.0
    unfinished: tuple[tuple[Node, float], ...] = ()
    at_border: bool = True

    @property
    def begun(self) -> float:
        """Earned so far, the shares of unfinished phrases included: for unfinished sequences."""
        return max([self.ending, *(before + node.share for node, before in self.unfinished)])

    @property
    def whole(self) -> float:
        """Earned by a sequence that ends here."""
        return self.ending


class HotwordTree:
    """Prefix tree of spelt phrases. `spelt`: of each phrase its spellings, and the bonus of the whole
    phrase."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spelt: Sequence[tuple[Sequence[tuple], float]]):
        self._tokenizer, self.root = tokenizer, Node()
        self._borders: dict[int, tuple[bool, bool]] = {}
        self.highest = max((value for _, value in spelt), default=0.0)
        for spellings, value in spelt:
            for tokens in spellings:
                node = self.root
                for place, token in enumerate(tokens, 1):
                    node = node.children.setdefault(token, Node())
                    node.share = max(node.share, value * place / len(tokens))
                node.value = max(node.value or 0.0, value)

    def advance(self, progress: Progress, token: int) -> Progress:
        """Return the progress of a sequence with one more token."""
        begins, ends = self._borders_of(token)
        splits = begins or progress.at_border  # a word, or none, ends before this token
        done = progress.ending if splits else progress.done
        places = list(progress.unfinished) + ([(self.root, done)] if splits else [])
        unfinished = tuple(
            (child, before) for node, before in places if (child := node.children.get(token)) is not None
        )
        ended = [before + node.value for node, before in unfinished if node.value is not None]
        return Progress(done, max([done, *ended]), unfinished, ends)

    def followers(self, progress: Progress) -> tuple[set[int], set[int]]:
        """Return the tokens that continue unfinished phrases, and those that begin one."""
        going = {token for node, _ in progress.unfinished for token in node.children}
        return going, set(self.root.children)

    def _borders_of(self, token: int) -> tuple[bool, bool]:
        """Whether a token begins apart from the word before it, and whether its end is the end of a word."""
        if token not in self._borders:
            piece = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            # Tokenizers of SentencePiece's kind drop a leading space when they decode a token by itself.
            name = self._tokenizer.convert_ids_to_tokens(token) or ""
            spaced = name[:1] in ("\u2581", "\u0120")
            self._borders[token] = (
                spaced or not piece or not _in_word(piece[0]),
                not piece or not _in_word(piece[-1]),
            )
        return self._borders[token]


def _in_word(character: str) -> bool:
    """Whether a character belongs to the same word as a letter beside it."""
    if writes_no_spaces(character):
        return False
    return character.isalnum() or character in "\ufffd_"  # \ufffd: bytes of a character that is not complete


class Hotwords:
    """Phrases of a request, ready for searches with one tokenizer. Errors: HotwordError."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        phrases: Sequence[str],
        ctc_text: str = "lower",
        bonus: float = BONUS,
        margin: float = MARGIN,
    ):
        self.tokenizer, self.bonus, self.margin = tokenizer, bonus, margin
        if isinstance(phrases, str):
            raise HotwordError(f"hotwords is the text '{phrases[:40]}': give a list of words or phrases")
        self.phrases: list[str] = []
        self._targets: list[list[int]] = []
        for phrase in dict.fromkeys(" ".join(str(phrase).split()) for phrase in phrases):
            if targets := ctc_target_ids(tokenizer, phrase, ctc_text) if phrase else []:
                self.phrases.append(phrase)
                self._targets.append(targets)
        self._spellings: dict[int, list[tuple[int, ...]]] = {}

    def spot(self, log_probs: np.ndarray, blank: int) -> list[int]:
        """Return the numbers of the phrases that an utterance may hold, likeliest first, at most
        MOST_SPOTTED. log_probs: [T, V] of the CTC head."""
        behind = -spotting_scores(log_probs, self._targets, blank)
        near = np.flatnonzero(behind <= self.margin)
        return near[np.argsort(behind[near], kind="stable")][:MOST_SPOTTED].tolist()

    def tree(self, numbers: Sequence[int]) -> HotwordTree:
        """Return the prefix tree of some of the phrases. A phrase's bonus is that of its shortest
        spelling."""
        spelt = []
        for number in numbers:
            spellings = self._spellings.setdefault(number, spellings_of(self.tokenizer, self.phrases[number]))
            spelt.append((spellings, self.bonus * min(map(len, spellings))))
        return HotwordTree(self.tokenizer, spelt)

    def tree_for(self, log_probs: np.ndarray, blank: int) -> HotwordTree | None:
        """Return the tree of the phrases that the CTC head spots; None where it spots none."""
        spotted = self.spot(log_probs, blank)
        return self.tree(spotted) if spotted else None


def spellings_of(tokenizer: PreTrainedTokenizerBase, phrase: str) -> list[tuple[int, ...]]:
    """Return the token sequences by which an LLM may write a phrase."""
    cased = dict.fromkeys(
        [phrase, phrase.lower(), phrase[:1].upper() + phrase[1:], phrase.title(), phrase.upper()]
    )
    return list(
        dict.fromkeys(
            tuple(ids)
            for text in cased
            for ids in (text_ids(tokenizer, " " + text), text_ids(tokenizer, text))
            if ids
        )
    )


def spotting_scores(log_probs: np.ndarray, targets: Sequence[Sequence[int]], blank: int) -> np.ndarray:
    """Return of each token sequence the log-probability of its best path through any stretch of the
    frames, less that of the likeliest tokens of the same frames, for each token of it: 0 where the CTC
    head writes it itself.

    log_probs [T, V] -> [N]
    """
    if not targets:
        return np.zeros(0)
    sizes = np.array([len(tokens) for tokens in targets])
    ids = np.zeros((len(targets), sizes.max()), dtype=np.int64)
    for row, tokens in enumerate(targets):
        ids[row, : len(tokens)] = tokens
    behind = log_probs - log_probs.max(axis=1, keepdims=True)
    spoken = np.full(ids.shape, -np.inf)  # of the best path that ends in token u
    silent = np.full(ids.shape, -np.inf)  # and in the blanks behind it
    best = np.full(len(targets), -np.inf)
    differs = np.ones(ids.shape, dtype=bool)
    differs[:, 1:] = ids[:, 1:] != ids[:, :-1]
    last = (np.arange(len(targets)), sizes - 1)
    for frame in behind:
        entering = np.zeros(ids.shape)
        entering[:, 1:] = np.maximum(silent[:, :-1], np.where(differs[:, 1:], spoken[:, :-1], -np.inf))
        extended = np.maximum(spoken, entering) + frame[ids]
        silent = np.maximum(silent, spoken) + frame[blank]
        spoken = extended
        best = np.maximum(best, spoken[last])
    return best / sizes
