"""Do the rows of a batch stay apart when they are joined to one row without padding? Tried once with the LLM
itself.

transformers keeps joined rows apart by their positions, which start at 0 again; but not in every model: a
state or a convolution runs on into the next row, a mask is built without the positions, positions are learned
and counted from the row's first token. There is no list here: the probe decides, with this model, its
attention implementation, type, device and kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from core.console import one_line
from model.language_model import LLM, Arranged, arrange, base_of, embed, token_keys_in_use
from model.pretrained import SourceError

LENGTHS = (24, 17, 9)  # of the rows that are tried; the second one is looked at
LONGEST_WINDOW = 512  # up to it the second one is longer than the LLM's attention window
WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window_size",
    "window_size",
)  # as configs name it
# Relative distances of hidden states that may be rounding, in float32 and in 16 bits. Measured, 16 bits:
# rounding changes a token of SmolLM2-135M by 0.05 at most, and one of random two-layer models by 0.013; rows
# that see each other, by 0.25 and more.
SAME = {True: 1e-3, False: 0.25}  # the row joined and the row alone: other products, other rounding
UNCHANGED = {True: 1e-4, False: 0.05}  # the joined row beside other rows: the same products
USABLE = {True: 1e-2, False: 0.5}  # the padded row and the row alone


def longest_row(config: PretrainedConfig) -> int | None:
    """Positions beyond which one row of a batch changes the rotary frequencies of all its rows; None: never.

    transformers chooses them by the longest row where rope_type is longrope or dynamic
    (`dynamic_rope_update`).
    """
    config = config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = [
        part.get("original_max_position_embeddings")
        if part["rope_type"] == "longrope"
        else config.max_position_embeddings
        for part in (parameters, *parameters.values())
        if isinstance(part, dict)
        and ("dynamic" in part.get("rope_type", "") or part.get("rope_type") == "longrope")
    ]
    return min((limit for limit in limits if limit is not None), default=None)


class Rows(NamedTuple):
    """What a row's hidden states differ by from those of the row alone: the largest |difference| / |value| of
    its tokens."""

    padded: float  # beside other rows, with padding
    joined: float  # between other rows, without
    others: float  # by which the joined row's change when only the other rows change
    kept_apart: bool

    def __str__(self) -> str:
        if self.kept_apart:
            return f"joined without padding where cheaper (they differ from rows alone by {self.joined:.0e} of their norm)"  # noqa: E501
        if self.others >= self.joined / 2:
            return f"padded: joined, each depends on the others (by {self.others:.0e} of its norm)"
        return f"padded: joined, they differ from rows alone by {self.joined:.0e} of their norm"


@torch.no_grad()
def probe(llm: LLM, audio_id: int) -> Rows:
    """Run the LLM four times on a few tokens: a row alone, padded beside two others, joined between them, and
    between others.

    Under ZeRO-3 all ranks call it together. The caller sets `llm.joins_rows`, alike on all ranks. Errors:
    SourceError for an LLM that does not take embeddings, draws random numbers, or computes a row otherwise
    where another one is beside it.
    """
    base = base_of(llm)
    name, config, device = (
        base.config.model_type,
        base.config.get_text_config(),
        next(base.parameters()).device,
    )
    window = min(
        (size for name in WINDOWS if isinstance(size := getattr(config, name, None), int) and size > 0),
        default=0,
    )
    lengths = list(LENGTHS)
    if window <= LONGEST_WINDOW:
        lengths[:2] = window + lengths[0], window + lengths[1]
    total, own = sum(lengths), slice(lengths[0], lengths[0] + lengths[1])
    ids = (torch.arange(2 * total, device=device) * 7919 + 11) % max(
        config.vocab_size - 2, 1
    )  # a prime: no short cycle
    tokens = embed(llm, ids[None], audio_id)[0]
    tokens, others = ((tokens + tokens.roll(1, 0)) / 2).split(
        total
    )  # between those of the table, as audio is
    others = torch.cat([others[: own.start], tokens[own], others[own.stop :]])
    mask = (torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]).long()
    keys = torch.arange(len(lengths), device=device)

    def rows_of(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.new_zeros(*mask.shape, tokens.shape[-1]).masked_scatter(mask.bool()[..., None], tokens)

    def states(
        rows: torch.Tensor, mask: torch.Tensor, keys: torch.Tensor, joined: bool = False
    ) -> torch.Tensor:
        return hidden_states(llm, arrange(rows, mask, torch.zeros_like(mask), keys, joined)).float()

    before = _random_states(device)
    try:
        alone = states(tokens[None, own], mask[1:2, : lengths[1]], keys[1:2])[0]
    except (SourceError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise SourceError(
            f"{name} does not run as the LLM, which is given embeddings in place of token ids "
            f"({one_line(error)}): choose another model.llm.name"
        ) from error
    if any(not torch.equal(one, two) for one, two in zip(before, _random_states(device), strict=True)):
        raise SourceError(
            f"{name} draws random numbers while it is trained: losses would depend on how a step is cut into "
            "micro-batches and ranks; choose another model.llm.name"
        )
    beside = states(rows_of(tokens), mask, keys)[1, : lengths[1]]
    exact, padded = tokens.dtype == torch.float32, _apart(beside, alone)
    if not padded <= USABLE[exact]:
        raise SourceError(
            f"{name} computes a row otherwise where other rows are beside it in a batch (by {padded:.0e} of "
            f"its "
            "norm): losses would depend on the batch; choose another model.llm.name"
        )
    try:
        between, between_others = (
            states(rows_of(rows), mask, keys, joined=True)[0, own] for rows in (tokens, others)
        )
    except TypeError:  # its forward takes no positions
        return Rows(padded, float("inf"), 0.0, False)
    joined, changed = _apart(between, alone), _apart(between_others, between)
    return Rows(padded, joined, changed, joined <= SAME[exact] and changed <= UNCHANGED[exact])


def hidden_states(llm: LLM, arranged: Arranged) -> torch.Tensor:
    """What the LLM gives to its output embeddings, for all positions; of the head itself one position is
    computed."""
    seen = []

    def take(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0][:1, :1],)

    handle = base_of(llm).get_output_embeddings().register_forward_pre_hook(take)
    try:
        with token_keys_in_use(llm, arranged.keys):
            llm(**arranged.arguments, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def _apart(one: torch.Tensor, two: torch.Tensor) -> float:
    """one, two [L, D] -> the largest relative distance of their vectors; infinite where there is a NaN."""
    distance = (one - two).norm(dim=-1) / two.norm(dim=-1).clamp(min=torch.finfo(two.dtype).tiny)
    return float(distance.nan_to_num(nan=float("inf")).max())


def _random_states(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
