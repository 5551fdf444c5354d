"""Is this step's gradient fit to be applied? Decided from global numbers before the optimizer moves, hence
alike on all ranks."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from statistics import median

from core.distributed import Ranks, gather
from core.files import append_lines
from model.batch import Batch
from recipe.config import HealthConfig


class Health:
    """Robust statistics of the gradient norm over the last accepted steps.

    A step is skipped when its loss or norm is not finite, or when its norm lies more than `spike_sigma`
    robust standard deviations (1.4826 x median absolute deviation, which equals the standard deviation for a
    normal law; Rousseeuw & Croux, 1993) above the median. Fewer than `MINIMUM` accepted steps give no
    statistics, so early steps are judged by finiteness.
    """

    MINIMUM = 32

    def __init__(self, config: HealthConfig):
        self.config = config
        self.norms: deque[float] = deque(maxlen=config.window)
        self.consecutive = 0
        self.skipped = 0
        self.rollbacks = 0

    def reason_to_skip(self, loss: float, norm: float) -> str | None:
        """None: apply the step (and remember its norm). Otherwise why it is skipped."""
        reason = None
        if not math.isfinite(loss):
            reason = f"loss is {loss}"
        elif not math.isfinite(norm) or norm < 0:  # DeepSpeed reports a norm that is not finite as -1
            reason = "gradient is not finite"
        elif len(self.norms) >= self.MINIMUM:
            centre = median(self.norms)
            # A floor under the deviation: norms that hardly vary must not turn a harmless wobble into a
            # spike.
            deviation = max(1.4826 * median(abs(n - centre) for n in self.norms), 0.05 * centre)
            if norm > centre + self.config.spike_sigma * deviation:
                reason = f"gradient norm {norm:.3g} is a spike (median {centre:.3g}, robust deviation {deviation:.3g})"  # noqa: E501
        if reason is None:
            self.norms.append(norm)
            self.consecutive = 0
        else:
            self.skipped += 1
            self.consecutive += 1
        return reason

    @property
    def must_roll_back(self) -> bool:
        return self.consecutive >= self.config.max_consecutive_skips

    def state(self) -> dict:
        return {
            "norms": list(self.norms),
            "consecutive": self.consecutive,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
        }

    def load(self, state: dict) -> None:
        self.norms = deque(state["norms"], maxlen=self.config.window)
        self.consecutive, self.skipped, self.rollbacks = (
            state["consecutive"],
            state["skipped"],
            state["rollbacks"],
        )


class SkippedSteps:
    """The steps skipped in a row up to now: which, why, whose utterances. `<stage folder>/skipped.jsonl`
    names all there were."""

    SHOWN = 20  # utterances in a message

    def __init__(self, folder: Path, ranks: Ranks):
        self.path, self.ranks = folder / "skipped.jsonl", ranks
        self.steps: list[dict] = []

    def add(self, step: int, data_step: int, reason: str | None, micro_batches: list[Batch]) -> None:
        """After every step; `reason` None: it was applied. `data_step`: the plan's step. Collective where it
        was skipped."""
        if reason is None:
            self.steps = []
            return
        ids = gather([name for batch in micro_batches for name in batch.ids])
        self.steps.append(
            {
                "step": step,
                "data_step": data_step,
                "reason": reason,
                "ids": [name for names in ids for name in names],
            }
        )
        if self.ranks.is_main:
            append_lines(self.path, [self.steps[-1]])

    def __str__(self) -> str:
        names = [name for step in self.steps for name in step["ids"]]
        reasons = "; ".join(dict.fromkeys(step["reason"] for step in self.steps))
        more = f" and {len(names) - self.SHOWN} more, all in {self.path}" if len(names) > self.SHOWN else ""
        return (
            f"steps {', '.join(str(step['step']) for step in self.steps)} were not fit to be applied "
            f"({reasons}); their "
            f"utterances: {', '.join(names[: self.SHOWN])}{more}"
        )
