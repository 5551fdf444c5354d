"""The pages about data name every format, option, reason and folder (docs/check.py holds their commands)."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from data_tools import pack
from data_tools.corpora import _DEFAULTS, READERS, Corpus
from data_tools.filters import FILTERS
from docs.check import shell
from docs.command_lines import statements
from model.prompt import INSTRUCTIONS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("prepare-data", "corpora", "audio-formats", "filters", "instruction-data")
TEXT = "\n".join((DOCS / f"{page}.md").read_text() for page in PAGES)
SPECIFICATIONS = re.findall(r"--corpus ([a-z0-9]+:\S+?)(?=[ `\n])", TEXT)
COMMANDS = [words for block, _ in shell(TEXT) for words in statements(block)]


def test_every_format_has_an_example():
    assert {specification.split(":")[0] for specification in SPECIFICATIONS} == set(READERS)


@pytest.mark.parametrize("specification", sorted(set(SPECIFICATIONS)))
def test_options_of_the_examples_exist(specification):
    name, _, rest = specification.partition(":")
    module, class_name = READERS[name].split(":")
    known = set(
        inspect.signature(getattr(import_module(f"data_tools.corpora.{module}"), class_name)).parameters
    )
    used = set(re.findall(r",(\w+)=", rest))
    assert used <= known | {"corpus", "task", "lang", "prompt", "label", "speaker", "origin"}, (
        used - known,
        Corpus,
    )


@pytest.mark.parametrize("name", READERS)
def test_readers_docstring_names_its_options(name):
    module, class_name = READERS[name].split(":")
    reader = getattr(import_module(f"data_tools.corpora.{module}"), class_name)
    own = set(inspect.signature(reader).parameters) - {"path", *_DEFAULTS}
    assert not [option for option in own if not re.search(rf"\b{option}\b", reader.__doc__)]


def test_every_folder_of_the_recipes_has_its_commands():
    recipes = "".join(
        path.read_text() for path in Path(pack.__file__).parents[1].glob("train/recipes/*.yaml")
    )
    made = set()
    for words in (words for words in COMMANDS if "--out" in words):
        out = words[words.index("--out") + 1]
        splits = words[words.index("--splits") + 1] if "--splits" in words and "--split" not in words else ""
        made |= {f"{out}/{split.split('=')[0]}" for split in splits.split(",")} if splits else {out}
    wanted = {folder.replace("/valid", "/train") for folder in re.findall(r"- shards: (\S+)", recipes)}
    assert len(wanted) == 8 and wanted <= made


def test_tasks_with_a_default_instruction_are_named():
    sentence = TEXT.split("**Instructions.**")[1].split("have a default")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) - {"prompt"} == set(INSTRUCTIONS)


def test_every_reason_is_documented():
    sources = [path.read_text() for path in Path(pack.__file__).parent.rglob("*.py")]
    used = set(
        re.findall(
            r'(?:Rejection|ClipError|refuse)\(\s*(?:[^"()]|\([^()]*\)|f?"[^"]*"(?=,\s*"))*?"([a-z_]+)"',
            "\n".join(sources),
        )
    )
    missing = [reason for reason in (used | FILTERS) - {"other_split"} if f"`{reason}`" not in TEXT]
    assert len(used) > 15 and not missing
