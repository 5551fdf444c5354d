"""Fill .venv so that nothing is built, downloaded or fixed later, inside a run. Used by `make setup`.

    python3 install/setup_env.py [--venv .venv] [--gpu auto|yes|no] [--dev] [--extras demo bench]
    [--flash-attn] [--check]

Steps, each skipped when it is done already, so that a repeat is quick and an interrupted set-up resumes where
it stopped:

1. venv            python3 -m venv; a broken one is made anew
2. packages        those of install/locks/, each checked against the sha256 there (`make lock` writes these
                   files from the requirements): the CPU build of torch where pip offers one and there is no
                   GPU
3. torchaudio      on CPU torch its compiled part, which links CUDA, is moved away: with it `import
                   torchaudio` fails, and transformers with it. On CUDA torch it stays (and comes back)
4. deepspeed ops   built into the installed package instead of just in time inside the first run; on a CPU
                   machine Adam for offloaded optimizer states is built for --extras offload and --dev only
5. fused op        python -m model.ops.build, at the same time as 4 and as what is left of 2
6. this project    pip install -e . without its dependencies: packages that import from any folder, the
                   command `soundwave`

The stamp .venv/.setup/done holds the hash of everything that these steps depend on. Only the standard library
is used here, and syntax that an old Python can read, so that it can say that it is too old. One set-up works
at a time: .venv.lock is next to the folder, which step 1 may empty.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)  # numpy needs 3.11; wheels of the pinned versions end at 3.13
EXTRAS = ("av", "bench", "browser", "demo", "docs", "quantization", "serve", "stores", "trackers")
OFFLOAD = "offload"  # an extra that is built, not installed
REQUIREMENTS = tuple(
    "requirements%s.txt" % kind for kind in ("", "-dev", "-dev-cpu", "-gpu", "-torch-cpu")
) + tuple("requirements-%s.txt" % name for name in EXTRAS)
LOCKS = ROOT / "install" / "locks"
DISK_GB = {"cpu": 4, "cuda": 14}

# Every process of this environment, however it is started: prebuilt ops and whatever torch still builds stay
# inside it (the default, ~/.cache/torch_extensions, is shared by all environments of a user, which spoil it
# for each other, and by all nodes of a shared home, which race for it). What torch.compile builds goes to the
# user's own cache: its default, a folder /tmp/torchinductor_USER, could be made by another user first.
ENVIRONMENT_PTH = (
    "import os, sys; os.environ.setdefault('TORCH_EXTENSIONS_DIR', os.path.join(sys.prefix, "
    "'torch_extensions'))"
    "; os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', os.path.join(os.environ.get('XDG_CACHE_HOME') or "
    "os.path.expanduser('~/.cache'), 'torchinductor'))"
    "; {accelerator}\n"
)


class SetupError(Exception):
    """One line for the user: what is wrong and what to do."""


def show(text):
    print(text, flush=True)


class Environment:
    """The virtual environment, and how commands run in it."""

    def __init__(self, folder):
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.state = folder / ".setup"

    def run(self, label, command, env=None, cwd=ROOT, milestones=True):
        """Run with output to a log, pip's milestones shown; returns the time taken. Errors: SetupError, with
        the last line."""
        milestones = milestones and sys.stdout.isatty()
        self.state.mkdir(parents=True, exist_ok=True)
        log_path = self.state / (label + ".log")
        tail = []
        began = time.time()
        with open(str(log_path), "w") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=str(cwd),
                env=dict(os.environ, **(env or {})),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
            )
            for line in process.stdout:
                log.write(line)
                log.flush()
                tail = tail[-400:] + [line.rstrip()]
                match = re.match(
                    r"\s*(Collecting|Downloading|Installing collected|Building wheel|Preparing metadata)\b.*",
                    line,
                )
                if match and milestones:
                    print("\r\033[K    " + line.strip()[:100], end="", flush=True)
            code = process.wait()
        if milestones:
            print("\r\033[K", end="", flush=True)
        if code:
            errors = [
                line.strip() for line in tail if re.search(r"\berror\b|No space left|not found", line, re.I)
            ]
            reason = (errors or [line for line in tail if line.strip()] or ["no output"])[-1]
            raise SetupError(
                "%s failed (exit %d): %s\n    all output: %s" % (label, code, reason[:300], log_path)
            )
        return "%.0f s" % (time.time() - began)

    def run_python(self, code):
        """The last line that a few lines of Python print in the environment; None where they fail."""
        result = subprocess.run(
            [str(self.python), "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=str(self.folder),
        )
        # The last line: libraries may have something to say before.
        return (result.stdout.strip().splitlines() or [""])[-1] if result.returncode == 0 else None

    @property
    def site_packages(self):
        return Path(self.run_python("import sysconfig; print(sysconfig.get_paths()['purelib'])"))


def has_gpu():
    """Whether an NVIDIA driver with at least one GPU answers on this machine."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listed = subprocess.run(
        [smi, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, stdin=subprocess.DEVNULL
    )
    return listed.returncode == 0 and "GPU" in listed.stdout


