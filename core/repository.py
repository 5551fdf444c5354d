"""The project's packages, and a hash of their source."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Packages that training needs. Jobs run a frozen copy (slurm/common.sh, freeze).
PACKAGES = ("core", "data_tools", "evaluation", "model", "recipe", "serving", "soundwave", "stream", "train")


def code_hash(packages: tuple[str, ...]) -> str:
    """Return the sha256 (hex) over the Python files of `packages`. Errors: FileNotFoundError where a package
    has none."""
    digest = hashlib.sha256()
    for package in packages:
        paths = sorted((ROOT / package).rglob("*.py"))
        if not paths:
            raise FileNotFoundError(f"no Python files in {ROOT / package}")
        for path in paths:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
