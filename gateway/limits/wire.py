"""One connection to the store of limits, shared by all calls of a worker.

Laws of this file:
- what is asked within one turn of the loop leaves in one write, and answers come in order;
- nobody waits longer than the timeout, dialling included, and nothing is asked twice: only what the
  store says it did not run (`NOSCRIPT`) is sent again;
- a connection that failed once is given up, with everything that waits on it;
- the password is read from its file at every connection, and is in no message, log or repr.
"""

import asyncio
import hashlib
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import hiredis

from gateway.clock import Clock
from gateway.limits.breaker import Breaker

MAX_WAITING: Final = 4096
"""Questions without an answer: a worker's calls at once. More are not asked."""

MAX_REPLY_BYTES: Final = 64 * 1024
"""Far above the answer to any of our scripts."""


class Script:
    """A script of this package, and the name that the store calls it by."""

    def __init__(self, name: str) -> None:
        self.text = files("gateway.limits").joinpath(f"{name}.lua").read_bytes()
        self.digest = hashlib.sha1(self.text, usedforsecurity=False).hexdigest().encode()


class Away:
    """No answer: the store is not there, is not what it should be, or is too slow.

    `was_asked` is whether the question may have reached it all the same.
    """

    __slots__ = ("reason", "was_asked")

    def __init__(self, reason: str, *, was_asked: bool) -> None:
        self.reason = reason
        self.was_asked = was_asked


Reply = Any
OnReply = Callable[[Reply | Away], None]
Word = bytes | str | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where the store is, and how it is spoken to; `password` returns it anew at every connection."""

    host: str
    port: int
    database: int = 0
    username: str = ""
    password: Callable[[], str] | None = None
    tls: ssl.SSLContext | None = None


class _Question:
    """What is asked; of a connection's own prelude nobody waits for the answer."""

    __slots__ = ("deadline", "is_sent", "then", "was_retried", "words")

    def __init__(
        self, words: tuple[Word, ...], deadline: float, then: OnReply | None = None
    ) -> None:
        self.words = words
        self.deadline = deadline
        self.then = then
        self.is_sent = False
        self.was_retried = False


class _Protocol(asyncio.Protocol):
    """Bytes of one connection, for its wire."""

    def __init__(self, wire: "Wire") -> None:
        self._wire = wire
        self.reader = hiredis.Reader()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream's transport is one

    def data_received(self, data: bytes) -> None:
        try:
            self.reader.feed(data)
            while (reply := self.reader.gets()) is not False:
                self._wire.on_reply(self, reply)
            if len(data) > MAX_REPLY_BYTES:
                raise hiredis.ProtocolError("more than was asked for")
        except hiredis.ProtocolError:
            self._wire.on_lost(self, "protocol")

    def connection_lost(self, exc: Exception | None) -> None:
        self._wire.on_lost(self, "lost" if exc is None else type(exc).__name__)