def which_kind(env, gpu):
    """cpu or cuda: as said (yes, no), else cuda where this machine has a GPU, or where the environment was
    made for one: jobs run from it, and a login node's `make test` must not turn it into a CPU one under
    them."""
    if gpu == "auto":
        recorded = env.state / "kind"
        return "cuda" if has_gpu() or (recorded.exists() and recorded.read_text() == "cuda") else "cpu"
    return "cuda" if gpu == "yes" else "cpu"


def fingerprint(kind):
    """Hash of what the set-up depends on: the pins, this folder, the op's sources, the interpreter, CPU or
    CUDA."""
    digest = hashlib.sha256(repr((kind, sys.version_info[:3])).encode())
    sources = (
        [ROOT / name for name in REQUIREMENTS]
        + [ROOT / "install" / "setup_env.py", ROOT / "pyproject.toml"]
        + sorted(path for path in LOCKS.glob("*.txt") if not path.name.startswith("vllm"))
    )
    sources += [
        path
        for path in sorted((ROOT / "model" / "ops").rglob("*"))
        if path.suffix in (".cpp", ".h", ".hpp", ".cu", ".cuh") or path.name == "build.py"
    ]
    for path in sources:
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def check_python():
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        raise SetupError(
            "Python %d.%d is %s: this needs %d.%d to %d.%d. Name another one: make setup PYTHON=python3.12"
            % (
                sys.version_info[0],
                sys.version_info[1],
                "too old" if sys.version_info[:2] < OLDEST else "not tried yet",
                OLDEST[0],
                OLDEST[1],
                NEWEST[0],
                NEWEST[1],
            )
        )


def check_machine(folder, kind):
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        raise SetupError(
            "no C++ compiler (%s): the fused op and DeepSpeed's ops are compiled here. Install one "
            "(Debian, Ubuntu: apt-get install g++ python3-dev; clusters: module load gcc)" % compiler
        )
    free = shutil.disk_usage(str(ROOT if not folder.parent.exists() else folder.parent)).free / 1e9
    if not folder.exists() and free < DISK_GB[kind]:
        raise SetupError(
            "%.1f GB free in %s, about %d GB needed: free some, or name another place: make setup VENV=/path"
            % (free, folder.parent, DISK_GB[kind])
        )


def last_set_up(env):
    """What the stamp says of the last complete set-up; another one may take it away at any moment."""
    try:
        return json.loads((env.state / "done").read_text())
    except FileNotFoundError:
        return {"files": []}


def make_venv(env, step="[1/6]"):
    if env.python.exists() and env.run_python("import pip; print(pip.__version__)") is not None:
        return
    show("%s virtual environment %s" % (step, env.folder))
    command = [sys.executable, "-m", "venv", "--clear", str(env.folder)]
    made = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
    )
    if made.returncode:
        raise SetupError(
            "python3 -m venv failed: %s (Debian, Ubuntu: apt-get install python3-venv)"
            % " ".join(made.stdout.split())[-300:]
        )


