"""From a global batch to ranks and micro-batches.

    sort by length -> cut into m rounds of world_size groups -> one group of every round to each rank

Every rank gets the same number m of micro-batches, the smallest for which all groups fit their budgets. All
groups of a round hold utterances of about the same length and have about the same padded cost, because under
ZeRO-3 ranks meet in every micro-batch. The last round holds the shortest utterances and is cut to measure:
each rank gets as much of it as it lacks to the mean, so what earlier rounds left uneven is evened out. Where
one round is enough, its costliest group is as cheap as it can be.

A pure function of the sizes: every rank computes the whole assignment and takes its part, nothing is
communicated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recipe.config import DataConfig


@dataclass(frozen=True)
class Budgets:
    """What one micro-batch may hold, padding included. An utterance beyond them makes a micro-batch of its
    own."""

    seconds: float  # audio: utterances with audio x the longest
    tokens: float  # LLM positions: rows x the longest

    @classmethod
    def of(cls, data: DataConfig) -> Budgets:
        return cls(data.micro_batch_seconds, data.micro_batch_tokens)


def padded_cost(seconds: np.ndarray, positions: np.ndarray, budgets: Budgets) -> float:
    """Cost of one micro-batch: padded audio plus padded LLM positions, each as a share of its budget."""
    if len(seconds) == 0:
        return 0.0
    return (
        np.count_nonzero(seconds) * float(seconds.max()) / budgets.seconds
        + len(positions) * float(positions.max()) / budgets.tokens
    )


def padding_share(seconds: np.ndarray, groups: list[np.ndarray]) -> float:
    """Share of the padded audio of micro-batches that is padding. groups: positions into `seconds` [N]."""
    padded = sum(np.count_nonzero(seconds[g]) * float(seconds[g].max()) for g in groups if len(g))
    return 1 - sum(float(seconds[g].sum()) for g in groups) / padded if padded else 0.0


def _expected(audio: np.ndarray, text: np.ndarray, groups: int) -> np.ndarray:
    """Cost of each utterance inside its group, padding included, if the sorted utterances are cut into equal
    groups. [N]"""
    cost = audio + text
    for _ in range(3):  # padding moves the cuts, the cuts move the padding: settled after two rounds
        before = np.cumsum(cost) - cost
        group = np.minimum((before * (groups / max(cost.sum(), 1e-12))).astype(np.int64), groups - 1)
        first = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
        sizes = np.diff(np.r_[first, len(cost)])
        cost = np.repeat(audio[first], sizes) * (audio > 0) + np.repeat(
            np.maximum.reduceat(text, first), sizes
        )
    return cost


def _costs(audio: np.ndarray, text: np.ndarray, start: int, bound: float) -> np.ndarray:
    """Costs of the groups that begin at `start` and hold 1, 2, ... utterances: those within the budgets, up
    to about `bound`."""
    longest = float(audio[start])
    per_row = max(longest, float(text[start]) / 4, 1e-9)  # rows with fewer LLM positions may follow
    ahead = min(len(audio), start + int(min(bound / per_row, len(audio))) + 2)
    rows = np.arange(1, ahead - start + 1)
    padded_audio = np.minimum(rows, np.count_nonzero(audio[start:ahead])) * longest
    padded_text = rows * np.maximum.accumulate(text[start:ahead])
    fits = int(
        np.count_nonzero((padded_audio <= 1 + 1e-9) & (padded_text <= 1 + 1e-9))
    )  # a prefix: both grow with the rows
    return (padded_audio + padded_text)[: max(fits, 1)]


def _cut_once(audio: np.ndarray, text: np.ndarray, ranks: int) -> list[list[tuple[int, int]]] | None:
    """One group a rank, the costliest as cheap as can be, or None where the budgets need more rounds.
    Arguments as of _cut.

    Under a cap, taking as many of the longest as fit, again and again, needs the fewest groups: the smallest
    cap for which they are no more than the ranks is found by bisection. What is left uneven is one
    utterance's share of its group.
    """

    def groups(cap: float) -> list[tuple[int, int]] | None:
        ranges: list[tuple[int, int]] = []
        start = 0
        while start < len(audio):
            if len(ranges) == ranks:
                return None
            rows = int(np.searchsorted(_costs(audio, text, start, cap), cap + 1e-9, side="right"))
            ranges.append((start, start + max(rows, 1)))
            start = ranges[-1][1]
        return ranges

    cost = audio + text
    low, high = max(float(cost.sum()) / ranks, float(cost.max())), max(2.0, float(cost.max()))
    best = groups(min(1.1 * low, high))
    if best is not None:
        high = min(1.1 * low, high)
    else:
        low, best = min(1.1 * low, high), groups(high)
    while best is not None and high - low > 2e-3 * high:
        middle = (low + high) / 2
        if (ranges := groups(middle)) is None:
            low = middle
        else:
            best, high = ranges, middle
    return (
        None
        if best is None
        else [[group] for group in best + [(len(audio), len(audio))] * (ranks - len(best))]
    )


def _cut(audio: np.ndarray, text: np.ndarray, ranks: int, rounds: int) -> list[list[tuple[int, int]]] | None:
    """Groups (start, stop) of each rank, one a round, or None where the budgets need more rounds.

    audio, text [N]: seconds and LLM positions as shares of their budgets, audio falling.
    """
    expected = _expected(audio, text, ranks * rounds)
    remaining = np.r_[np.cumsum(expected[::-1])[::-1], 0.0]
    bound = 3 * remaining[0] / (ranks * rounds) + 1
    groups: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    start, n = 0, len(audio)
    for turn in range(rounds - 1):
        for served, rank in enumerate(np.argsort(load, kind="stable")):
            stop, cost = start, 0.0
            if start < n:
                costs = _costs(audio, text, start, bound)
                target = remaining[start] / (ranks * (rounds - turn) - served)
                best = int(np.argmin(np.abs(costs - target)))
                stop, cost = start + best + 1, float(costs[best])
            groups[rank].append((start, stop))
            load[rank] += cost
            start = stop
    # The last round: whichever rank lacks what the next group can hold takes it.
    waiting = np.argsort(load, kind="stable")
    loads = load[waiting]  # rising
    waiting_load = float(loads.sum())
    for left in range(ranks, 0, -1):
        if start >= n:
            place, stop = 0, n
        else:
            costs = _costs(audio, text, start, bound if left > 1 else np.inf)
            if left == 1:
                place, stop = 0, start + len(costs)
            else:
                lacks = (waiting_load + remaining[start]) / left - loads[:left]  # falling
                places = np.clip(left - np.searchsorted(lacks[::-1], costs), 0, left - 1)
                nearer = np.maximum(places - 1, 0)
                places = np.where(
                    np.abs(lacks[nearer] - costs) < np.abs(lacks[places] - costs), nearer, places
                )
                best = int(np.argmin(np.abs(lacks[places] - costs)))
                place, stop = int(places[best]), start + best + 1
        groups[waiting[place]].append((start, stop))
        waiting_load -= loads[place]
        loads[place : left - 1] = loads[place + 1 : left].copy()
        waiting[place : left - 1] = waiting[place + 1 : left].copy()
        start = stop
    return groups if start >= n else None


def assign(
    seconds: np.ndarray, positions: np.ndarray, world_size: int, budgets: Budgets
) -> list[list[np.ndarray]]:
    """[rank][micro-batch] -> positions into the global batch; each position once, equally many micro-batches
    on every rank.

    seconds [N] of audio (0: text only), positions [N] of the LLM (0: not used). Where there are fewer
    utterances than micro-batches, some are empty.
    """
    order = np.lexsort((-positions.astype(np.int64), -seconds.astype(np.float64)))
    audio, text = seconds[order] / budgets.seconds, positions[order] / budgets.tokens
    full = max(np.minimum(audio, 1).sum(), np.minimum(text, 1).sum())
    rounds = max(1, int(np.ceil(full / world_size - 1e-9)))
    while (
        groups := _cut(audio, text, world_size, rounds) if rounds > 1 else _cut_once(audio, text, world_size)
    ) is None:
        rounds += 1
    return [[order[start:stop] for start, stop in rank] for rank in groups]
