"""Sessions of a fleet, in a Redis that its replicas share.

Laws of this file:
- every change is one Lua script: done whole, and told to every replica in the same step;
- all keys are in one hash slot, under `{veklom:<namespace>}`;
- records stand there as they were sealed: what wraps them here is this host's alone;
- nothing is believed that was not left there by a replica (`keys.deployment`): it counts as absent;
- what could not be told is kept, within limits, until it can be.

Instants are the gateways' own, as in the sealed records themselves, so that deadlines compare like
with like; a replica whose clock is not the store's is not let in. Only the last resort, that Redis
forgets a record nobody closed, goes by the clock of Redis.
"""

import hashlib
import math
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any, Final

import msgspec
from redis.exceptions import NoScriptError

from gateway.clock import Clock
from gateway.config import Sessions, Store
from gateway.errors import GatewayError
from gateway.store.connection import StoreRefused, check_server, connect, errors_translated
from gateway.store.sessions import (
    Entry,
    StoreUnavailable,
    too_many_in_all,
    too_many_of_owner,
    why_due,
)
from gateway.store.words import Changed, Dropped, Event, KillLifted, KillPlaced, Words
from gateway.telemetry.logs import get_log
from keys.deployment import Authenticator
from keys.errors import Forged
from keys.wrapping import Wrapping
from policies.request import Principal

KEPT_SECONDS: Final = 300
"""How long past its expiry a record stays for a replica to record its end; then Redis forgets it."""

MAX_EVENTS: Final = 10_000
"""Events that stay in the log, about 2 MB; a replica that missed more compares all it holds."""

EVENTS_AT_ONCE: Final = 1000
DUE_AT_ONCE: Final = 1000
READ_AT_ONCE: Final = 200
"""How much one question moves: Redis answers nobody else meanwhile."""

MAX_OWED: Final = 10_000
"""Ends of sessions that are remembered until the store can be told."""

CLAIM_SECONDS: Final = 600
"""How long whoever ended a session may ask again for what to record: far beyond any lost answer."""

LIFTED: Final = b""
"""What is known of a kill that was lifted, about 100 bytes in the store for each there ever was."""

MAX_SKEW_SECONDS: Final = 30.0
"""How far a replica's clock may be from that of Redis, as for issuers' tokens."""

log = get_log()


