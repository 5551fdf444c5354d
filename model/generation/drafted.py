"""Drafted decoding: greedy decoding in which the LLM checks a draft, several tokens in one forward pass.

The draft is the CTC head's greedy transcript, which is spelled in the LLM's own vocabulary. One pass over k
draft tokens gives the LLM's own choice after each token. The draft tokens that equal these choices are
accepted, and the first choice that differs is written in place of the draft's token. The answer is that of
greedy decoding, token by token; only the number of passes differs. (Rounding can decide between two tokens of
equal logits: matrix products of other shapes round otherwise.)

What makes the draft good (`Draft`):
- The prompt and the first draft are one pass.
- After a mismatch the draft continues at the place where its text, without case, spaces and punctuation,
  continues the answer. Punctuation, insertions, deletions, substitutions and other tokenisations are aligned.
- The LLM's choices after the mismatch edit the rest of the draft: they bring case and punctuation, which
  lower-case CTC targets lack, for the whole draft at once.
- Spellings that the LLM preferred in earlier answers are used for later drafts (`Spelling`).

Speculative decoding: Leviathan et al., 2023. CTC drafts for speech LLMs: Saon et al., 2026 (arXiv
2603.11243), who accept a prefix of the draft.
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from core.control_tokens import control_tokens, text_ids, token_id
from model.language_model import LLM, base_of
from model.rows import longest_row

SEARCH_BACK, SEARCH_AHEAD = 4, 10  # draft tokens around the expected place in which the answer is looked for
REPEATED = 3  # tokens by which a repetition in the answer is known
SHORT = 2  # letters of a text that is found by chance, farther away than SHORT tokens
SENTENCE_ENDS = frozenset(".!?…。！？")


@dataclass(frozen=True)
class Drafting:
    """How to draft.

    longest: draft tokens in one pass at most. minimum_ratio: a draft token is accepted if its probability is
    at least this share of the likeliest token's. At 1 it has to be the likeliest token, and answers are those
    of greedy decoding.
    """

    longest: int = 16
    minimum_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ValueError(f"the longest draft is {self.longest} tokens: give at least 1")
        if not 0 < self.minimum_ratio <= 1:
            raise ValueError(f"minimum_ratio of the draft is {self.minimum_ratio}: give a number in (0, 1]")


@dataclass
class Passes:
    """What a batch took. passes: forward passes of the LLM. row_passes: of each answer, those in which it
    took part. tokens: of each answer, the end of turn included. drafted, accepted: draft tokens."""

    passes: int = 0
    row_passes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0


class Spelling:
    """Texts of the tokens of one tokenizer, and how the LLM spells the draft's tokens.

    What it has learnt changes drafts, never answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: list[int], rows: int):
        """stop: ids that end an answer; rows: of the LLM's embedding table."""
        self.tokenizer, self.stop, self.rows = tokenizer, stop, rows
        self.special = set(control_tokens(tokenizer).ids) | set(tokenizer.all_special_ids) | set(stop)
        self._preferred: dict[int, Counter[int]] = defaultdict(Counter)
        self._endings: Counter[tuple[int, ...]] = Counter()
        self.letters = lru_cache(maxsize=None)(self._letters)
        self.begins_word = lru_cache(maxsize=None)(self._begins_word)
        self.is_mark = lru_cache(maxsize=None)(self._is_mark)
        self.capital = lru_cache(maxsize=None)(self._capital)

    def _letters(self, token: int) -> str:
        """A token's text without case, spaces and punctuation; of a part of a character, its name."""
        if token in self.special:
            return ""
        text = self.text(token)
        if "\ufffd" in text:
            return f"<{self.tokenizer.convert_ids_to_tokens(token)}>"
        return "".join(c for c in text.casefold() if c.isalnum())

    def _begins_word(self, token: int) -> bool:
        name = "" if token >= len(self.tokenizer) else self.tokenizer.convert_ids_to_tokens(token) or ""
        return name[:1] in ("Ġ", "▁", " ", "\n")

    def _is_mark(self, token: int) -> bool:
        """Whether a token is punctuation."""
        return not self.letters(token) and token not in self.special and bool(self.text(token).strip())

    def text(self, token: int) -> str:
        return str(self.tokenizer.decode([token])) if token < len(self.tokenizer) else ""

    def ends_sentence(self, token: int) -> bool:
        return token not in self.special and self.text(token).strip()[-1:] in SENTENCE_ENDS

    def _capital(self, token: int) -> int:
        """The same token with a capital, where the vocabulary has one."""
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        mark = name[:1] if self.begins_word(token) else ""
        word = name[len(mark) :]
        capital = token_id(self.tokenizer, mark + word[:1].upper() + word[1:])
        return token if capital is None else capital

    def spell(self, text: str) -> list[int]:
        """The tokens of a word's rest, or of a mark, without a space in front."""
        token = token_id(self.tokenizer, text)
        return text_ids(self.tokenizer, text) if token is None else [token]

    def learn(self, drafted: int, written: int) -> None:
        self._preferred[drafted][written] += 1

    def learn_end(self, answer: list[int]) -> None:
        """Remember with which punctuation an answer ended."""
        if len(answer) > 1 and answer[-1] in self.stop:
            self._endings[(answer[-2],) if self.is_mark(answer[-2]) else ()] += 1

    def ending(self) -> list[int]:
        return list(self._endings.most_common(1)[0][0]) if self._endings else self.spell(".")

    def preferred(self, token: int) -> int:
        known = self._preferred.get(token)
        return known.most_common(1)[0][0] if known else token

    def draft(self, ctc: list[int]) -> list[int]:
        """A CTC transcript as an answer would spell it: learnt spellings, a capital at the beginning, a full
        stop and the end of turn at the end."""
        tokens = [i for i in ctc if 0 <= i < min(self.rows, len(self.tokenizer)) and i not in self.special]
        if not tokens:
            return []
        first, rest = tokens[0], tokens[1:]
        begun = [first]
        if self.begins_word(first) and self.letters(first):  # an answer begins without the space
            word = self.text(self.capital(first)).strip()
            begun = text_ids(self.tokenizer, word)
        tokens = [*begun, *(self.preferred(i) for i in rest)]
        if self.letters(tokens[-1]):
            tokens += self.ending()
        return [*tokens, self.stop[0]]


