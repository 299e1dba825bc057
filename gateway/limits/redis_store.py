"""Limits of a fleet, in a Redis that all workers of all replicas share.

Laws of this file:
- a call is admitted by one script and settled by one, all or nothing, by the store's clock;
- what is held ends by itself unless it is renewed, so that a worker that dies leaves nothing behind;
- a call whose limits the store did not count goes by what each limit declares for that, and says so;
- what could not be settled is kept, within limits, until it can be: the store counts it once;
- keys name limits, never callers: those are hashed.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import msgspec

from gateway.clock import Clock
from gateway.limits.memory_store import MemoryLimiter
from gateway.limits.reservation import OnWarned, Reservation, warned
from gateway.limits.wire import Away, Script, Wire, Word
from policies.limits import Demand, Key, Limit, OnStoreError
from policies.quota import (
    NOTHING,
    Budget,
    Concurrency,
    Measure,
    QuotaStatus,
    Rate,
    Requests,
    Usage,
)

HOLD_SECONDS: Final = 90.0
"""How long a budget holds what a call reserved, unless it is renewed: as long as a usual lease."""

REMEMBERED_SECONDS: Final = 600.0
"""How long the store knows that a call was settled, and refuses to count it twice."""

KEPT_SECONDS: Final = 86_400.0
"""How long past its window a budget's account is kept: far beyond any call that began in it."""

MAX_UNSETTLED: Final = 10_000
"""Calls whose end waits for the store, some 10 MB of them; of more the oldest are forgotten."""

SETTLED_AT_ONCE: Final = 200
"""Late settlements a second: the store has calls to answer meanwhile."""

RETRY_SECONDS: Final = 1.0
"""When to come again to a limit that cannot be counted: as often as the store is tried."""

ADMIT, SETTLE, RENEW = Script("admit"), Script("settle"), Script("renew")
SCRIPTS: Final = (ADMIT, SETTLE, RENEW)

_MICRO: Final = 1_000_000.0

Then = Callable[[Reservation | QuotaStatus], None]


class LimitCounts(msgspec.Struct):
    """What happened to calls that the store did not count as it should."""

    degraded: int = 0
    unsettled_lost: int = 0


class _Settlement(msgspec.Struct, frozen=True):
    """A call's end that is still to be told; `asked_at` is 0 where the store cannot know it yet."""

    keys: list[str]
    words: list[Word]
    demands: list[Demand]
    asked_at: float


