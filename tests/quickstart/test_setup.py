"""The set-up refuses what cannot work, says why, and is quick when repeated; the README's commands exist."""

import argparse
import fcntl
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("setup_env", ROOT / "install/setup_env.py")
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {normal(line.split("==")[0]): line for line in lines if line and not line.startswith("-")}


def test_every_requirement_is_pinned_once():
    files = [*ROOT.glob("requirements*.txt"), ROOT / "install/constraints.txt"]
    seen: dict[str, tuple[str, str]] = {}
    for path in sorted(files):
        for name, line in pins(path).items():
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[^\s=]+", line), f"{path.name}: {line}"
            if name in seen and "constraints.txt" in (path.name, seen[name][0]):
                pytest.fail(f"{name} is pinned in {path.name} and in {seen[name][0]}")
            assert seen.get(name, ("", line))[1] == line, f"{path.name} and {seen[name][0]} differ on {name}"
            seen[name] = (path.name, line)
    assert {"torch", "deepspeed", "transformers", "peft", "webdataset", "torchaudio", "tensorboard"} <= seen.keys()
    assert "flash-attn" in pins(ROOT / "requirements-gpu.txt") and "flash-attn" not in pins(ROOT / "requirements.txt")


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
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--disable-pip-version-check", "no-such-package-of-ours==0"]
    with pytest.raises(setup_env.SetupError, match="pip-torch failed .exit 1.: .*No matching distribution found for no-such"):
        env.run("pip-torch", command)
    assert "No matching distribution" in (tmp_path / ".venv/.setup/pip-torch.log").read_text()


def test_the_stamp_knows_what_the_set_up_depends_on(monkeypatch, tmp_path):
    for name in ("requirements.txt", "install/setup_env.py", "model/ops/csrc/op.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    seen = {setup_env.fingerprint("cpu"), setup_env.fingerprint("cuda")}
    for name in ("requirements.txt", "install/setup_env.py", "model/ops/csrc/op.cpp"):
        (tmp_path / name).write_text("two")
        seen.add(setup_env.fingerprint("cpu"))
    assert len(seen) == 5
    (tmp_path / "README.md").write_text("anything")
    assert setup_env.fingerprint("cpu") in seen


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


def test_check_says_that_a_set_up_is_missing(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "install/setup_env.py", "--venv", tmp_path / "none", "--check"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "not complete" in done.stdout
    assert not (tmp_path / "none").exists()


def test_the_environment_is_made_under_a_lock_that_stands_beside_it(monkeypatch, tmp_path):
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
    for step in ("check_machine", "write_environment", "install_packages", "mend_torchaudio", "build_deepspeed",
                 "build_fused_op"):
        monkeypatch.setattr(setup_env, step, lambda *arguments: None)
    monkeypatch.setattr(setup_env, "make_venv", make_venv)
    monkeypatch.setattr(setup_env.Environment, "ask", lambda self, code: "Python")
    options = argparse.Namespace(venv=str(folder), gpu="no", dev=False, flash_attn=False, check=False)
    assert setup_env.set_up(options) == 0
    second.join()
    assert (folder / ".setup/kind").read_text() == "cpu"
    assert codes == [0] and len(made) == 1, "the second one waits, and finds the work done"
    assert ".venv.lock" in (ROOT / ".gitignore").read_text().splitlines()


def fenced(text: str) -> list[str]:
    """The commands of a Markdown text: lines of indented blocks, comments cut off."""
    found = [line[4:].split("  #")[0].strip() for line in text.splitlines() if re.match(r"    \S", line)]
    return [line for line in found if re.match(r"(make|sbatch|python|deepspeed|for|slurm/)\b", line)]


@pytest.mark.parametrize("readme", ["README.md", "examples/quickstart/README.md"])
def test_make_targets_of_the_readme_exist(readme):
    text = (ROOT / readme).read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(fenced(text)) + " ".join(re.findall(r"`(make [^`]+)`", text))))
    assert targets or readme != "README.md"
    for target in sorted(targets):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def test_files_and_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for command in fenced(text):
        for path in re.findall(r"(?<![\w/.])(?:train|data_tools|slurm|examples)/[\w./-]+\.(?:py|sh|yaml)", command):
            assert (ROOT / path).exists(), f"{path}, in: {command}"
        module = re.search(r"-m ([\w.]+)", command)
        if module:
            assert importlib.util.find_spec(module.group(1)), command


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    ["data_tools/pack.py", "--help"],
    ["-m", "evaluation.run", "--help"],
    ["-m", "evaluation.answer", "--help"],
    ["-m", "examples.quickstart.demo", "--dry-run"],
    ["-m", "train.run", "examples/quickstart/stage1.yaml", "--print-config"],
    ["-m", "train.run", "train/recipes/stage1.yaml", "--dry-run"],
    ["-m", "train.run", "train/recipes/stage2.yaml", "--dry-run"],
    ["-m", "train.run", "train/recipes/stage3.yaml", "--dry-run"],
])
def test_the_readme_s_programs_answer(command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"\.PHONY: (.*)", text).group(1).split()) - {"setup-dev"}
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert phony == set(re.findall(r"^  make (\S+)", shown, re.MULTILINE))
