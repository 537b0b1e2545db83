"""Lifecycle: which requests a server takes, and how they end: by themselves, with their client, or with the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from inferneo.server.errors import RATE_LIMIT, SERVER, ApiError

logger = logging.getLogger(__name__)

SHUTTING_DOWN = "shutting_down"
POLL_SECONDS = 0.05  # how soon a second signal is heard
LAST_WORDS_SECONDS = 5.0  # for final events, once the requests were told to end


class Lifecycle:
    """Admits requests, watches their clients, and ends them in order when the server goes down.

    Args:
        max_requests: how many requests may be in the house; those beyond the engine's batch wait in it.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_draining = False
        self._is_over = False

    @property
    def num_requests(self) -> int:
        """Requests in the house."""
        return len(self._tasks)

    @property
    def is_draining(self) -> bool:
        """Whether the server is going down and takes nothing new."""
        return self._is_draining

    async def run(self, work: Coroutine[Any, Any, None], gone: Coroutine[Any, Any, None] | None = None) -> None:
        """Run one request's work; cancel it when its client is gone or the server's time is up.

        Args:
            work: answers the request. Cancelled, it must stop what it started.
            gone: returns when the client has gone; None if whoever calls this cancels it then.
        Raises:
            ApiError: 429 too many requests, 503 the server goes down; and whatever `work` raises.
        """
        try:
            self._admit()
        except ApiError:
            work.close()
            if gone is not None:
                gone.close()
            raise
        task = asyncio.create_task(work)
        self._tasks.add(task)
        # Not below: whoever cancels this again while it waits there would keep the task counted for ever.
        task.add_done_callback(self._tasks.discard)
        watch = None if gone is None else asyncio.create_task(gone)
        try:
            await asyncio.wait({task} if watch is None else {task, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (task, watch):
                if one is not None:
                    one.cancel()
            ended = await asyncio.gather(*filter(None, (task, watch)), return_exceptions=True)
        if not isinstance(ended[0], asyncio.CancelledError):
            task.result()
        elif self._is_over:
            raise going_down("the server went down before the answer's end")

    async def drain(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """Take nothing new; wait for what runs, at most so long; then tell the rest to end, and wait for that.

        Args:
            seconds: how long requests may go on.
            hurry: asked again and again; True ends the wait.
        """
        self._is_draining = True
        if self._tasks:
            logger.info("going down: %d requests may go on for %g s", len(self._tasks), seconds)
        await self._wait_until_empty(seconds, hurry)
        self._is_over = True
        for task in self._tasks:
            task.cancel()
        await self._wait_until_empty(LAST_WORDS_SECONDS, hurry)

    async def _wait_until_empty(self, seconds: float, hurry: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self._tasks and not hurry() and loop.time() < deadline:
            await asyncio.sleep(POLL_SECONDS)

    def _admit(self) -> None:
        if self._is_draining:
            raise going_down("the server is going down and takes no new request")
        if len(self._tasks) >= self._max_requests:
            raise ApiError(
                429,
                f"there are {len(self._tasks)} requests, running and queued; the limit is {self._max_requests} "
                "(try again later, or raise --max-queued)",
                type=RATE_LIMIT,
                code="queue_full",
                should_retry=True,
                retry_after=1,
            )


def going_down(message: str) -> ApiError:
    """The error of a request that the server's end cuts off."""
    return ApiError(
        503, f"{message} (send it again)", type=SERVER, code=SHUTTING_DOWN, should_retry=True, retry_after=1
    )
