"""Notices callers that leave while nobody reads from them.

A connection whose reading is paused, because the provider is slow to take a body, is asked for
nothing, so the loop does not see it end. The kernel still does: here such connections wait in an
epoll of their own for the one event that the other side is gone.
"""

import asyncio
import select
from collections.abc import Callable
from contextlib import suppress

_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_MOST_AT_ONCE = 64


class HangupWatch:
    """The paused connections of one worker, by descriptor."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._watched: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, on_gone: Callable[[], None]) -> None:
        """Call `on_gone` once if the other side of `fd` hangs up before `forget`."""
        if self._epoll is None:
            self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._on_events)
        if fd not in self._watched:
            self._epoll.register(fd, _GONE | select.EPOLLONESHOT)
        self._watched[fd] = on_gone

    def forget(self, fd: int) -> None:
        """Watch `fd` no longer; it may be closed already."""
        if self._watched.pop(fd, None) is not None and self._epoll is not None:
            with suppress(OSError):
                self._epoll.unregister(fd)

    def _on_events(self) -> None:
        assert self._epoll is not None  # noqa: S101 - it is the one that has events
        for fd, _ in self._epoll.poll(0, _MOST_AT_ONCE):
            on_gone = self._watched.get(fd)
            self.forget(fd)
            if on_gone is not None:
                on_gone()

    def close(self) -> None:
        """Stop watching."""
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        self._watched.clear()
