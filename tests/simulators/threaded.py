"""The provider double on a thread of its own, for tests that block in a synchronous SDK."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.simulators.provider import Provider, Script


@contextmanager
def threaded_provider(script: Script) -> Iterator[Provider]:
    """Serve a provider double until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="provider-double")
    thread.start()
    provider = Provider(script=script)
    asyncio.run_coroutine_threadsafe(provider.__aenter__(), loop).result(30)
    try:
        yield provider
    finally:
        asyncio.run_coroutine_threadsafe(provider.__aexit__(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
