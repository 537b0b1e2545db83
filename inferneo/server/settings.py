"""ServerSettings: what a server is called, who may use it, and how much of everything it allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from inferneo_core.errors import ConfigError, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """One server's names, doors and limits. Whatever a client can count up has a limit here.

    Args:
        served_model_names: names that requests may call the model by; answers carry the one that was used.
        api_key: what clients must send; None lets everybody in.
        host, port: where the server listens. Port 0 takes a free one.
        allowed_hosts: values of the Host header to accept besides those of `host` and the loopback; "*" takes any.
        allowed_origins: values of the Origin header to accept besides the server's own.
        show_ui: serve the chat page at "/".
        max_body_bytes: of one request's body or one WebSocket message.
        max_header_bytes: of one request's headers.
        max_connections: clients connected at once.
        max_queued: requests that wait for the engine; the next one is told to come back later (429).
        max_prompt_chars: characters of text in one request, over all its prompts or messages.
        max_messages: messages of one chat.
        max_choices: answers to one request: its prompts times `n`.
        max_logprobs: most likely tokens to report with each token.
        max_stops: stop strings of one request.
        max_stop_token_ids: stop_token_ids of one request.
        max_request_seconds: from the request to its last token; then it is aborted.
        receive_seconds: for a request's headers to arrive, again for its body, and for a WebSocket's key.
        max_unread_tokens: tokens of one stream that wait for a slow reader; at so many the stream pauses.
        slow_reader_seconds: how long a reader may take nothing at all; then its request is aborted.
        heartbeat_seconds: silence after which a stream sends a sign of life.
        shutdown_seconds: how long streams may go on after the server was told to stop.

    Raises:
        ConfigError: a value is impossible.
    """

    served_model_names: tuple[str, ...]
    api_key: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    show_ui: bool = True
    max_body_bytes: int = 4 * 2**20
    max_header_bytes: int = 2**16
    max_connections: int = 1024
    max_queued: int = 1024
    max_prompt_chars: int = 2**20
    max_messages: int = 1024
    max_choices: int = 128
    max_logprobs: int = 20
    max_stops: int = 4
    max_stop_token_ids: int = 128
    max_request_seconds: float = 600.0
    receive_seconds: float = 30.0
    max_unread_tokens: int = 256
    slow_reader_seconds: float = 30.0
    heartbeat_seconds: float = 10.0
    shutdown_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError(f"served_model_names is {shown(self.served_model_names)}; a model has at least one name")
        if self.api_key is not None and not self.api_key:
            raise ConfigError("api_key is empty; leave it None to let everybody in")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; it is in [0, 65535] (0 takes a free one)")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_") and not value >= 1:
                raise ConfigError(f"{field.name} is {shown(value)}; it is at least 1")
            if field.name.endswith("_seconds") and not 0 < value < math.inf:
                raise ConfigError(f"{field.name} is {shown(value)}; it is a positive number of seconds")

    @property
    def model_name(self) -> str:
        """The name that the server uses by itself: the first."""
        return self.served_model_names[0]
