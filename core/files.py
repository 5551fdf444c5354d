"""Files that a kill must not spoil: whole ones that appear at once, and logs of JSON lines."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

PARTIAL = ".partial"
STEP = re.compile(r"step-(\d+)$")  # a finished checkpoint's folder
ROOT = Path(__file__).resolve().parent.parent


def step_of(folder: Path) -> int | None:
    """Return the step of a checkpoint by its folder's name; None for another folder."""
    match = STEP.match(folder.name)
    return int(match[1]) if match else None


def step_folders(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first, complete by name only: a save that died has left another name."""
    numbered = [(STEP.match(path.name), path) for path in checkpoints.glob("step-*")]
    folders = [(int(match[1]), path) for match, path in numbered if match]
    return [path for _, path in sorted(folders, reverse=True)]


def code_version() -> str | None:
    """Commit of this code, with -dirty where tracked files were changed; None where there is no git or no
    checkout. A frozen copy lies in a checkout that may have moved on since: its VERSION names the
    commit (slurm/common.sh)."""
    if (ROOT / "VERSION").exists():
        return (ROOT / "VERSION").read_text().strip() or None
    command = [
        "git",
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
    ]  # tags differ between clones: the hash alone
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def sync_folder(folder: Path) -> None:
    """fsync of a directory: without it a rename may be lost in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + PARTIAL)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def append_lines(path: Path, records: list[dict]) -> None:
    """One JSON line each, in one write(): lines that ranks of one machine append to the same file do not mix.
    (On NFS, lines that several machines append at one moment may be lost: such records
    are counted elsewhere, too.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, lines.encode())
    finally:
        os.close(descriptor)


def read_lines(path: Path, last_bytes: int | None = None) -> list[dict]:
    """The records of a file of JSON lines, which may be growing or absent; a line that is cut, by a kill or
    at the beginning of the last `last_bytes`, is left out."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        if last_bytes is not None:
            file.seek(max(0, path.stat().st_size - last_bytes))
        lines = file.read().splitlines()
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def truncate_log(path: Path, first_step: int) -> list[dict]:
    """Take the lines of `first_step` and later ones, which are done again, out of a log of steps; returns
    what stays: events, too, which have happened whatever is done again."""
    records = [
        record for record in read_lines(path) if record["step"] < first_step or record.get("kind") == "event"
    ]
    if path.exists():
        write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return records
