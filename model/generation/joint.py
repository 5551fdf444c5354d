"""Joint decoding: a beam search over the LLM's answers in which the CTC head has a say.

    score(y) = log p_LLM(y | audio, prompt) + weight * log p_CTC(text of y | audio) + token_bonus * tokens in
    the text of y

The CTC head is trained over the LLM's own vocabulary, so every answer can be asked back to the frames: words
that are fluent and were not said cost CTC probability, and so does an end of turn in front of words that were
said. During the search the CTC term is the prefix score of hybrid CTC/attention decoding (Watanabe et al.,
2017, "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition"). One thing is new: the LLM writes
"I'm, na" where CTC was taught " i'm name" (`data.ctc_text`), so the text, not the token, is scored, and its
end means all tokens that begin with it (" na": " name", " nature" ...).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from core.ctc_text import ctc_target_ids
from model.generation.hotwords import Hotwords, HotwordTree, Progress

Tokens = tuple[int, ...]
IMPOSSIBLE = (
    -1e4
)  # log-probability of what no path can spell; finite, so that differences of two such are numbers


@dataclass(frozen=True)
class JointSearch:
    """How to search. weight: of CTC's log-probability beside the LLM's. beams: hypotheses kept. candidates:
    next tokens of each that CTC judges, the LLM's likeliest. token_bonus: added for each token of the text (a
    sum of log-probabilities likes short answers). ctc_text: the normalisation of CTC's targets, as in the
    recipe. hotwords: phrases to favour (model/generation/hotwords.py)."""

    weight: float = 0.7
    beams: int = 4
    candidates: int = 8
    token_bonus: float = 2.0
    ctc_text: str = "lower"
    hotwords: Hotwords | None = None

    def __post_init__(self) -> None:
        for name in ("beams", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the joint search is {getattr(self, name)}: give at least 1")


class CTCPrefixScores:
    """Log-probabilities of token sequences under CTC, of one utterance; prefixes once computed are kept.

    log_probs: [T, V] per frame, with the blank's in column `blank`.
    """

    def __init__(self, log_probs: np.ndarray, blank: int):
        self.log_probs, self.blank = log_probs, blank
        silent = np.cumsum(log_probs[:, blank], dtype=np.float64)
        # prefix -> [T] log-probability of frames 0..t spelling it, ending in its last token, and ending in a
        # blank
        self._paths: dict[Tokens, tuple[np.ndarray, np.ndarray]] = {
            (): (np.full_like(silent, -np.inf), silent)
        }
        self._begun: dict[tuple[Tokens, str], float] = {}
        self._masses: dict[tuple[str, int | None], np.ndarray] = {}
        best = log_probs.argmax(axis=1)
        self.spoken = int(
            ((best != blank) & (best != np.concatenate([[blank], best[:-1]]))).sum()
        )  # tokens of the greedy text

    def whole(self, tokens: Tokens) -> float:
        """Of exactly these tokens."""
        spoken, silent = self._paths_of(tokens)
        return max(float(np.logaddexp(spoken[-1], silent[-1])), IMPOSSIBLE)

    def begun(self, prefix: Tokens, last: np.ndarray, name: str) -> float:
        """Log-probability of the prefix plus any token of `last`; `name`: cache key."""
        if (prefix, name) not in self._begun:
            again = prefix[-1] if prefix and prefix[-1] in last else None
            ways = self._entries(prefix) + self._mass(last, name, again)
            if again is not None:
                ways = np.logaddexp(ways, self._entries(prefix, again) + self.log_probs[:, again])
            self._begun[prefix, name] = max(float(np.logaddexp.reduce(ways)), IMPOSSIBLE)
        return self._begun[prefix, name]

    def _mass(self, tokens: np.ndarray, name: str, without: int | None) -> np.ndarray:
        """[T] log-probability that a frame says any of the tokens but one."""
        if (name, without) not in self._masses:
            columns = self.log_probs[:, tokens[tokens != (-1 if without is None else without)]]
            top = columns.max(axis=1, initial=IMPOSSIBLE)
            with np.errstate(divide="ignore"):  # no token is left: log 0
                self._masses[name, without] = top + np.log(np.exp(columns - top[:, None]).sum(axis=1))
        return self._masses[name, without]

    def _entries(self, prefix: Tokens, following: int | None = None) -> np.ndarray:
        """[T] log-probability that frames 0..t-1 spell the prefix, such that a token may begin at t: after a
        blank alone where the token repeats the prefix's last one (`following`)."""
        spoken, silent = self._paths_of(prefix)
        done = silent if prefix and following == prefix[-1] else np.logaddexp(spoken, silent)
        return np.concatenate([[-np.inf if prefix else 0.0], done[:-1]])

    def _paths_of(self, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
        if tokens not in self._paths:
            spoken = _accumulate(self._entries(tokens[:-1], tokens[-1]), self.log_probs[:, tokens[-1]])
            silent = _accumulate(np.concatenate([[-np.inf], spoken[:-1]]), self.log_probs[:, self.blank])
            self._paths[tokens] = (spoken, silent)
        return self._paths[tokens]


def _accumulate(entering: np.ndarray, step: np.ndarray) -> np.ndarray:
    """x[t] = log(exp(x[t - 1]) + exp(entering[t])) + step[t] from x[-1] = -inf, without a loop over t."""
    steps = np.cumsum(step, dtype=np.float64)
    return steps + np.logaddexp.accumulate(entering - (steps - step))


class JointScores(LogitsProcessor):
    """For transformers' beam search: adds to each candidate what its text costs CTC beyond the hypothesis
    it continues. Over a finished answer these sum up to weight * log p_CTC(its whole text), plus the
    bonus, and the bonus of its hotwords. The best finished answer is kept here (`best`): an end of turn
    pays at once for all that it leaves unsaid, so it is rarely among a step's best candidates, where
    transformers would take note of it. When no hypothesis is within reach of it any more, the search
    ends.

    ctc: of each conversation, None where there is not exactly one audio (the LLM searches alone there); stop:
    ids that end a turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ctc: list[CTCPrefixScores | None],
        search: JointSearch,
        stop: list[int],
        max_new_tokens: int,
    ):
        self.tokenizer, self.ctc, self.search = tokenizer, ctc, search
        self.stop, self.max_new_tokens = stop, max_new_tokens
        # Of each conversation: (score, answer) of the best that has ended; the scores of the
        # unfinished ones.
        self.best: list[tuple[float, list[int]]] = [(-np.inf, []) for _ in ctc]
        self._totals: list[dict[Tokens, float]] = [{(): 0.0} for _ in ctc]
        added = set(tokenizer.added_tokens_decoder)  # special ones among them: never CTC targets
        vocabulary = sorted((name, i) for name, i in tokenizer.get_vocab().items() if i not in added)
        self._names, self._ids = [name for name, _ in vocabulary], np.array([i for _, i in vocabulary])
        self._texts: dict[Tokens, Tokens] = {}
        self.trees: list[HotwordTree | None] = [
            None
            if one is None or search.hotwords is None
            else search.hotwords.tree_for(one.log_probs, one.blank)
            for one in ctc
        ]
        self._progress: list[dict[Tokens, Progress]] = [{(): Progress()} for _ in ctc]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [N, L]: answers so far, the beams of a conversation side by side; scores [N, V]: the
        LLM's log-probabilities -> [N, V], -inf but for the candidates."""
        judged = scores.clone()
        candidates = scores.topk(min(self.search.candidates, scores.shape[1])).indices.tolist()
        answers = [tuple(answer) for answer in input_ids.tolist()]
        for conversation, ctc in enumerate(self.ctc):
            own = range(conversation * self.search.beams, (conversation + 1) * self.search.beams)
            totals = self._totals[conversation]
            rows = [row for row in own if answers[row] in totals]  # an answer that has ended is not
            if ctc is None or not rows:
                continue
            judged[rows] = -torch.inf
            if (
                max(self.within_reach(conversation, ctc, answers[row]) for row in rows)
                <= self.best[conversation][0]
            ):
                judged[rows, self.stop[0]] = 0.0
                continue
            for row in rows:
                tokens = sorted(
                    {
                        *candidates[row],
                        *self.stop,
                        *self.hotword_tokens(conversation, answers[row], scores[row]),
                    }
                )
                values = scores[row, tokens].tolist()
                scores_of_tokens = self.judge(conversation, ctc, answers[row], tokens, values)
                judged[row, tokens] = torch.tensor(scores_of_tokens).to(scores)
        return judged

    def within_reach(self, conversation: int, ctc: CTCPrefixScores, answer: Tokens) -> float:
        """What an answer may come to: its score, and the bonus of as many tokens as CTC's greedy text is
        longer."""
        unsaid = max(0, ctc.spoken - len(self.text_tokens(answer)))
        bonus = self.search.token_bonus
        if self.trees[conversation] is not None and self.search.hotwords is not None:
            bonus += self.search.hotwords.bonus
        return self._totals[conversation][answer] + bonus * unsaid

    def hotword_tokens(self, conversation: int, answer: Tokens, values: torch.Tensor) -> list[int]:
        """Return the tokens that continue a hotword of an answer, and the likeliest that begin one.
        values [V]: the LLM's log-probabilities."""
        if (tree := self.trees[conversation]) is None:
            return []
        going, first = tree.followers(self.progress(conversation, tree, answer))
        begin = sorted(first, key=lambda token: -values[token].item())[: self.search.candidates]
        return [*going, *begin]

    def progress(self, conversation: int, tree: HotwordTree, answer: Tokens) -> Progress:
        """Return what an answer has earned by the hotwords of its conversation's tree."""
        known = self._progress[conversation]
        if answer not in known:
            known[answer] = tree.advance(self.progress(conversation, tree, answer[:-1]), answer[-1])
        return known[answer]

    def judge(
        self, conversation: int, ctc: CTCPrefixScores, answer: Tokens, tokens: list[int], values: list[float]
    ) -> list[float]:
        """The LLM's log-probabilities of an answer's next tokens -> those of the search."""
        totals, judged = self._totals[conversation], []
        so_far, total = self.text_tokens(answer), totals[answer]
        paid = self.begun(ctc, so_far)
        tree = self.trees[conversation]
        earned = 0.0 if tree is None else self.progress(conversation, tree, answer).begun
        # An answer that is cut pays for what it leaves unsaid, as one does that ends: else running on is the
        # cheaper way out.
        cut = len(answer) + 1 >= self.max_new_tokens
        for token, value in zip(tokens, values, strict=True):
            longer = answer if token in self.stop else (*answer, token)
            text = so_far if token in self.stop else self.text_tokens(longer)
            ended = cut or token in self.stop
            cost = (ctc.whole(text) if ended else self.begun(ctc, text)) - paid
            bonus = self.search.token_bonus * (len(text) - len(so_far))
            if tree is not None:
                progress = self.progress(conversation, tree, longer)
                bonus += (progress.whole if ended else progress.begun) - earned
            judged.append(value + self.search.weight * cost + bonus)
            if not ended:
                totals[longer] = total + judged[-1]
            elif total + judged[-1] > self.best[conversation][0]:
                self.best[conversation] = (total + judged[-1], list(longer))
        return judged

    def text_tokens(self, answer: Tokens) -> Tokens:
        """An answer's text as CTC would be taught it."""
        if answer not in self._texts:
            # At its end may be a character's first bytes.
            text = str(self.tokenizer.decode(list(answer), skip_special_tokens=True)).rstrip("\ufffd")
            self._texts[answer] = tuple(ctc_target_ids(self.tokenizer, text, self.search.ctc_text))
        return self._texts[answer]

    def begun(self, ctc: CTCPrefixScores, tokens: Tokens) -> float:
        """Of an unfinished text: its last token, or its last few, may be the beginning of one that is not
        there yet (" ", "na": " name"); the likeliest reading counts."""
        cost, name = IMPOSSIBLE if tokens else 0.0, ""
        for place in reversed(range(len(tokens))):
            name = str(self.tokenizer.convert_ids_to_tokens(tokens[place])) + name
            ids = self._ids[bisect_left(self._names, name) : bisect_left(self._names, name + chr(0x10FFFF))]
            if not len(ids):
                break
            cost = max(cost, ctc.begun(tokens[:place], ids, name))
        return cost
