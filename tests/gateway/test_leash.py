"""A leash carries orders and sockets down, one word up, and breaks when the supervisor is gone."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from gateway.bundles import Bundle, PolicySource
from gateway.leash import (
    MAX_MESSAGE_BYTES,
    Holder,
    Leash,
    LookAtPolicies,
    NewRelay,
    Order,
    Restarts,
    Retire,
    Serving,
    UsePolicies,
)


@pytest.fixture
def signals() -> Iterator[list[int]]:
    """Note the signals that leashes raise; unheeded, one would end this process."""
    heard: list[int] = []
    before = signal.signal(signal.SIGIO, lambda number, _frame: heard.append(number))
    yield heard
    signal.signal(signal.SIGIO, before)


@pytest.fixture
def holder(signals: list[int]) -> Iterator[Holder]:
    """Hold a leash."""
    holder = Holder()
    yield holder
    holder.close()


class Child:
    """A child that notes what it hears."""

    def __init__(self, holder: Holder) -> None:
        self.heard: asyncio.Queue[tuple[Order, list[socket.socket]] | None] = asyncio.Queue()
        fd = os.dup(holder.child_end.fileno())
        holder.child_end.close()
        self.leash = Leash(fd, lambda *order: self.heard.put_nowait(order), self._on_cut)

    def _on_cut(self) -> None:
        self.heard.put_nowait(None)


async def test_orders_come_with_their_sockets(holder: Holder) -> None:
    """Orders given before anybody listens arrive later, in order, each with its own socket."""
    near, far = socket.socketpair()
    assert holder.order(Restarts(counts={"worker": 2}))
    assert holder.order(NewRelay(worker=3), far)
    assert holder.order(Retire())
    far.close()
    child = Child(holder)
    first, second, third = [await asyncio.wait_for(child.heard.get(), 2) for _ in range(3)]
    assert first == (Restarts(counts={"worker": 2}), [])
    assert second is not None
    assert second[0] == NewRelay(worker=3)
    with near, second[1][0] as end:
        end.sendall(b"relayed")
        assert near.recv(20) == b"relayed"
    assert third == (Retire(), [])
    holder.close()
    assert await asyncio.wait_for(child.heard.get(), 2) is None


async def test_a_word_raises_a_signal(holder: Holder, signals: list[int]) -> None:
    """The supervisor, which has no loop, is signalled when a child serves, and hears it once."""
    child = Child(holder)
    assert not list(holder.words())
    child.leash.tell_serving()
    assert signals == [signal.SIGIO]
    child.leash.ask_for_policies()
    assert list(holder.words()) == [Serving(), LookAtPolicies()]
    assert not list(holder.words())
    holder.close()
    assert await asyncio.wait_for(child.heard.get(), 2) is None


async def test_nobody_to_order(holder: Holder) -> None:
    """An order to a child that is gone is known not to have arrived."""
    holder.child_end.close()
    assert not holder.order(Retire())
    assert not list(holder.words())


async def test_an_order_of_any_size(holder: Holder) -> None:
    """Policies that no packet holds arrive whole, in their place between other orders."""
    child = Child(holder)
    small, large = (
        UsePolicies(bundle=Bundle(policies=(PolicySource("p.yaml", "#" * size),)))
        for size in (1, 100 * MAX_MESSAGE_BYTES)
    )
    for order in (large, Retire(), small):
        assert holder.order(order)
    heard = [await asyncio.wait_for(child.heard.get(), 2) for _ in range(3)]
    assert heard == [(large, []), (Retire(), []), (small, [])]
    holder.close()
    assert await asyncio.wait_for(child.heard.get(), 2) is None