class RedisLimiter:
    """Counts calls against the limits of a policy set, together with every other worker."""

    waits = True

    def __init__(
        self,
        wire: Wire,
        *,
        namespace: str,
        sharers: int,
        clock: Clock,
        on_warned: OnWarned = lambda _: None,
    ) -> None:
        self._wire = wire
        self._prefix = f"{{veklom:{namespace}}}:limit:"
        self._sharers = sharers
        self._clock = clock
        self._on_warned = on_warned
        self._local = MemoryLimiter(clock)
        self._shares: dict[Measure, Measure] = {}
        self._live: dict[str, Reservation] = {}
        self._unsettled: dict[str, _Settlement] = {}
        self.counts = LimitCounts()

    @property
    def gauges(self) -> dict[str, float]:
        """Return what operators may want to see."""
        return {
            "limits_store_up": int(not self._wire.is_away),
            "limits_calls_held": len(self._live),
            "limits_calls_unsettled": len(self._unsettled),
            "limits_calls_degraded": self.counts.degraded,
            "limits_settlements_lost": self.counts.unsettled_lost,
        }

    async def close(self) -> None:
        """Give the connection up, once the store has answered what was asked, or is too late.

        A crash here is that of any worker: what it held ends by itself.
        """
        await self._wire.close()

    # --- admit ---

    def admit(self, asked: Sequence[Demand], call_id: str = "") -> Reservation | QuotaStatus:
        """Return what a call holds that no limit applies to; others have to wait."""
        assert not asked  # noqa: S101 - the store answers later: `begin`
        return Reservation((), (), (), call_id)

    def begin(self, asked: Sequence[Demand], call_id: str, then: Then) -> None:
        """Call `then` once with what the call may hold, or the first limit that refuses it."""
        never = self._never_fits(asked)
        if never is not None:
            then(never)
            return
        keys, words = self._frame(asked, call_id, _admit_words)
        self._wire.ask(
            ADMIT, keys, [call_id, *words], partial(self._on_admitted, asked, call_id, then)
        )

    def _never_fits(self, asked: Sequence[Demand]) -> QuotaStatus | None:
        """Return what refuses a call that takes more than a limit ever has, whatever is counted."""
        for demand in asked:
            measure, name = demand.measure, demand.limit.name
            if demand.limit.is_shadow or isinstance(measure, Concurrency):
                continue
            if isinstance(measure, Rate) and demand.cost > measure.burst:
                return measure.status(name, 0.0, 0.0, is_allowed=False, cost=demand.cost)
            if isinstance(measure, Budget) and demand.cost > measure.maximum:
                now = self._clock.now()
                return measure.status(name, 0, now, demand.ends_at, demand.cost, is_allowed=False)
        return None

    def _on_admitted(self, asked: Sequence[Demand], call_id: str, then: Then, reply: Any) -> None:
        if isinstance(reply, Away):
            then(self._without_store(asked, call_id, was_asked=reply.was_asked))
            return
        if (
            reply[0] < 0
        ):  # settled before it was admitted: only a reply that nobody awaits is so late
            then(self._without_store(asked, call_id, was_asked=False))
            return
        statuses, taken, notes = [], [], []
        for place, demand in enumerate(asked[: (len(reply) - 1) // 2]):
            fits, figure = bool(reply[1 + 2 * place]), int(reply[2 + 2 * place])
            status = self._status(demand, figure, is_allowed=fits)
            if place + 1 == reply[0]:
                then(status)
                return
            if fits:
                taken.append(demand)
            else:
                notes.append(f"{demand.limit.name}:shadow")
            if not demand.limit.is_shadow:
                statuses.append(status)
        reservation = Reservation(tuple(taken), tuple(statuses), tuple(notes), call_id)
        if any(not isinstance(demand.measure, Rate) for demand in taken):
            reservation.renewed_at = self._clock.monotonic()
            self._live[call_id] = reservation
        then(reservation)

    def _status(self, demand: Demand, figure: int, *, is_allowed: bool) -> QuotaStatus:
        measure, name, cost = demand.measure, demand.limit.name, demand.cost
        if isinstance(measure, Rate):
            ahead = figure / _MICRO
            return measure.status(name, ahead, 0.0, is_allowed=is_allowed, cost=cost)
        if isinstance(measure, Concurrency):
            return measure.status(name, figure + is_allowed, is_allowed=is_allowed)
        now, taken = self._clock.now(), figure + (cost if is_allowed else 0)
        return measure.status(name, taken, now, demand.ends_at, cost, is_allowed=is_allowed)

    def _without_store(
        self, asked: Sequence[Demand], call_id: str, *, was_asked: bool
    ) -> Reservation | QuotaStatus:
        """Decide as each limit declares for this case."""
        self.counts.degraded += 1
        admission = self._count_here(asked, call_id)
        if was_asked and isinstance(admission, QuotaStatus):
            # The store may have admitted the call all the same: it is to know that nothing came of it.
            self._settle_in_store(call_id, asked, NOTHING, was_taken=True)
        return admission

    def _count_here(self, asked: Sequence[Demand], call_id: str) -> Reservation | QuotaStatus:
        here, notes = [], []
        for demand in asked:
            limit, mode = demand.limit, demand.limit.on_store_error
            if mode is OnStoreError.DENY and not limit.is_shadow:
                return _unavailable(limit)
            if mode is OnStoreError.LOCAL:
                share = self._share(demand.measure)
                here.append(Demand(limit, share, demand.key, demand.cost, demand.ends_at))
            notes.append(f"{limit.name}:{mode}")
        local = self._local.admit(here, call_id)
        if isinstance(local, QuotaStatus):
            return local
        reservation = Reservation(tuple(asked), local.statuses, (*notes, *local.notes), call_id)
        reservation.elsewhere = local
        return reservation

    def _share(self, measure: Measure) -> Measure:
        share = self._shares.get(measure)
        if share is None:
            share = self._shares[measure] = measure.shared_by(self._sharers)
        return share

    # --- settle ---

    def settle(self, reservation: Reservation, actual: Usage) -> None:
        """Count what the call took in place of what it had reserved; a second time does nothing."""
        taken, reservation.taken = reservation.taken, ()
        self._live.pop(reservation.call_id, None)
        local = reservation.elsewhere
        if local is not None:
            self._local.settle(local, actual)
        if taken:
            self._settle_in_store(reservation.call_id, taken, actual, was_taken=local is None)

    def _settle_in_store(
        self, call_id: str, taken: Sequence[Demand], actual: Usage, *, was_taken: bool
    ) -> None:
        changed = [demand for demand in taken if _changes(demand)]
        if not changed:
            return
        keys, words = self._frame(
            changed, call_id, partial(_settle_words, actual=actual, was_taken=was_taken)
        )
        remembered = int(REMEMBERED_SECONDS * 1000)
        settlement = _Settlement(keys, [call_id, remembered, *words], changed, 0.0)
        self._tell(call_id, settlement)

    def _tell(self, call_id: str, settlement: _Settlement) -> None:
        self._wire.ask(
            SETTLE,
            settlement.keys,
            settlement.words,
            partial(self._on_settled, call_id, settlement),
        )

    def _on_settled(self, call_id: str, settlement: _Settlement, reply: Any) -> None:
        if isinstance(reply, Away):
            self._keep(call_id, settlement, was_asked=reply.was_asked)
            return
        self._unsettled.pop(call_id, None)
        spent = iter(reply[1:])
        budgets = [each for each in settlement.demands if isinstance(each.measure, Budget)]
        for demand, before, after in zip(budgets, spent, spent, strict=False):
            word = warned(demand, before, after)
            if word is not None:
                self._on_warned(word)

    def _keep(self, call_id: str, settlement: _Settlement, *, was_asked: bool) -> None:
        """Keep an end for later. A crash here loses it: what it held expires, its spending does not
        count in the store, and stands in the audit log.
        """  # noqa: D205 - a crash considered
        if was_asked and not settlement.asked_at:
            settlement = msgspec.structs.replace(settlement, asked_at=self._clock.monotonic())
        self._unsettled.pop(call_id, None)
        self._unsettled[call_id] = settlement
        if len(self._unsettled) > MAX_UNSETTLED:
            self._unsettled.pop(next(iter(self._unsettled)))
            self.counts.unsettled_lost += 1

    # --- time ---

    def tick(self) -> None:
        """Renew what calls hold, and tell what could not be told; once a second."""
        now = self._clock.monotonic()
        for call_id, reservation in list(self._live.items()):
            held = [each for each in reservation.taken if not isinstance(each.measure, Rate)]
            shortest = min(map(_lease_of, held), default=HOLD_SECONDS)
            if now - reservation.renewed_at >= shortest / 3:
                reservation.renewed_at = now
                keys, words = self._frame(held, call_id, _renew_words)
                self._wire.ask(RENEW, keys, [call_id, *words], _ignore)
        self._tell_late(now)

    def _tell_late(self, now: float) -> None:
        """Settle what is late. Of what the store may know already but for its answer, nothing is told
        once it would have forgotten that: counting twice is worse than what expired.
        """  # noqa: D205 - the reason
        at_once = 1 if self._wire.is_away else SETTLED_AT_ONCE
        for call_id, settlement in list(self._unsettled.items())[:at_once]:
            if settlement.asked_at and now - settlement.asked_at > REMEMBERED_SECONDS / 2:
                del self._unsettled[call_id]
                self.counts.unsettled_lost += 1
            else:
                self._tell(call_id, settlement)

    # --- words ---

    def _frame(
        self,
        demands: Iterable[Demand],
        call_id: str,
        words_of: Callable[[Demand, Clock], tuple[Word, ...]],
    ) -> tuple[list[str], list[Word]]:
        keys = [f"{self._prefix}ended:{call_id}"]
        words: list[Word] = []
        for demand in demands:
            key = f"{self._prefix}{demand.limit.name}:{_digest(demand.key)}"
            keys.append(key)
            if isinstance(demand.measure, Budget):
                keys.append(f"{key}:holds")
            words += words_of(demand, self._clock)
        return keys, words


def _digest(key: Key) -> str:
    return hashlib.blake2b(msgspec.msgpack.encode(key), digest_size=16).hexdigest()


def _admit_words(demand: Demand, clock: Clock) -> tuple[Word, ...]:
    measure, cost, shadow = demand.measure, demand.cost, int(demand.limit.is_shadow)
    if isinstance(measure, Rate):
        return (b"rate", cost, repr(measure.interval * _MICRO), measure.burst, 0, shadow)
    if isinstance(measure, Concurrency):
        lease = int(measure.lease_seconds * _MICRO)
        return (b"places", cost, measure.maximum, lease, 0, shadow)
    hold = int(HOLD_SECONDS * _MICRO)
    return (b"budget", cost, measure.maximum, hold, _kept_ms(demand, clock), shadow)


def _settle_words(
    demand: Demand, clock: Clock, *, actual: Usage, was_taken: bool
) -> tuple[Word, ...]:
    measure = demand.measure
    if isinstance(measure, Concurrency):
        return (b"places", 0, 0, 0, 0)
    charge = measure.meter.charge(actual)
    if isinstance(measure, Rate):
        taken = demand.cost if was_taken else 0
        return (b"rate", taken, charge, repr(measure.interval * _MICRO), 0)
    return (b"budget", demand.cost, charge, 0, _kept_ms(demand, clock))


def _renew_words(demand: Demand, _clock: Clock) -> tuple[Word, ...]:
    kind = b"places" if isinstance(demand.measure, Concurrency) else b"budget"
    return (kind, demand.cost, int(_lease_of(demand) * _MICRO))


def _lease_of(demand: Demand) -> float:
    measure = demand.measure
    return measure.lease_seconds if isinstance(measure, Concurrency) else HOLD_SECONDS


def _kept_ms(demand: Demand, clock: Clock) -> int:
    return int((max(0.0, demand.ends_at - clock.now()) + KEPT_SECONDS) * 1000)


def _changes(demand: Demand) -> bool:
    """Return whether the end of a call changes what its limit counts: a request stays a request."""
    return not (isinstance(demand.measure, Rate) and isinstance(demand.measure.meter, Requests))


def _unavailable(limit: Limit) -> QuotaStatus:
    return QuotaStatus(
        name=limit.name,
        code="limits_unavailable",
        is_allowed=False,
        quota=0,
        remaining=0,
        reset_seconds=RETRY_SECONDS,
        retry_after_seconds=RETRY_SECONDS,
        window_seconds=RETRY_SECONDS,
    )


def _ignore(_reply: Any) -> None:
    """Nothing: what was not renewed is renewed the next time, or expires."""
