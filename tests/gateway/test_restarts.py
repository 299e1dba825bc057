"""When a process that died is started again, and when it is given up."""

from gateway.restarts import (
    FAILED_STARTS_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MAX_FAILED_STARTS,
    PROVEN_SECONDS,
    BackOff,
)


def test_pauses_double_up_to_the_longest() -> None:
    """A process that serves and dies again and again is started ever more rarely, and for ever."""
    back_off = BackOff()
    pauses = [back_off.pause_after(now, lived_seconds=1, has_served=True) for now in range(10)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, *[LONGEST_PAUSE_SECONDS] * 3]


def test_a_proven_process_begins_anew() -> None:
    """After a long life the next death is the first one again."""
    back_off = BackOff()
    for now in range(5):
        back_off.pause_after(now, lived_seconds=1, has_served=True)
    assert back_off.pause_after(100, lived_seconds=PROVEN_SECONDS, has_served=True) == 0.1


def test_failed_starts_are_given_up() -> None:
    """So many deaths before serving, within so long, are the end."""
    back_off = BackOff()
    pauses = [
        back_off.pause_after(now, lived_seconds=0.1, has_served=False)
        for now in range(MAX_FAILED_STARTS)
    ]
    assert pauses[-1] is None
    assert None not in pauses[:-1]


def test_only_failed_starts_of_late_count() -> None:
    """Old failed starts are forgotten, and one process that served forgives those before it."""
    back_off = BackOff()
    spread = FAILED_STARTS_SECONDS / (MAX_FAILED_STARTS - 1)
    for turn in range(20):
        assert back_off.pause_after(spread * turn, lived_seconds=0.1, has_served=False)
    late = spread * 20
    assert back_off.pause_after(late, lived_seconds=0.1, has_served=True)
    for turn in range(MAX_FAILED_STARTS - 1):
        assert back_off.pause_after(late + turn, lived_seconds=0.1, has_served=False)
