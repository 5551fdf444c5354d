"""The command: what it refuses to start with, drain on TERM, kill and restart."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from model import artifact
from serving.__main__ import main, name_of, parse, token_of
from tests.serving.conftest import build, wav

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("process")
    return artifact.save(build(root), root / "sft" / "model")


class Process:
    """The server's command. wait_ready returns its address, of the log's line."""

    def __init__(self, saved, log, *more: str):
        command = [sys.executable, "-m", "serving", str(saved), "--port", "0", "--device", "cpu", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def wait_ready(self) -> str:
        until = time.monotonic() + 180
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            for event in self.events():
                if event["event"] == "ready":
                    return event["url"]
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)


def post(url: str, timeout: float = 120):
    return httpx2.post(
        f"{url}/audio/transcriptions",
        data={"model": "sft"},
        files={"file": ("c.wav", wav(0.5))},
        timeout=timeout,
    )


@pytest.mark.slow  # starts the command twice
def test_a_killed_server_starts_again_and_open_requests_are_answered_after_term(saved, tmp_path):
    first = Process(saved, tmp_path / "first")
    try:
        url = first.wait_ready()
        before = post(url).json()["text"]
    finally:
        first.stop()  # by kill -9
    port = url.rsplit(":", 1)[1].split("/")[0]
    second = Process(saved, tmp_path / "second", "--port", port, "--batch-wait", "1.5", "--verbose")
    try:
        assert second.wait_ready() == url  # the port is free again at once
        answers: list[str] = []
        threads = [
            threading.Thread(target=lambda: answers.append(post(url).json()["text"])) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 60
        while "soundwave_waiting_jobs 6.0" not in httpx2.get(url.removesuffix("/v1") + "/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.02)
        second.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert answers == [before] * 6
        assert second.process.wait(60) == 0
        with pytest.raises(httpx2.TransportError):
            post(url, 5)
        events = second.events()
        answered = [one for one in events if one["event"] == "request" and one.get("tokens")]
        assert len({one["request_id"] for one in answered}) == 6
        names = [one["event"] for one in events]
        assert names[0] == "loading" and names.index("loading") < names.index("ready") and "ended" in names
    finally:
        second.stop()


def test_what_cannot_be_served_is_one_line(saved, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "is not a model folder" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main([str(saved), "--port", str(taken.getsockname()[1])]) == 2
    error = capsys.readouterr().err
    assert "cannot listen on 127.0.0.1" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "70000"],
        ["--audio-seconds", "nan"],
        ["--waiting-jobs", "0"],
        ["--batch-wait", "-1"],
        ["--name", "a b"],
        ["--token-env", "A", "--token-file", "b"],
    ],
)
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit) as end:
        parse(["model", *options])
    assert end.value.code == 2


def test_the_key_comes_from_a_variable_or_a_private_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KEY", "a-long-secret")
    assert token_of(parse(["model", "--token-env", "KEY"])) == "a-long-secret"
    assert "KEY" not in os.environ  # later child processes do not have it
    with pytest.raises(ValueError, match="set this environment variable"):
        token_of(parse(["model", "--token-env", "KEY"]))
    file = tmp_path / "key"
    file.write_text("another-secret\n")
    file.chmod(0o600)
    assert token_of(parse(["model", "--token-file", str(file)])) == "another-secret"
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    token_of(parse(["model", "--token-file", str(file)]))
    assert "chmod 600" in capsys.readouterr().err
    file.write_text("short")
    with pytest.raises(ValueError, match="at least 8") as error:
        token_of(parse(["model", "--token-file", str(file)]))
    assert "short" not in str(error.value)


def test_the_served_name_is_the_stages(tmp_path):
    assert name_of(tmp_path / "runs" / "sft" / "model") == "sft"
    assert name_of(tmp_path / "my model") == "my-model"
