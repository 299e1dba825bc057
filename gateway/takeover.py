"""What a new control process makes of what the workers of its predecessor hold. No I/O.

Laws of this file:
- only what every long-running worker holds was open: a session that one of them lacks was half
  opened or half closed, and whoever opened or closed it was never told that it was done;
- where revisions differ, a renewal or rotation was under way of which nobody was told that it was
  done: the lowest is the one that its owner knows, and has the token of;
- a session was last used when the latest of them says so.
"""

from collections.abc import Sequence

import msgspec

from gateway.relay import Held


class Takeover(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions to go on with, and sessions to destroy everywhere."""

    adopted: tuple[Held, ...]
    half_open: tuple[Held, ...]


def settle(holdings: Sequence[Sequence[Held]]) -> Takeover:
    """Return what becomes of the sessions that each long-running worker says it holds."""
    by_session: dict[str, list[Held]] = {}
    for holding in holdings:
        for held in holding:
            by_session.setdefault(held.record.session_id, []).append(held)
    adopted: list[Held] = []
    half_open: list[Held] = []
    for copies in by_session.values():
        oldest = min(copies, key=lambda held: held.record.revision)
        used_at = max(held.used_at for held in copies)
        merged = msgspec.structs.replace(oldest, used_at=used_at)
        (adopted if len(copies) == len(holdings) else half_open).append(merged)
    return Takeover(adopted=tuple(adopted), half_open=tuple(half_open))
