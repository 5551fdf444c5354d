"""The client of chat servers: where the key goes, where it does not, and what a bad server or address ends
in. Loopback only."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from evaluation import endpoint, judge
from evaluation.endpoint import AddressError, Endpoint, EndpointError, checked_key, checked_url, sent_in_clear
from tests.hostile import is_one_line

KEY = "sk-SECRET123"


class Hosts:
    """Two servers: the one that is asked, which answers as `mode` says, and another host."""

    def __init__(self):
        self.mode, self.seen = 200, []
        hosts = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked = self.server is hosts.asked
                hosts.seen.append(
                    ("asked" if asked else "other", self.command, self.headers.get("Authorization"))
                )
                mode = hosts.mode if asked else 200
                if isinstance(mode, int) and 300 <= mode < 400:
                    self.send_response(mode)
                    self.send_header("Location", f"http://127.0.0.2:{hosts.other.server_port}/{KEY}")
                    self.end_headers()
                    return
                self.send_response(mode if isinstance(mode, int) else 200)
                self.end_headers()
                if mode == "endless":
                    try:
                        while True:
                            self.wfile.write(b"x" * (1 << 16))
                    except OSError:
                        return
                elif mode == "echo":
                    self.wfile.write(
                        json.dumps({"choices": [{"message": {"content": f"7 9 {KEY} \x1b[2J"}}]}).encode()
                    )
                elif isinstance(mode, bytes):
                    self.wfile.write(mode)
                else:
                    self.wfile.write(b'{"choices": [{"message": {"content": "7 9"}}]}')

            do_GET = do_POST

            def log_message(self, *arguments):
                pass

        self.asked, self.other = (
            ThreadingHTTPServer((host, 0), Handler) for host in ("127.0.0.1", "127.0.0.2")
        )
        self.url = f"http://127.0.0.1:{self.asked.server_port}/v1"
        for server in (self.asked, self.other):
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture(scope="module")
def running():
    hosts = Hosts()
    yield hosts
    for server in (hosts.asked, hosts.other):
        server.shutdown()
        server.server_close()


@pytest.fixture
def hosts(running, monkeypatch):
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running.mode, running.seen = 200, []
    return running


def test_the_key_goes_to_its_address(hosts):
    assert Endpoint(hosts.url + "/", "m", f" {KEY}\r\n")("x") == "7 9"
    assert Endpoint(hosts.url, "m", "")("x") == "7 9"
    assert hosts.seen == [("asked", "POST", f"Bearer {KEY}"), ("asked", "POST", None)]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(hosts, status):
    hosts.mode = status
    with pytest.raises(EndpointError, match=f"answers {status}, a redirect to http://127.0.0.2") as error:
        Endpoint(hosts.url, "m", KEY)("x")
    assert (
        [name for name, *_ in hosts.seen] == ["asked"]
        and KEY not in str(error.value)
        and is_one_line(error.value)
    )


@pytest.mark.parametrize(
    "mode, tries, says",
    [
        (401, 1, "answers 401: check the address, the model's name and the key"),
        (404, 1, "answers 404"),
        (429, 4, "answers 429 after 4 tries"),
        (503, 4, "answers 503 after 4 tries"),
        ("endless", 4, "gives no answer .more than 1000000 bytes. after 4 tries"),
        (b"<html>", 4, "answers something else than a chat completion after 4 tries"),
        (b"[]", 4, "something else"),
        (b'{"choices": []}', 4, "something else"),
        (b'{"choices": [null]}', 4, "something else"),
        (b"[" * 100_000, 4, "something else"),
        (b"\xff", 4, "something else"),
    ],
)
def test_bad_servers_are_one_line(hosts, monkeypatch, mode, tries, says):
    monkeypatch.setattr(endpoint, "LARGEST_REPLY", 1_000_000)
    hosts.mode = mode
    with pytest.raises(EndpointError, match=says) as error:
        Endpoint(hosts.url, "m", KEY)("x")
    assert len(hosts.seen) == tries and is_one_line(error.value) and KEY not in str(error.value)


def test_a_key_that_is_sent_back_is_not_kept(hosts):
    hosts.mode = "echo"
    assert Endpoint(hosts.url, "m", KEY)("x") == r"7 9 *** \x1b[2J"


@pytest.mark.parametrize("key", [f"{KEY}\nX-Evil: 1", f"{KEY} b", "sk-ключ", f"{KEY}\0"])
def test_keys_that_are_none_are_refused_unshown(key):
    with pytest.raises(AddressError, match="the key in JUDGE_KEY holds") as error:
        checked_key(key, "JUDGE_KEY")
    assert key[:5] not in str(error.value) and is_one_line(error.value)


@pytest.mark.parametrize(
    "url, says",
    [
        ("http://user:hunter2@host/v1", "user name or password"),
        ("http://hunter2@host/v1", "user name or password"),
        ("user:hunter2@host/v1", "not an http or https address"),
        ("http://host/v1?key=hunter2", "a query"),
        ("http://host/v1#hunter2", "a query"),
        ("file:///etc/passwd", "not an http"),
        ("ftp://host/", "not an http"),
        ("localhost:8000/v1", "not an http"),
        ("", "not an http"),
        ("http://", "not an http"),
        ("http://host:port/v1", "is no address"),
        ("http://[::1/v1", "is no address"),
        ("http://host/\n", "not an http"),
        ("http://host/\x1b]2J", "not an http"),
        ("http://host\x1b[2J/", "is no address"),
    ],
)
def test_addresses_that_are_refused(url, says):
    with pytest.raises(AddressError, match=says) as error:
        checked_url(url)
    assert "hunter2" not in str(error.value) and is_one_line(error.value)


@pytest.mark.parametrize(
    "url, clear",
    [
        ("http://localhost:8000/v1", False),
        ("http://127.0.0.1/v1", False),
        ("http://[::1]/v1", False),
        ("https://host/v1", False),
        ("http://host/v1", True),
        ("http://10.0.0.1/v1", True),
        ("http://localhost.evil.org/v1", True),
    ],
)
def test_what_can_be_read_on_the_way(url, clear):
    assert checked_url(url) == url and sent_in_clear(url) == clear


def test_proxy_settings_that_cannot_be_used_are_one_line(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:1")
    with pytest.raises(AddressError, match="proxy and certificate settings") as error:
        Endpoint("http://host/v1", "m", KEY)
    assert is_one_line(error.value)


def test_the_judge_keeps_and_prints_no_key(hosts, tmp_path, monkeypatch, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "1", "reference": "a", "prediction": "b"}) + "\n")
    hosts.mode = "echo"
    with_password = hosts.url.replace("//", f"//u:{KEY}@")
    for key, url, code in ((KEY, hosts.url, 0), (f"{KEY}\n{KEY}", hosts.url, 2), (KEY, with_password, 2)):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert judge.main([str(file), "--endpoint", url]) == code
    hosts.mode = 302
    assert judge.main([str(file), "--endpoint", hosts.url, "--judge-model", "other"]) == 1
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err and "Traceback" not in printed.err
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())
