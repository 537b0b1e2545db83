"""A request's body: read within limits of size and time, and parsed."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel
from starlette.types import Receive, Scope

from inferneo.server.errors import TIMEOUT, ApiError
from inferneo.server.protocol import read_json, validate
from inferneo.server.security import header_values
from inferneo.server.settings import ServerSettings

Request = TypeVar("Request", bound=BaseModel)


class ClientGone(Exception):
    """The client hung up before its request was complete; there is nobody to tell."""


async def read_request(model: type[Request], scope: Scope, receive: Receive, settings: ServerSettings) -> Request:
    """The request in an HTTP body.

    Raises:
        ApiError: 413 too large, 408 too slow, 400 not what the model asks for.
        ClientGone: the client hung up first.
    """
    try:
        body = await asyncio.wait_for(_read_body(scope, receive, settings.max_body_bytes), settings.receive_seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408,
            f"the body took more than {settings.receive_seconds:g} s to arrive (send it at once)",
            type=TIMEOUT,
            code="body_too_slow",
        ) from None
    return validate(model, read_json(body))


async def _read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body; stops reading at the limit, whatever Content-Length says or leaves unsaid."""
    for announced in header_values(scope, b"content-length"):
        _check_size(int(announced), max_bytes)  # the HTTP parser lets only digits through
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        _check_size(len(body), max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ApiError(
            413,
            f"the body has {size} bytes or more; max_body_bytes is {max_bytes} (send less)",
            code="body_too_large",
        )