class _Script:
    def __init__(self, name: str) -> None:
        self.text = files("gateway.store").joinpath(f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


_OPEN, _REPLACE, _CLOSE, _FIND, _DUE, _TOUCH, _MEET, _KILL = map(
    _Script, ("open", "replace", "close", "find", "due", "touch", "meet", "kill")
)


class EventsMissed(GatewayError):
    """Some of what was said can no longer be heard; only comparing everything helps."""

    code = "events_missed"


class Owed(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a session, of which the store has not confirmed that it heard."""

    session_id: str
    reason: str
    due_at: float | None
    claim: str


class Meeting(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica learns of the store when it connects.

    `last` is the number of the last event.
    """

    epoch: bytes
    last: int
    persistence: str


class RedisStore:
    """Every open session of the fleet, and what its replicas tell each other."""

    def __init__(  # noqa: PLR0913 - the composition root names every part once
        self,
        store: Store,
        limits: Sessions,
        *,
        deployment: str,
        deployment_key: bytes,
        wrapping: Wrapping,
        clock: Clock,
    ) -> None:
        self._config = store
        self._limits = limits
        self._clock = clock
        self._wrapping = wrapping
        authenticator = Authenticator(deployment_key, store.namespace)
        self._words = Words(authenticator)
        self._check = authenticator.mac("deployment", deployment, b"")
        self._prefix = f"{{veklom:{store.namespace}}}:"
        self._deadlines, self._events, self._kills, self._about = (
            self._prefix + name for name in ("deadlines", "events", "kills", "about")
        )
        self._client = connect(store, connections=store.connections)
        self._listener = connect(store, connections=1, wait_seconds=self.listen_seconds)
        self._held: dict[str, Entry] = {}
        self._used: dict[str, float] = {}
        self._owed: dict[str, Owed] = {}
        self._owed_kills: dict[str, bytes | None] = {}  # no more than may stand
        self.replica = secrets.token_hex(8)
        """Names this process among the replicas."""
        self.errors = 0
        self.forged = 0

    @property
    def address(self) -> str:
        """Where the store is; the configuration refuses a URL that holds credentials."""
        return self._config.url

    @property
    def listen_seconds(self) -> float:
        """How long a replica waits for events before it asks again: silence proves nothing longer."""
        return self._config.staleness / 4

    async def aclose(self) -> None:
        """End every connection."""
        await self._client.aclose()
        await self._listener.aclose()

    # --- asking ---

    async def _ask(self, *command: Any) -> Any:
        return await self._ask_by(self._client, *command)

    async def _ask_by(self, client: Any, *command: Any) -> Any:
        try:
            with errors_translated():
                return await client.execute_command(*command)
        except StoreUnavailable:
            self.errors += 1
            raise
        except StoreRefused as refused:
            self.errors += 1
            raise StoreUnavailable from refused

    async def _run(self, script: _Script, keys: Sequence[str], *args: Any) -> Any:
        return await self._run_by(self._client, script, keys, *args)

    async def _run_by(self, client: Any, script: _Script, keys: Sequence[str], *args: Any) -> Any:
        rest = (len(keys), *keys, *args)
        try:
            return await self._ask_by(client, "EVALSHA", script.sha, *rest)
        except NoScriptError:  # a Redis that was just started knows none
            return await self._ask_by(client, "EVAL", script.text, *rest)

    def _session(self, session_id: str) -> str:
        return f"{self._prefix}session:{session_id}"

    def _ended(self, session_id: str) -> str:
        return f"{self._prefix}ended:{session_id}"

    def _owner(self, principal: Principal) -> str:
        name = f"{principal.issuer}\0{principal.subject}".encode()
        return f"{self._prefix}owner:{hashlib.sha256(name).hexdigest()[:32]}"

    # --- sessions ---

    def _written(self, entry: Entry) -> tuple[Any, ...]:
        record = entry.record
        return (
            record.session_id,
            self._words.from_entry(replace(entry, record=self._wrapping.unwrap(record))),
            record.revision,
            record.expires_at * 1000,
            record.idle_seconds * 1000,
            math.ceil(entry.deadline * 1000),
            (record.expires_at + KEPT_SECONDS) * 1000,
        )

    async def open(self, entry: Entry) -> None:
        """Keep a new session, if there is room."""
        keys = self._session(entry.record.session_id), self._deadlines, self._owner(entry.principal)
        about, now = self._words.from_about(entry), int(self._clock.now() * 1000)
        limits = self._limits.total, self._limits.per_subject
        match await self._run(_OPEN, keys, *self._written(entry), about, now, *limits):
            case b"too many in all":
                raise too_many_in_all()
            case b"too many of owner":
                raise too_many_of_owner()

    async def replace(self, entry: Entry, revision: int) -> bool:
        """Keep this in place of the session's `revision`; tell the other replicas."""
        record = entry.record
        event = Changed(session_id=record.session_id, by=self.replica)
        keys = (
            self._session(record.session_id),
            self._deadlines,
            self._owner(entry.principal),
            self._events,
        )
        told = self._words.from_event(event), MAX_EVENTS
        return bool(await self._run(_REPLACE, keys, *self._written(entry), revision, *told))

    async def close(
        self, session_id: str, reason: str, *, due_at: float | None = None
    ) -> Entry | None:
        """Forget a session and return whose it was; tell the other replicas.

        An end that the store does not confirm is owed to it, whether or not it was done there.
        """
        owed = self._owed.pop(session_id, None) or Owed(
            session_id=session_id, reason=reason, due_at=due_at, claim=secrets.token_hex(16)
        )
        keys = self._session(session_id), self._deadlines, self._events, self._ended(session_id)
        due = "" if due_at is None else int(due_at * 1000)
        event = self._words.from_event(
            Dropped(session_id=session_id, reason=reason, by=self.replica)
        )
        try:
            about = await self._run(
                _CLOSE, keys, session_id, due, event, MAX_EVENTS, owed.claim, CLAIM_SECONDS * 1000
            )
        except StoreUnavailable:
            if len(self._owed) < MAX_OWED:
                self._owed[session_id] = owed
            raise
        try:
            return None if about is None else self._words.to_about(session_id, about)
        except Forged:
            self._refuse_forged("session")
            return None

    async def find(self, session_id: str) -> Entry | None:
        """Return the open session of this id."""
        return (await self.find_all([session_id])).get(session_id)

    async def find_all(self, session_ids: Iterable[str]) -> dict[str, Entry]:
        """Return those of these sessions that are open."""
        asked = list(session_ids)
        found: dict[str, Entry] = {}
        for begin in range(0, len(asked), READ_AT_ONCE):
            ids = asked[begin : begin + READ_AT_ONCE]
            answer = await self._run(_FIND, [self._deadlines, *map(self._session, ids)], *ids)
            for number, session_id in enumerate(ids):
                kept, deadline = answer[2 * number : 2 * number + 2]
                if kept is not None and deadline is not None:
                    entry = self._read(session_id, kept, float(deadline) / 1000)
                    if entry is not None:
                        found[session_id] = entry
        return found

    def _read(self, session_id: str, kept: bytes, deadline: float) -> Entry | None:
        try:
            entry = self._words.to_entry(session_id, kept, 0.0)
            entry.record = self._wrapping.wrap(entry.record)
        except Forged:
            self._refuse_forged("session")
            return None
        entry.used_at = deadline - entry.record.idle_seconds
        return entry

    def _refuse_forged(self, what: str) -> None:
        self.forged += 1
        log.error("store.forged", reason=f"the store holds a {what} that no replica left there")

    async def owned_by(self, principal: Principal) -> list[Entry]:
        """Return what is open of this issuer and subject."""
        ids = await self._ask("ZRANGE", self._owner(principal), 0, -1)
        return list((await self.find_all(each.decode() for each in ids)).values())

    async def scan(self) -> AsyncIterator[list[Entry]]:
        """Yield every open session, as they were when the scan began."""
        ids = [each.decode() for each in await self._ask("ZRANGE", self._deadlines, 0, -1)]
        for begin in range(0, len(ids), READ_AT_ONCE):
            yield list((await self.find_all(ids[begin : begin + READ_AT_ONCE])).values())

    async def due(self, now: float) -> list[tuple[str, str]]:
        """Return sessions that end by `now`, once the store has heard what was used here."""
        await self._tell_use()
        limits = int(now * 1000), DUE_AT_ONCE, self._session("")
        found = await self._run(_DUE, [self._deadlines], *limits)
        pairs = zip(found[::2], found[1::2], strict=True)
        return [(each.decode(), why_due(float(expiry or 0) / 1000, now)) for each, expiry in pairs]

    def touch(self, session_ids: Iterable[str], used_at: float) -> None:
        """Note that these sessions carried a call: no more of them than workers hold."""
        for session_id in session_ids:
            self._used[session_id] = max(used_at, self._used.get(session_id, 0.0))

    async def _tell_use(self) -> None:
        used, self._used = self._used, {}
        while used:
            ids = list(used)[:READ_AT_ONCE]
            told = [part for each in ids for part in (each, int(used[each] * 1000))]
            try:
                await self._run(_TOUCH, [self._deadlines, *map(self._session, ids)], *told)
            except StoreUnavailable:
                for session_id, used_at in used.items():
                    self.touch([session_id], used_at)
                raise
            for session_id in ids:
                del used[session_id]

    # --- what this gateway knows of it ---

    def adopt(self, entry: Entry) -> None:
        """Go on with a session that workers already hold, and tell the store when it was used."""
        self.hold(entry)
        self.touch([entry.record.session_id], entry.used_at)

    def hold(self, entry: Entry) -> None:
        """Note that workers may hold this."""
        self._held[entry.record.session_id] = entry

    def let_go(self, session_id: str) -> bool:
        """Note that workers were told to forget it; return whether they may have held it."""
        return self._held.pop(session_id, None) is not None

    def recall(self, session_id: str) -> Entry | None:
        """Return what workers may hold of a session, whether or not the store answers."""
        return self._held.get(session_id)

    def held(self) -> list[Entry]:
        """Return the sessions that this gateway's workers may hold."""
        return list(self._held.values())

    def owes(self, session_id: str) -> bool:
        """Return whether the store has not confirmed the end of this session."""
        return session_id in self._owed

    def owed(self) -> list[Owed]:
        """Return the ends of sessions that the store has not confirmed."""
        return list(self._owed.values())

    # --- the replicas ---

    async def meet(self) -> Meeting:
        """Return what there is to know when the store is reached, perhaps again.

        Raises:
            StoreRefused: It must not be used as it is, or is not this deployment's.
            StoreUnavailable: It does not answer.
        """
        try:
            seconds, micros = await self._ask("TIME")
            persistence = await check_server(self._client, self._config)
            check, epoch, last = await self._who_shares(self._client, secrets.token_bytes(16))
        except StoreUnavailable as error:
            if isinstance(error.__cause__, StoreRefused):
                raise error.__cause__ from None
            raise
        skew = abs(int(seconds) + int(micros) / 1e6 - self._clock.now())
        if skew > MAX_SKEW_SECONDS:
            raise StoreRefused(f"this clock and the store's differ by {skew:.0f} s")
        if check != self._check:
            raise StoreRefused(
                f"the namespace {self._config.namespace!r} is another deployment's, or this replica "
                "lacks its key: replicas have the same `name`, and state_dir/fingerprint.key is a "
                "copy (32 bytes, mode 0600) of what the first of them has"
            )
        return Meeting(epoch=epoch, last=_number(last), persistence=persistence)

    async def check(self) -> None:
        """Return if the store may be used as it is now.

        Raises:
            StoreRefused: It may not.
            StoreUnavailable: It does not answer.
        """
        await check_server(self._client, self._config)

    async def _who_shares(self, client: Any, epoch: bytes) -> Any:
        return await self._run_by(client, _MEET, (self._about, self._events), self._check, epoch)

    async def read_events(
        self, epoch: bytes, after: int, *, waits: bool
    ) -> list[tuple[int, Event | None]]:
        """Return numbered events in order, None for a forged one; wait for the first if there is none.

        Raises:
            EventsMissed: The store has forgotten what it had said, or does not keep so much of it.
            StoreUnavailable: It does not answer.
        """
        # A store that was flushed numbers anew: who only waits for higher numbers hears nothing more.
        _, current, last = await self._who_shares(self._listener, secrets.token_bytes(16))
        if current != epoch or _number(last) < after:
            raise EventsMissed
        block = ("BLOCK", int(self.listen_seconds * 1000)) if waits else ()
        question = ("XREAD", "COUNT", EVENTS_AT_ONCE, *block, "STREAMS", self._events, f"0-{after}")
        answer = await self._ask_by(self._listener, *question)
        events = [
            (_number(number), self._to_event(fields.get(b"event", b"")))
            for _stream, entries in answer or ()
            for number, fields in entries
        ]
        if [number for number, _ in events] != list(range(after + 1, after + 1 + len(events))):
            raise EventsMissed
        return events

    def _to_event(self, data: bytes) -> Event | None:
        try:
            return self._words.to_event(data)
        except Forged:
            self._refuse_forged("message")
            return None

    async def place_kill(self, kill_id: str, data: bytes) -> None:
        """Let a kill stand until it is lifted, and have every replica hear of it."""
        stands = self._words.from_kill(kill_id, data)
        await self._tell_kill(kill_id, data, stands, KillPlaced(kill_id=kill_id, data=data))

    async def lift_kill(self, kill_id: str) -> bool:
        """Lift a kill, and have every replica hear of it; return whether it stood."""
        lifted = self._words.from_kill(kill_id, LIFTED)
        return await self._tell_kill(kill_id, None, lifted, KillLifted(kill_id=kill_id))

    async def _tell_kill(
        self, kill_id: str, data: bytes | None, stands: bytes, event: Event
    ) -> bool:
        self._owed_kills.pop(kill_id, None)
        told = self._words.from_event(event), MAX_EVENTS
        try:
            return bool(await self._run(_KILL, [self._kills, self._events], kill_id, stands, *told))
        except StoreUnavailable:
            self._owed_kills[kill_id] = data
            raise

    def owed_kills(self) -> list[tuple[str, bytes | None]]:
        """Return the kills, and liftings without data, that the store has not confirmed."""
        return list(self._owed_kills.items())

    async def known_kills(self) -> Mapping[str, bytes]:
        """Return every kill that was told, by id: its data, or `LIFTED`."""
        answer = await self._ask("HGETALL", self._kills)
        known: dict[str, bytes] = {}
        for key, data in answer.items():
            kill_id = key.decode()
            try:
                known[kill_id] = self._words.to_kill(kill_id, data)
            except Forged:
                self._refuse_forged("kill")
        return known


def _number(stream_id: bytes) -> int:
    """Return the number of an event: ids are `0-<number>`, without gaps."""
    return int(stream_id.rpartition(b"-")[2])
