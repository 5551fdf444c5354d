"""Which validation is the best one."""

import math

import pytest

from recipe.config import CheckpointConfig, Corpus, Recipe, RecipeError
from train.checks import check
from train.validate import SCORES, chosen_by, is_better


def found(score: float, loss: float = 1.0, by: str = "wer") -> dict:
    return {"by": by, "score": score, "loss": loss}


@pytest.mark.parametrize(
    ("new", "best", "better"),
    [
        (found(0.5), None, True),
        (found(0.4), found(0.5), True),
        (found(0.6), found(0.5), False),
        (found(0.5, 1.0), found(0.5, 1.0), False),
        (found(1.0, 0.9), found(1.0, 1.0), True),
        (found(1.0, 1.1), found(1.0, 1.0), False),
        (found(math.nan), None, False),
        (found(math.inf), None, False),
        (found(9.0, by="loss"), found(0.1), True),
        (found(0.5), {"score": 0.5}, True),
    ],
)
def test_the_lower_score_wins_and_of_equal_ones_the_lower_loss(new, best, better):
    """By WER alone the first of many equal scores stayed the best: the step before the model could write
    anything."""
    assert is_better(new, best) is better


def test_without_words_the_loss_decides():
    assert (
        chosen_by({"loss": 1.0, "words": 0.0}, "wer") == "loss"
        and chosen_by({"loss": 1.0, "cer": 0.5}, "cer") == "cer"
    )


@pytest.mark.parametrize("score", [*SCORES, "bleu"])
def test_scores_to_choose_by(score):
    recipe = Recipe(checkpoint=CheckpointConfig(best_by=score))
    recipe.data.train = [Corpus(shards="x")]
    if score in ("wer", "cer", "mer", "loss"):
        check(recipe)
    else:
        with pytest.raises(RecipeError, match="'bleu' is not one of wer, cer, mer, loss"):
            check(recipe)
