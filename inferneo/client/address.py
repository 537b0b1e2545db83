"""Where the server is: base URLs, loopback hosts, and the WebSocket's own URL."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit, urlunsplit

DEFAULT_BASE_URL = "http://localhost:8000"


def base_url_of(url: object) -> str:
    """The base URL that the SDK puts its paths behind: "/v1" is added where there is no path.

    Args:
        url: a string or an httpx URL: "http://localhost:8000", "https://example.org/models/v1".

    Raises:
        ValueError: it is no http or https URL, or has a query.
    """
    parts = urlsplit(str(url))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url is {str(url)!r}; it begins with http:// or https:// (say {DEFAULT_BASE_URL})")
    if parts.query or parts.fragment:
        raise ValueError(f"base_url is {str(url)!r}; it has no query and no fragment (pass default_query=)")
    return urlunsplit(parts._replace(path="/v1" if parts.path in ("", "/") else parts.path))


def is_loopback(url: str) -> bool:
    """Whether the server is on this very machine, where no proxy can stand in between."""
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified  # 0.0.0.0 reaches the machine itself


def websocket_url_of(base_url: str, path: str, query: str) -> str:
    """The WebSocket at a path below a base URL: http becomes ws, https becomes wss."""
    parts = urlsplit(base_url)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    return urlunsplit(parts._replace(scheme=scheme, path=f"{parts.path.rstrip('/')}/{path}", query=query))
