"""In front of the application: who may ask, how often and how much; every refusal is one sentence as JSON."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..config.serve_flags import Serving

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MINUTE = 60.0
_ADDRESSES = 10_000  # whose requests are counted; above that, those that have not asked for a while are forgotten
_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-store"}


class Refusal(Exception):
    """An answer that is an error: its code, its sentence, and seconds after which to ask again."""

    def __init__(self, code: int, sentence: str, retry_after: float | None = None):
        super().__init__(sentence)
        self.code, self.sentence, self.retry_after = code, sentence, retry_after

    @property
    def body(self) -> bytes:
        """Half of a surrogate pair, which a client's own words may have, as JSON's escape of it."""
        return json.dumps({"error": self.sentence}, ensure_ascii=False).encode(errors="backslashreplace")

    @property
    def headers(self) -> dict[str, str]:
        wait = {} if self.retry_after is None else {"retry-after": str(max(1, round(self.retry_after)))}
        return {"content-type": "application/json", **wait}


class Rate:
    """So many requests of an address in a minute: a bucket that fills as time goes by."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._per_minute, self._clock = per_minute, clock
        self._most = max(1.0, per_minute)  # with less room than one request it would never have one
        self._left: dict[str, tuple[float, float]] = {}  # by address: (requests left, at this time)

    def wait(self, address: str) -> float:
        """Take one; seconds until there is one, 0 where there was."""
        if not self._per_minute:
            return 0.0
        now = self._clock()
        left, at = self._left.get(address, (self._most, now))
        left = min(self._most, left + (now - at) * self._per_minute / _MINUTE)
        self._left[address] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > _ADDRESSES:
            full_after = _MINUTE * self._most / self._per_minute
            self._left = {x: (n, t) for x, (n, t) in self._left.items() if now - t < full_after}
        return 0.0 if left >= 1 else (1 - left) * _MINUTE / self._per_minute


class Guard:
    """The application within the limits of `Serving`. seen: called with (path, code, seconds) of every request."""

    def __init__(self, app: ASGIApp, serving: Serving, seen: Callable[[str, int, float], None]):
        self._app, self._serving, self._seen, self._rate = app, serving, seen, Rate(serving.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun, code = time.perf_counter(), 500

        async def answered(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                message["headers"] = [*message["headers"], *_encoded(_HEADERS)]
            await send(message)

        try:
            await self._app(scope, await self._checked(scope, receive), answered)
        except Refusal as refusal:
            headers = _encoded(refusal.headers)
            await answered({"type": "http.response.start", "status": refusal.code, "headers": headers})
            await answered({"type": "http.response.body", "body": refusal.body})
        finally:
            self._seen(scope["path"], code, time.perf_counter() - begun)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """What gives the body, which has arrived whole.  Errors: Refusal."""
        headers, limits = dict(scope["headers"]), self._serving
        host = _without_port(headers.get(b"host", b"").decode("latin-1"))
        if limits.names and host not in limits.names:
            raise Refusal(421, f"this server is not {host[:100]!r}: call it by {limits.names[0]}, or start it with "
                          "--allowed_hosts")  # fmt: skip
        if scope["method"] != "POST":
            return receive
        wait = self._rate.wait(scope["client"][0] if scope.get("client") else "")
        if wait:
            raise Refusal(429, f"more than {limits.rate:g} requests in a minute: wait {max(1, round(wait))} s", wait)
        kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"the body must be JSON, got {kind[:100] or 'no content type'!r}: send Content-Type: "
                          "application/json")  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(limits.timeout):
                body = await self._body(receive)
        except TimeoutError:
            raise Refusal(408, f"the body has not come within {limits.timeout:g} s: send it at once") from None
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again

    async def _body(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the connection was closed before the body had come")
            body += message.get("body", b"")
            if len(body) > self._serving.max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> Refusal:
        most = self._serving.max_bytes
        return Refusal(413, f"the body has more than {most:,} bytes: send the texts in several requests")


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _without_port(host: str) -> str:
    """`localhost:8000`, `[::1]:8000` -> `localhost`, `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
