"""Ending what runs beside: a task is over when it says so, not when it was asked."""

import asyncio
from collections.abc import Collection
from typing import Any, Final

ASK_AGAIN_SECONDS: Final = 0.05


async def end_tasks(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel the tasks, and return when all are over.

    They are asked again until they heed: `asyncio.wait_for`, which libraries use, loses a cancellation
    that comes together with its result (before Python 3.12).
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=ASK_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)
