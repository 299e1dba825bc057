"""Limits as callers see them: `RateLimit` and `RateLimit-Policy`. No I/O.

The form is that of draft-ietf-httpapi-ratelimit-headers-11: structured-field lists of quoted names
with `q` (quota), `w` (window, seconds), `r` (remaining), `t` (effective window, seconds). Calls at
once have the registered unit `concurrent-requests` and no window.
"""

import math
from collections.abc import Sequence

from policies.quota import QuotaStatus

Header = tuple[bytes, bytes]


def rate_limit_headers(statuses: Sequence[QuotaStatus]) -> list[Header]:
    """Return the two fields, none where no limit applied."""
    if not statuses:
        return []
    policies, states = [], []
    for status in statuses:
        if status.window_seconds:
            window = max(1, math.ceil(status.window_seconds))
            policies.append(b'"%b";q=%d;w=%d' % (status.name.encode(), status.quota, window))
            reset = math.ceil(status.reset_seconds)
            states.append(b'"%b";r=%d;t=%d' % (status.name.encode(), status.remaining, reset))
        else:
            name = status.name.encode()
            policies.append(b'"%b";q=%d;qu="concurrent-requests"' % (name, status.quota))
            states.append(b'"%b";r=%d' % (name, status.remaining))
    return [(b"ratelimit-policy", b", ".join(policies)), (b"ratelimit", b", ".join(states))]
