"""Dialling and reuse over real sockets: only what was checked is dialled, only what is fit reused."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Self

import pytest
import trustme

from gateway.errors import Refused
from gateway.providers.provider import Provider
from gateway.proxy.dialling import candidates, system_resolver
from gateway.proxy.pool import Pool
from gateway.proxy.upstream import Header, Upstream
from keys.region import SecretRegion

NAME = "models.internal"


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def now(self) -> float:
        """Return the test's time."""
        return self.time

    monotonic = now


class Exchange:
    """A caller's side of one exchange; `done` is set when the answer is whole."""

    def __init__(self) -> None:
        self.done = asyncio.Event()

    def on_response_head(self, status: int, headers: list[Header], content_length: int) -> None:
        """Take the head."""

    def on_response_data(self, _data: bytes, *, is_complete: bool) -> None:
        """Take data."""
        if is_complete:
            self.done.set()

    def on_upstream_lost(self, **_: bool) -> None:
        """Take the loss."""
        self.done.set()

    def on_upstream_pause(self) -> None:
        """Never comes."""

    def on_upstream_resume(self) -> None:
        """Never comes."""


class House:
    """A pool whose resolver answers as the test says."""

    def __init__(self, answers: Sequence[str] = ("127.0.0.1",)) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.clock = Clock()
        self.tls: dict[str, ssl.SSLContext] = {}
        self.pool = Pool(
            clock=self.clock,
            tls=self.tls,
            connect_seconds=5,
            idle_seconds=30,
            max_connections=8,
            resolver=self.resolve,
        )
        self.region = SecretRegion.open(slots=1)
        self.handed_out: set[Upstream] = set()

    async def resolve(self, host: str, _port: int) -> Sequence[str]:
        """Answer, as DNS would."""
        self.asked.append(host)
        if not self.answers:
            raise socket.gaierror("no such name")
        return self.answers

    async def acquire(self, provider: Provider) -> Upstream | Refused:
        """Return what the pool hands out."""
        handed: asyncio.Future[Upstream | Refused] = asyncio.get_running_loop().create_future()
        self.pool.acquire(provider, handed.set_result)
        upstream = await asyncio.wait_for(handed, 10)
        if isinstance(upstream, Upstream):
            self.handed_out.add(upstream)
        return upstream

    async def connect(self, provider: Provider) -> Upstream:
        """Return a connection."""
        upstream = await self.acquire(provider)
        assert isinstance(upstream, Upstream), upstream
        return upstream

    async def call(self, upstream: Upstream) -> None:
        """Make one call and give the connection back."""
        exchange = Exchange()
        slot = self.region.lease()
        head = b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"
        slot.use(len(head))
        slot.view[:] = head
        upstream.start(exchange, slot, b"", is_head=False)
        await asyncio.wait_for(exchange.done.wait(), 10)
        self.pool.give_back(upstream)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    """A pool that is closed again."""
    house = House()
    yield house
    house.pool.close()
    for upstream in house.handed_out:
        upstream.abort()
    for _ in range(5):
        await asyncio.sleep(0)  # closing takes a few rounds of the loop


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening socket that the test answers on by hand."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def named(
    port: int, *, scheme: str = "http", host: str = NAME, private_addresses: bool = True
) -> Provider:
    """Return a provider that has a name."""
    return Provider.from_url(
        "mine", "openai", f"{scheme}://{host}:{port}/v1",
        request_stream_usage=False, private_addresses=private_addresses,
    )  # fmt: skip


@pytest.mark.parametrize(
    "answers",
    [["127.0.0.1"], ["10.0.0.1", "169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"], ["fe80::1%lo"]],
)
async def test_a_name_that_leads_inside_is_not_dialled(
    house: House, listener: socket.socket, answers: list[str]
) -> None:
    """Without a declaration no private answer is dialled, and the refusal says why."""
    house.answers = answers
    listener.setblocking(False)
    refused = await house.acquire(named(listener.getsockname()[1], private_addresses=False))
    assert isinstance(refused, Refused)
    assert refused.code == "upstream_forbidden_address"
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert house.pool.busy == 0


async def test_a_private_answer_beside_a_public_one_is_passed_over(house: House) -> None:
    """Only what passed the check is tried: here a public address, which tests cannot reach."""
    provider = named(1, private_addresses=False)
    answers = ["10.0.0.1", "8.8.8.8", "127.0.0.1", "8.8.8.8", "2606:4700::1", "::1", "8.8.4.4"]
    assert candidates(provider, answers) == ["8.8.8.8", "2606:4700::1", "8.8.4.4"]


async def test_a_name_is_resolved_once_for_a_connection(
    house: House, listener: socket.socket
) -> None:
    """What was checked is what is dialled: an answer that changes afterwards is never heard."""
    provider = named(listener.getsockname()[1])
    await house.connect(provider)
    assert house.asked == [NAME]
    end, (address, _) = listener.accept()
    assert address == "127.0.0.1"
    end.close()


async def test_the_next_address_is_tried(house: House, listener: socket.socket) -> None:
    """An address where nobody listens does not fail the call while there is another."""
    house.answers = ["::1", "127.0.0.1"]
    await house.connect(named(listener.getsockname()[1]))


