"""Tasks that outlive their bugs."""

from __future__ import annotations

import asyncio
import logging

import pytest

from promptfleet_workers.background import keep_running


async def test_one_that_crashes_is_told_of_and_begins_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun = 0

    async def run() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise RuntimeError("a secret")

    with caplog.at_level(logging.ERROR):
        await keep_running("sweeper", run, again_after_s=0)

    assert begun == 3
    assert [record.message for record in caplog.records] == ["background_crashed"] * 2
    assert "a secret" not in caplog.text


async def test_cancelling_ends_it() -> None:
    task = asyncio.create_task(keep_running("sweeper", asyncio.Event().wait))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
