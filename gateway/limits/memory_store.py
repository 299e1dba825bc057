"""Limits of one process, in memory. Exact for one worker; several workers need a shared store.

`admit` looks at every limit that a call asks of, then takes from all of them, or from none. `settle`
puts what the call really took in place of what was reserved, once, however often it is called. What
is held lives as long as the process, which knows all of its calls. No I/O.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Final

from gateway.clock import Clock
from gateway.limits.reservation import OnWarned, Reservation, warned
from policies.limits import Demand, Key
from policies.quota import Budget, Concurrency, QuotaStatus, Rate, Requests, Usage

SWEEP_EVERY: Final = 4096
"""Admissions between two sweeps of keys that are as good as unused."""

MAX_KEYS: Final = 65_536
"""Keys of each kind that a sweep leaves, some 20 MB of them. Models are named by callers, who could
name ever more; above this the keys nearest to unused are forgotten, which forgives least."""


class Account:
    """One window of one budget: what was spent, and what is held for calls that run."""

    __slots__ = ("ends_at", "held", "spent")

    def __init__(self, ends_at: float) -> None:
        self.ends_at = ends_at
        self.spent = 0
        self.held = 0


class MemoryLimiter:
    """Counts calls against the limits of a policy set."""

    waits = False

    def __init__(self, clock: Clock, on_warned: OnWarned = lambda _: None) -> None:
        self._clock = clock
        self._on_warned = on_warned
        self._arrivals: dict[Key, float] = {}
        self._running: dict[Key, int] = {}
        self._accounts: dict[Key, Account] = {}
        self._admissions = 0

    @property
    def gauges(self) -> dict[str, float]:
        """Return what operators may want to see."""
        return {
            "limits_calls_held": sum(self._running.values()),
            "limits_budget_keys": len(self._accounts),
        }

    def admit(self, asked: Sequence[Demand], call_id: str = "") -> Reservation | QuotaStatus:
        """Return what the call may hold, or the status of the first limit that refuses it."""
        now = self._clock.monotonic()
        statuses: list[QuotaStatus] = []
        taken: list[Demand] = []
        notes: tuple[str, ...] = ()
        for demand in asked:
            status = self._look(demand, now)
            if status.is_allowed:
                taken.append(demand)
                if not demand.limit.is_shadow:
                    statuses.append(status)
            elif demand.limit.is_shadow:
                notes += (f"{demand.limit.name}:shadow",)
            else:
                return status
        for demand in taken:
            self._take(demand, now)
        self._admissions += 1
        if self._admissions % SWEEP_EVERY == 0:
            self._sweep(now)
        return Reservation(tuple(taken), tuple(statuses), notes, call_id)

    def begin(
        self,
        asked: Sequence[Demand],
        call_id: str,
        then: Callable[[Reservation | QuotaStatus], None],
    ) -> None:
        """Call `then` with what `admit` returns."""
        then(self.admit(asked, call_id))

    def _look(self, demand: Demand, now: float) -> QuotaStatus:
        measure, name, key, cost = demand.measure, demand.limit.name, demand.key, demand.cost
        if type(measure) is Rate:
            tat, allowed = measure.spend(self._arrivals.get(key, now), now, cost)
            return measure.status(name, tat, now, is_allowed=allowed, cost=cost)
        if type(measure) is Concurrency:
            running = self._running.get(key, 0) + 1
            return measure.status(name, running, is_allowed=running <= measure.maximum)
        assert type(measure) is Budget  # noqa: S101 - there is no fourth measure
        account = self._accounts.get(key)
        taken = account.spent + account.held if account is not None else 0
        allowed = taken + cost <= measure.maximum
        wall, ends_at = self._clock.now(), demand.ends_at
        total = taken + cost if allowed else taken
        return measure.status(name, total, wall, ends_at, cost, is_allowed=allowed)

    def _take(self, demand: Demand, now: float) -> None:
        measure, key = demand.measure, demand.key
        if type(measure) is Rate:
            self._arrivals[key] = measure.settle(self._arrivals.get(key, now), now, demand.cost)
        elif type(measure) is Concurrency:
            self._running[key] = self._running.get(key, 0) + 1
        else:
            self._account(key, demand.ends_at).held += demand.cost

    def settle(self, reservation: Reservation, actual: Usage) -> None:
        """Count what the call took, and free the rest of what it held; a second time does nothing."""
        taken, reservation.taken = reservation.taken, ()
        for demand in taken:
            measure, key = demand.measure, demand.key
            if type(measure) is Concurrency:
                self._leave(key)
            elif type(measure) is Budget:
                account = self._account(key, demand.ends_at)
                account.held -= demand.cost
                before, account.spent = account.spent, account.spent + measure.meter.charge(actual)
                if measure.warn_at and (word := warned(demand, before, account.spent)):
                    self._on_warned(word)
            elif type(measure) is Rate and type(measure.meter) is not Requests:
                change = measure.meter.charge(actual) - demand.cost
                now = self._clock.monotonic()
                self._arrivals[key] = measure.settle(self._arrivals.get(key, now), now, change)

    def _account(self, key: Key, ends_at: float) -> Account:
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = Account(ends_at)
        return account

    def _leave(self, key: Key) -> None:
        left = self._running[key] - 1
        if left:
            self._running[key] = left
        else:
            del self._running[key]

    def _sweep(self, now: float) -> None:
        self._arrivals = dict(_most([each for each in self._arrivals.items() if each[1] > now]))
        wall = self._clock.now()
        kept = {k: each for k, each in self._accounts.items() if each.held or each.ends_at > wall}
        if len(kept) > MAX_KEYS:
            kept = dict(sorted(kept.items(), key=lambda item: _weight(item[1]))[-MAX_KEYS:])
        self._accounts = kept


def _most(live: list[tuple[Key, float]]) -> list[tuple[Key, float]]:
    return sorted(live, key=itemgetter(1))[-MAX_KEYS:] if len(live) > MAX_KEYS else live


def _weight(account: Account) -> tuple[int, int]:
    """Return how much forgetting would forgive: what is held is never forgotten first."""
    return account.held, account.spent
