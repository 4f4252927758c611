"""Who may ask the page's server, and what every answer says to the browser.

The server runs code on the machine of whoever started it, so only their own browser may ask:

1. The token made at the start comes with each request: as ``/?token=T`` once, which puts it into a cookie that no
   script reads, from then on in that cookie, or as ``Authorization: Bearer T``. A second one, `once`, opens the page a
   single time: a browser is started with it, and command lines can be read by others.
2. Host is this machine's own name, so that a foreign name that is made to point here (DNS rebinding) leads nowhere.
3. An Origin, if the browser names one, is the page's own; whatever changes something carries a header that a form on
   another page cannot send.
4. Every answer forbids to be framed, guessed at, kept, or read by another page.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MARK = b"x-viscircuits"  # the header that a form cannot send
NOTHING = b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
ALWAYS: Headers = [
    (b"content-security-policy", NOTHING),  # the page itself says what it needs
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


class Door:
    """An ASGI application before another: asks who is there, and sees the answer out.

    Parameters
    ----------
    inside
        The application that answers whoever may come in.
    port
        Where it listens; part of the Host and Origin that are its own.
    token
        What every request must know.
    once
        What may stand in the first address in its place, a single time.
    """

    def __init__(self, inside: Application, port: int, token: str, once: str | None = None) -> None:
        self.inside = inside
        self.token = token.encode()
        self.once = None if once is None else once.encode()
        self.cookie = f"viscircuits-{port}".encode()  # cookies are shared among the ports of a machine
        self.hosts = {f"{name}:{port}".encode() for name in ("127.0.0.1", "localhost")}
        self.origins = {b"http://" + host for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        refusal = self._foreign(scope["headers"])
        given = _tokens(scope["query_string"]) if scope["path"] == "/" else []
        if refusal is None and given:
            refusal = await self._let_in(given, send)
            if refusal is None:
                return
        refusal = refusal or self._unknown(scope["headers"]) or _unmarked(scope["method"], scope["headers"])
        if refusal is not None:
            await _answer(send, refusal[0], json.dumps({"error": refusal[1]}).encode())
            return
        await self.inside(scope, receive, _seeing_out(send))

    async def _let_in(self, given: Sequence[bytes], send: Send) -> tuple[int, str] | None:
        """Put a right token into a cookie, and lead to the page without it."""
        if not (self._used(given) or all(secrets.compare_digest(each, self.token) for each in given)):
            return 403, "this is not the token of this start; open the address that `viscircuits view --serve` printed"
        cookie = self.cookie + b"=" + self.token + b"; Path=/; HttpOnly; SameSite=Strict"
        await _answer(send, 303, b"", [(b"location", b"/"), (b"set-cookie", cookie)])
        return None

    def _used(self, given: Sequence[bytes]) -> bool:
        """Whether this is what opens the page once; from now on nothing is."""
        right = self.once is not None and len(given) == 1 and secrets.compare_digest(given[0], self.once)
        if right:
            self.once = None
        return right

    def _foreign(self, headers: Headers) -> tuple[int, str] | None:
        """Why a request that was not meant for this server, or comes from another page, is refused."""
        host = _all(headers, b"host")
        if len(host) != 1 or host[0].lower() not in self.hosts:
            own = min(self.hosts).decode()
            return 421, f"this server answers to {own} alone; open the address that `viscircuits view --serve` printed"
        if not all(origin.lower() in self.origins for origin in _all(headers, b"origin")):
            return 403, "another page asked; only the page that this server gave may ask it"
        return None

    def _unknown(self, headers: Headers) -> tuple[int, str] | None:
        """Why a request without the token is refused."""
        given = [value[7:] for value in _all(headers, b"authorization") if value[:7].lower() == b"bearer "]
        for cookies in _all(headers, b"cookie"):
            pairs = (each.strip().partition(b"=") for each in cookies.split(b";"))
            given += [value for name, _, value in pairs if name == self.cookie]
        if any(secrets.compare_digest(each, self.token) for each in given):
            return None
        return 403, "the token is missing or wrong; open the address that `viscircuits view --serve` printed"


def _unmarked(method: str, headers: Headers) -> tuple[int, str] | None:
    if method in ("GET", "HEAD") or _all(headers, MARK) == [b"1"]:
        return None
    return 403, f"{method} requests need the header X-Viscircuits: 1"


def _tokens(query: bytes) -> list[bytes]:
    """What the address gives as a token, once or several times."""
    given = parse_qs(query.decode("latin-1"), keep_blank_values=True).get("token", [])
    return [each.encode("utf-8", "surrogatepass") for each in given]


def _all(headers: Headers, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key.lower() == name]


def _seeing_out(send: Send) -> Send:
    """Send, with what every answer says; what the answer says itself comes first."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            said: Headers = list(message.get("headers", ()))
            names = {name.lower() for name, _ in said}
            said += [(name, value) for name, value in ALWAYS if name not in names]
            if message["status"] >= 400:  # what is left of the request's body is not read
                said.append((b"connection", b"close"))
            message = {**message, "headers": said}
        await send(message)

    return sending


async def _answer(send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    out = _seeing_out(send)
    length = (b"content-length", str(len(body)).encode())
    kind = [(b"content-type", b"application/json")] if body else []
    await out({"type": "http.response.start", "status": status, "headers": [*headers, *kind, length]})
    await out({"type": "http.response.body", "body": body})
