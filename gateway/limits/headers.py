"""Limits as callers see them: `RateLimit` and `RateLimit-Policy`. No I/O.

The form is that of draft-ietf-httpapi-ratelimit-headers-11: structured-field lists of quoted names
with `q` (quota), `w` (window, seconds), `qu` (what is counted, where it is not requests), `r`
(remaining), `t` (effective window, seconds). Calls at once have no window.
"""

import math
from collections.abc import Sequence
from typing import Final

from policies.quota import QuotaStatus, Unit

Header = tuple[bytes, bytes]

MAX_INTEGER: Final = 10**15 - 1
"""RFC 9651, 3.3.1."""

_UNITS = {unit: b';qu="%b"' % unit.encode() for unit in Unit} | {Unit.REQUESTS: b""}


def rate_limit_headers(statuses: Sequence[QuotaStatus]) -> list[Header]:
    """Return the two fields, none where no limit applied."""
    if not statuses:
        return []
    policies, states = [], []
    for status in statuses:
        name, unit = status.name.encode(), _UNITS[status.unit]
        policy = b'"%b";q=%d' % (name, status.quota)
        state = b'"%b";r=%d' % (name, status.remaining)
        if status.window_seconds:
            policy += b";w=%d" % max(1, _whole(status.window_seconds))
            state += b";t=%d" % _whole(status.reset_seconds)
        policies.append(policy + unit)
        states.append(state)
    return [(b"ratelimit-policy", b", ".join(policies)), (b"ratelimit", b", ".join(states))]


def degraded_header(notes: Sequence[str]) -> list[Header]:
    """Return the field that names limits whose store did not count the call, none where all did."""
    degraded = [note for note in notes if not note.endswith(":shadow")]
    return [(b"x-veklom-limits-degraded", ", ".join(degraded).encode())] if degraded else []


def _whole(seconds: float) -> int:
    return min(math.ceil(seconds), MAX_INTEGER)
