"""The documentation holds its rules, the rules find what they are for, and the site builds without a network."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from docs import check, command_lines, generate, prose, results_page
from recipe.config import BY_NAME, Recipe, known_keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rule", check.CHECKS, ids=lambda rule: rule.__name__)
def test_the_documentation_holds_the_rule(rule):
    assert list(rule()) == []


def test_the_site_builds_without_warnings(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    no_network = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    environment = {**os.environ, **no_network, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "index.html").read_text()
    loaded = re.findall(
        r'<(?:script|img)[^>]* src="(http[^"]+)"|<link[^>]*stylesheet[^>]* href="(http[^"]+)"', page
    )
    assert "Soundwave training" in page and loaded == [], "a reader's browser asks no other server"


@pytest.mark.parametrize(
    "command, reason",
    [
        ("python -m evaluation.run --model DIR --shards DIR --tsak asr", "--tsak"),
        ("python data_tools/pack.py --corpus a:b --out DIR --codec mp3", "mp3"),
        ("python -m evaluation.gone", "no module"),
        ("deepspeed --num_gpus 2 train/run.py train/recipes/stage1.yaml optim.stepz=3", "optim.stepz"),
        ("deepspeed train/run.py train/recipes/stage9.yaml", "stage9"),
        ("torchrun --standalone --nproc-per-node 8 -m evaluation.run --model a", "required"),
        ("slurm/chain.sh --stages 1 optim.stepz=3", "optim.stepz"),
        ("slurm/pack.sh --time=2:00:00 -- --corpus a:b", "--out"),
        ("sbatch slurm/stage9.sh", "without a script"),
        ("sbatch slurm/evaluate.sh --model DIR", "required"),
        ("make dmeo", "dmeo"),
        ("make demo ARGZ=1", "ARGZ"),
        ("soundwavee transcribe", "no command"),
        ("for n in 1 2; do python -m train.run train/recipes/stage$n.yaml seeed=$n; done", "seeed"),
        ("LOCAL_DISK=/x slurm/pack.sh --corpus a:b --out c || make dmeo", "dmeo"),
    ],
)
def test_a_wrong_command_is_found(command, reason):
    with pytest.raises(command_lines.WrongCommand, match=re.escape(reason)):
        for words in command_lines.statements(command):
            command_lines.check(words)


def test_comments_continued_lines_and_quotes_of_a_block_are_understood():
    block = (
        "# first\nmake demo  # then\npython x.py 'data.train=[{shards: a}]' \\\n    b=1; cd /x && git pull\n"
    )
    assert command_lines.statements(block) == [
        ["make", "demo"],
        ["python", "x.py", "data.train=[{shards: a}]", "b=1"],
        ["cd", "/x"],
        ["git", "pull"],
    ]


def test_dead_links_and_long_pages_are_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n\n[a](#a-title) [b](#gone) [c](gone.md) [d](https://x.org)\n\n" + "word " * 1201
    )
    monkeypatch.setattr(check, "documents", lambda: [page])
    monkeypatch.setattr(check, "pages", lambda: [page])
    monkeypatch.setattr(check, "written", lambda: [page])
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("line\n" * 111)
    assert [line.split(": ")[1] for line in check.links()] == ["link #gone", "link gone.md"]
    assert [line.split(":")[0] for line in check.lengths()] == ["README.md", "page.md"]


#: Needs packages that conflict with the project's.
OWN_ENVIRONMENT = {"benchmarks.tts_words"}
GOES, STANDS = "goes", "stands"  # apart from their second words, since this file is checked, too


@pytest.mark.parametrize(
    "code, found",
    [
        (f'"""The run {GOES}\n    on."""', [f"{GOES} on"]),
        (f"# what {STANDS}\n# behind it\nx = 1\n", [f"{STANDS} behind"]),
        (f'raise ValueError(f"{{name}} {GOES} on")', [f"{GOES} on"]),
        (f"def test_a_run_{GOES}_on(): pass", [f"{GOES} on"]),
        (f"{GOES}_on = {STANDS}_behind = 1", []),
    ],
)
def test_banned_phrases_are_found_in_docstrings_comments_messages_and_test_names(tmp_path, code, found):
    path = tmp_path / "a.py"
    path.write_text(code + "\n")
    assert [hit.phrase for hit in prose.hits(path, prose.phrases())] == found


def test_code_in_a_page_is_not_prose(tmp_path):
    page = tmp_path / "a.md"
    phrase = f"{GOES} on"
    page.write_text(f"It resumes. `{phrase}`\n\n```\n{phrase}\n```\n\nIt {phrase}.\n")
    assert [(hit.line, hit.phrase) for hit in prose.hits(page, prose.phrases())] == [(7, phrase)]


def test_the_recipe_reference_has_every_key_with_its_default():
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| `(.*?)` \| (?:yes|no) \| \S", generate.recipe_page(), re.MULTILINE
    )
    defaults = OmegaConf.structured(Recipe)
    leaves = {
        key
        for key in known_keys()
        if not OmegaConf.is_dict(OmegaConf.select(defaults, key)) or key in BY_NAME
    }
    assert len(dict(rows)) == len(rows) and set(dict(rows)) == leaves
    read = {key: yaml.safe_load(value) for key, value in rows}
    told = {key: OmegaConf.select(defaults, key) for key in leaves}
    told = {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for key, value in told.items()
    }
    strings = {key for key, value in told.items() if isinstance(value, str)}
    assert {key: read[key] for key in leaves - strings} == {key: told[key] for key in leaves - strings}
    assert {key: dict(rows)[key] for key in strings} == {key: told[key] for key in strings}


def test_every_command_has_a_description():
    for module, command in command_lines.commands().items():
        parser = command_lines.parser_of(module)
        about = generate.first_paragraph(parser.description)
        assert len(about) > 15 and about[-1] in ".)", (
            f"{command} --help has a description that is cut: {about!r}"
        )
        for part in (parser, *command_lines.subparsers(parser).values()):
            part.format_help()


def test_a_parser_is_found_without_running_the_command(tmp_path, monkeypatch):
    parser = command_lines.parser_of("evaluation.run")
    assert isinstance(parser, argparse.ArgumentParser) and "--decode" in parser._option_string_actions


def test_the_cli_reference_shows_defaults_as_a_user_writes_them():
    """Several values have blanks between them; no Python list, tuple or None."""
    parser = argparse.ArgumentParser(description="Print defaults.")
    parser.add_argument("--decode", nargs="+", default=["greedy", "drafted"])
    parser.add_argument("--part", default="0/1", help="this part")
    parser.add_argument("--out")
    parser.add_argument("--names", action="append", default=[])
    rows = [line for line in generate.described(parser).splitlines() if line.startswith("| `")]
    assert [[cell.strip() for cell in row.split("|")[2:4]] for row in rows] == [
        ["`greedy drafted`", ""],
        ["`0/1`", "this part"],
        ["", ""],
        ["", ""],
    ]
    defaults = re.findall(
        r"^\| `[^`]*` \| `([^`]*)`", (generate.REFERENCE / "cli.md").read_text(), re.MULTILINE
    )
    assert len(defaults) > 100 and not [default for default in defaults if default[0] in "[({"]


def test_the_cli_reference_does_not_depend_on_the_machine(monkeypatch):
    page = generate.cli_page()
    monkeypatch.setattr(os, "cpu_count", lambda: 77)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert generate.cli_page() == page and "`number of cores`" in page
    assert "### python -m data_tools.annotate\n\nIn short: `soundwave annotate`. Write a manifest" in page


def test_finding_parsers_changes_nothing_in_this_process():
    import torch

    before = dict(os.environ), torch.is_grad_enabled(), torch.get_num_threads()
    for module in command_lines.commands():
        command_lines.parser_of(module)
    assert (dict(os.environ), torch.is_grad_enabled(), torch.get_num_threads()) == before


def test_percentages_come_from_the_recorded_scores():
    row = {"wer": "0.4013"}
    assert results_page.mean_and_range([row, {"wer": "0.4113"}]) == "40.6 (40.1 to 41.1)"
    assert results_page.mean_and_range([row]) == "40.1" and results_page.mean_and_range([]) == ""
    assert (
        "40.1 [36.6, 43.7]" in results_page.readme_rows() and "commit 916cabf" in results_page.readme_rows()
    )


def parsers(module: str) -> Iterator[argparse.ArgumentParser]:
    parser = command_lines.parser_of(module)
    yield parser
    yield from command_lines.subparsers(parser).values()


@pytest.mark.parametrize("module", sorted(set(command_lines.commands()) - OWN_ENVIRONMENT))
def test_help_shows_every_default_and_an_example_that_parses(module):
    for parser in parsers(module):
        for action in parser._actions:
            plain = action.default is None or isinstance(action.default, bool)
            if plain or action.help == argparse.SUPPRESS or action.default in ([], "", argparse.SUPPRESS):
                continue
            assert "default" in parser._get_formatter()._format_action(action), action.dest
    example = command_lines.parser_of(module).epilog.removeprefix("example:\n  ")
    command_lines.check(shlex.split(example))
