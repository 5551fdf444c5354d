"""The same thing has the same option name in every command, and former names stay accepted but hidden."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from core.command_line import CommandParser, accept_old_name, old_names
from docs import command_lines

#: What an option means -> its name, and names that other programs give it. Switches (no value) are not meant.
NAMES = {
    "a model folder": ("--model", "checkpoint ckpt model-path model-dir model-folder weights run model-name"),
    "a packed folder": ("--shards", "data dataset data-dir packed shard-dir folder"),
    "where the result goes": (
        "--out",
        "output out-dir output-dir out-file to json csv png save save-to dest write result o",
    ),
    "what computes": ("--device", "cuda accelerator platform use-gpu"),
    "a list of samples": ("--manifest", "input inputs test jsonl samples"),
    "how many clips are selected": ("--limit", "max-clips max-samples subset first-n num-samples n"),
    "a sample of a folder": ("--index", "row sample listen item"),
    "the language of speech": ("--language", "lang langs language-code"),
    "a part of a corpus": ("--split", "take subset part-of"),
    "a folder for working files": ("--cache", "work-dir tmp temp cache-dir scratch"),
    "repetitions": ("--repeats", "repeat runs trials"),
    "processes": ("--workers", "jobs num-workers processes threads"),
    "the longest answer": ("--max-new-tokens", "new-tokens max-tokens max-length answer-tokens"),
    "a limit of one request": ("--request-seconds", "max-request-seconds answer-seconds"),
    "the LLM's tokenizer": ("--tokenizer", "tokenizer-dir tokenizer-path"),
}
#: (command, option): a manifest beside another one.
EXCEPTIONS = {("benchmarks.hotwords", "--test")}
#: Words of a help text or a value's name -> the option that it describes.
MEANINGS = (
    (re.compile(r"^(another )?(stage \d )?model folder"), ("--model", "--memory-model", "--to-official")),
    (re.compile(r"(folder|folders) written by data_tools/pack|^packed (folder|clips)"), ("--shards",)),
    (
        re.compile(r"^(where (to write|the report)|write the (result|report|table|scores|rows)|result as)"),
        ("--out",),
    ),
    (re.compile(r"cuda where there is one"), ("--device",)),
    (re.compile(r"evenly spaced"), ("--limit",)),
    (re.compile(r"processes that|processes, each"), ("--workers",)),
)


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for module in command_lines.commands():
        if module != "benchmarks.tts_words":  # needs packages that conflict with the project's
            parser = command_lines.parser_of(module)
            yield module, parser
            for sub in command_lines.subparsers(parser).values():
                yield module, sub


def options() -> Iterator[tuple[str, argparse.Action]]:
    """Yield the shown options that take a value."""
    for module, parser in parsers():
        for action in parser._actions:
            if action.option_strings and action.nargs != 0:
                yield module, action


def test_no_option_is_a_synonym():
    wrong = {f"--{old}": new for new, others in NAMES.values() for old in others.split()}
    found = [
        f"{module} {name}: write {wrong[name]}"
        for module, action in options()
        for name in action.option_strings
        if name in wrong and (module, name) not in EXCEPTIONS
    ]
    assert found == []


def test_every_argument_has_a_help_text():
    found = [
        f"{module} {'/'.join(action.option_strings) or action.dest}"
        for module, parser in parsers()
        for action in parser._actions
        if not action.help
    ]
    assert found == []


def test_options_with_the_same_help_have_the_same_name():
    found = [
        f"{module} {action.option_strings[0]}: {action.help!r} is {expected[0]}"
        for module, action in options()
        for words, expected in MEANINGS
        if words.search(action.help or "") and action.option_strings[0] not in expected
    ]
    assert found == []


@pytest.mark.parametrize("old, new", [("--take", "--split"), ("--langs", "--languages")])
def test_former_names_are_accepted_and_hidden(old, new):
    from data_tools.pack import parse_arguments

    common = ["--corpus", "folder:x", "--out", "y", "--splits", "train=1"]
    assert vars(parse_arguments([*common, old, "train"])) == vars(parse_arguments([*common, new, "train"]))
    parser = command_lines.parser_of("data_tools.pack")
    assert old_names(parser)[old] == new and not re.search(rf"{old}\b", parser.format_help())


def test_a_former_name_satisfies_a_required_option_and_errors_show_the_new_one(capsys):
    parser = CommandParser("python -m x", "Do.", example="--out F")
    parser.add_argument("--out", required=True, type=int)
    accept_old_name(parser, "--json", "--out")
    assert parser.parse_args(["--json", "3"]).out == 3
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", "word"])
    assert "argument --out:" in capsys.readouterr().err


def test_documents_use_the_current_names():
    with pytest.raises(command_lines.WrongCommand, match="--listen is a former name: write --index"):
        command_lines.check("python -m data_tools.show DIR --listen 3".split())
