"""Room for every connection that the configuration allows: descriptors, before anything is started.

A process that runs out of them cannot dial a provider or take a caller in, and whoever opens
connections decides when. So the soft limit is raised to the hard one, which every child inherits,
and a configuration that allows more connections than fit is refused: lowering its limits silently
would be another surprise.
"""

import resource
from typing import Final

from gateway.config import Limits

RESERVE: Final = 256
"""What a process holds besides its connections: listeners, relays, its log, name look-ups, and
callers beyond the limit while they are told so."""


def descriptors_fault(limits: Limits) -> str:
    """Return what is wrong with the limits where a worker's connections do not fit, else ""."""
    needed = limits.connections + limits.upstream_connections + RESERVE
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or needed <= hard:
        return ""
    return (
        f"({limits.connections}) and upstream_connections ({limits.upstream_connections}) need {needed} "
        f"descriptors in a worker, and this process may have {hard}: lower them, or raise the hard "
        "limit (`ulimit -Hn`, LimitNOFILE= of systemd, `--ulimit nofile` of docker)"
    )


def raise_descriptor_limit() -> None:
    """Allow this process, and all that it starts from now on, as many descriptors as it may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
