"""What the control process makes of workers that answer, die or say nothing."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from gateway import workers as workers_module
from gateway.errors import Refused
from gateway.relay import Ack, DropSession, KeepCounts, Link, Message
from gateway.telemetry.metrics import CallMetrics
from gateway.workers import Workers


class Pair:
    """Two ends of a relay; the far one answers drops with a count, unless it is told not to."""

    def __init__(self, workers: Workers, cuts: int) -> None:
        self._workers = workers
        self._cuts = cuts
        self.answers = True
        self.held: list[DropSession] = []
        self.heard = asyncio.Event()
        self.keeps = asyncio.Event()
        self.kept: KeepCounts | None = None

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
        if isinstance(message, KeepCounts):
            self.kept = message
            self.keeps.set()
            return
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


async def test_a_lost_worker_is_not_waited_for(workers: Workers, pairs: list[Pair]) -> None:
    """A worker that dies with a question open counts as done at once: it holds nothing any more."""
    pairs[0].answers = False
    asked = asyncio.gather(workers.drop("sid", "closed"))
    await pairs[0].heard.wait()
    pairs[0].far.close()
    (answer,) = await asyncio.wait_for(asked, 2)
    assert answer == 3


async def test_knows_when_all_are_gone(workers: Workers, pairs: list[Pair]) -> None:
    """The drain ends with the last worker; without a worker there is nothing to wait for."""
    gone = asyncio.gather(workers.wait_until_gone())
    for pair in pairs:
        assert not gone.done()
        pair.far.close()
    await asyncio.wait_for(gone, 2)
    await asyncio.wait_for(workers.wait_until_gone(), 2)


async def test_an_outgoing_worker_and_its_successor_are_one(
    workers: Workers, pairs: list[Pair]
) -> None:
    """Two processes of one role count once, and the role is filled until both are gone."""
    for pair in pairs:
        workers.on_ready(pair.near, 0)
    assert workers.ready == 1
    workers.lose(pairs[0].near)
    assert workers.ready == 1
    workers.lose(pairs[1].near)
    assert workers.ready == 0


async def test_keeps_the_counts_of_the_dead(workers: Workers, pairs: list[Pair]) -> None:
    """What a worker had counted stays in the totals, and the others are given it to keep."""
    metrics = CallMetrics()
    metrics.observe_denied("policy_denied")
    workers.on_snapshot(pairs[0].near, metrics.snapshot({"connections": 7.0}))
    workers.lose(pairs[0].near)
    assert workers.kept.data["denied"] == {"policy_denied": 1}
    assert workers.kept.data["gauges"] == {}
    await asyncio.wait_for(pairs[1].keeps.wait(), 2)
    assert pairs[1].kept == workers.kept
    workers.keep(KeepCounts(n=0, data={}))
    assert workers.kept.n == 1
