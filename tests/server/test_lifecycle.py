"""Lifecycle: requests are counted while they are answered, and not a moment longer."""

from __future__ import annotations

import asyncio

import pytest

from inferneo.server.lifecycle import Lifecycle


@pytest.mark.parametrize("num_turns", range(6))
def test_request_cancelled_in_any_turn_of_its_end_is_forgotten(run, num_turns):
    async def scenario():
        lifecycle = Lifecycle(1)
        working = asyncio.Event()

        async def work():
            working.set()

        request = asyncio.create_task(lifecycle.run(work()))
        await working.wait()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await asyncio.sleep(0)  # the work's own end
        return lifecycle.num_requests

    assert run(scenario()) == 0
