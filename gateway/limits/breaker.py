"""Whether to ask a store that has been failing: not at all, or with one question at a time. No I/O."""

from typing import Final

FAILURES: Final = 3
"""In a row, until nobody waits for the store any more."""

PROBE_SECONDS: Final = 1.0
"""Between two questions to a store that is thought to be away; the first answer ends that."""


class Breaker:
    """Closed it lets everything pass; open one probe every so often, until one succeeds."""

    def __init__(self) -> None:
        self._failures = 0
        self._probed_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the store is thought to be away."""
        return self._failures >= FAILURES

    def lets_pass(self, now: float) -> bool:
        """Return whether to ask now; while open this is the probe."""
        if not self.is_open:
            return True
        if now - self._probed_at < PROBE_SECONDS:
            return False
        self._probed_at = now
        return True

    def succeeded(self) -> bool:
        """Note an answer; return whether the store had been away."""
        was_open, self._failures = self.is_open, 0
        return was_open

    def failed(self, now: float) -> bool:
        """Note that no answer came; return whether the store is away from now on."""
        was_open = self.is_open
        self._failures += 1
        if self.is_open:
            self._probed_at = now
        return self.is_open and not was_open
