"""How much of each source goes into each step: the dynamic data mixture.

A source is one task of one corpus. Tasks are drawn with p_task proportional to n_task^(1/tau) (n:
utterances), tau moving linearly over the stage from `tau_start` to `tau_end`: 1 is proportional to size,
large is balanced. Nothing is drawn at random: a source owns a fixed number of cost units (milliseconds of
audio) of every step, so that the units it has given before step s are a prefix sum over the schedule, known
for any s without visiting the steps before.

With `language_alpha` a source is one language of one task of one corpus, and the languages of a task have
audio in proportion to hours^alpha (XLS-R's sampling of languages; Babu et al. 2022, section 3.1).
"""

from __future__ import annotations

import numpy as np

from core.console import shown
from recipe.config import MixtureConfig, RecipeError


def temperature(mixture: MixtureConfig, step: np.ndarray, steps: int) -> np.ndarray:
    """tau at `step` of a stage of `steps` steps; constant after its end."""
    progress = np.minimum(np.asarray(step, dtype=np.float64) / max(steps, 1), 1.0)
    return mixture.tau_start + (mixture.tau_end - mixture.tau_start) * progress


def task_probabilities(counts: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """p_task proportional to n_task^(1/tau). counts [K], tau [S] -> [S, K]; rows sum to 1."""
    logits = np.log(np.asarray(counts, dtype=np.float64))[None, :] / np.atleast_1d(tau)[:, None]
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


class Mixture:
    """Cost units of every source before any step.

    tasks [C], counts [C] (utterances), mean_cost [C] (units per utterance), weights [C] (the corpus' explicit
    weight within its task, or None), languages [C] (with language_alpha) describe the C sources; `units` is
    the budget of one step.
    """

    def __init__(
        self,
        config: MixtureConfig,
        tasks: list[str],
        counts: np.ndarray,
        mean_cost: np.ndarray,
        weights: list[float | None],
        units: int,
        steps: int,
        languages: list[str] | None = None,
    ):
        if config.tau_start <= 0 or config.tau_end <= 0:
            raise RecipeError(
                f"data.mixture: tau must be above 0, got {config.tau_start} to {config.tau_end} "
                "(1: proportional to size, 5 and more: nearly balanced)"
            )
        self.config, self.units, self.steps = config, units, max(int(steps), 1)
        self.tasks = sorted(set(tasks))
        self._task_of = np.array([self.tasks.index(task) for task in tasks])
        counts = np.asarray(counts, dtype=np.float64)
        self._mean_cost = np.asarray(mean_cost, dtype=np.float64)
        self._task_counts = np.bincount(self._task_of, counts, minlength=len(self.tasks))
        self._explicit = self._explicit_probabilities()
        if config.language_alpha is None or languages is None:
            self._within = self._shares_within(tasks, counts, weights)
        else:
            self._within = self._language_shares(tasks, languages, counts, weights, config.language_alpha)
        moves = self._explicit is None and config.tau_start != config.tau_end and len(self.tasks) > 1
        # [S + 1, C] units before each step while the schedule moves; a single row where it does not.
        rates = self._rates(np.arange(self.steps + 1) if moves else np.array([0]))
        self._rate_after = rates[-1]
        self._before = np.concatenate([np.zeros_like(rates[:1]), np.cumsum(rates[:-1], axis=0)])

    def _explicit_probabilities(self) -> np.ndarray | None:
        given = self.config.task_weights
        if not given:
            return None
        for task in self.tasks:
            if task not in given:
                raise RecipeError(
                    f"data.mixture.task_weights has no weight for task '{task}': name every task of "
                    f"data.train "
                    f"({', '.join(self.tasks)}), or restrict the corpora with `tasks:`"
                )
        weights = np.array([float(given[task]) for task in self.tasks])
        if (weights <= 0).any():
            raise RecipeError(
                f"data.mixture.task_weights must be above 0, got {shown(dict(given))}; leave a task out with "
                f"`tasks:`"
            )
        return weights / weights.sum()

    def _shares_within(self, tasks: list[str], counts: np.ndarray, weights: list[float | None]) -> np.ndarray:
        """Share of each source within its task: by size, or by explicit weights, which all corpora of a task
        then need."""
        shares = np.zeros(len(tasks))
        for task in self.tasks:
            members = [i for i, name in enumerate(tasks) if name == task]
            given = [weights[i] for i in members]
            if all(weight is None for weight in given):
                share = counts[members]
            elif any(weight is None or weight <= 0 for weight in given):
                raise RecipeError(
                    f"data.train: of the corpora with task '{task}', all or none need a `weight` above 0; "
                    f"got {given}"
                )
            else:
                share = np.array(given, dtype=np.float64)
            shares[members] = share / share.sum()
        return shares

    def _language_shares(
        self,
        tasks: list[str],
        languages: list[str],
        counts: np.ndarray,
        weights: list[float | None],
        alpha: float,
    ) -> np.ndarray:
        """Share of each source among its task's utterances, such that the audio of the task's languages is in
        proportion to hours^alpha. Sources of one task and language share by size, or by weight."""
        shares = self._shares_within(tasks, counts, weights)
        pairs = list(zip(tasks, languages, strict=True))
        for pair in sorted(set(pairs)):
            members = [at for at, other in enumerate(pairs) if other == pair]
            shares[members] /= shares[members].sum()
            hours = (counts[members] * self._mean_cost[members]).sum()
            shares[members] *= hours**alpha / (shares[members] * self._mean_cost[members]).sum()
        return shares / np.bincount(self._task_of, shares)[self._task_of]

    def probabilities(self, steps: np.ndarray) -> np.ndarray:
        """Share of each source among the utterances of a step. steps [S] -> [S, C]; rows sum to 1."""
        steps = np.atleast_1d(steps)
        if self._explicit is not None:
            per_task = np.repeat(self._explicit[None, :], len(steps), axis=0)
        else:
            per_task = task_probabilities(self._task_counts, temperature(self.config, steps, self.steps))
        return per_task[:, self._task_of] * self._within[None, :]

    def _rates(self, steps: np.ndarray) -> np.ndarray:
        """Units of each step by source. Utterances are what the mixture shares out, so a source's units
        follow its length."""
        cost = self.probabilities(steps) * self._mean_cost[None, :]
        # Whole units: sums of integers are the same on every machine, whatever the order of addition.
        return np.maximum(np.rint(cost / cost.sum(axis=1, keepdims=True) * self.units), 1).astype(np.int64)

    def before(self, step: int) -> np.ndarray:
        """Units that each source has given before `step` [C] int64. The same work at step 10 and at step 10
        million."""
        last = len(self._before) - 1
        return self._before[min(step, last)] + max(step - last, 0) * self._rate_after
