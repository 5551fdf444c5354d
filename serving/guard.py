"""In front of every route: request id, token, open requests, size of the body, log line, metrics.

A refusal is sent before the body is read; core/request_body.py, outside of this, reads the rest.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid

from serving.limits import Limits
from serving.metrics import Metrics
from serving.problems import Problem

logger = logging.getLogger("soundwave.serving")
ROUTES = (
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/chat/completions",
    "/v1/models",
    "/health",
    "/metrics",
)
OPEN = ("/health",)  # without a token
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Guard:
    """ASGI middleware."""

    def __init__(self, app, limits: Limits, metrics: Metrics, token: str | None = None):
        self.app, self.limits, self.metrics, self.token = app, limits, metrics, token
        self.open = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        log: dict[str, object] = {"request_id": request_id}
        scope.setdefault("state", {}).update(request_id=request_id, log=log)
        began, status, path = time.monotonic(), 499, scope["path"]  # 499: the client left
        route = path if path in ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"

        counted = route in ROUTES[:3]
        ended: float | None = None

        def end() -> None:
            nonlocal ended
            if ended is None:
                ended = time.monotonic()
                self.open -= counted
                self.metrics.open.set(self.open)

        async def sending(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = dict(message)
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif not message.get("more_body", False):
                end()  # before the rest of a refused body is read
            await send(message)

        self.open += counted
        self.metrics.open.set(self.open)
        try:
            if problem := self._refusal(path, headers, counted):
                await send_problem(problem, sending)
            else:
                await self.app(scope, self._limited(receive), sending)
        finally:
            end()
            took = (ended or began) - began
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(took)
            level = logging.DEBUG if route in ("/health", "/metrics") else logging.INFO
            fields = {
                "method": scope["method"],
                "path": path[:200],
                "status": status,
                "seconds": round(took, 4),
            }
            logger.log(level, "request", extra=log | fields)

    def _refusal(self, path: str, headers: dict[bytes, bytes], counted: bool) -> Problem | None:
        if self.token is not None and path not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self.token.encode())
            if scheme.lower() != b"bearer" or not right:
                return Problem(401, "the API key is missing or wrong", code="invalid_api_key")
        if counted and self.open > self.limits.open_requests:
            return Problem(429, "the server is busy: try again later", code="queue_full", retry_after=2)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> Problem:
        return Problem(413, f"the request has more than {self.limits.body_bytes:,} bytes", code="too_large")

    def _limited(self, receive):
        received, is_read = 0, False
        until = asyncio.get_running_loop().time() + self.limits.request_seconds

        async def counted():
            nonlocal received, is_read
            if is_read:  # what follows the body is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise Problem(408, "the request's body came too slowly", code="timeout") from None
            received += len(message.get("body", b""))
            if received > self.limits.body_bytes:
                raise self._too_large()
            is_read = not message.get("more_body")
            return message

        return counted


async def send_problem(problem: Problem, send) -> None:
    body = json.dumps(problem.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in problem.headers().items()]
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
