"""`pack --out s3://...`: the bytes of a local packing, on moto's S3 server behind a proxy with faults."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("obstore", reason="make setup EXTRAS=stores")

from core.object_store import ROOT, ObjectStore
from data_tools import pack
from data_tools.shards import INDEX_NAME, ShardIndex
from data_tools.verify import check
from tests.data_tools.test_pack import folder_bytes
from tests.stream.s3_server import s3, s3_packages

__all__ = ["s3", "s3_packages"]  # fixtures

URL = "s3://bucket/shards/packed"
SHAPE = ["--shard-mb", "0.05", "--max-broken-share", "1"]
ANYONE = "AWS4-HMAC-SHA256 Credential=A/20240101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
SECRETS = ("hidden-key", "AKIATESTTESTTEST")


class FaultyServer(ThreadingHTTPServer):
    """Passes requests on to an S3 server. faults: object name -> what its next PUTs get instead: an HTTP
    status, or "cut" (the connection is closed). at_put: called with the name before each PUT."""

    daemon_threads = True

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.faults: dict[str, list[int | str]] = {}
        self.puts: Counter[str] = Counter()
        self.at_put = lambda name: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        """A client that was killed closes its connections: nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = urlsplit(self.path).path.rpartition("/")[2]
        if self.command == "PUT":
            self.server.puts[name] += 1
            self.server.at_put(name)
            fault = self.server.faults.get(name)
            what = fault.pop(0) if fault else None
            if what == "cut":
                self.close_connection = True
                return
            if isinstance(what, int):
                self._answer(what, {}, b"<Error>hidden-key</Error>")
                return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, {"Authorization": ANYONE, **dict(self.headers)})
        answer = upstream.getresponse()
        self._answer(answer.status, dict(answer.getheaders()), answer.read())
        upstream.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(key, value)
        if "content-length" not in map(str.lower, headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def proxy(s3, tmp_path, monkeypatch):
    """The S3 server behind a proxy, whose address is in ~/.aws; packing's work goes below tmp_path."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, folder in (("HOME", "home"), ("SOUNDWAVE_SHARD_CACHE", "cache"), ("TMPDIR", "scratch")):
        monkeypatch.setenv(name, str(tmp_path / folder))
        (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.setattr("tempfile.tempdir", None)
    proxy = FaultyServer(s3)
    config = tmp_path / "home" / ".aws" / "config"
    config.write_text(f"[default]\nregion = us-east-1\nendpoint_url = http://127.0.0.1:{proxy.server_port}\n")
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def run(corpus: Path, out: str | Path, *more: str) -> int:
    return pack.main(["--manifest", str(corpus), "--out", str(out), *SHAPE, "--workers", "2", *more])


def tars(files: dict[str, bytes]) -> list[str]:
    return sorted(name for name in files if name.endswith(".tar"))


def objects(url: str = URL) -> dict[str, bytes]:
    store = ObjectStore(url)
    try:
        return {name: store.read(name).data for name in store.names()}
    finally:
        store.close()


@pytest.fixture
def local(corpus, tmp_path) -> dict[str, bytes]:
    """The files that the same command writes into a folder."""
    assert run(corpus, tmp_path / "packed") == 0
    return folder_bytes(tmp_path / "packed")


@pytest.mark.slow
def test_objects_are_the_files_of_a_local_packing(proxy, corpus, local, tmp_path, capsys):
    work, tars_at_once = tmp_path / "work", []
    proxy.at_put = lambda name: tars_at_once.append(len([*work.rglob("*.tar*")]))
    capsys.readouterr()
    assert run(corpus, URL, "--work", str(work)) == 0
    first = capsys.readouterr().out
    assert objects() == local
    assert len(tars(local)) >= 5
    assert max(tars_at_once) <= 2, "a shard is removed when it is uploaded"
    assert [path for path in work.rglob("*") if path.is_file()] == []
    assert f"{URL}: " in first and str(work) not in first
    assert check(URL, 5, 1) == []

    assert run(corpus, URL, "--work", str(work)) == 0
    assert "is packed already" in capsys.readouterr().out
    assert run(corpus, URL, "--work", str(work), "--seed", "1") == 2
    assert f"{URL} is packed already, with other options" in capsys.readouterr().err
    assert objects() == local


@pytest.mark.slow
def test_passing_faults_are_retried_and_a_lasting_one_ends_in_one_line(proxy, corpus, local, capsys):
    passing, lasting = tars(local)[0], tars(local)[3]
    proxy.faults = {passing: [503, "cut"], lasting: [500] * 50}
    capsys.readouterr()
    assert run(corpus, URL) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"cannot write {lasting}" in error and "run the same command again" in error
    assert not any(secret in error for secret in SECRETS)
    there = objects()
    assert INDEX_NAME not in there and there[passing] == local[passing]

    proxy.faults, uploaded = {}, set(there)
    proxy.puts.clear()
    assert run(corpus, URL) == 0
    assert objects() == local
    assert not (uploaded & {name for name in proxy.puts if name.endswith(".tar")}), "none is uploaded twice"


@pytest.mark.slow
def test_a_killed_packing_resumes_with_the_same_bytes(proxy, corpus, local, tmp_path):
    command = [sys.executable, "-m", "data_tools.pack", "--manifest", str(corpus), "--out", URL, *SHAPE]
    command += ["--workers", "2", "--work", str(tmp_path / "work")]
    for name in (tars(local)[2], tars(local)[4], "samples.npy", INDEX_NAME):
        reached = threading.Event()

        def hold(put: str, name: str = name, reached: threading.Event = reached) -> None:
            if put == name:
                reached.set()
                time.sleep(2)

        proxy.at_put = hold
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
        assert reached.wait(120)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        proxy.at_put = lambda name: None
    time.sleep(2.5)  # what the proxy holds is passed on, or not
    assert run(corpus, URL, "--work", str(tmp_path / "work")) == 0
    assert objects() == local


@pytest.mark.slow
def test_a_shard_that_was_removed_is_packed_again(proxy, corpus, local):
    proxy.faults = {"samples.npy": [500] * 50}
    assert run(corpus, URL) == 1
    store = ObjectStore(URL)
    store.delete(tars(local)[1])
    store.close()
    proxy.faults = {}
    assert run(corpus, URL) == 0
    assert objects() == local


@pytest.mark.slow
def test_another_command_and_foreign_objects_are_refused(proxy, corpus, local, tmp_path, capsys):
    proxy.faults = {tars(local)[3]: [500] * 50}
    assert run(corpus, URL) == 1
    capsys.readouterr()
    assert run(corpus, URL, "--seed", "1", "--work", str(tmp_path / "elsewhere")) == 2
    assert "was begun with other options" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    store = ObjectStore("s3://bucket/other")
    store.upload(tmp_path / "notes.txt", "notes.txt")
    store.close()
    assert run(corpus, "s3://bucket/other") == 2
    assert "holds notes.txt, which this command did not write" in capsys.readouterr().err
    assert run(corpus, "s3://bucket/other", "--dry-run") == 2
    assert run(corpus, "s3://nowhere/packed") != 0
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: s3://nowhere/packed") and not any(key in error for key in SECRETS)


@pytest.mark.slow
def test_splits_and_parts_go_to_their_places(proxy, corpus, tmp_path):
    splits = ["--splits", "train=0.6,test=0.4", "--split-by", "id"]
    assert run(corpus, tmp_path / "all", *splits) == 0
    work = ["--work", str(tmp_path / "work")]
    assert run(corpus, "s3://bucket/all", *work, *splits, "--part", "0/2") == 0
    assert run(corpus, "s3://bucket/all", *work, *splits, "--part", "1/2") == 0
    assert pack.main(["--merge", "--out", "s3://bucket/all", *work]) == 0
    for split in ("train", "test"):
        assert objects(f"s3://bucket/all/{split}") == folder_bytes(tmp_path / "all" / split)
        assert len(ShardIndex.load(f"s3://bucket/all/{split}")) > 0


@pytest.mark.slow
def test_a_second_process_waits_for_the_first(proxy, corpus, local, capsys):
    command = [sys.executable, "-m", "data_tools.pack", "--manifest", str(corpus), "--out", URL, *SHAPE]
    reached = threading.Event()

    def hold(put: str) -> None:
        if put == tars(local)[1]:
            reached.set()
            time.sleep(3)

    proxy.at_put = hold
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        assert reached.wait(120)
        capsys.readouterr()
        assert run(corpus, URL) == 0
        shown = capsys.readouterr()
    assert first.returncode == 0
    assert "is being packed by another process" in shown.err and "is packed already" in shown.out
    assert proxy.puts[tars(local)[2]] == 1
    assert objects() == local


@pytest.mark.slow
def test_googles_store_gets_the_same_objects(proxy, corpus, local, tmp_path, monkeypatch):
    """Google's XML interface is that of S3: the same server takes its part."""
    server = f"http://127.0.0.1:{proxy.server_port}"
    account = {"gcs_base_url": server, "disable_oauth": True, "client_email": "", "private_key": ""}
    (tmp_path / "account.json").write_text(json.dumps(account | {"private_key_id": ""}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    assert run(corpus, "gs://bucket/packed") == 0
    assert objects("gs://bucket/packed") == local


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "s3://me:hidden-key@bucket/x"], "holds credentials"),
        (["--out", "https://host/x"], "python -m data_tools.copy_packed FOLDER https://host/x"),
        (["--out", "s3://bucket/x", "--part", "0/2"], "need --work DIR"),
        (["--out", "folder", "--work", "elsewhere"], "--work is for an --out that is a URL"),
    ],
)
def test_wrong_places_give_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        pack.main(["--manifest", "m.jsonl", *arguments])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert message in error and "hidden-key" not in error and "Traceback" not in error


def test_without_the_package_the_extra_is_named(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(corpus, URL, "--work", str(tmp_path / "work")) == 2
    assert "make setup EXTRAS=stores" in capsys.readouterr().err


def test_the_marker_names_no_credentials(tmp_path, monkeypatch):
    """What is written into the bucket beside the packing: the digest of the options alone."""
    from data_tools.upload import Upload

    written: dict[str, str] = {}
    upload = Upload(URL)
    monkeypatch.setattr(
        ObjectStore, "upload", lambda self, path, name: written.update({name: path.read_text()})
    )
    upload.begin("0" * 64, tmp_path)
    assert {name: json.loads(text) for name, text in written.items()} == {
        ".pack-begun.json": {"options": "0" * 64}
    }
