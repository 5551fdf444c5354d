"""Suggestions for unknown names."""

from core.near_names import did_you_mean, near_names


def test_all_names_that_are_as_near_are_suggested():
    known = ["lr_lora", "lr_adapters", "steps", "warmup_steps", "lr_scheduler"]
    assert set(near_names("lr", known)) == {"lr_lora", "lr_adapters", "lr_scheduler"}
    assert near_names("stepz", known) == ["steps"]
    assert near_names("xyz", known) == []
    assert near_names("xyz", ["ab", "cd"], cutoff=0.0) == ["ab", "cd"]


def test_names_are_compared_by_a_part():
    assert near_names("stepz", ["a.steps", "b.loss"], compared=lambda key: key[2:]) == ["a.steps"]


def test_the_question_lists_every_name():
    assert did_you_mean([]) == ""
    assert did_you_mean(["a"]) == "did you mean 'a'?"
    assert did_you_mean(["a", "b", "c"]) == "did you mean 'a', 'b' or 'c'?"
