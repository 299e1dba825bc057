"""The workers, as the control process sees them over their relays: told, asked, and lost.

A request counts as done when every worker has confirmed it; one that stays silent past its time, or
dies with a question open, refuses it.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from gateway.errors import Refused
from gateway.relay import DropSession, Link, Message, PutSession, SnapshotRequest
from keys.session import SessionRecord
from policies.request import Principal

ACK_SECONDS = 5.0
"""How long a worker may take to confirm; workers answer in microseconds or are stuck."""


class Workers:
    """The workers, as seen over their relays."""

    def __init__(self) -> None:
        self._links: list[Link] = []
        self._ready: set[int] = set()
        self._waiting: dict[tuple[Link, int], asyncio.Future[Any]] = {}
        self._n = 0
        self.all_gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, link: Link) -> None:
        """Count one more worker."""
        self._links.append(link)

    def lose(self, link: Link) -> None:
        """Count one less; whoever waited for it hears that it is gone."""
        self._links.remove(link)
        for key in [key for key in self._waiting if key[0] is link]:
            future = self._waiting.pop(key)
            if not future.done():
                future.set_exception(ConnectionError("a worker is gone"))
        if not self._links and not self.all_gone.done():
            self.all_gone.set_result(None)

    @property
    def ready(self) -> int:
        """Return how many workers serve."""
        return len(self._ready)

    def on_ready(self, worker: int) -> None:
        """Note that a worker serves."""
        self._ready.add(worker)

    def on_answer(self, link: Link, n: int, answer: object) -> None:
        """Hand an answer to whoever waits for it."""
        waiting = self._waiting.pop((link, n), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def tell(self, message: Message) -> None:
        """Send to every worker without waiting."""
        for link in self._links:
            link.send(message)

    async def _ask(self, build: Callable[[int], Message]) -> list[Any]:
        loop = asyncio.get_running_loop()
        self._n += 1
        n, message = self._n, build(self._n)
        asked = {(link, n): loop.create_future() for link in self._links}
        self._waiting.update(asked)
        for link in self._links:
            link.send(message)
        try:
            async with asyncio.timeout(ACK_SECONDS):
                return await asyncio.gather(*asked.values())
        except (TimeoutError, ConnectionError):
            raise Refused(
                "overloaded", "A worker does not answer.", retry_after_seconds=1
            ) from None
        finally:
            for key in asked:
                self._waiting.pop(key, None)

    async def put(self, principal: Principal, record: SessionRecord) -> None:
        """Return when every worker serves the session."""
        await self._ask(lambda n: PutSession(n=n, principal=principal, record=record))

    async def drop(self, session_id: str, reason: str) -> int:
        """Return, when every worker has forgotten the session, how many live calls were cut."""
        acks = await self._ask(lambda n: DropSession(n=n, session_id=session_id, reason=reason))
        return sum(ack.count for ack in acks)

    async def snapshots(self) -> list[dict[str, Any]]:
        """Return every worker's counters."""
        answers = await self._ask(lambda n: SnapshotRequest(n=n))
        return [answer.data for answer in answers]
