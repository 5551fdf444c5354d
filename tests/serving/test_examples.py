"""The container files and the examples of serving: what can be checked without a container engine."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from core.repository import PACKAGES
from serving.__main__ import parse

ROOT = Path(__file__).resolve().parents[2]
COMPOSE, UNIT = ROOT / "examples/serving/compose.yaml", ROOT / "examples/serving/soundwave.service"


def test_the_dockerfile_passes_hadolint():
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_has_a_target_for_each_kind_and_no_secret_or_cache_in_its_context():
    text = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"^FROM \S+ AS (cpu|cuda)$", text, re.M)) == {"cpu", "cuda"}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", ".cache", "runs", "data"} <= set(ignored)
    for package in PACKAGES:
        assert package not in ignored


def test_the_apptainer_definition_copies_what_its_set_up_needs():
    text = (ROOT / "Apptainer.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n(.*?)(?=^%|\Z)", text, re.M | re.S))
    assert set(sections) == {"files", "post", "environment", "runscript", "test"}
    for line in sections["files"].split("\n"):
        if line.strip():
            assert list(ROOT.glob(line.split()[0])), line
    copied = {line.split()[0] for line in sections["files"].splitlines() if line.strip()}
    assert {
        "install",
        "core",
        "model",
        "requirements*.txt",
    } <= copied  # the op's build imports model and core
    base = re.search(r"^From: (\S+)$", text, re.M)[1]
    assert f"CUDA_BASE={base}" in (ROOT / "Dockerfile").read_text()  # one CUDA for both


def test_compose_starts_the_server_with_options_that_it_has():
    service = yaml.safe_load(COMPOSE.read_text())["services"]["soundwave"]
    program, module, name, *options = service["command"]
    assert (program, module, name) == ("python", "-m", "serving")
    parsed = parse(options)
    assert parsed.token_env in service["environment"] and parsed.host == "0.0.0.0"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert int(service["stop_grace_period"].split("s")[0]) > parsed.drain_seconds


def test_the_unit_starts_the_server_with_options_that_it_has(tmp_path):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(UNIT)
    service = unit["Service"]
    _, module, name, *options = shlex.split(service["ExecStart"])
    assert (module, name) == ("-m", "serving")
    parsed = parse(options)
    assert parsed.token_file.name == service["LoadCredential"].split(":")[0]
    assert int(service["TimeoutStopSec"]) > parsed.drain_seconds
    if shutil.which("systemd-analyze"):
        copy = tmp_path / UNIT.name
        copy.write_text(UNIT.read_text().replace("/opt/soundwave/.venv/bin/python", sys.executable))
        done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
