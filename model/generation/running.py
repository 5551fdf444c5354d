"""Answers of the LLM in the making: rows join a batch and leave it between two forward passes.

A pass checks each row's draft (model/generation/drafted.py); a row without a draft gets one token. Rows of
unequal length and rows that join later share one cache, with a mask of the positions that count
(`MaskedCache`). A row leaves as soon as it ends and costs the others nothing more (continuous batching; Yu et
al., 2022, "Orca").
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicSlidingWindowLayer

from model.generation.drafted import Draft, Passes
from model.language_model import LLM, base_of, embed

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

Choice = Callable[[torch.Tensor], int]
NO_IDS = cast(torch.LongTensor, torch.zeros(1, 0, dtype=torch.long))


class MaskedCache:
    """The LLM's cache and which of its positions count, row by row: mask [R, C]."""

    def __init__(self, llm: LLM, mask: torch.Tensor):
        config = base_of(llm).config.get_text_config(decoder=True)
        self.cache, self.mask = DynamicCache(config=config), mask[:, :0]
        layers = self.cache.layers
        windows = [layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
        self.limit = min(windows) if windows else None

    def keep(self, valid: torch.Tensor) -> None:
        """valid [R, N]: of the positions that the last pass added, those that count. Trailing positions that
        count in no row are cut off."""
        self.mask = torch.cat([self.mask, valid], dim=1)
        counted = self.mask.any(dim=0).nonzero()
        width = int(counted[-1]) + 1 if len(counted) else 0
        self.cache.crop(width - self.mask.shape[1])
        self.mask = self.mask[:, :width]

    def select(self, rows: list[int]) -> None:
        """Drop the other rows."""
        if len(rows) < len(self.mask):
            chosen = torch.tensor(rows, device=self.mask.device)
            self.cache.batch_select_indices(chosen)
            self.mask = self.mask[chosen]
            self.keep(self.mask[:, :0])

    def make_room(self, added: int, always: bool = False) -> None:
        """Close the gaps between positions that count, where they are many, a window has no room for `added`
        more, or always."""
        width, needed = self.mask.shape[1], int(self.mask.sum(1).max())
        full = self.limit is not None and width + added >= self.limit
        if width == needed or not (always or full or width > 1.5 * needed + 32):
            return
        # Stable: the positions that count move to the end, in their order.
        order = self.mask.to(torch.int8).argsort(dim=1, stable=True)[:, width - needed :]
        for layer in self.cache.layers:
            if not getattr(layer, "is_initialized", False):
                continue
            for name in ("keys", "values"):
                states = getattr(layer, name)
                index = order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, index))
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = needed
        self.mask = self.mask.gather(1, order)

    def join(self, other: MaskedCache) -> None:
        """Append the rows of another cache; the shorter rows are padded in front with what does not count."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        merged = []
        for own, new in zip(self.cache.layers, other.cache.layers, strict=True):
            if not getattr(own, "is_initialized", False):  # shared with another layer
                continue
            for name in ("keys", "values"):
                parts = [_padded(getattr(layer, name), width, dim=2) for layer in (own, new)]
                merged.append((own, name, torch.cat(parts)))
        for layer, name, states in merged:  # all at once: a lack of memory leaves the cache as it was
            setattr(layer, name, states)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = width
        self.mask = torch.cat([_padded(mask, width, dim=1) for mask in (self.mask, other.mask)])


def _padded(states: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """`states`, with zeros in front along `dim`, which has `width` entries then."""
    shape = list(states.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([states.new_zeros(shape), states], dim=dim) if shape[dim] else states


@dataclass(frozen=True)
class Limits:
    """stop: ids that end an answer; least, most: tokens of an answer."""

    stop: list[int]
    least: int
    most: int


def sampler(temperature: float, top_p: float) -> Choice:
    """Return a function that draws a token from logits [V] by torch's generator: the likeliest tokens of
    `top_p` probability together, at this temperature."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))

    def draw(logits: torch.Tensor) -> int:
        scores = warpers(NO_IDS, cast(torch.FloatTensor, logits[None]))
        return int(torch.multinomial(scores.softmax(dim=-1), 1))

    return draw