class Draft:
    """What is left of a draft, aligned to the answer so far."""

    def __init__(self, spelling: Spelling, tokens: list[int], longest: int):
        self.spelling, self.longest = spelling, longest
        self.tokens, self.place = list(tokens), 0
        self.length = longest  # of the next proposal
        self.repeats = False  # the last proposal was a repetition
        self.misses = 0  # proposals in a row of which nothing was accepted
        self.hits = 0  # tokens in a row that the LLM wrote by itself and that the draft has

    def proposal(self, answer: list[int], limit: int) -> list[int]:
        """The next tokens of the draft, or of a repetition in the answer itself; `limit` at most."""
        self.repeats = self.misses > 0 or self.place >= len(self.tokens) - 1
        repeated = _repetition(answer, max(0, min(self.longest, limit))) if self.repeats else []
        self.repeats = bool(repeated)
        return repeated or self.tokens[self.place : self.place + max(0, min(self.length, limit))]

    def advance(self, proposed: list[int], accepted: int, choices: list[int]) -> None:
        """Follow a pass. choices: the LLM's token in place of each proposed one, and after the last."""
        if self.repeats:
            for token in choices[: accepted + 1]:
                self._follow(token)
            self.misses = 1 if accepted else 0  # a repetition that ends is no reason to look for the next one
            return
        for token in proposed[:accepted]:
            if self.spelling.letters(token):
                self.spelling.learn(token, token)
        # From the end on: what is inserted does not move the places before it.
        for ahead in range(len(proposed), accepted, -1):
            self._edit(self.place + ahead, choices[ahead])
        self.place += accepted
        self._follow(choices[accepted])
        self._adapt(proposed, accepted)

    def _adapt(self, proposed: list[int], accepted: int) -> None:
        """Double the length after a draft that was right, halve it after two of which nothing was."""
        if not proposed:
            return
        self.misses = 0 if accepted else self.misses + 1
        if accepted == len(proposed):
            self.length = min(self.longest, 2 * self.length)
        elif self.misses >= 2:
            self.length //= 2

    def _edit(self, place: int, choice: int) -> None:
        """Correct the draft at a place by what the LLM writes after the tokens in front of it."""
        letters = self.spelling.letters
        if place >= len(self.tokens):
            return
        token = self.tokens[place]
        if choice == token:
            return
        if letters(choice) and letters(choice) == letters(token):
            self.tokens[place] = choice
        elif not letters(choice) and choice not in self.spelling.special:
            if letters(token) or token in self.spelling.special:
                self.tokens.insert(place, choice)
            else:
                self.tokens[place] = choice

    def _follow(self, own: int) -> None:
        """Move to where the draft continues after the token that the LLM wrote by itself."""
        spelling, tokens = self.spelling, self.tokens
        letters = spelling.letters(own)
        if not letters:
            if spelling.is_mark(own) and self.place < len(tokens) and spelling.is_mark(tokens[self.place]):
                self.place += 1
            if spelling.ends_sentence(own) and self.place < len(tokens):
                self.tokens[self.place] = spelling.capital(tokens[self.place])
            return
        place = self._find(letters, own)
        self.hits = 0 if place is None else self.hits + 1
        if place is not None:
            self.place = place
            if self.hits >= 2:  # the answer is in the draft, again or at last
                self.length = max(2, self.length)
            return
        # Another word: it replaces the draft's word, or what is left of it.
        if not (self.place < len(tokens) and spelling.letters(tokens[self.place])):
            return
        if spelling.begins_word(own) or not spelling.begins_word(tokens[self.place]):
            self.place += 1
            while (
                self.place < len(tokens)
                and spelling.letters(tokens[self.place])
                and not spelling.begins_word(tokens[self.place])
            ):
                self.place += 1

    def _find(self, letters: str, own: int) -> int | None:
        """The place after these letters in the draft, nearest to where the draft stands; the token in which
        they end is cut."""
        spelling = self.spelling
        around = range(max(0, self.place - SEARCH_BACK), min(len(self.tokens), self.place + SEARCH_AHEAD))
        for start in sorted(around, key=lambda start: (abs(start - self.place), start < self.place)):
            distance = abs(start - self.place)
            if len(letters) <= SHORT and distance > SHORT:
                continue
            if distance and spelling.begins_word(own) != spelling.begins_word(self.tokens[start]):
                continue
            end = self._match(start, letters, own)
            if end is not None:
                return end
        return None

    def _match(self, start: int, letters: str, own: int) -> int | None:
        """The place after `letters`, if the draft's text from `start` on begins with them."""
        spelling, tokens = self.spelling, self.tokens
        left, place = letters, start
        while left and place < len(tokens):
            here = spelling.letters(tokens[place])
            if not here:
                if place == start or tokens[place] in spelling.special:
                    return None
                place += 1
            elif left.startswith(here):
                if here == letters:
                    spelling.learn(tokens[place], own)
                left, place = left[len(here) :], place + 1
            elif here.startswith(left):
                rest = here[len(left) :]
                tokens[place : place + 1] = spelling.spell(rest)
                return place
            else:
                return None
        return place if not left else None


