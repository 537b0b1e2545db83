"""StepDriver: one step at a time, driven by whichever thread needs it.

There is no hidden thread. A consumer that lacks a token takes the turn and steps for everybody, while the others wait
for what that step brings them. Requests to the engine (add, abort, pause) go through an inbox that each step drains
first, so posting one never waits for a step; when no step is in flight it takes effect at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from inferneo_core.errors import EngineClosed


class StepDriver:
    """Serialises steps and the actions between them.

    Args:
        step: runs one step; False when there was nothing to do. It calls `drain` first.
        shut: runs once, when the driver closes, with no step in flight and none to come.
    """

    def __init__(self, step: Callable[[], bool], shut: Callable[[], None]) -> None:
        self._step = step
        self._shut = shut
        self._inbox: deque[Callable[[], None]] = deque()
        self._is_draining = False
        # Guards what follows; held briefly, never during a step. Reentrant: a stream's __del__ may post from anywhere.
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._owner: int | None = None  # ident of the thread that is in a step
        self._is_closing = False
        self._is_closed = False

    def submit(self, action: Callable[[], None]) -> None:
        """Post an action that must not be lost.

        Raises:
            EngineClosed: the driver was closed; the action will never run.
        """
        with self._turn:  # a close() now either sees this action or is seen by it
            if self._is_closing:
                raise EngineClosed("the engine was closed (make a new Engine)")
            self.post(action)

    def post(self, action: Callable[[], None]) -> None:
        """Run the action before the next step: now, if no step is in flight. After close, never."""
        self._inbox.append(action)
        with self._turn:
            if self._owner is None and not self._is_closed:
                self.drain()

    def drain(self) -> None:
        """Run what was posted. Only for the thread in a step; `post` and the end of a step do it for the others."""
        if self._is_draining:  # an action dropped a stream whose __del__ posted: the loop below will come to it
            return
        self._is_draining = True
        try:
            while self._inbox:
                self._inbox.popleft()()
        finally:
            self._is_draining = False

    def step(self) -> bool:
        """Wait for the turn, run one step; returns what it returned."""
        return self.advance(lambda: False)

    def advance(self, is_settled: Callable[[], bool]) -> bool:
        """Wait while others step; if `is_settled` is still false once the turn is free, take it and run one step.

        Returns:
            False when there was nothing to do.
        Raises:
            EngineClosed: the driver was closed.
        """
        me = threading.get_ident()
        if self._owner == me:
            raise RuntimeError("a step may not start another step of the same engine")
        try:
            with self._lock:
                while self._owner is not None and not is_settled():
                    self._turn.wait()
                if is_settled():
                    return True
                if self._is_closed:
                    raise EngineClosed("the engine was closed (make a new Engine)")
                self._owner = me
            return self._step()
        finally:
            try:
                self._end_turn(me)
            except KeyboardInterrupt:  # it struck in there: once more, or the turn might stay taken for ever
                self._end_turn(me)
                raise

    def _end_turn(self, me: int) -> None:
        with self._lock:
            if self._owner == me:
                self._turn.notify_all()  # they wake once this block is left, also if an action raises
                self._owner = None
                self.drain()
                if self._is_closing:
                    self._shut_once()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """A block of code that sees every posted action done; if a step is in flight, the block runs beside it."""
        with self._turn:
            if self._owner is None and not self._is_closed:
                self.drain()
            yield

    def close(self) -> None:
        """Shut down once the step in flight is over; waits for it unless called from inside it. Idempotent."""
        with self._turn:
            self._is_closing = True
            while self._owner is not None and self._owner != threading.get_ident():
                self._turn.wait()
            if self._owner is None:
                self._shut_once()

    def _shut_once(self) -> None:
        if not self._is_closed:
            self.drain()
            self._is_closed = True
            self._shut()
            self._turn.notify_all()
