"""moto's S3 server, installed into .cache/s3-server from install/locks/s3-server.txt at first use."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from core.object_store import ROOT

LOCK = ROOT / "install" / "locks" / "s3-server.txt"


@pytest.fixture(scope="session")
def s3_packages():
    """moto's server in a folder of its own: its packages need other versions than ours. One process at a
    time: test workers begin together."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]
    folder = ROOT / ".cache" / "s3-server" / f"{digest}-{sys.version_info.minor}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_name(f".{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--no-compile", "--require-hashes"]
            command += ["--target", str(unfinished), "-r", str(LOCK)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            unfinished.rename(folder)
    return folder


@pytest.fixture
def s3(s3_packages, monkeypatch, tmp_path):
    """A bucket named `bucket` on moto's server; keys are in ~/.aws, as a user has them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, "PYTHONPATH": str(s3_packages)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=10)
            break
        except OSError:
            time.sleep(0.1)
    aws = tmp_path / "home" / ".aws"
    aws.mkdir(parents=True)
    (aws / "credentials").write_text(
        "[default]\naws_access_key_id = AKIATESTTESTTEST\naws_secret_access_key = hidden-key\n"
    )
    (aws / "config").write_text(f"[default]\nregion = us-east-1\nendpoint_url = {url}\n")
    yield url
    process.kill()
    process.wait()
