"""A request that is refused before its body is read: the client gets the answer, not a reset connection."""

from __future__ import annotations

import http.client
import json
import subprocess
import time
from urllib.parse import urlsplit

import pytest

from tests.serving.conftest import serving

openai = pytest.importorskip("openai")
PIECE = bytes(1 << 20)
KEY = "secret-token"
FORM = {"Content-Type": "multipart/form-data; boundary=edge"}
HEAD = (
    b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\n"
)


@pytest.fixture(scope="module")
def address(model):
    with serving(model, token=KEY, open_requests=40) as (server, url):
        yield server, url


def send(
    url: str, path: str, megabytes: int, chunked: bool, headers=(), head: bytes = b""
) -> tuple[int, str]:
    """Send a body as urllib does: it reads no answer before it has sent everything, and its `Connection: close`
    makes uvicorn close the connection after the answer (otherwise uvicorn itself drops the rest)."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=120)

    def body():
        yield head
        for _ in range(megabytes):
            yield PIECE

    headers = {"Authorization": f"Bearer {KEY}", "Connection": "close"} | dict(headers)
    if not chunked:
        headers["Content-Length"] = str(len(head) + megabytes * len(PIECE))
    try:
        connection.request("POST", path, body(), headers, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize(
    "path, headers, megabytes, status",
    [
        ("/v1/audio/transcriptions", FORM, 150, 413),
        ("/v1/chat/completions", {}, 150, 413),
        ("/v1/audio/transcriptions", {"Content-Type": "text/plain"}, 40, 400),
        ("/v1/audio/translations", {"Authorization": "Bearer wrong"}, 40, 401),
        ("/v1/models", {}, 40, 405),
        ("/nowhere", {}, 40, 404),
    ],
)
def test_the_answer_arrives_though_the_body_is_not_read(address, path, headers, megabytes, status, chunked):
    if headers is FORM and not chunked:
        headers, head = dict(FORM), HEAD
    else:
        head = HEAD if headers is FORM else b""
    found, text = send(address[1], path, megabytes, chunked, headers, head)
    assert found == status
    assert "error" in json.loads(text)


def test_a_busy_server_s_answer_arrives_and_frees_its_place_at_once(address):
    server, url = address
    guard_limit, open_before = server.limits.open_requests, server.metrics.open._value.get()
    assert open_before == 0
    object.__setattr__(server.limits, "open_requests", 0)
    try:
        assert send(url, "/v1/chat/completions", 40, True)[0] == 429
    finally:
        object.__setattr__(server.limits, "open_requests", guard_limit)
    assert server.metrics.open._value.get() == 0


@pytest.mark.parametrize("expects", [True, False], ids=["expect", "no expect"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "length"])
def test_curl_shows_the_answer(address, tmp_path, expects, chunked):
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(150 << 20)
    command = ["curl", "-sS", "-m", "100", "-X", "POST", "-T", str(big), "-o", "-", "-w", "\n%{http_code}"]
    command += [
        "-H",
        f"Authorization: Bearer {KEY}",
        "-H",
        "Connection: close",
        *([] if expects else ["-H", "Expect:"]),
    ]
    command += ["-H", "Transfer-Encoding: chunked"] if chunked else []
    done = subprocess.run(
        [*command, f"{address[1]}/v1/chat/completions"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    body, status = done.stdout.rsplit("\n", 1)
    assert status == "413" and json.loads(body)["error"]["code"] == "too_large"


def test_openai_s_client_shows_the_answer(address):
    url = address[1]
    large = ("a.wav", b"".join([PIECE] * 150))
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as error:
            client.audio.transcriptions.create(model="tiny", file=large)
        assert error.value.status_code == 413
    small = ("a.wav", large[1][: 40 << 20])
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.audio.transcriptions.create(model="tiny", file=small)


def test_reading_what_is_left_is_bounded(model, monkeypatch):
    """A client that never stops sending keeps its connection for the bound's seconds, no longer."""
    from core import request_body

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 413, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async def forever():
        import asyncio

        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    def run(**bounds) -> tuple[list[dict], float]:
        import asyncio

        sent: list[dict] = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "headers": [(b"transfer-encoding", b"chunked")]}
        began = time.monotonic()
        asyncio.run(request_body.AnswerThenRead(app, **bounds)(scope, forever, send))
        return sent, time.monotonic() - began

    for bounds in ({"seconds": 0.2}, {"most_bytes": 5_000}):
        sent, took = run(**bounds)
        assert took < 5
        assert [one["type"] for one in sent] == ["http.response.start", *2 * ["http.response.body"]]
        assert sent[1]["body"] == b"no" and sent[1]["more_body"] and not sent[2].get("more_body")
