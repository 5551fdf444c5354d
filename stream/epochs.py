"""The optimizer steps that `optim.epochs` makes, from the index of data.train."""

from __future__ import annotations

import json
import math

from recipe.config import Recipe, RecipeError
from recipe.stages import stage_folder, stage_of
from stream.plan import UNITS_PER_SECOND, Plan, UnindexedPlan


def resolve_steps(recipe: Recipe) -> bool:
    """Set `optim.steps` from `optim.epochs`, where the recipe has that; return whether it did.

    The audio of so many epochs of all sources together, in whole steps: at least that many epochs. Where
    data.train cannot be read any more, the steps are those of the run that the output folder holds.
    Errors: RecipeError.
    """
    epochs = recipe.optim.epochs
    if epochs is None:
        return False
    try:
        recipe.optim.steps = steps_of_epochs(recipe, epochs)
    except RecipeError:
        recorded = _recorded_steps(recipe)
        if recorded is None:
            raise
        recipe.optim.steps = recorded
    return True


def steps_of_epochs(recipe: Recipe, epochs: float) -> int:
    """Return the steps that hold `epochs` epochs of data.train. Errors: RecipeError."""
    plan = Plan.open(recipe.data, stage_of(recipe).name, 1, recipe.model)
    if isinstance(plan, UnindexedPlan):
        raise RecipeError(
            "optim.epochs needs an index, and data.train is streamed without one: give optim.steps, or pack "
            "the corpora"
        )
    units = sum(order.total for order in plan.orders)
    per_step = round(recipe.data.batch_seconds * UNITS_PER_SECOND)
    # Rounded first: 0.1 x 3 epochs are not a step more than 0.3.
    return max(1, math.ceil(round(epochs * units / per_step, 9)))


def _recorded_steps(recipe: Recipe) -> int | None:
    """Return the steps of the run in the output folder, where it had the same epochs."""
    try:
        noted = json.loads((stage_folder(recipe) / "run.json").read_text())
        steps, epochs = noted["steps"], noted["epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) and epochs == recipe.optim.epochs else None
