"""Limits of one process, in memory. Exact for one worker; several workers need a shared store.

`admit` looks at every limit that applies, then takes from all of them, or from none. `settle` frees
what is held while a call runs, once, however often it is called. No I/O.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Final

from gateway.clock import Clock
from policies.quota import Limit, QuotaStatus
from policies.request import AccessRequest

Key = tuple[str, ...]

SWEEP_EVERY: Final = 4096
"""Admissions between two sweeps of keys that are as good as unused."""

MAX_KEYS: Final = 65_536
"""Keys with a pace that a sweep leaves, some 20 MB of them. Models are named by callers, who could
name ever more; above this the keys nearest to unused are forgotten, which forgives least."""


class Reservation:
    """What one call took: freed once by `settle`."""

    __slots__ = ("held", "statuses")

    def __init__(self, statuses: tuple[QuotaStatus, ...], held: tuple[Key, ...]) -> None:
        self.statuses = statuses
        self.held = held


class MemoryLimiter:
    """Counts calls against the limits of a policy set."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._arrivals: dict[Key, float] = {}
        self._running: dict[Key, int] = {}
        self._admissions = 0

    def admit(self, limits: Sequence[Limit], request: AccessRequest) -> Reservation | QuotaStatus:
        """Return what the call may hold, or the status of the first limit that refuses it."""
        now = self._clock.monotonic()
        arrivals: list[tuple[Key, float]] = []
        held: list[Key] = []
        statuses: list[QuotaStatus] = []
        for limit in limits:
            if not limit.applies_to(request):
                continue
            key = limit.key_of(request)
            if limit.rate is None:
                status = self._concurrency(limit, key)
                held.append(key)
            else:
                tat, allowed = limit.rate.spend(self._arrivals.get(key, now), now)
                status = limit.rate.status(limit.name, tat, now, is_allowed=allowed)
                arrivals.append((key, tat))
            if not status.is_allowed:
                return status
            statuses.append(status)
        self._arrivals.update(arrivals)
        for key in held:
            self._running[key] = self._running.get(key, 0) + 1
        self._admissions += 1
        if self._admissions % SWEEP_EVERY == 0:
            self._sweep(now)
        return Reservation(tuple(statuses), tuple(held))

    def _sweep(self, now: float) -> None:
        live = [item for item in self._arrivals.items() if item[1] > now]
        if len(live) > MAX_KEYS:
            live = sorted(live, key=itemgetter(1))[-MAX_KEYS:]
        self._arrivals = dict(live)

    def _concurrency(self, limit: Limit, key: Key) -> QuotaStatus:
        running = self._running.get(key, 0)
        allowed = running < limit.concurrent
        return QuotaStatus(
            name=limit.name,
            code="concurrency_limit_exceeded",
            is_allowed=allowed,
            quota=limit.concurrent,
            remaining=max(0, limit.concurrent - running - 1),
            reset_seconds=0.0,
            retry_after_seconds=0.0 if allowed else 1.0,
            window_seconds=0.0,
        )

    def settle(self, reservation: Reservation) -> None:
        """Free what the call held; a second time does nothing."""
        held, reservation.held = reservation.held, ()
        for key in held:
            left = self._running[key] - 1
            if left:
                self._running[key] = left
            else:
                del self._running[key]
