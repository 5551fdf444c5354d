"""What every report says of where it was made."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from core.files import code_version

PACKAGES = (
    "torch",
    "torchaudio",
    "deepspeed",
    "transformers",
    "webdataset",
    "soundfile",
    "soxr",
    "lhotse",
    "datasets",
)


def cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict:
    """Commit (with -dirty where files were changed), processor, threads, load before the run, versions."""
    import torch  # not above: benchmarks/pack.py times processes, imports included, that need no torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "commit": code_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def line(facts: dict) -> str:
    where = (
        facts["gpu"]
        or f"{facts['cpu']}, {facts['cores']} cores, {facts['capability']}, {facts['threads']} threads"
    )
    return (
        f"{where}; load before {facts['load_before']:.1f}; torch {facts['versions']['torch']}, Python "
        f"{facts['python']}; "
        f"commit {facts['commit']}"
    )


def settings(options: argparse.Namespace) -> dict[str, str]:
    """The options of a run, for a report that is published: of a path outside the working folder only its
    name, which tells readers enough and nothing about the machine's folders."""
    return {name: _value(value) for name, value in vars(options).items()}


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    path = Path(str(value))
    if not path.is_absolute():
        return str(value)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def keep(path: Path, report: dict, table: str) -> None:
    """The report as JSON, and its table beside it (.txt) under the machine's line."""
    path.write_text(json.dumps(report, indent=1) + "\n")
    lines = table.rstrip().strip("\n")  # a head whose first column has no name begins with spaces
    path.with_suffix(".txt").write_text(f"{line(report['machine'])}\n\n{lines}\n")