@dataclass(eq=False)
class Row:
    """One answer in the making.

    choose: draws its tokens from logits [V]; None: the likeliest ones. A row that draws has no draft. passes:
    those in which it took part; drafted, accepted: draft tokens.
    """

    limits: Limits
    draft: Draft | None = None
    choose: Choice | None = None
    answer: list[int] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    ended: bool = False
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def propose(self) -> None:
        if self.draft is not None:
            self.proposed = self.draft.proposal(self.answer, self.limits.most - len(self.answer) - 1)

    def take(self, choices: list[int], agreed: list[bool]) -> int:
        """Append the draft tokens that are accepted and the LLM's own token after them; return how many were
        accepted. choices: the LLM's token in place of each proposed one, and after the last."""
        accepted = 0
        self.passes += 1
        self.drafted += len(self.proposed)
        for token, right in zip(self.proposed, agreed, strict=False):
            if not right:
                break
            self.answer.append(token)
            accepted += 1
            if token in self.limits.stop:
                break
        self.accepted += accepted
        if not (accepted and self.answer[-1] in self.limits.stop):
            self.answer.append(choices[accepted])
            self.ended = self.answer[-1] in self.limits.stop or len(self.answer) >= self.limits.most
            if not self.ended and self.draft is not None:
                self.draft.advance(self.proposed, accepted, choices)
        else:
            self.ended = True
        if self.ended and self.draft is not None:
            self.draft.spelling.learn_end(self.answer)
        return accepted


