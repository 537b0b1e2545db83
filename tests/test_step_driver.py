"""StepDriver: one step at a time, actions in between, and nobody left waiting."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from inferneo_core.errors import EngineClosed
from inferneo_core.step_driver import StepDriver


def nothing() -> None:
    pass


def make(step: Callable[[], bool], shut: Callable[[], None] = nothing) -> StepDriver:
    return StepDriver(step, shut)


class Gate:
    """A step that stands still until it is let go, so that a test can act while it is in flight."""

    def __init__(self) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()

    def __call__(self) -> bool:
        self.entered.set()
        assert self.leave.wait(60)
        return True


def test_step_returns_what_the_step_returned() -> None:
    answers = [True, False]
    driver = make(lambda: answers.pop(0))
    assert driver.step() is True
    assert driver.step() is False


def test_steps_never_overlap(background: Any) -> None:
    inside = 0
    counted = 0
    start = threading.Barrier(8, timeout=60)

    def step() -> bool:
        nonlocal inside, counted
        inside += 1
        counted += 1
        assert inside == 1
        inside -= 1
        return True

    driver = make(step)

    def run() -> None:
        start.wait()
        for _ in range(50):
            driver.step()

    for task in [background(run) for _ in range(8)]:
        task.result()
    assert counted == 400


def test_advance_of_a_settled_request_takes_no_step() -> None:
    driver = make(lambda: pytest.fail("nothing was to be done"))
    assert driver.advance(lambda: True)


def test_waiter_is_served_by_the_step_of_another(background: Any) -> None:
    gate, steps = Gate(), []
    driver = make(lambda: steps.append(threading.get_ident()) or gate())
    settled = False
    driving = background(driver.step)
    assert gate.entered.wait(60)
    asked = threading.Event()

    def is_settled() -> bool:
        asked.set()
        return settled

    waiting = background(driver.advance, is_settled)
    assert asked.wait(60)
    settled = True
    gate.leave.set()
    assert driving.result() and waiting.result()
    assert len(steps) == 1


def test_post_takes_effect_at_once_when_no_step_is_in_flight() -> None:
    done: list[int] = []
    driver = make(lambda: True)
    driver.post(lambda: done.append(1))
    assert done == [1]


def test_post_never_waits_for_a_step_and_takes_effect_as_it_ends(background: Any) -> None:
    gate, done = Gate(), []
    driver = make(gate)
    driving = background(driver.step)
    assert gate.entered.wait(60)
    driver.post(lambda: done.append(1))  # returns although the step stands still
    assert done == []
    with driver.between_steps():
        assert done == []
    gate.leave.set()
    driving.result()
    assert done == [1]


def test_actions_run_in_the_order_they_were_posted_also_those_posted_by_actions() -> None:
    done: list[str] = []
    driver = make(lambda: True)

    def outer() -> None:
        driver.post(lambda: done.append("inner"))
        done.append("outer")

    driver.post(outer)
    driver.post(lambda: done.append("last"))
    assert done == ["outer", "inner", "last"]


def test_an_object_that_posts_as_it_is_collected_does_no_harm() -> None:
    done: list[str] = []

    class Dropped:
        def __init__(self) -> None:
            self.itself = self  # only the collector can end this

        def __del__(self) -> None:
            driver.post(lambda: done.append("dropped"))

    def step() -> bool:
        Dropped()
        gc.collect()
        assert done == []  # not in the middle of a step
        return True

    driver = make(step)
    driver.step()
    assert done == ["dropped"]


def test_step_inside_a_step_is_refused() -> None:
    def step() -> bool:
        with pytest.raises(RuntimeError, match="may not start another step"):
            driver.step()
        return True

    driver = make(step)
    assert driver.step()


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_step_that_raises_gives_the_turn_back(error: BaseException, background: Any) -> None:
    answers: list[Any] = [error, True]

    def step() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return bool(answer)

    driver = make(step)
    with pytest.raises(type(error)):
        driver.step()
    assert background(driver.step).result()


def test_action_that_raises_leaves_no_waiter_behind(background: Any) -> None:
    gate = Gate()
    driver = make(gate)

    def bad() -> None:
        raise LookupError("mine")

    driving = background(driver.step)
    assert gate.entered.wait(60)
    asked = threading.Event()
    waiting = background(driver.advance, lambda: asked.set() or False)  # type: ignore[func-returns-value]
    assert asked.wait(60)
    driver.post(bad)
    gate.leave.set()
    with pytest.raises(LookupError):
        driving.result()
    assert waiting.result()


@pytest.mark.parametrize("place", ["notify_all", "drain"])
def test_interrupt_while_the_turn_ends_leaves_it_free(
    place: str, monkeypatch: pytest.MonkeyPatch, background: Any
) -> None:
    driver = make(lambda: True)
    target: Any = driver._turn if place == "notify_all" else driver
    original, struck = getattr(target, place), []

    def strike() -> None:
        if not struck:
            struck.append(True)
            raise KeyboardInterrupt
        original()

    monkeypatch.setattr(target, place, strike)
    with pytest.raises(KeyboardInterrupt):
        driver.step()
    assert background(driver.step).result()


def test_close_waits_for_the_step_in_flight(background: Any) -> None:
    order: list[str] = []
    gate = Gate()

    def step() -> bool:
        gate()
        order.append("step")
        return True

    driver = make(step, lambda: order.append("shut"))
    driving = background(driver.step)
    assert gate.entered.wait(60)
    closing = background(driver.close)
    while not driver._is_closing:
        assert not closing.is_done()
    gate.leave.set()
    driving.result()
    closing.result()
    assert order == ["step", "shut"]


def test_close_inside_a_step_takes_effect_as_it_ends() -> None:
    order: list[str] = []

    def step() -> bool:
        driver.close()
        order.append("step")
        return True

    driver = make(step, lambda: order.append("shut"))
    assert driver.step()
    assert order == ["step", "shut"]
    with pytest.raises(EngineClosed):
        driver.step()


def test_close_twice_shuts_once(background: Any) -> None:
    shut: list[int] = []
    driver = make(lambda: True, lambda: shut.append(1))
    for task in [background(driver.close) for _ in range(4)]:
        task.result()
    assert shut == [1]


def test_close_runs_what_was_posted_before_it(background: Any) -> None:
    gate, order = Gate(), []
    driver = make(gate, lambda: order.append("shut"))
    driving = background(driver.step)
    assert gate.entered.wait(60)
    driver.submit(lambda: order.append("submitted"))
    closing = background(driver.close)
    gate.leave.set()
    driving.result()
    closing.result()
    assert order == ["submitted", "shut"]


def test_after_close_submit_raises_and_post_is_dropped() -> None:
    driver = make(lambda: True)
    driver.close()
    with pytest.raises(EngineClosed, match="make a new Engine"):
        driver.submit(lambda: pytest.fail("never to run"))
    driver.post(lambda: pytest.fail("never to run"))
    with pytest.raises(EngineClosed):
        driver.advance(lambda: False)


def test_waiters_learn_of_the_close(background: Any) -> None:
    gate = Gate()
    driver = make(gate)
    driving = background(driver.step)
    assert gate.entered.wait(60)
    waiting = [background(driver.step) for _ in range(5)]
    closing = background(driver.close)
    while not driver._is_closing:
        assert not closing.is_done()
    gate.leave.set()
    driving.result()
    closing.result()
    for task in waiting:
        with contextlib.suppress(EngineClosed):  # unless its turn came before the closing thread woke
            task.result()
    with pytest.raises(EngineClosed):
        driver.step()
