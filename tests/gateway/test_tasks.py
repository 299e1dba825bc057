"""Ending tasks: whoever does not hear the first time is asked again."""

import asyncio

from gateway.tasks import end_tasks


async def test_a_task_that_misses_its_cancellation_is_asked_again() -> None:
    """A cancellation that gets lost, as in some libraries, keeps nobody waiting for ever."""
    asked = 0
    began = asyncio.Event()

    async def deaf() -> None:
        nonlocal asked
        while True:
            try:
                began.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                asked += 1
                if asked == 3:
                    raise

    async def done() -> None:
        return

    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(deaf()), loop.create_task(done())]
    await began.wait()
    async with asyncio.timeout(10):
        await end_tasks(tasks)
    assert all(task.done() for task in tasks)
    assert asked == 3
    await end_tasks([])