def pins(path):
    """Name -> version of a requirements or a lock file."""
    versions = {}
    for line in path.read_text().splitlines():
        match = re.match(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", line)
        if match:
            versions[re.sub(r"[-_.]+", "-", match.group(1)).lower()] = match.group(2)
    return versions


def lock_of(name, kind):
    """The lock file of a requirements file."""
    middle = name[len("requirements") : -len(".txt")].lstrip("-")
    return LOCKS / ((middle or kind) + ".txt")


def check_locks(files, kind):
    """Errors: SetupError where a requirements file was edited and `make lock` not run since."""
    locked = pins(LOCKS / "deepspeed.txt")
    for name in files:
        locked.update(pins(lock_of(name, kind)))
    for name in files:
        for package, version in pins(ROOT / name).items():
            if locked.get(package, "").split("+")[0] != version:
                raise SetupError(
                    "%s asks for %s %s, install/locks/ has %s: make lock"
                    % (name, package, version, locked.get(package, "none"))
                )


def without_hashes(env, path):
    """A copy of a lock file for --no-hashes: packages that a site has built itself."""
    copy = env.state / path.name
    lines = re.sub(r" *\\\n *--hash=\S+", "", path.read_text())
    copy.write_text(lines)
    return copy


# A source distribution would run code, and fetch what it is built with unchecked.
WHEELS = ("--only-binary", ":all:")


class Installer:
    """pip, told to take what the lock files name and nothing else."""

    def __init__(self, env, hashes):
        self.env, self.hashes = env, hashes

    def run(self, label, paths, options=()):
        """Install what lock files name."""
        # --no-compile: compile_modules does so on several cores, beside other work
        return self.env.run(label, self.command("install", paths, ("--no-compile", *options)))

    def build_wheel(self, label, paths, folder, options=(), env=None):
        """Build a wheel of what lock files name, and put it into a folder."""
        command = self.command("wheel", paths, ("--wheel-dir", str(folder), *options))
        return self.env.run(label, command, env=env, milestones=False)

    def command(self, what, paths, options):
        if not self.hashes:
            paths = [without_hashes(self.env, path) for path in paths]
        command = [str(self.env.python), "-m", "pip", what, "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes"] if self.hashes else []
        return command + list(options) + [part for path in paths for part in ("-r", str(path))]


def install_base(env, kind, installer):
    """torch and the packages of requirements.txt, which everything else is built with."""
    version = pins(LOCKS / "cuda.txt")["torch"]
    have = env.run_python("import importlib.metadata as m; print(m.version('torch'))")
    lock = kind
    if kind == "cpu" and have != version + "+cpu":
        show("[2/6] packages: torch %s first" % version)
        torch = env.state / "torch-cpu.txt"
        torch.write_text((ROOT / "requirements-torch-cpu.txt").read_text())
        try:
            installer.run("pip-torch", [torch], WHEELS)
        except SetupError as error:
            if "No matching distribution" not in str(error):
                raise
            show(
                "      pip offers no CPU build of torch %s here: taking the default one, which brings CUDA "
                "libraries" % version
            )
            lock = "cuda"
    elif kind == "cuda" and have == version + "+cpu":  # pip would leave it: +cpu is the same version to it
        env.run("pip-torch", [str(env.python), "-m", "pip", "uninstall", "--yes", "torch"])
    show("[2/6] packages: requirements.txt")
    took = installer.run("pip", [lock_of("requirements.txt", lock)], WHEELS)
    build = env.run_python("import importlib.metadata as m; print(m.version('torch'))")
    show("      done in %s; torch %s" % (took, build))


def install_rest(kind, files, installer):
    """The packages of the other requirements files."""
    plain = [
        lock_of(name, kind) for name in files if name not in ("requirements.txt", "requirements-gpu.txt")
    ]
    if plain:
        took = installer.run("pip-more", plain, WHEELS)
        show("      %d more requirements files: done in %s" % (len(plain), took))
    if "requirements-gpu.txt" in files:  # flash-attn's build reads the installed torch
        show("      flash-attn is compiled now: this can take an hour")
        installer.run("pip-flash-attn", [LOCKS / "gpu.txt"], ("--no-build-isolation",))


def fix_torchaudio(env):
    """Move torchaudio's CUDA-linked library away on CPU torch, back on CUDA torch; then the import must
    work."""
    cuda = env.run_python("import torch; print(torch.version.cuda)")
    package = env.site_packages / "torchaudio"
    library, aside = package / "lib", package / "lib.cuda"
    if cuda == "None" and library.exists():
        show("[3/6] torchaudio: its compiled part needs CUDA, torch here has none: moved to %s" % aside.name)
        shutil.rmtree(str(aside), ignore_errors=True)
        library.rename(aside)
    elif cuda != "None" and aside.exists() and not library.exists():
        aside.rename(library)
    if env.run_python("import torchaudio, transformers; torchaudio.transforms.Resample(8000, 16000)") is None:
        raise SetupError(
            "torchaudio or transformers does not import: see the error with: "
            "%s -c 'import torchaudio, transformers'" % env.python
        )


OPS_CHECK = """
import os
os.environ["DS_ACCELERATOR"] = %r
wanted = %r
from deepspeed.git_version_info import installed_ops
assert all(installed_ops[w] for w in wanted), installed_ops
from torch.utils import cpp_extension
def never(*a, **k):
    raise AssertionError("built just in time")
cpp_extension.load = never  # a prebuilt op is imported, never compiled
from deepspeed.ops.op_builder.all_ops import ALL_OPS
for w in wanted:
    ALL_OPS[w].load(verbose=False)
print("ok")
"""


# Communication through shared memory is CPU ranks'. Adam on the CPU is that of offloaded optimizer states,
# for which CPU ranks have little reason: it takes a minute to compile.
DEEPSPEED_OPS = {"cpu": ["deepspeed_shm_comm"], "cuda": ["cpu_adam"]}
OFFLOAD_OP = "cpu_adam"
BUILD_FLAGS = {"deepspeed_shm_comm": "DS_BUILD_SHM_COMM", OFFLOAD_OP: "DS_BUILD_CPU_ADAM"}


def missing_ops(env, kind, wanted):
    """The ops of DeepSpeed that have to be built: none, or all wanted ones beside those that are there."""
    have = env.run_python("import importlib.metadata as m; print(m.version('deepspeed'))")
    if have != pins(LOCKS / "deepspeed.txt")["deepspeed"]:
        return wanted
    if env.run_python(OPS_CHECK % (kind, wanted)) == "ok":
        return []
    there = env.run_python(
        "from deepspeed.git_version_info import installed_ops as o; print(*[n for n in o if o[n]])"
    )
    return sorted(set(wanted) | set(BUILD_FLAGS).intersection((there or "").split()))


def build_deepspeed(env, kind, ops, installer):
    """A wheel of DeepSpeed with its ops compiled for this CPU, in a folder of its own."""
    # DeepSpeed uses a prebuilt op only where the accelerator is the one that it was built under; a login node
    # shows none.
    flags = {"DS_ACCELERATOR": kind, "DS_ENABLE_NINJA": "1", **{BUILD_FLAGS[name]: "1" for name in ops}}
    folder = env.state / "deepspeed"
    shutil.rmtree(str(folder), ignore_errors=True)
    # --no-cache-dir: pip keeps a wheel that it once built, for another CPU or with other ops, and would
    # give that one again.
    took = installer.build_wheel(
        "deepspeed-ops",
        [LOCKS / "deepspeed.txt"],
        folder,
        ("--no-build-isolation", "--no-binary", "deepspeed", "--no-cache-dir"),
        dict(
            flags,
            MAX_JOBS=os.environ.get("MAX_JOBS", str(min(8, os.cpu_count() or 1))),
            PATH=str(env.folder / "bin") + os.pathsep + os.environ.get("PATH", ""),
        ),
    )  # ninja is in there
    show("      DeepSpeed's ops: done in %s" % took)


def install_deepspeed(env, kind, ops):
    """Install the wheel that was built, and check that its ops load."""
    wheels = [str(path) for path in (env.state / "deepspeed").glob("*.whl")]
    command = [env.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-index"]
    env.run("deepspeed", command + ["--no-compile", "--force-reinstall", *wheels])
    shutil.rmtree(str(env.state / "deepspeed"))
    if env.run_python(OPS_CHECK % (kind, ops)) != "ok":
        raise SetupError(
            "DeepSpeed was built, but its ops %s do not load: see %s" % (ops, env.state / "deepspeed-ops.log")
        )
    # the compiler used what this CPU can: train/preflight.py asks whether a node's can it, too
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith(("flags", "Features")):
            (env.state / "cpu").write_text(line.partition(":")[2].strip())
            break


def build_fused_op(env):
    command = [str(env.python), "-m", "model.ops.build"]
    show("      the fused op: done in %s" % env.run("fused-op", command, milestones=False))


def compile_modules(env):
    """Bytecode of all packages. Images and clusters often forbid Python to write it when it imports, and
    every process would then take some 10 s longer to start."""
    command = [env.python, "-m", "compileall", "-q", "-j", str(max(1, (os.cpu_count() or 1) // 2))]
    with contextlib.suppress(SetupError):  # packages hold files that are templates, or of another Python
        env.run("bytecode", [*command, env.site_packages], {"PYTHONDONTWRITEBYTECODE": ""}, milestones=False)


def install_the_rest(env, kind, files, wanted, installer):
    """What needs torch and the base packages: the ops are compiled while pip installs what else is
    asked for."""
    ops = missing_ops(env, kind, wanted)

    def packages():
        install_rest(kind, files, installer)
        compile_modules(env)

    parts = [lambda: build_fused_op(env), packages]
    if ops:
        show("[4/6] DeepSpeed's ops (%s), about 2 minutes" % ", ".join(ops))
        parts.insert(0, lambda: build_deepspeed(env, kind, ops, installer))
    show("[5/6] the fused op")
    with ThreadPoolExecutor(len(parts)) as pool:
        for part in [pool.submit(part) for part in parts]:
            part.result()
    if ops:
        install_deepspeed(env, kind, ops)


def install_project(env):
    show("[6/6] this project: the command soundwave")
    command = [env.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    took = env.run("project", command + ["--no-build-isolation", "--no-index", "--editable", str(ROOT)])
    show("      done in %s" % took)


def write_environment(env, kind):
    accelerator = "os.environ.setdefault('DS_ACCELERATOR', 'cpu')" if kind == "cpu" else "None"
    (env.site_packages / "soundwave_environment.pth").write_text(
        ENVIRONMENT_PTH.format(accelerator=accelerator)
    )


SUMMARY = """
import sys, torch, deepspeed, transformers
versions = ["%s %s" % (module.__name__, module.__version__) for module in (torch, deepspeed, transformers)]
print("Python %d.%d" % sys.version_info[:2], *versions, sep=", ")
"""


def set_up(options):
    folder = Path(options.venv)
    folder = folder if folder.is_absolute() else ROOT / folder
    env = Environment(folder)
    check_python()
    kind = which_kind(env, options.gpu)
    files = ["requirements.txt"]
    if options.dev:
        files += ["requirements-dev.txt", "requirements-docs.txt"] + (
            ["requirements-dev-cpu.txt"] if kind == "cpu" else []
        )
    files += ["requirements-%s.txt" % name for name in options.extras if name != OFFLOAD]
    ops = DEEPSPEED_OPS[kind] + (
        [OFFLOAD_OP] if kind == "cpu" and (options.dev or OFFLOAD in options.extras) else []
    )
    if options.flash_attn:
        files += ["requirements-gpu.txt"]
    stamp, digest = env.state / "done", fingerprint(kind)

    def complete():
        done = last_set_up(env)
        has_all = set(files) <= set(done["files"]) and set(ops) <= set(done.get("ops", []))
        if done.get("fingerprint") == digest and has_all and env.python.exists():
            show("set-up: %s is complete (%s)" % (options.venv, done["summary"]))
            return True
        return False

    if complete():
        return 0
    if options.check:
        show("set-up: %s is not complete: make setup" % options.venv)
        return 1
    check_machine(folder, kind)
    with lock(folder):
        if complete():  # by the set-up that was waited for
            return 0
        # What was there stays.
        last = last_set_up(env)
        files += [name for name in last["files"] if name not in files and (ROOT / name).exists()]
        ops += [name for name in last.get("ops", []) if name not in ops]
        if stamp.exists():
            stamp.unlink()
        began = time.time()
        make_venv(env)
        env.state.mkdir(exist_ok=True)
        (env.state / "kind").write_text(kind)
        write_environment(env, kind)
        installer = Installer(env, options.hashes)
        check_locks(files, kind)
        install_base(env, kind, installer)
        fix_torchaudio(env)
        install_the_rest(env, kind, files, ops, installer)
        install_project(env)
        summary = env.run_python(SUMMARY)
        if summary is None:
            raise SetupError(
                "the packages do not import together: see the error with: "
                "%s -c 'import torch, deepspeed, transformers'" % env.python
            )
        partial = stamp.with_name("done.partial")
        partial.write_text(
            json.dumps({"fingerprint": digest, "files": files, "ops": ops, "summary": summary})
        )
        partial.replace(stamp)
    show("set-up: %s is complete in %.0f s (%s)" % (options.venv, time.time() - began, summary))
    return 0


class lock:
    """One set-up at a time in a folder: a second one waits, then finds the work done. The lock is next to
    the folder, which making the environment empties."""

    def __init__(self, folder):
        folder = folder.resolve()
        self.path = folder.with_name(folder.name + ".lock")

    def __enter__(self):
        import fcntl

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(str(self.path), "w")
        except OSError as error:
            raise SetupError("cannot write %s: %s" % (self.path, error.strerror)) from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            show("another set-up works in this folder: waiting for it")
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


def main():
    parser = argparse.ArgumentParser(
        description="Fill .venv: packages, fixes, prebuilt ops. Quick when repeated."
    )
    parser.add_argument("--venv", default=".venv", help="folder of the virtual environment (default: .venv)")
    parser.add_argument(
        "--gpu",
        choices=("auto", "yes", "no"),
        default="auto",
        help="which torch: CUDA's where this machine has an NVIDIA GPU or the environment was made for one; or "  # noqa: E501
        "said (a login node without one: yes)",
    )
    parser.add_argument("--dev", action="store_true", help="also what tests and linting need")
    parser.add_argument(
        "--extras",
        nargs="*",
        choices=(*EXTRAS, OFFLOAD),
        default=[],
        help="also requirements-NAME.txt; offload: DeepSpeed's Adam on the CPU",
    )
    parser.add_argument(
        "--no-hashes",
        dest="hashes",
        action="store_false",
        help="do not compare packages with install/locks/: where a site has built some itself",
    )
    parser.add_argument(
        "--flash-attn", action="store_true", help="also flash-attn (compiled; needs CUDA's nvcc)"
    )
    parser.add_argument(
        "--check", action="store_true", help="only say whether the set-up is complete (exit 1: not)"
    )
    try:
        return set_up(parser.parse_args())
    except SetupError as error:
        print("error: %s" % error, file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
