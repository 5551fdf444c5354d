"""core/console.py: no control sequence of data reaches a terminal, and an error is one line."""

import importlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.console import one_line, print_error, print_text, printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\rb", r"a\rb"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud800", r"\ud800"),
        ("a\tb\nc", "a\tb\nc"),
        ("日本語 é \u200c 👩\u200d👧", "日本語 é \u200c 👩\u200d👧"),
        (5, "5"),
    ],
)
def test_control_characters_are_written_as_escapes(text, shown):
    assert printable(text) == shown


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_text_can_be_printed(text):
    shown = printable(text)
    shown.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)


def test_printing(capsys):
    print_text("a", 1, "\x1b", sep="\t")
    print_error("error:", ValueError("first\nsecond \x1b[2J"))
    out, err = capsys.readouterr()
    assert out == "a\t1\t\\x1b\n" and err == "error: first second \\x1b[2J\n"


def test_reasons_of_libraries_are_one_line():
    assert one_line(ValueError("\n\n  what is wrong  \nmuch more")) == "what is wrong"
    assert (
        one_line(MemoryError()) == "needs more memory than there is"
        and len(one_line(ValueError("x" * 5000))) == 300
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.pretrained.SourceError",
        "model.artifact.FolderError",
        "model.prompt.PromptError",
        "data_tools.packing.PackError",
        "data_tools.corpora.CorpusError",
        "data_tools.shards.ShardError",
        "data_tools.shards.OutputError",
        "recipe.config.RecipeError",
        "train.checkpoint.errors.CheckpointError",
        "train.checkpoint.universal.ConversionError",
        "stream.loader.StreamStalled",
        "stream.rejected.BrokenSample",
        "evaluation.predictions.PredictionError",
        "evaluation.endpoint.EndpointError",
        "evaluation.run.InputError",
    ],
)
def test_errors_for_users_are_one_printable_line(name):
    module, _, kind = name.rpartition(".")
    error = getattr(importlib.import_module(module), kind)(
        "clip evil\x1b]0;owned\x07\nerror: forged\x1b[2J is broken"
    )
    assert str(error) == f"{error}" == r"clip evil\x1b]0;owned\x07 error: forged\x1b[2J is broken"
