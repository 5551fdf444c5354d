"""A chat model behind HTTP, by OpenAI's protocol: ask it, and let the key go to its address alone.

Redirects are refused (a server may name any other host), and so are credentials in the address, which would
be printed and stored. The key is in no message, file or traceback of this project.
"""

from __future__ import annotations

import ipaddress
import json
import time
from urllib.parse import urlsplit

import httpx2

from core.console import OneLine, one_line, printable

RETRIES = 4
LARGEST_REPLY = 4 << 20  # bytes


class EndpointError(OneLine, RuntimeError):
    """The server cannot be asked; one line: what, where, what to do."""


class AddressError(EndpointError):
    """An address or a key that is wrong before anything is sent."""


def checked_url(url: str) -> str:
    """Return an http or https address without a slash at its end. Errors: AddressError."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # `port` raises for what is no number
    except ValueError as error:
        raise AddressError(
            f"the endpoint is no address ({one_line(error)}): write it as http://localhost:8000/v1"
        ) from None
    if parts.username is not None or parts.password is not None:
        raise AddressError(
            f"the endpoint on {printable(host)} holds a user name or password, which would be stored with "
            f"the "
            "results: leave it out, and give a key in the environment"
        )
    if parts.scheme not in ("http", "https") or not host or not url.isprintable():
        shown = "" if "@" in url else f" {ascii(url)[:100]}"  # what is before an @ may be a password
        raise AddressError(
            f"the endpoint{shown} is not an http or https address: write it as http://localhost:8000/v1"
        )
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise AddressError(
            f"the endpoint on {host} holds a query (?...), which would be stored with the results: give the "
            f"base "
            "address alone, and a key in the environment"
        )
    return url.rstrip("/")


def checked_key(key: str | None, source: str) -> str | None:
    """Return the key of the environment variable `source`, without blanks around it. Errors: AddressError,
    without the key."""
    key = (key or "").strip()
    if any(not "!" <= sign <= "~" for sign in key):
        raise AddressError(
            f"the key in {source} holds a blank, a line break or another character that no key has: set it "
            f"again"
        )
    return key or None


def sent_in_clear(url: str) -> bool:
    """Whether what goes to `url` can be read on the way: http, to another machine."""
    parts = urlsplit(url)
    try:
        local = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        local = parts.hostname == "localhost"
    return parts.scheme == "http" and not local


class Endpoint:
    """POST URL/chat/completions, greedy. Errors of the constructor: AddressError."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None,
        *,
        key_source: str = "the environment",
        timeout: float = 120.0,
    ):
        self.target, self.model, self.timeout = checked_url(url) + "/chat/completions", model, timeout
        self._key = checked_key(key, key_source)
        try:
            httpx2.URL(self.target)
            self._client = httpx2.Client(follow_redirects=False, timeout=timeout)
        except (
            httpx2.InvalidURL,
            ValueError,
            ImportError,
            OSError,
        ) as error:  # of the address, a proxy or a certificate file
            raise AddressError(
                f"{self.target} cannot be asked ({one_line(error)}): check the address, and the proxy and "
                "certificate settings of the environment"
            ) from None

    def __call__(self, text: str) -> str:
        """Return the reply. Busy servers (408, 429, 5xx) and broken connections are asked again after 1, 2, 4
        s.

        Errors: EndpointError.
        """
        body = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": 32,
            "messages": [{"role": "user", "content": text}],
        }
        reason = ""
        for attempt in range(RETRIES):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                status, content, where = self._post(body)
            except httpx2.HTTPError as error:  # its text names addresses, never headers
                reason = f"gives no answer ({self._without_key(one_line(error))})"
                continue
            if 300 <= status < 400:
                raise EndpointError(
                    f"{self.target} answers {status}, a redirect to {self._without_key(where)[:100]}: give "
                    f"the "
                    "address that answers itself; the key is not sent on"
                )
            if status == 200:
                try:
                    return self._without_key(
                        str(json.loads(content)["choices"][0]["message"]["content"] or "")
                    )
                except (ValueError, LookupError, TypeError, RecursionError):
                    reason = "answers something else than a chat completion"
                    continue
            reason = f"answers {status}"
            if status not in (408, 429) and status < 500:
                raise EndpointError(
                    f"{self.target} {reason}: check the address, the model's name and the key"
                )
        raise EndpointError(
            f"{self.target} {reason} after {RETRIES} tries: start the server, then run the same command again"
        )

    def _post(self, body: dict) -> tuple[int, bytes, str]:
        """(status, content, Location of a redirect); what is too long or too slow is a broken connection."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        started, content = time.monotonic(), b""
        with self._client.stream("POST", self.target, json=body, headers=headers) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > LARGEST_REPLY:
                    raise httpx2.ReadError(f"more than {LARGEST_REPLY} bytes")
                if time.monotonic() - started > self.timeout:
                    raise httpx2.ReadTimeout(f"not complete after {self.timeout:g} s")
            return response.status_code, content, response.headers.get("Location", "nowhere")

    def _without_key(self, text: str) -> str:
        """A server could send the key back, which then would be stored."""
        return printable(text.replace(self._key, "***") if self._key else text)

    def close(self) -> None:
        self._client.close()
