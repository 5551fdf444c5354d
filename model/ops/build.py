"""Compile the C++ implementation into the virtual environment, and load it.

`python -m model.ops.build` does it at install time; the first use does it otherwise. The result is keyed by
the sources, the torch version, the compiler and the CPU's features, so that nodes of different kinds may
share one environment.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from core.private_folder import private_folder, user_cache

SOURCES = Path(__file__).parent / "csrc"
MAIN = SOURCES / "linear_ctc.cpp"
FLAGS = [
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DNDEBUG",
    "-Wno-psabi",
]


class BuildError(RuntimeError):
    """No compiler, or it failed; the message holds the command and its output."""


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "") or "c++") or shutil.which("g++") or shutil.which("clang++")


def _cpu_features() -> str:
    """What -march=native depends on: the CPU's feature flags (Linux), or the platform's name elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("flags", "Features", "vendor_id", "cpu family", "model\t")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)}))


def _key() -> str:
    """Of all that a library must fit to be loaded here."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    for part in (torch.__version__, platform.machine(), _cpu_features(), *FLAGS):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _compiler_key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    return hashlib.sha256(version.encode()).hexdigest()[:8]


def _folder() -> Path:
    """Inside the environment where it can be written to, else in the user's cache. Errors: OSError."""
    inside = Path(sys.prefix) / "lib" / "soundwave_ops"
    try:
        inside.mkdir(parents=True, exist_ok=True)
        if os.access(inside, os.W_OK):
            return inside
    except OSError:
        pass
    return private_folder(user_cache() / "soundwave_ops")


def _command(compiler: str, output: Path) -> list[str]:
    package = Path(torch.__file__).parent
    include = package / "include"
    abi = int(torch.compiled_with_cxx11_abi())
    return [
        compiler,
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f"-isystem{include}",
        f"-isystem{include / 'torch/csrc/api/include'}",
        str(MAIN),
        "-o",
        str(output),
        f"-L{package / 'lib'}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]


def build() -> Path:
    """The compiled library's path, compiled now if it is not there. Without a compiler, the newest that any
    compiler made.

    Processes that build at the same time wait for the first one; the file appears under its name only when
    complete.
    Errors: BuildError.
    """
    compiler = _compiler()
    folder = _folder()
    key = _key()
    if compiler is None:
        made = sorted(folder.glob(f"linear_ctc-{key}-*.so"), key=lambda path: path.stat().st_mtime)
        if not made:
            raise BuildError(
                "no C++ compiler found: install g++ (or set CXX) for the fast CPU implementation"
            )
        return made[-1]
    library = folder / f"linear_ctc-{key}-{_compiler_key(compiler)}.so"
    if library.exists():
        return library
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        print(
            f"compiling the fused op for this CPU (about half a minute, once) -> {library}",
            file=sys.stderr,
            flush=True,
        )
        handle, name = tempfile.mkstemp(dir=folder, prefix=f"{library.stem}.", suffix=".tmp")
        os.close(handle)
        unfinished = Path(name)
        try:
            command = _command(compiler, unfinished)
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            unfinished.chmod(0o755)
            unfinished.rename(library)
        finally:
            unfinished.unlink(missing_ok=True)
    return library


@functools.cache
def load() -> bool:
    """Whether torch.ops.soundwave_cpu is there; compiles and loads it once, and warns once where that cannot
    be done."""
    try:
        torch.ops.load_library(str(build()))
    except (BuildError, OSError) as error:
        warnings.warn(f"the fused op runs on its slow plain PyTorch reference: {error}", stacklevel=2)
        return False
    return True


if __name__ == "__main__":
    try:
        print(f"fused op: {build()}")
    except (BuildError, OSError) as error:
        sys.exit(str(error))
