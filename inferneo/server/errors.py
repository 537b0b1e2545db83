"""ApiError: whatever a client is told went wrong, in the shape of the OpenAI API."""

from __future__ import annotations

import logging
from typing import Any

from inferneo_core.errors import EngineClosed, InferneoError, PromptTooLong, RequestError, shown

logger = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
AUTHENTICATION = "authentication_error"
RATE_LIMIT = "rate_limit_error"
TIMEOUT = "timeout_error"
SERVER = "server_error"


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP. Over a WebSocket, below 500 is the client's fault, the rest ours.
        message: what is wrong, the limit and the remedy; for people.
        type: the kind, as OpenAI names them.
        param: the field of the request at fault.
        code: for programs, such as "model_not_found".
        should_retry: whether the same request may succeed later. Clients of the OpenAI API are told by the header
            `x-should-retry`; otherwise they repeat requests that can only fail again.
        retry_after: seconds until then.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        should_retry: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.should_retry = should_retry
        self.retry_after = retry_after

    def to_json(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}, as in the OpenAI API."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The HTTP headers that go with it: x-should-retry, and Retry-After where there is a time."""
        headers = {"x-should-retry": "true" if self.should_retry else "false"}
        if self.retry_after is not None:
            headers["Retry-After"] = f"{max(1, round(self.retry_after))}"
        return headers


def from_exception(error: BaseException) -> ApiError:
    """What to tell a client about an exception. One that nobody foresaw is logged here, and its text stays here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="context_length_exceeded" if isinstance(error, PromptTooLong) else None)
    if isinstance(error, EngineClosed):
        return ApiError(
            503, "the server is shutting down", type=SERVER, code="shutting_down", should_retry=True, retry_after=1
        )
    if isinstance(error, InferneoError):  # StepFailed: the next step may well succeed
        return ApiError(500, str(error), type=SERVER, code="engine_error", should_retry=True)
    logger.error("a request failed unexpectedly", exc_info=error)
    message = f"the server failed with {type(error).__name__} (its log says where)"
    return ApiError(500, message, type=SERVER, code="internal_error")


def too_many(what: str, count: int, unit: str, limit: int, setting: str | None) -> ApiError:
    """The error of a field that holds more than its limit.

    Args:
        what: the field; its last word is its name.
        count, unit, limit: how many of what it has, and may have.
        setting: the server's setting behind the limit; None where there is none.
    """
    remedy = "send fewer" if setting is None else f"send fewer, or raise the server's {setting}"
    return ApiError(400, f"{what} has {shown(count)} {unit}; at most {limit} ({remedy})", param=what.split(" ")[-1])
