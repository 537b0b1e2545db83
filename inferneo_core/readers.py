"""Readers: the asyncio consumers that wait for an output, and how the engine's thread wakes them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict

from inferneo_core.stream import TokenStream

logger = logging.getLogger(__name__)


class Readers:
    """The consumers that wait for an output, each in its own event loop.

    No lock: each access to the dict is one operation of its own. The garbage collector may end a reader, in any thread
    and in the middle of any line, and a reader that had to wait for a lock there would wait for ever.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], tuple[TokenStream, ...]] = {}
        self._expiries: dict[asyncio.Future[None], float] = {}  # in the time of the future's loop
        # With the time of each: a loop other than asyncio's need not give a handle that knows it (uvloop's may not).
        self._timers: dict[asyncio.AbstractEventLoop, tuple[float, asyncio.TimerHandle]] = {}

    async def wait(self, *streams: TokenStream, timeout: float | None = None) -> None:
        """Return once one of the streams is settled, or after so many seconds."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting[future] = streams
        if timeout is not None:
            self._expire_at(loop.time() + timeout, future, loop)
        try:
            if not _any_settled(streams):  # looked at after registering: a step in between would wake this future
                await future
        finally:
            self._waiting.pop(future, None)
            self._expiries.pop(future, None)

    def wake_settled(self) -> None:
        """Wake every reader one of whose streams is settled, with one call into each event loop."""
        by_loop = defaultdict(list)
        for future, streams in self._waiting.copy().items():
            if _any_settled(streams):
                self._waiting.pop(future, None)
                by_loop[future.get_loop()].append(future)
        for loop, futures in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, futures)
            except RuntimeError:  # the loop was closed under its readers; nobody is left to wake
                logger.debug("%d readers went away with their event loop", len(futures))

    def _expire_at(self, when: float, future: asyncio.Future[None], loop: asyncio.AbstractEventLoop) -> None:
        """Wake the reader then. One timer a loop serves all: one a wait would cost as much as the wait itself."""
        self._expiries[future] = when
        if loop in self._timers:
            earliest, timer = self._timers[loop]
            if earliest <= when:
                return
            timer.cancel()
        else:
            for closed in [other for other in self._timers.copy() if other.is_closed()]:
                self._timers.pop(closed, None)
        self._set_timer(when, loop)

    def _set_timer(self, when: float, loop: asyncio.AbstractEventLoop) -> None:
        self._timers[loop] = when, loop.call_at(when, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake the loop's readers whose time is up, and set the timer for those who wait on."""
        now = loop.time()
        mine = [(when, future) for future, when in self._expiries.copy().items() if future.get_loop() is loop]
        _wake([future for when, future in mine if when <= now])
        later = [when for when, _ in mine if when > now]
        if later:
            self._set_timer(min(later), loop)
        else:
            self._timers.pop(loop, None)


def _any_settled(streams: tuple[TokenStream, ...]) -> bool:
    return any(stream.is_settled for stream in streams)


def _wake(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
