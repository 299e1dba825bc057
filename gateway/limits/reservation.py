"""What a store of limits gives a call, and what it says when money or tokens run low. No I/O."""

from collections.abc import Callable

import msgspec

from policies.limits import Demand
from policies.quota import Budget, QuotaStatus, Unit


class Warned(msgspec.Struct, frozen=True, kw_only=True):
    """Spending crossed a threshold of a budget: told once for each window, by who crossed it."""

    limit: str
    key: tuple[str, ...]
    percent: int
    spent: int
    maximum: int
    unit: Unit


OnWarned = Callable[[Warned], None]


class Reservation:
    """What one call took, until it is settled, once.

    `statuses` are for the caller, limits in shadow left out; `notes` for the record: which limits
    would have refused (`name:shadow`), and which were not counted by their store (`name:local`,
    `name:allow`).
    """

    __slots__ = ("call_id", "elsewhere", "notes", "renewed_at", "statuses", "taken")

    def __init__(
        self,
        taken: tuple[Demand, ...],
        statuses: tuple[QuotaStatus, ...],
        notes: tuple[str, ...] = (),
        call_id: str = "",
    ) -> None:
        self.call_id = call_id
        self.taken = taken
        self.statuses = statuses
        self.notes = notes
        self.elsewhere: Reservation | None = None  # in this process, while the store was away
        self.renewed_at = 0.0


def warned(demand: Demand, before: int, after: int) -> Warned | None:
    """Return what to say once a budget went from `before` to `after`, None for nothing."""
    budget = demand.measure
    if not isinstance(budget, Budget) or not budget.warn_at:
        return None
    percent = budget.crossed(before, after)
    if not percent:
        return None
    return Warned(
        limit=demand.limit.name,
        key=demand.key[1:],
        percent=percent,
        spent=after,
        maximum=budget.maximum,
        unit=budget.meter.unit,
    )