class Wire:
    """Asks the store one thing after another; who asks is told once, sooner or later but in time."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        scripts: Sequence[Script],
        timeout_seconds: float,
        clock: Clock,
        on_state: Callable[[bool, str], None],
    ) -> None:
        self._endpoint = endpoint
        self._address = (endpoint.host, endpoint.port)
        self._scripts: Mapping[bytes, Script] = {each.digest: each for each in scripts}
        self._timeout = timeout_seconds
        self._clock = clock
        self._on_state = on_state
        self._loop = asyncio.get_running_loop()
        self._breaker = Breaker()
        self._connection: _Protocol | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._unsent: deque[_Question] = deque()
        self._unanswered: deque[_Question] = deque()
        self._is_flushing = False
        self._timer: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Future[None] | None = None

    @property
    def is_away(self) -> bool:
        """Whether the store is thought to be away."""
        return self._breaker.is_open

    def ask(
        self, script: Script, keys: Sequence[str], words: Sequence[Word], then: OnReply
    ) -> None:
        """Run a script; call `then` with its answer, or `Away`, not before this returns."""
        now = self._clock.monotonic()
        if not self._breaker.lets_pass(now) or self._waiting >= MAX_WAITING:
            self._loop.call_soon(then, Away("open", was_asked=False))
            return
        question = (b"EVALSHA", script.digest, len(keys), *keys, *words)
        self._put(_Question(question, now + self._timeout, then))

    async def close(self) -> None:
        """Give the connection up, once nothing waits for an answer any more."""
        if self._waiting:
            self._emptied = self._loop.create_future()
            await asyncio.wait([self._emptied], timeout=self._timeout)
        if self._dialling is not None:
            self._dialling.cancel()
            await asyncio.gather(self._dialling, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        self._drop("closed")

    @property
    def _waiting(self) -> int:
        return len(self._unsent) + len(self._unanswered)

    def _put(self, question: _Question) -> None:
        self._unsent.append(question)
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout, self._on_time)
        if self._connection is None:
            if self._dialling is None:
                self._dialling = self._loop.create_task(self._dial())
        elif not self._is_flushing:
            self._is_flushing = True
            self._loop.call_soon(self._flush)

    # --- out ---

    async def _dial(self) -> None:
        host, port = self._address
        try:
            async with asyncio.timeout(self._timeout):
                _, connection = await self._loop.create_connection(
                    lambda: _Protocol(self), host, port, ssl=self._endpoint.tls
                )
            prelude = self._prelude()
        except (OSError, TimeoutError, ValueError) as error:
            self._dialling = None
            self._address = (self._endpoint.host, self._endpoint.port)
            self._drop(type(error).__name__)
            return
        self._dialling = None
        self._connection = connection
        deadline = self._clock.monotonic() + self._timeout
        self._unsent.extendleft(_Question(words, deadline) for words in reversed(prelude))
        self._flush()

    def _prelude(self) -> list[tuple[Word, ...]]:
        """Return what every connection begins with.

        Raises:
            OSError: The file of the password cannot be read.
            ValueError: There is none in it.
        """
        endpoint = self._endpoint
        words: list[tuple[Word, ...]] = []
        if endpoint.password is not None:
            words.append((b"AUTH", endpoint.username or "default", endpoint.password()))
        if endpoint.database:
            words.append((b"SELECT", endpoint.database))
        # Taught beforehand, so that nothing is asked out of its order for want of a script.
        return words + [(b"SCRIPT", b"LOAD", script.text) for script in self._scripts.values()]

    def _flush(self) -> None:
        self._is_flushing = False
        if self._connection is None or self._connection.transport is None or not self._unsent:
            return
        packed = []
        while self._unsent:
            question = self._unsent.popleft()
            packed.append(hiredis.pack_command(question.words))  # type: ignore[arg-type]  # any tuple
            question.is_sent = True
            self._unanswered.append(question)
        self._connection.transport.write(b"".join(packed))

    # --- back ---

    def on_reply(self, connection: _Protocol, reply: Reply) -> None:
        """Take the answer to the oldest question."""
        if connection is not self._connection:
            return
        if not self._unanswered:
            self._drop("protocol")
            return
        question = self._unanswered.popleft()
        if not isinstance(reply, hiredis.ReplyError):
            self._on_answer(question, reply)
            return
        kind = str(reply).partition(" ")[0]
        if kind == "NOSCRIPT" and not question.was_retried:
            self._teach(question)
            return
        if kind == "MOVED":
            host, _, port = str(reply).rpartition(" ")[2].rpartition(":")
            self._address = (host or self._address[0], int(port))
        question.is_sent = False  # it came, and was not run
        self._unanswered.appendleft(question)
        self._drop(kind)

    def _on_answer(self, question: _Question, reply: Reply) -> None:
        # A store that takes a connection but no calls, such as a replica, is still away.
        if question.then is not None:
            if self._breaker.succeeded():
                self._on_state(True, "")
            question.then(reply)
        self._note_emptied()

    def _teach(self, question: _Question) -> None:
        """Ask once more with the text of the script: the store forgot it meanwhile."""
        question.was_retried = True
        digest = question.words[1]
        script = self._scripts[digest if isinstance(digest, bytes) else b""]
        question.words = (b"EVAL", script.text, *question.words[2:])
        self._put(question)

    def on_lost(self, connection: _Protocol, reason: str) -> None:
        """Give the connection up."""
        if connection is self._connection:
            self._drop(reason)

    def _on_time(self) -> None:
        self._timer = None
        now = self._clock.monotonic()
        oldest = min((q[0].deadline for q in (self._unanswered, self._unsent) if q), default=None)
        if oldest is None:
            return
        if oldest <= now:
            self._drop("timeout")
        else:
            self._timer = self._loop.call_later(oldest - now, self._on_time)

    def _drop(self, reason: str) -> None:
        """Give up the connection and everything that waits on it."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.transport is not None:
            connection.transport.abort()
        waiting = [*self._unanswered, *self._unsent]
        self._unanswered.clear()
        self._unsent.clear()
        if self._breaker.failed(self._clock.monotonic()):
            self._on_state(False, reason)
        for question in waiting:
            if question.then is not None:
                question.then(Away(reason, was_asked=question.is_sent))
        self._note_emptied()

    def _note_emptied(self) -> None:
        if self._emptied is not None and not self._waiting and not self._emptied.done():
            self._emptied.set_result(None)
