"""The console command `soundwave` and the installed project."""

import importlib.metadata
import importlib.util
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cli
import core
from core import command_line
from recipe.stages import is_trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    """What a command changes in its process is set back."""
    monkeypatch.setattr(command_line, "_command", None)
    monkeypatch.setattr(sys, "argv", ["soundwave"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    handler = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, handler)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_names_the_command(name, clean_process, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: soundwave {name} ")


def test_arguments_are_passed_through(clean_process, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", "first.jsonl", "--no-such-option"])
    assert ended.value.code == 2
    assert "(soundwave compare --help lists the options)" in capsys.readouterr().err


def test_module_form_keeps_its_name(capsys):
    from evaluation.compare import main

    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m evaluation.compare ")


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["evalute"]) == 2
    assert "did you mean 'evaluate'?" in capsys.readouterr().err
    assert cli.main(["xyz"]) == 2
    assert "soundwave --help lists the commands" in capsys.readouterr().err


def test_overview_imports_no_library_and_works_from_any_folder(tmp_path):
    """Also the proof that packages are installed: the folder is not the project's."""
    code = (
        "import cli, sys; cli.main(['--help']); print(sorted({'torch', 'numpy', 'train'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS) and done.stdout.endswith("[]\n")


def test_installed_version_is_the_one_in_core(capsys):
    assert importlib.metadata.version("soundwave-train") == core.__version__
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"soundwave {core.__version__}\n"


def test_every_package_of_the_project_is_installed():
    from setuptools import find_namespace_packages

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_namespace_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    programs = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks", "examples", "tests"}
    assert programs | {"ds_configs"} == {name for name in found if "." not in name}


def test_extras_read_files_of_plain_pins():
    """setuptools does not read `-r` in a requirements file."""
    dynamic = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    extras = dynamic["optional-dependencies"]
    assert {"gpu", "dev", "demo"} <= extras.keys()
    for entry in [dynamic["dependencies"], *extras.values()]:
        for name in entry["file"]:
            lines = (ROOT / name).read_text().splitlines()
            assert not [line for line in lines if line.startswith("-")], name


@pytest.mark.parametrize(
    "command, expected",
    [
        ("python train/run.py recipe.yaml", True),
        ("python -m train.run recipe.yaml", True),
        ("/env/bin/python /env/bin/soundwave train recipe.yaml", True),
        ("/env/bin/python /env/bin/soundwave status train", False),
        ("vim train.py", False),
    ],
)
def test_a_running_trainer_is_recognised_by_its_command_line(command, expected):
    assert is_trainer(command.encode().split()) is expected


def test_a_command_of_a_package_that_the_environment_lacks_is_one_line(monkeypatch, capsys):
    """An environment that was made before the package existed."""
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["serve", "model"]) == 2
    assert capsys.readouterr().err.startswith("error: package serving of this repository is not installed: ")
