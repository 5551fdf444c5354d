"""docs/recipes.md names every key of a recipe, with the default that the code has; docs/architecture.md every
module."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from core.code import PACKAGES
from recipe.config import BY_NAME, Recipe, known_keys

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "recipes.md").read_text()


def test_every_key_is_explained():
    assert [key for key in known_keys() if f"`{key}`" not in TEXT] == []


def test_defaults_are_those_of_the_code():
    recipe = OmegaConf.structured(Recipe)
    rows = re.findall(r"^\| `([a-z_.]+)` \| `(.*?)` \| \S", TEXT, re.MULTILINE)
    told = dict(rows)
    leaves = [
        key for key in known_keys() if not OmegaConf.is_dict(OmegaConf.select(recipe, key)) or key in BY_NAME
    ]
    assert len(told) == len(rows) and set(told) == set(leaves)

    def text(key: str) -> str:
        value = OmegaConf.select(recipe, key)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if isinstance(value, str):
            return value
        return "null" if value is None else yaml.safe_dump(value, default_flow_style=True).splitlines()[0]

    assert {key: told[key] for key in leaves} == {key: text(key) for key in leaves}


def test_every_module_has_its_place_in_the_architecture():
    rows = dict(
        re.findall(
            r"^\| `([a-z_/]+/)` \| (.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE
        )
    )
    packages = {
        f"{path.parent.relative_to(ROOT)}/"
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
        if not path.stem.startswith("__") and path.parent.name != "corpora"
    }
    names = {
        package: {path.stem for path in (ROOT / package).glob("*.py") if not path.stem.startswith("__")}
        for package in packages
    }
    listed = {
        package: {name.removesuffix(".py") for name in re.findall(r"`([a-z0-9_.]+)`", rows.get(package, ""))}
        for package in packages
    }
    assert listed == names
