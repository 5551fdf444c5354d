"""Extension points: names, their errors, and modules of users that register something."""

from __future__ import annotations

import dataclasses

import pytest

from core.plugins import PluginError, load_plugins
from core.registry import AlreadyRegistered, Registry, UnknownName
from recipe.config import RecipeError, load_recipe


def test_registered_names_are_found_in_order():
    losses = Registry("loss")

    @losses.register("ctc")
    def first():
        return 1

    losses.add("ce", 2)
    assert list(losses) == ["ctc", "ce"] and losses["ctc"] is first and losses["ce"] == 2
    assert "ctc" in losses and "kl" not in losses and losses.get("kl") is None


def test_an_unknown_name_is_one_line_with_the_nearest_and_all_known():
    losses = Registry("loss")
    losses.add("ctc", 1)
    losses.add("cross_entropy", 2)
    with pytest.raises(UnknownName) as raised:
        losses["cros_entropy"]
    text = str(raised.value)
    assert text.startswith("loss 'cros_entropy' is not known; did you mean 'cross_entropy'?")
    assert "ctc, cross_entropy" in text and "\n" not in text
    with pytest.raises(UnknownName, match=r"loss 'zzz' is not known\. Known: ctc"):
        losses["zzz"]
    with pytest.raises(UnknownName):
        losses[["a", "list"]]


def test_a_name_is_given_once():
    losses = Registry("loss")

    class First:
        pass

    class Second:
        pass

    losses.register("ctc")(First)
    losses.register("ctc")(First)
    with pytest.raises(AlreadyRegistered, match="'ctc'"):
        losses.register("ctc")(Second)
    with pytest.raises(ValueError, match="letters"):
        losses.add("my loss", 1)


def test_a_reloaded_instance_replaces_itself_and_described_data_does_not():
    losses, stages = Registry("loss"), Registry("stage")

    class Term:
        pass

    @dataclasses.dataclass(frozen=True)
    class Plan:
        steps: int

    losses.add("term", Term())
    losses.add("term", again := Term())
    assert losses["term"] is again
    stages.add("plan", Plan(1))
    stages.add("plan", Plan(1))
    with pytest.raises(AlreadyRegistered, match="the stage 'plan' is registered already"):
        stages.add("plan", Plan(2))


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("absent_plugin", None, "there is no module absent_plugin: start in the folder"),
        ("absent.plugin", None, "there is no module absent.plugin"),
        ("needs_other", "import not_installed_here", "imports not_installed_here, which is not installed"),
        (
            "raises",
            "x = 1\nraise RuntimeError('first\\nsecond')",
            r"RuntimeError: first \(.*raises.py, line 2\)",
        ),
        ("no_python", "def", r"SyntaxError: .*no_python.py, line 1"),
        ("leaves", "raise SystemExit(3)", "SystemExit: 3"),
        ("../up", None, "is not the name of a module"),
        ("file.py/", None, "is not the name of a module"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, name, source, words):
    monkeypatch.chdir(tmp_path)
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(PluginError, match=words) as raised:
        load_plugins([name])
    assert "\n" not in str(raised.value)


def test_a_recipe_imports_its_plugins_before_it_is_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "marks_file.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    (tmp_path / "recipe.yaml").write_text("plugins: [marks_file]\noptim: {steps: -1}\n")
    with pytest.raises(RecipeError, match="optim.steps"):
        load_recipe(tmp_path / "recipe.yaml")
    assert (tmp_path / "imported").exists()
    (tmp_path / "recipe.yaml").write_text("plugins: [marks_fil]\n")
    with pytest.raises(RecipeError, match=r"recipe.yaml: plugins: there is no module marks_fil"):
        load_recipe(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml", ["plugins=[marks_file]"]).plugins == ["marks_file"]
