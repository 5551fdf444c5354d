"""Every command line of docs/data.md is one that the tools take, and every format is in it."""

import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from data_tools import annotate, instruct, pack, show, verify
from data_tools.corpora import _DEFAULTS, READERS, Corpus
from data_tools.filters import FILTERS
from model.prompt import INSTRUCTIONS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
SPECIFICATIONS = re.findall(r"--corpus ([a-z0-9]+:\S+?)(?=[ `\n])", TEXT)
LINES = re.findall(r"python (?:-m )?data_tools[./][^`';\n]*", re.sub(r"\\\n\s*", "", TEXT))
VARIABLES = {"$split": "train", "$SLURM_CPUS_PER_TASK": "8", "$SLURM_ARRAY_TASK_ID": "3"}
COMMANDS = [
    re.sub(r"\$\w+", lambda name: VARIABLES[name[0]], re.sub(r"\s+#.*|   .*", "", line)) for line in LINES
]


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


@pytest.mark.parametrize("command", [c for c in COMMANDS if "..." not in c and len(c.split()) > 3])
def test_commands_parse(command, monkeypatch, capsys):
    words = shlex.split(command)
    tool = words[1] if words[1] != "-m" else words[2]
    arguments = words[2:] if words[1] != "-m" else words[3:]
    module = {
        "data_tools/pack.py": pack,
        "data_tools.annotate": annotate,
        "data_tools.instruct": instruct,
    }.get(tool)
    if module is pack:
        pack.parse_arguments(arguments)
        return
    if module is None:
        module = {"data_tools.show": show, "data_tools.verify": verify}[tool]
        assert module.main(arguments) == 2 and "does not exist" in capsys.readouterr().err, (
            "the paths are made up"
        )
        return
    monkeypatch.setattr(module, "run", lambda options: "")
    assert module.main(arguments) == 0


@pytest.mark.parametrize("name", READERS)
def test_a_readers_options_stand_in_its_docstring(name):
    module, class_name = READERS[name].split(":")
    reader = getattr(import_module(f"data_tools.corpora.{module}"), class_name)
    own = set(inspect.signature(reader).parameters) - {"path", *_DEFAULTS}
    assert not [option for option in own if not re.search(rf"\b{option}\b", reader.__doc__)]


def test_every_folder_of_the_recipes_has_its_commands():
    recipes = "".join(
        path.read_text() for path in Path(pack.__file__).parents[1].glob("train/recipes/*.yaml")
    )
    made = set()
    for words in (command.split() for command in COMMANDS if " --out " in command):
        out = words[words.index("--out") + 1]
        splits = words[words.index("--splits") + 1] if "--splits" in words and "--take" not in words else ""
        made |= {f"{out}/{split.split('=')[0]}" for split in splits.split(",")} if splits else {out}
    wanted = {
        folder.replace("/valid", "/train") for folder in re.findall(r"- shards: (\S+)", recipes)
    }  # $split is train here
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
