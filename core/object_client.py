"""The process behind core/object_store.py: requests on standard input, answers on standard output.

    python core/object_client.py URL TIMEOUT

A request is a line of JSON ({"id", "do": get | head | put | list | delete, "name", ...}); an answer is a line
of JSON ({"id", "bytes", "size", "etag"}, or {"id", "error", "errno"}) and that many bytes. Requests run
at the same time and answers come in any order. The process ends with its standard input.
"""

from __future__ import annotations

import asyncio
import configparser
import errno
import json
import netrc
import os
import re
import signal
import sys
from base64 import b64encode
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

RETRIES = 3
AT_A_TIME = 64
MOST_NAMES = 1000  # of one listing
_STATUS = re.compile(r"status(?: code)?:?\D{0,24}?\b([345]\d\d)\b", re.IGNORECASE)
_KIND = re.compile(r"kind: (Connect|Timeout|Interrupted|Decode|Request)")
_CAUSES = {
    "Connect": "the server cannot be reached",
    "Timeout": "the request timed out",
    "Interrupted": "the connection was closed before the whole answer came",
    "Decode": "the connection was closed before the whole answer came",
    "Request": "the connection failed",
}


def aws_profile() -> dict[str, Any]:
    """Return keys, region and endpoint of the profile in ~/.aws, as far as the environment names no keys.

    object_store finds the others itself: AWS_* variables, container and instance roles, web identities.
    """
    profile_values: dict[str, str] = {}
    environment = os.environ
    profile = environment.get("AWS_PROFILE") or "default"
    home = Path.home() / ".aws"
    for variable, name, section in (
        ("AWS_CONFIG_FILE", "config", "default" if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile),
    ):
        parser = configparser.RawConfigParser()
        with suppress(configparser.Error, OSError, UnicodeDecodeError):
            parser.read(environment.get(variable) or home / name)
            profile_values |= dict(parser.items(section)) if parser.has_section(section) else {}
    options = {}
    if not {"AWS_REGION", "AWS_DEFAULT_REGION"} & environment.keys() and "region" in profile_values:
        options["region"] = profile_values["region"]
    if endpoint := environment.get("AWS_ENDPOINT_URL_S3") or (
        profile_values.get("endpoint_url") if "AWS_ENDPOINT_URL" not in environment else None
    ):
        options["endpoint"] = endpoint
    if "AWS_ACCESS_KEY_ID" not in environment and "aws_access_key_id" in profile_values:
        options["access_key_id"] = profile_values["aws_access_key_id"]
        options["secret_access_key"] = profile_values.get("aws_secret_access_key", "")
        if "aws_session_token" in profile_values:
            options["session_token"] = profile_values["aws_session_token"]
    return options


def basic_authorization(host: str | None) -> dict[str, str]:
    """Return the header of a host that ~/.netrc (or $NETRC) has a password for."""
    with suppress(OSError, netrc.NetrcParseError):
        path = os.environ.get("NETRC")
        if login := netrc.netrc(path).authenticators(host or ""):
            return {"Authorization": "Basic " + b64encode(f"{login[0]}:{login[2]}".encode()).decode()}
    return {}


def open_store(url: str, seconds: float) -> Any:
    """Return obstore's store of a URL."""
    from obstore.store import from_url

    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    options: dict[str, Any] = aws_profile() if scheme == "s3" else {}
    client: dict[str, Any] = {"timeout": timedelta(seconds=seconds), "connect_timeout": timedelta(seconds=10)}
    if scheme != "https":  # the services' own endpoints are https; http is used where a user's endpoint is
        client["allow_http"] = True
    if scheme in ("http", "https") and (headers := basic_authorization(host)):
        client["default_headers"] = headers
    retry: Any = {
        "max_retries": RETRIES,
        "retry_timeout": timedelta(seconds=2 * seconds),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        },
    }
    return cast(Any, from_url)(url, client_options=client, retry_config=retry, **options)


def reason_of(error: Exception) -> tuple[str, int]:
    """Return one line and an errno. Nothing of the error's own text: an answer's body may hold key ids."""
    name, text = type(error).__name__, str(error)
    if name == "NotFoundError" or isinstance(error, FileNotFoundError):
        return "there is no such object", errno.ENOENT
    if name in ("PermissionDeniedError", "UnauthenticatedError") or "redential" in text[:300]:
        return "access is denied: check the credentials of this process", errno.EACCES
    if name == "NotSupportedError":
        return "the server does not answer range requests", errno.EOPNOTSUPP
    if "timed out" in text or "timeout" in text.split("retry_timeout")[0].lower():
        return _CAUSES["Timeout"], errno.ETIMEDOUT
    if status := _STATUS.search(text):
        return f"the server answers with HTTP status {status[1]}", errno.EIO
    if kind := _KIND.search(text):
        return _CAUSES[kind[1]], errno.EIO
    return f"the request failed ({name})", errno.EIO


async def answer(store: Any, question: dict) -> tuple[bytes, int, str | None]:
    """Return (data, size of the whole object, ETag)."""
    import obstore

    name = question["name"]
    if question["do"] == "head":
        meta = await obstore.head_async(store, name)
        return b"", meta["size"], meta.get("e_tag")
    if question["do"] == "put":
        stored = await obstore.put_async(store, name, Path(question["path"]))
        return b"", os.path.getsize(question["path"]), stored.get("e_tag")
    if question["do"] == "list":
        names = []
        async for objects in obstore.list(store, chunk_size=MOST_NAMES):
            names = [found["path"] for found in objects]
            break
        return json.dumps(names).encode(), 0, None
    if question["do"] == "delete":
        await obstore.delete_async(store, name)
        return b"", 0, None
    options: Any = {}
    if question["size"] is not None:
        options["range"] = (question["start"], question["start"] + question["size"])
    result = await obstore.get_async(store, name, options=options)
    data = bytes(await result.bytes_async())
    return data, result.meta["size"], result.meta.get("e_tag")


async def serve(url: str, seconds: float) -> None:
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    gate, running, output = asyncio.Semaphore(AT_A_TIME), set(), sys.stdout.buffer
    store: Any = None
    failure: Exception | None = None
    try:
        store = open_store(url, seconds)
    except Exception as error:  # told in answer to each request
        failure = error

    async def one(question: dict) -> None:
        head: dict[str, Any] = {"id": question["id"]}
        data = b""
        try:
            if failure is not None:
                raise failure
            async with gate:
                data, size, etag = await answer(store, question)
            head |= {"bytes": len(data), "size": size, "etag": etag}
        except Exception as error:  # the library has no list of what it raises
            head["error"], head["errno"] = reason_of(error)
        output.write(json.dumps(head).encode() + b"\n" + data)
        output.flush()

    while line := await reader.readline():
        task = asyncio.create_task(one(json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)


if __name__ == "__main__":
    # Signals of the batch system go to all processes of a job; this one ends with its parent.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with suppress(BrokenPipeError):
        asyncio.run(serve(sys.argv[1], float(sys.argv[2])))
    os._exit(0)