def _repetition(answer: list[int], limit: int) -> list[int]:
    """What followed when the answer's last REPEATED tokens were written before, `limit` tokens at most."""
    last, size = answer[-REPEATED:], len(answer)
    for start in range(size - REPEATED - 1, -1, -1):
        if answer[start : start + REPEATED] == last:
            period = size - REPEATED - start
            follows = answer[start + REPEATED :]
            return (follows * (limit // period + 1))[:limit]
    return []


def refusal(llm: LLM, positions: int, longest: int) -> str | None:
    """Why this LLM's answers cannot be drafted: its cache cannot be cut and keep gaps; None where they can.

    positions: of the longest prompt and its answer; longest: draft tokens in one pass.
    """
    base = base_of(llm)
    config, name = base.config.get_text_config(decoder=True), base.config.model_type
    arguments = inspect.signature(base.forward).parameters
    if "position_ids" not in arguments or "past_key_values" not in arguments:
        return f"{name} takes no positions"
    if base._is_stateful or not cast(Any, base)._supports_default_dynamic_cache():
        return f"{name} keeps a state that cannot be cut"
    if getattr(config, "hidden_size_per_layer_input", None):
        return f"{name} needs token ids beside their embeddings"
    limit = longest_row(config)
    if limit is not None and positions + longest >= limit:
        return f"{name} changes its rotary frequencies at {limit} positions"
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            if positions + longest + 2 > layer.sliding_window:
                return (
                    f"{name} attends to {layer.sliding_window} positions at a time, and prompt, answer and "
                    "draft may have more"
                )
        elif type(layer) not in (DynamicLayer, DummyLayer):
            return f"{name} keeps a state that cannot be cut"
    return None
