"""A budget for the refusals of callers whom nobody could identify. No I/O.

Such a refusal costs its caller nothing, and its record costs us room on the disk that every call
needs. So they are recorded one by one as long as the budget lasts; beyond it they are counted by
code, and once a second the counts become one event. Nothing is lost: what was recorded on its own and
what was counted are together what was refused. A caller who is known is never counted here.
"""

from collections.abc import Callable
from typing import Final

from gateway.audit.event import CodeCount, RefusalsCounted
from gateway.clock import Clock

REFUSALS_PER_SECOND: Final = 20
"""Enough to see what is tried; at some 500 bytes a record, less than a gigabyte a day."""

REFUSALS_AT_ONCE: Final = 200
"""A fleet whose tokens expire together is still told apart, caller by caller."""


class RefusalBudget:
    """What one process may still record on its own, and what it has counted instead."""

    def __init__(self, clock: Clock) -> None:
        self._now = clock.monotonic
        self._left = float(REFUSALS_AT_ONCE)
        self._filled_at = self._now()
        self._counts: dict[str, int] = {}
        self._since = self._filled_at

    def spend(self) -> bool:
        """Take one record out of the budget; return whether there was one left."""
        now = self._now()
        earned = (now - self._filled_at) * REFUSALS_PER_SECOND
        self._left = min(float(REFUSALS_AT_ONCE), self._left + earned)
        self._filled_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def count(self, code: str) -> None:
        """Count a refusal that has no record of its own."""
        if not self._counts:
            self._since = self._now()
        self._counts[code] = self._counts.get(code, 0) + 1

    def flush(self, record: Callable[[RefusalsCounted], object]) -> None:
        """Hand what was counted to `record`; it stays counted if `record` raises."""
        if not self._counts:
            return
        record(
            RefusalsCounted(
                total=sum(self._counts.values()),
                codes=tuple(
                    CodeCount(code=code, count=count)
                    for code, count in sorted(self._counts.items())
                ),
                period_us=int((self._now() - self._since) * 1e6),
            )
        )
        self._counts = {}
