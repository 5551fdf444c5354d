"""From a global batch to ranks and micro-batches.

    sort by length -> cut into m rounds of world_size groups -> one group of every round to each rank

Every rank gets the same number m of micro-batches, the smallest for which all groups fit their budgets. All groups of a
round hold utterances of about the same length and have about the same padded cost, because under ZeRO-3 ranks meet in
every micro-batch. The last round holds the shortest utterances and is cut to measure: each rank gets as much of it as it
lacks to the mean, so what earlier rounds left uneven is evened out.

A pure function of the sizes: every rank computes the whole assignment and takes its part, nothing is communicated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.config import DataConfig


@dataclass(frozen=True)
class Budgets:
    """What one micro-batch may hold, padding included. An utterance beyond them makes a micro-batch of its own."""

    seconds: float  # audio: utterances with audio x the longest
    tokens: float  # LLM positions: rows x the longest

    @classmethod
    def of(cls, data: DataConfig) -> "Budgets":
        return cls(data.micro_batch_seconds, data.micro_batch_tokens)


def padded_cost(seconds: np.ndarray, positions: np.ndarray, budgets: Budgets) -> float:
    """Cost of one micro-batch: padded audio plus padded LLM positions, each as a share of its budget."""
    if len(seconds) == 0:
        return 0.0
    return (np.count_nonzero(seconds) * float(seconds.max()) / budgets.seconds
            + len(positions) * float(positions.max()) / budgets.tokens)


def padding_share(seconds: np.ndarray, groups: list[np.ndarray]) -> float:
    """Share of the padded audio of micro-batches that is padding. groups: positions into `seconds` [N]."""
    padded = sum(np.count_nonzero(seconds[g]) * float(seconds[g].max()) for g in groups if len(g))
    return 1 - sum(float(seconds[g].sum()) for g in groups) / padded if padded else 0.0


def _stop(audio: np.ndarray, text: np.ndarray, start: int, target: float, slack: float) -> int:
    """End of the group that begins at `start` and comes nearest to `target` in cost without leaving its budgets.

    audio, text [N]: seconds and LLM positions as shares of their budgets, audio falling. slack: how far below the target the
    look-ahead may end; only bounds the work.
    """
    longest, n = float(audio[start]), len(audio)
    per_row = max(longest, float(text[start]) / 4, 1e-9)
    ahead = n if target == np.inf else min(n, start + int(max(target, slack) / per_row) + 2)
    widest = np.maximum.accumulate(text[start:ahead])
    rows = np.arange(1, ahead - start + 1)
    with_audio = np.minimum(rows, np.count_nonzero(audio[start:ahead]))
    padded_audio, padded_text = with_audio * longest, rows * widest
    fits = int(np.count_nonzero((padded_audio <= 1 + 1e-9) & (padded_text <= 1 + 1e-9)))  # a prefix: both grow with the rows
    if fits <= 1:
        return start + 1
    if target == np.inf:
        return start + fits
    return start + 1 + int(np.argmin(np.abs(padded_audio[:fits] + padded_text[:fits] - target)))


def _cut(audio: np.ndarray, text: np.ndarray, density: np.ndarray, ranks: int, rounds: int) -> list[list[tuple[int, int]]] | None:
    """Groups (start, stop) of each rank, one a round, or None where the budgets need more rounds.

    density [N]: expected cost of each utterance inside its group, padding included.
    """
    remaining = np.r_[np.cumsum(density[::-1])[::-1], 0.0]
    slack = 4 * remaining[0] / (ranks * rounds)
    groups: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    start, n = 0, len(audio)
    for turn in range(rounds):
        last = turn == rounds - 1
        lacking = 0.0  # of the ranks that this round has served
        for served, rank in enumerate(np.argsort(load, kind="stable")):
            if start >= n:
                groups[rank].append((n, n))
                continue
            if last:
                waiting = ranks - served
                mean = (load.sum() - lacking + remaining[start]) / waiting
                target = mean - load[rank]
            else:
                target = remaining[start] / (ranks * (rounds - turn) - served)
            stop = _stop(audio, text, start, target if served < ranks - 1 or not last else np.inf, slack)
            cost = np.count_nonzero(audio[start:stop]) * audio[start] + (stop - start) * text[start:stop].max()
            groups[rank].append((start, stop))
            load[rank] += cost
            if last:
                lacking += load[rank]
            start = stop
    return groups if start >= n else None


def assign(seconds: np.ndarray, positions: np.ndarray, world_size: int, budgets: Budgets) -> list[list[np.ndarray]]:
    """[rank][micro-batch] -> positions into the global batch; each position once, equally many micro-batches on every rank.

    seconds [N] of audio (0: text only), positions [N] of the LLM (0: not used). Where there are fewer utterances than
    micro-batches, some are empty.
    """
    order = np.lexsort((-positions.astype(np.int64), -seconds.astype(np.float64)))
    audio, text = seconds[order] / budgets.seconds, positions[order] / budgets.tokens
    least = max(audio.sum(), text.sum())
    rounds = max(1, int(np.ceil(min(least, len(order)) / world_size - 1e-9)))
    while True:
        density = audio + text
        groups = _cut(audio, text, density, world_size, rounds)
        if groups is not None:
            break
        rounds += 1
    # Once more with what the first cut taught about padding.
    for start, stop in (group for rank in groups for group in rank):
        if stop > start:
            density[start:stop] = audio[start] * (audio[start:stop] > 0) + text[start:stop].max()
    groups = _cut(audio, text, density, world_size, rounds) or groups
    return [[order[start:stop] for start, stop in rank] for rank in groups]
