"""When a process that died is started again, and when to give up. No I/O.

Laws of this file:
- the first restart comes at once, each further one after twice the pause, up to the longest;
- a process that lived long enough has proved itself: the pauses begin anew;
- one that cannot even begin is not tried for ever: a gateway that never serves must say so.
"""

from typing import Final

FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 10.0

PROVEN_SECONDS: Final = 30.0
"""A process that lived this long did not die of how it was started."""

MAX_FAILED_STARTS: Final = 5
FAILED_STARTS_SECONDS: Final = 60.0
"""So many deaths before serving, within so long, and the gateway ends."""


class BackOff:
    """The pauses of one role."""

    def __init__(self) -> None:
        self._pause = FIRST_PAUSE_SECONDS
        self._failed_starts: list[float] = []

    def pause_after(self, now: float, *, lived_seconds: float, has_served: bool) -> float | None:
        """Return how long to wait after a death at `now`, in seconds; None means to give up."""
        if has_served:
            self._failed_starts.clear()
        else:
            since = now - FAILED_STARTS_SECONDS
            self._failed_starts = [at for at in self._failed_starts if at > since] + [now]
            if len(self._failed_starts) >= MAX_FAILED_STARTS:
                return None
        if lived_seconds >= PROVEN_SECONDS:
            self._pause = FIRST_PAUSE_SECONDS
        pause = self._pause
        self._pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        return pause
