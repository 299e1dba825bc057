"""The budget of refusals: bounded records, and nothing lost."""

from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.audit.event import RefusalsCounted
from gateway.audit.refusals import REFUSALS_AT_ONCE, REFUSALS_PER_SECOND, RefusalBudget


class MovableClock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.at = 1_000_000.0

    def now(self) -> float:
        """Return the instant."""
        return self.at

    def monotonic(self) -> float:
        """Return the same."""
        return self.at


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.floats(0, 20)),
        st.tuples(st.just("refuse"), st.integers(1, 400)),
        st.tuples(st.just("flush"), st.booleans()),
    ),
    max_size=40,
)


class Tally:
    """Refuses as the story of a call does, and adds up what became of it by code."""

    def __init__(self) -> None:
        self.clock = MovableClock()
        self.budget = RefusalBudget(self.clock)
        self.refused: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.recorded_at: list[float] = []

    def refuse(self, times: int) -> None:
        """Refuse for several reasons."""
        for number in range(times):
            code = f"code-{number % 3}"
            self.refused[code] += 1
            if self.budget.spend():
                self.written[code] += 1
                self.recorded_at.append(self.clock.at)
            else:
                self.budget.count(code)

    def take(self, event: RefusalsCounted) -> None:
        """Write a whole event of counts down."""
        assert event.total == sum(each.count for each in event.codes) > 0
        assert event.period_us >= 0
        for each in event.codes:
            self.written[each.code] += each.count


def fail(_event: RefusalsCounted) -> None:
    """Write nothing, as a full log does."""
    raise OSError


@given(STEPS)
def test_recorded_and_counted_is_refused(steps: list[tuple[str, float]]) -> None:
    """Whatever comes when, and whether or not the log takes the counts: each refusal is in one of both.

    In no stretch of time are more recorded on their own than the budget allows.
    """
    tally = Tally()
    for step, amount in steps:
        if step == "pass":
            tally.clock.at += amount
        elif step == "refuse":
            tally.refuse(int(amount))
        else:
            with suppress(OSError):
                tally.budget.flush(tally.take if amount else fail)
    tally.budget.flush(tally.take)
    tally.budget.flush(fail)  # nothing is left to hand over
    assert tally.written == tally.refused
    for first, began in enumerate(tally.recorded_at):
        for last in range(first, len(tally.recorded_at), 50):
            passed = tally.recorded_at[last] - began
            allowed = REFUSALS_AT_ONCE + passed * REFUSALS_PER_SECOND
            assert last - first + 1 <= allowed + 1e-6


def test_a_refused_flush_keeps_the_counts() -> None:
    """What the log did not take is handed over with what came since, from the first instant on."""
    clock = MovableClock()
    budget = RefusalBudget(clock)
    budget.count("a")
    clock.at += 1

    with pytest.raises(OSError):  # noqa: PT011 - ours, just above
        budget.flush(fail)
    budget.count("b")
    taken: list[RefusalsCounted] = []
    budget.flush(taken.append)
    assert (taken[0].total, taken[0].period_us) == (2, 1_000_000)