@pytest.mark.parametrize("answers", [[], ["::1"]])
async def test_an_unreachable_name(house: House, answers: list[str]) -> None:
    """A name without answers, or where nobody listens, is unreachable and takes no place."""
    house.answers = answers
    refused = await house.acquire(named(1))
    assert isinstance(refused, Refused)
    assert refused.code == "upstream_unreachable"
    assert house.pool.busy == 0


@pytest.mark.parametrize("host", ["a..internal", "a" * 70 + ".internal"])
async def test_a_name_that_none_can_have(house: House, host: str) -> None:
    """What the system's resolver cannot even ask for is unreachable, and ends no task unheard."""
    house.pool._resolver = system_resolver
    refused = await house.acquire(named(1, host=host))
    assert isinstance(refused, Refused)
    assert refused.code == "upstream_unreachable"
    assert house.pool.busy == 0


@pytest.fixture
def authority() -> trustme.CA:
    """An authority that the pool trusts."""
    return trustme.CA()


class TlsServer:
    """Answers requests over TLS, one connection after another, in a thread of its own."""

    def __init__(
        self, authority: trustme.CA, name: str, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(context)
        self.asked: list[str | None] = []
        context.sni_callback = lambda _object, server_name, _context: self.asked.append(server_name)
        self._context = context
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            with end, contextlib.suppress(OSError):
                end.settimeout(0.5)  # a caller that says nothing more is not waited for
                with self._context.wrap_socket(end, server_side=True) as wrapped:
                    while wrapped.recv(4096):
                        wrapped.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


async def test_tls_asks_for_the_name_and_verifies_it(house: House, authority: trustme.CA) -> None:
    """Though an address is dialled, SNI and the certificate are the name's; reuse ends with it."""
    context = house.tls["mine"] = ssl.create_default_context()
    authority.configure_trust(context)
    with TlsServer(authority, NAME) as server:
        provider = named(server.port, scheme="https")
        upstream = await house.connect(provider)
        assert server.asked == [NAME]
        await house.call(upstream)
        assert await house.acquire(provider) is upstream
        await house.call(upstream)
        house.clock.time = 1e12  # no certificate is valid then
        assert await house.acquire(provider) is not upstream
        assert server.asked == [NAME, NAME]


async def test_a_certificate_for_another_host_is_refused(
    house: House, authority: trustme.CA
) -> None:
    """Whoever sits at the address without the name's certificate is no provider."""
    context = house.tls["mine"] = ssl.create_default_context()
    authority.configure_trust(context)
    with TlsServer(authority, "other.internal") as server:
        refused = await house.acquire(named(server.port, scheme="https"))
    assert isinstance(refused, Refused)
    assert refused.code == "upstream_unreachable"


async def test_an_address_that_never_answers_costs_its_share(
    house: House, listener: socket.socket, authority: trustme.CA
) -> None:
    """A server that takes the connection and says nothing leaves time for the next address."""
    context = house.tls["mine"] = ssl.create_default_context()
    authority.configure_trust(context)
    house.pool._connect_seconds = 1
    house.answers = ["127.0.0.1", "::1"]
    try:
        server = TlsServer(authority, NAME, "::1", listener.getsockname()[1])
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with server:
        await house.connect(named(server.port, scheme="https"))
        assert server.asked == [NAME]


async def kept(house: House, listener: socket.socket, provider: Provider) -> socket.socket:
    """Return the provider's end of a connection that was used once and is idle now."""
    upstream = await house.connect(provider)
    end, _ = listener.accept()
    exchange = asyncio.get_running_loop().create_task(house.call(upstream))
    await asyncio.sleep(0)
    assert end.recv(4096)
    end.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    await exchange
    assert len(house.pool._idle["mine"]) == 1
    return end


async def test_a_fit_connection_is_used_again(house: House, listener: socket.socket) -> None:
    """An idle connection in order carries the next call."""
    provider = named(listener.getsockname()[1])
    end = await kept(house, listener, provider)
    await house.connect(provider)
    assert house.asked == [NAME]
    end.close()


async def test_a_connection_with_unread_bytes_is_not_used_again(
    house: House, listener: socket.socket
) -> None:
    """Bytes that nobody asked for would be taken for the next caller's answer."""
    provider = named(listener.getsockname()[1])
    end = await kept(house, listener, provider)
    end.send(b"HTTP/1.1 200 OK\r\n")  # in the kernel, and not yet read
    await house.connect(provider)
    assert house.asked == [NAME, NAME]
    end.close()


async def test_a_connection_that_the_provider_left_is_not_used_again(
    house: House, listener: socket.socket
) -> None:
    """A farewell that is not yet read is seen before a credential is sent after it."""
    provider = named(listener.getsockname()[1])
    (await kept(house, listener, provider)).close()
    await house.connect(provider)
    assert house.asked == [NAME, NAME]


async def test_a_connection_of_a_former_provider_is_not_used_again(
    house: House, listener: socket.socket
) -> None:
    """After a reload a provider of the same name is another: its calls get their own connection."""
    port = listener.getsockname()[1]
    end = await kept(house, listener, named(port))
    await house.connect(named(port))
    assert house.asked == [NAME, NAME]
    end.close()
