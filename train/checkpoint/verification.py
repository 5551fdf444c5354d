"""Is a checkpoint whole and sound? Its manifest, hashes and state.json; the newest one that is."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
from pathlib import Path

from core.distributed import Ranks, from_main, gather
from core.file_names import UnsafeName, file_size_inside, plain_name
from core.files import step_folders, step_of
from core.json_files import JsonError, read_object

logger = logging.getLogger("soundwave")
DAMAGED = ".damaged"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_files(folder: Path) -> dict[str, dict]:
    """Return name -> {"size", "sha256"} of a checkpoint's files. All names are plain: nothing outside the
    folder is read.

    Errors: ValueError for a manifest that is missing or not as `save` writes it.
    """
    try:
        files = read_object(folder / "manifest.json").get("files")
        if not isinstance(files, dict) or "state.json" not in files:
            raise ValueError("does not list state.json")
        for name, fact in files.items():
            plain_name(name)
            if (
                not isinstance(fact, dict)
                or not _is_count(fact.get("size"))
                or not _SHA256.fullmatch(str(fact.get("sha256")))
            ):
                raise ValueError("has an entry without size and sha256")
    except ValueError as error:
        raise ValueError(f"manifest.json {error}") from None
    return files


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """None where the folder is complete and sound, else what is wrong. `part` of `parts`: hash only every
    parts-th file."""
    name = "manifest.json"
    try:
        files = manifest_files(folder)
        for name, fact in files.items():
            size = file_size_inside(folder, name)
            if size != fact["size"]:
                return f"{name} has {size} bytes instead of {fact['size']}"
        for name in sorted(files)[part::parts]:
            if sha256_of(folder / name) != files[name]["sha256"]:
                return f"{name} does not have its sha256"
        name = "state.json"
        check_state(read_state(folder), folder)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    except UnsafeName as error:
        return f"{name} {error}"
    except ValueError as error:
        return str(error)
    return None


def read_state(folder: Path) -> dict:
    """Errors: ValueError."""
    try:
        return read_object(folder / "state.json")
    except JsonError as error:
        raise ValueError(f"state.json {error}") from None


def check_state(state: dict, folder: Path) -> None:
    """Errors: ValueError for a value that is missing or of another type than `save` is given."""
    topology, health, best = state.get("topology"), state.get("health"), state.get("best")
    right = {
        "step": _is_count(state.get("step")) and step_of(folder) == state["step"],
        "data_offset": _is_count(state.get("data_offset")),
        "topology": isinstance(topology, dict)
        and _is_count(topology.get("world_size"))
        and topology["world_size"] > 0
        and topology.get("zero_stage") in (1, 2, 3),
        "health": isinstance(health, dict)
        and all(_is_count(health.get(key)) for key in ("consecutive", "skipped", "rollbacks"))
        and isinstance(health.get("norms"), list)
        and all(_is_finite(norm) for norm in health["norms"]),
        "best": "best" in state and (best is None or is_best(best)),
        "facts": isinstance(state.get("facts"), dict),
    }
    wrong = [key for key, sound in right.items() if not sound]
    if wrong:
        raise ValueError(f"state.json has no valid '{wrong[0]}'")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_best(best: object) -> bool:
    """Whether `best` is what a validation leaves: {"step", "score", "by"}."""
    return (
        isinstance(best, dict)
        and _is_count(best.get("step"))
        and _is_finite(best.get("score"))
        and isinstance(best.get("by", ""), str)
    )


def saved_in_health(folder: Path) -> bool:
    """Whether no step was skipped right before it was saved. True where that cannot be read: `verify` reports
    the damage."""
    try:
        return read_state(folder)["health"]["consecutive"] == 0
    except (OSError, ValueError, KeyError, TypeError):
        return True


def find_good(folders: list[Path], ranks: Ranks, *, among=lambda folder: True) -> Path | None:
    """The newest sound checkpoint, of the first folder that has one; hashing is shared among ranks, all
    return the same. Every damaged one before it gets a line and another name.

    among: asked on rank 0 for each folder, whether it is a candidate at all.
    """
    candidates: list[str] = []
    if ranks.is_main:
        candidates = [str(p) for folder in folders for p in step_folders(folder) if among(p)]
    for name in from_main(candidates):
        problems = gather(verify(Path(name), part=ranks.rank, parts=ranks.world_size))
        problem = next((p for p in problems if p), None)
        if problem is None:
            return Path(name)
        if ranks.is_main:
            aside = _set_aside(Path(name))
            logger.warning(
                "checkpoint %s is damaged (%s): it is set aside as %s, and the one before it is taken",
                name,
                problem,
                aside,
            )
    return None


def _set_aside(folder: Path) -> str:
    """Give a damaged checkpoint its other name; returns that."""
    aside = folder.with_name(folder.name + DAMAGED)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(folder, aside)
    except OSError as error:
        return f"nothing, {error}"
    return aside.name
