"""An environment with some packages and what they require, and nothing else: links into this one's."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def with_requirements(names: list[str]) -> set[str]:
    """Names of installed packages: the given ones and all that they require without extras."""
    found, left = set(), list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        for line in requires:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return found


def environment(folder: Path, names: list[str]) -> Path:
    """Fill a folder that is all that `python` sees beside the standard library."""
    folder.mkdir(parents=True)
    for name in with_requirements(names):
        one = distribution(name)
        for top in {Path(str(file)).parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            target, link = Path(str(one.locate_file(top))), folder / top
            if target.exists() and not link.exists():
                link.symlink_to(target)
    return folder


def python(folder: Path, script: Path, *arguments: str, home: Path, timeout: float = 300) -> str:
    """Run a script there, in another folder than the project's; return its standard output."""
    start = f"import sys, runpy; sys.path[:0] = [{str(folder)!r}]; sys.argv = sys.argv[1:]; "
    command = [
        sys.executable,
        "-S",
        "-E",
        "-P",
        "-c",
        start + "runpy.run_path(sys.argv[0], run_name='__main__')",
    ]
    done = subprocess.run(
        [*command, str(script), *arguments],
        cwd=home,
        env={"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise AssertionError(done.stderr[-4000:])
    return done.stdout
