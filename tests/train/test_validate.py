"""Which validation is the best one."""

import math

import pytest

from recipe.config import CheckpointConfig, Corpus, Recipe, RecipeError
from train.checks import check
from train.validate import chosen_by, is_better, score_label, score_text


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


@pytest.mark.parametrize(
    ("stage", "by", "words"),
    [
        ("alignment", "wer", None),
        ("alignment", "ctc", None),
        ("alignment", "clean/cer", None),
        ("sft", "bleu", None),
        ("sft", "clean/accuracy", None),
        ("alignment", "bleu", "'bleu' is not one of wer, cer, mer, loss, ctc, clean/wer"),
        ("sft", "blue", "'blue' is not one of wer, cer, mer, loss, ce"),
        ("sft", "noisy/wer", "'noisy/wer' is not one of"),
    ],
)
def test_scores_to_choose_by(stage, by, words):
    recipe = Recipe(stage=stage, checkpoint=CheckpointConfig(best_by=by))
    recipe.data.train = [Corpus(shards="x")]
    recipe.data.valid = [Corpus(shards="y", name="clean"), Corpus(shards="z")]
    if words is None:
        check(recipe)
    else:
        with pytest.raises(RecipeError, match=words):
            check(recipe)


@pytest.mark.parametrize(
    ("by", "lower"),
    [
        ("wer", True),
        ("clean/mer", True),
        ("ctc", True),
        ("bleu", False),
        ("a/accuracy", False),
        ("unparsed", True),
    ],
)
def test_each_score_has_its_direction(by, lower):
    assert is_better(found(0.4, by=by), found(0.5, by=by)) is lower
    assert is_better(found(0.6, by=by), found(0.5, by=by)) is not lower
    assert is_better(found(0.5, 0.9, by=by), found(0.5, 1.0, by=by)), "of equal ones the lower loss"


def test_early_stopping_without_validation_is_an_error():
    recipe = Recipe()
    recipe.data.train, recipe.optim.stop_after = [Corpus(shards="x")], 3
    with pytest.raises(RecipeError, match=r"optim.stop_after needs validation, and data.valid is empty"):
        check(recipe)


def test_a_set_has_a_plain_name():
    recipe = Recipe()
    recipe.data.train, recipe.data.valid = [Corpus(shards="x")], [Corpus(shards="y", name="a/b")]
    with pytest.raises(RecipeError, match=r"data.valid\[0\]: name is 'a/b'"):
        check(recipe)


@pytest.mark.parametrize(
    ("score", "value", "label", "text"),
    [
        ("wer", 0.4912, "WER", "49.1 %"),
        ("noisy/cer", 1.331, "noisy/CER", "133.1 %"),
        ("clean/accuracy", 0.75, "clean/ACCURACY", "75.0 %"),
        ("bleu", 21.25, "BLEU", "21.25"),
        ("loss", 2.46597, "loss", "2.466"),
        ("clean/loss", 0.5, "clean/loss", "0.5"),
    ],
)
def test_the_log_shows_shares_in_percent(score, value, label, text):
    assert (score_label(score), score_text(score, value)) == (label, text)
