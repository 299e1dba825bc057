"""Calls that wait for something that only the control process can get, and that all need alike.

It is asked for once, however many wait; nobody waits longer than the named time. More than one call
for each connection cannot wait here, so that the limit of connections is the limit of this, too.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from gateway.errors import Refused

OnArrival = Callable[[Refused | None], None]

K = TypeVar("K", bound=Hashable)


class Awaited(Generic[K]):
    """What is awaited, by its key, and who waits for it."""

    def __init__(
        self, ask: Callable[[K], None], seconds: float, unavailable: Callable[[], Refused]
    ) -> None:
        """Take how to ask, how long to wait, and what those are told who waited in vain."""
        self._ask = ask
        self._seconds = seconds
        self._unavailable = unavailable
        self._waiting: dict[K, list[tuple[float, OnArrival]]] = {}

    def wait(self, key: K, on_arrival: OnArrival, now: float) -> None:
        """Call `on_arrival` when it has come, or with a refusal; ask if nobody has yet."""
        waiting = self._waiting.setdefault(key, [])
        waiting.append((now + self._seconds, on_arrival))
        if len(waiting) == 1:
            self._ask(key)

    def __iter__(self) -> Iterator[K]:
        """Return what is awaited, as it was when asked."""
        return iter(list(self._waiting))

    def arrived(self, key: K, *, is_known: bool) -> None:
        """Let everybody who waits for it go on, or be refused."""
        refusal = None if is_known else self._unavailable()
        for _, on_arrival in self._waiting.pop(key, ()):
            on_arrival(refusal)

    def ask_again(self) -> None:
        """Ask for everything: whoever was asked is gone."""
        for key in self:
            self._ask(key)

    def sweep(self, now: float) -> None:
        """Refuse those who have waited for too long."""
        for key, waiting in list(self._waiting.items()):
            if waiting[0][0] < now:
                self.arrived(key, is_known=False)