class RunningBatch:
    """The rows that the LLM is answering. A caller ends a row early by setting its `ended`."""

    def __init__(self, llm: LLM, audio_id: int, minimum_ratio: float = 1.0):
        """minimum_ratio: of `Drafting`."""
        self.llm, self.audio_id, self.minimum_ratio = llm, audio_id, minimum_ratio
        self.rows: list[Row] = []
        self.passes = 0
        self._cache: MaskedCache | None = None

    def join(self, rows: list[Row], embeddings: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        """Add rows by a pass over their prompts and drafts; return the tokens that each has after it.

        embeddings [R, L, D] of the prompts, left-padded, mask [R, L].
        """
        cache = MaskedCache(self.llm, mask.bool())
        written = self._pass(cache, rows, embeddings, mask)
        self._leave()
        if self._cache is None:
            self._cache = cache
        else:
            for one in (self._cache, cache):
                one.make_room(0, always=True)
            self._cache.join(cache)
        self.rows = [*self.rows, *rows]
        return written

    def step(self) -> list[list[int]]:
        """Run a pass over the rows that have not ended, which are `rows` from now on; return the tokens that
        it added to each. Without rows nothing is run."""
        self._leave()
        if not self.rows or self._cache is None:
            return []
        return self._pass(self._cache, self.rows)

    def _leave(self) -> None:
        """Drop the rows that have ended."""
        going = [place for place, row in enumerate(self.rows) if not row.ended]
        if self._cache is not None and going:
            self._cache.select(going)
        self.rows = [self.rows[place] for place in going]
        if not self.rows:
            self._cache = None

    def _pass(
        self,
        cache: MaskedCache,
        rows: list[Row],
        embeddings: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[list[int]]:
        """One pass over the proposed tokens, after the prompts or after each row's last token."""
        for row in rows:
            row.propose()
        logits, first = self._logits(cache, rows, embeddings, mask)
        choices, agreed = _choose(logits, rows, self.minimum_ratio)
        self.passes += 1
        before = [len(row.answer) for row in rows]
        accepted = [row.take(own, right) for row, own, right in zip(rows, choices, agreed, strict=True)]
        count = torch.tensor(accepted, device=first.device)[:, None]
        added = torch.arange(logits.shape[1] - 1, device=first.device) < count
        cache.keep(torch.cat([first, added], dim=1))
        return [row.answer[start:] for row, start in zip(rows, before, strict=True)]

    def _logits(
        self,
        cache: MaskedCache,
        rows: list[Row],
        embeddings: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The LLM's logits [R, 1 + longest proposal, V] before and at each proposed token, and which of the
        positions in front of the proposed tokens count [R, N]."""
        device, longest = cache.mask.device, max(len(row.proposed) for row in rows)
        drafted = torch.tensor(
            [row.proposed + [0] * (longest - len(row.proposed)) for row in rows],
            dtype=torch.long,
            device=device,
        ).reshape(len(rows), longest)
        lengths = torch.tensor([len(row.proposed) for row in rows], device=device)
        is_proposed = torch.arange(longest, device=device) < lengths[:, None]
        if embeddings is not None and mask is not None:
            first = mask.bool()
            drafted_embeddings = embed(self.llm, drafted, self.audio_id).to(embeddings.dtype)
            inputs: dict[str, Any] = {"inputs_embeds": torch.cat([embeddings, drafted_embeddings], dim=1)}
        else:
            last = torch.tensor([row.answer[-1:] for row in rows], device=device)
            first = torch.ones_like(last, dtype=torch.bool)
            inputs = {"input_ids": torch.cat([last, drafted], dim=1)}
            cache.make_room(1 + longest)
        seen = torch.cat([cache.mask, first, is_proposed], dim=1).long()
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, cache.mask.shape[1] :]
        if "logits_to_keep" in inspect.signature(base_of(self.llm).forward).parameters:
            inputs["logits_to_keep"] = 1 + longest
        output = self.llm(
            **inputs, attention_mask=seen, position_ids=positions, past_key_values=cache.cache, use_cache=True
        )
        return output.logits[:, -(1 + longest) :].float(), first


def _choose(
    logits: torch.Tensor, rows: list[Row], minimum_ratio: float
) -> tuple[list[list[int]], list[list[bool]]]:
    """The LLM's token at each position [R, 1 + K], and whether each proposed token is accepted [R, K]."""
    for place, row in enumerate(rows):
        early = row.limits.least - len(row.answer)
        if early > 0:
            logits[place, :early, row.limits.stop] = -torch.inf
    choices = logits.argmax(dim=-1).tolist()
    for place, row in enumerate(rows):
        if row.choose is not None:
            choices[place][0] = row.choose(logits[place, 0])
    agreed = [
        [token == choice for token, choice in zip(row.proposed, chosen, strict=False)]
        for row, chosen in zip(rows, choices, strict=True)
    ]
    if minimum_ratio < 1:
        best, limit = logits.max(dim=-1).values, math.log(minimum_ratio)
        for place, row in enumerate(rows):
            for step, token in enumerate(row.proposed):
                near = logits[place, step, token] - best[place, step] >= limit
                agreed[place][step] |= token not in row.limits.stop and bool(near)
    return choices, agreed


@torch.no_grad()
def decode(
    llm: LLM,
    audio_id: int,
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    drafts: list[Draft],
    limits: Limits,
    minimum_ratio: float = 1.0,
    streamer: BaseStreamer | None = None,
) -> tuple[list[list[int]], Passes]:
    """embeddings [B, L, D] of prompts, left-padded, mask [B, L], one draft for each -> answers, the end of
    turn included where there is one, and what they took. streamer: for one row."""
    rows = [Row(limits, draft) for draft in drafts]
    batch = RunningBatch(llm, audio_id, minimum_ratio)
    if streamer is not None:
        streamer.put(torch.zeros(1, 0, dtype=torch.long))  # the prompt, which has no ids
    written = batch.join(rows, embeddings, mask)
    while written:
        if streamer is not None:
            streamer.put(torch.tensor(written[0]))
        written = batch.step()
    if streamer is not None:
        streamer.end()
    passes = Passes(
        passes=batch.passes,
        row_passes=[row.passes for row in rows],
        tokens=[len(row.answer) for row in rows],
        drafted=sum(row.drafted for row in rows),
        accepted=sum(row.accepted for row in rows),
    )
    return [row.answer for row in rows], passes
