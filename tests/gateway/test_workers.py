"""What the control process makes of workers that answer, die or say nothing."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from gateway import workers as workers_module
from gateway.errors import Refused
from gateway.relay import Ack, DropSession, Link, Message
from gateway.workers import Workers


class Pair:
    """Two ends of a relay; the far one answers drops with a count, unless it is told not to."""

    def __init__(self, workers: Workers, cuts: int) -> None:
        self._workers = workers
        self._cuts = cuts
        self.answers = True
        self.held: list[DropSession] = []
        self.heard = asyncio.Event()

    async def open(self) -> None:
        """Connect both ends."""
        near, far = socket.socketpair()
        self.near = await Link.open(near, self._on_near, self._workers.lose)
        self.far = await Link.open(far, self._on_far, lambda _link: None)
        self._workers.add(self.near)

    def _on_near(self, link: Link, message: Message) -> None:
        assert isinstance(message, Ack)
        self._workers.on_answer(link, message.n, message)

    def _on_far(self, link: Link, message: Message) -> None:
        assert isinstance(message, DropSession)
        if self.answers:
            link.send(Ack(n=message.n, count=self._cuts))
        else:
            self.held.append(message)
            self.heard.set()


@pytest.fixture
async def workers() -> Workers:
    """Return an empty fleet."""
    return Workers()


@pytest.fixture
async def pairs(workers: Workers) -> AsyncIterator[list[Pair]]:
    """Connect two workers."""
    pairs = [Pair(workers, 2), Pair(workers, 3)]
    for pair in pairs:
        await pair.open()
    yield pairs
    for pair in pairs:
        pair.near.close()
        pair.far.close()


async def test_waits_for_every_worker_and_sums(workers: Workers, pairs: list[Pair]) -> None:
    """A drop is done when all have confirmed; the live calls they cut are added up."""
    assert len(pairs) == 2
    assert await workers.drop("sid", "closed") == 5


async def test_a_silent_worker_is_refused_and_forgotten(
    workers: Workers, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past its time the request is refused; nothing is kept of it and a late answer is ignored."""
    monkeypatch.setattr(workers_module, "ACK_SECONDS", 0.01)
    pairs[1].answers = False
    with pytest.raises(Refused):
        await workers.drop("sid", "closed")
    assert not workers._waiting
    [late] = pairs[1].held
    workers.on_answer(pairs[1].near, late.n, Ack(n=late.n))


async def test_whoever_waits_for_a_lost_worker_hears_it(
    workers: Workers, pairs: list[Pair]
) -> None:
    """A worker that dies with a question open refuses it at once, not after the timeout."""
    pairs[0].answers = False
    asked = asyncio.gather(workers.drop("sid", "closed"), return_exceptions=True)
    await pairs[0].heard.wait()
    pairs[0].far.close()
    [outcome] = await asyncio.wait_for(asked, 2)
    assert isinstance(outcome, Refused)


async def test_knows_when_all_are_gone(workers: Workers, pairs: list[Pair]) -> None:
    """The drain ends with the last worker."""
    for pair in pairs:
        assert not workers.all_gone.done()
        pair.far.close()
    await asyncio.wait_for(workers.all_gone, 2)
