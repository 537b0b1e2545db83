"""Who may speak to the server: Host, Origin and API key, checked before any handler, on the WebSocket upgrade too."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from inferneo.server.errors import AUTHENTICATION, ApiError
from inferneo.server.settings import ServerSettings

OPEN_PATHS = frozenset(["/", "/health"])  # a page that asks for the key, and what a load balancer asks
AUTHENTICATED = "inferneo.authenticated"  # the scope's entry that tells a WebSocket whether its key is still to come
BEARER = "bearer "


class Gate:
    """ASGI middleware that refuses what comes from the wrong place or without the key.

    A page of another site can make a browser send requests here; its Origin gives it away. By DNS rebinding such a page
    can pass for ours; then the Host does. Neither is covered by CORS, which binds browsers only after the fact and
    WebSockets never.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._key = None if settings.api_key is None else settings.api_key.encode()
        self._hosts = frozenset(host.lower() for host in (settings.host, *settings.allowed_hosts))
        self._any_host = "*" in self._hosts or not (settings.allowed_hosts or is_loopback(settings.host))
        self._origins = frozenset(origin.lower().rstrip("/") for origin in settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            token = take_token(scope)
            try:
                self._check(scope, token)
            except ApiError as error:
                await refuse(error, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, token: str | None) -> None:
        hosts, origins = header_values(scope, b"host"), header_values(scope, b"origin")
        self._check_host(hosts)
        if origins:
            self._check_origin(origins[-1], hosts[0])
        if self._key is None or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            scope[AUTHENTICATED] = True
            return
        key = bearer_key(header_values(scope, b"authorization"))
        if scope["type"] == "websocket":
            key = token if key is None else key
            scope[AUTHENTICATED] = key is not None
            if key is None:  # a browser cannot set the header: the first message may bring the key
                return
        if not is_key(key, self._key):
            raise wrong_key(missing=key is None)

    def _check_host(self, hosts: list[str]) -> None:
        name = host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None:
            raise forbidden("the request has no valid Host header (send exactly one)", "invalid_host")
        if not (self._any_host or name in self._hosts or is_loopback(name)):
            raise forbidden(
                f"the Host header names {name!r}, which is not this server (start it with --allowed-host {name})",
                "invalid_host",
            )

    def _check_origin(self, origin: str, host: str) -> None:
        origin = origin.lower()
        if "*" in self._origins or origin in self._origins or urlsplit_netloc(origin) == host.lower():
            return
        raise forbidden(
            f"pages of {origin!r} may not use this server (start it with --allowed-origin {origin})", "invalid_origin"
        )


def is_key(given: str | None, key: bytes) -> bool:
    """Whether the key is right; takes equally long wherever it is wrong."""
    return given is not None and hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key)


def wrong_key(*, missing: bool) -> ApiError:
    """The refusal of a request whose key is missing or wrong."""
    message = "an API key is needed (send it as 'Authorization: Bearer KEY')" if missing else "the API key is wrong"
    return ApiError(401, message, type=AUTHENTICATION, code="invalid_api_key")


def forbidden(message: str, code: str) -> ApiError:
    """The refusal of a request that comes from the wrong place."""
    return ApiError(403, message, type="permission_error", code=code)


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error; a WebSocket that was not accepted yet gets it as an HTTP response."""
    if scope["type"] == "http":
        await error_response(error)(scope, receive, send)
        return
    websocket = WebSocket(scope, receive, send)
    if "websocket.http.response" in scope.get("extensions", {}):
        await websocket.send_denial_response(error_response(error))
    else:
        await websocket.close(1008)


def error_response(error: ApiError) -> JSONResponse:
    """An error as a whole HTTP response."""
    headers = error.headers()
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 408:
        headers["Connection"] = "close"  # what still comes of that request is not read
    return JSONResponse(error.to_json(), error.status, headers)


def take_token(scope: Scope) -> str | None:
    """Take `token` out of the query string, in the scope itself: the web server logs it from there."""
    query = scope.get("query_string", b"")
    if b"token" not in query and b"%" not in query:
        return None
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    tokens = [value for name, value in pairs if name == "token"]
    scope["query_string"] = urlencode([pair for pair in pairs if pair[0] != "token"]).encode("latin-1")
    return tokens[-1] if tokens else None


def bearer_key(headers: Iterable[str]) -> str | None:
    """The key of an Authorization header; None if there is none of that kind."""
    for value in headers:
        if value.lower().startswith(BEARER):
            return value[len(BEARER) :].strip()
    return None


def header_values(scope: Scope, name: bytes) -> list[str]:
    """All values of a header."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return [value.decode("utf-8", "surrogateescape") for key, value in headers if key == name]


def host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is not one."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def urlsplit_netloc(origin: str) -> str | None:
    """Host and port of an origin; None if it is not one ("null")."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def is_loopback(name: str) -> bool:
    """Whether a host name or address means this machine and can mean nothing else."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
