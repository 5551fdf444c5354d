"""How sure a score is: bootstrap intervals and a paired test, over utterances.

A corpus score here is a ratio of sums: errors over reference words, correct answers over questions. The
bootstrap draws utterances with replacement (Bisani and Ney, "Bootstrap estimates for confidence intervals in
ASR performance evaluation", ICASSP 2004). The paired test swaps the two systems' counts utterance by
utterance at random (approximate randomisation; Riezler and Maxwell, "On some pitfalls in automatic evaluation
and significance testing for MT", 2005). Both treat utterances as independent: where one speaker gives many
utterances, the intervals are too narrow.
"""

from __future__ import annotations

import numpy as np

CHUNK = 1 << 22  # numbers drawn at a time, which bounds memory at some tens of MB


def _resampled(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Sums [samples, columns] of `values` [utterances, columns] over draws with replacement."""
    rng = np.random.default_rng(seed)
    count = len(values)
    rows = max(1, CHUNK // max(count, 1))
    sums = []
    for start in range(0, samples, rows):
        drawn = rng.integers(0, count, size=(min(rows, samples - start), count))
        sums.append(values[drawn].sum(axis=1))
    return np.concatenate(sums)


def interval(
    numerators, denominators, *, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(numerators) / sum(denominators), both one number an utterance."""
    values = np.stack(
        [np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)], axis=1
    )
    sums = _resampled(values, samples, seed)
    ratios = sums[:, 0] / np.maximum(sums[:, 1], 1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_test(
    first, second, denominators, *, samples: int = 10_000, seed: int = 0
) -> dict[str, float | list[float]]:
    """Do two systems differ on the same utterances?

    `first`, `second`: errors (or correct answers) of each system per utterance; `denominators`: words (or
    ones). Returns the two scores, their difference (second - first) with its 95 % bootstrap interval, and the
    two-sided p-value of approximate randomisation, (1 + number of as large differences) / (1 + samples).
    """
    first, second, denominators = (np.asarray(x, dtype=np.float64) for x in (first, second, denominators))
    total = max(denominators.sum(), 1)
    gaps = second - first
    observed = abs(gaps.sum())
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // max(len(gaps), 1))
    as_large = 0
    for start in range(0, samples, rows):
        signs = rng.integers(0, 2, size=(min(rows, samples - start), len(gaps))) * 2 - 1
        as_large += int((np.abs(signs @ gaps) >= observed - 1e-9).sum())
    sums = _resampled(np.stack([gaps, denominators], axis=1), min(samples, 2000), seed + 1)
    low, high = np.quantile(sums[:, 0] / np.maximum(sums[:, 1], 1), [0.025, 0.975])
    return {
        "first": float(first.sum() / total),
        "second": float(second.sum() / total),
        "difference": float(gaps.sum() / total),
        "difference_ci95": [float(low), float(high)],
        "p_value": (1 + as_large) / (1 + samples),
    }
