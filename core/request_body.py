"""ASGI: answer a request whose body has not been read, without a reset of its connection.

A server that closes a connection on which bytes wait unread sends a reset, and a client that is still sending
sees the reset instead of the answer. So the answer is sent at once, and the connection is kept open while the
rest of the body is read and dropped (nginx's lingering_close), within the bounds below.
"""

from __future__ import annotations

import asyncio

REST_BYTES = 1 << 30
REST_SECONDS = 30.0


class AnswerThenRead:
    """Put it outside of everything that may answer before the body's end (413, 401, 404, 405 ...)."""

    def __init__(self, app, most_bytes: int = REST_BYTES, seconds: float = REST_SECONDS):
        self.app, self.most_bytes, self.seconds = app, most_bytes, seconds

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        has_more = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        # Such a client sends no body before it is asked to: an answer instead of that is enough.
        is_requested = headers.get(b"expect", b"").lower() != b"100-continue"

        async def reading():
            nonlocal has_more, is_requested
            is_requested = True
            message = await receive()
            has_more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def read_rest() -> None:
            received = 0
            try:
                async with asyncio.timeout(self.seconds):
                    while has_more and received < self.most_bytes:
                        received += len((await reading()).get("body", b""))
            except TimeoutError:
                pass

        async def answering(message):
            is_end = message["type"] == "http.response.body" and not message.get("more_body", False)
            if not (is_end and has_more and is_requested):
                await send(message)
                return
            await send(message | {"more_body": True})
            await read_rest()
            await send({"type": "http.response.body", "body": b""})

        await self.app(scope, reading, answering)
