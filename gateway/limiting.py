"""Where a worker counts limits: in its own memory, or in the store that the fleet shares."""

from collections.abc import Callable
from functools import partial

from gateway.clock import Clock
from gateway.config import Config, Store
from gateway.limits.memory_store import MemoryLimiter
from gateway.limits.redis_store import SCRIPTS, RedisLimiter
from gateway.limits.reservation import OnWarned
from gateway.limits.wire import Endpoint, Wire
from gateway.passwords import read_password
from gateway.tls import client_context


def open_limiter(
    config: Config, clock: Clock, on_warned: OnWarned, on_state: Callable[[bool, str], None]
) -> MemoryLimiter | RedisLimiter:
    """Return what the configuration names; `on_state` hears when the store goes away or comes back.

    Raises:
        OSError: The files that TLS takes cannot be used.
    """
    store = config.store
    if not store.is_shared:
        return MemoryLimiter(clock, on_warned)
    wire = Wire(
        _endpoint(store),
        scripts=SCRIPTS,
        timeout_seconds=store.limits_timeout,
        clock=clock,
        on_state=on_state,
    )
    return RedisLimiter(
        wire,
        namespace=store.namespace,
        sharers=config.workers * store.replicas,
        clock=clock,
        on_warned=on_warned,
    )


def _endpoint(store: Store) -> Endpoint:
    tls = client_context(store.ca_file) if store.is_tls else None
    if tls is not None and store.certificate:
        # A key under a passphrase is refused: without an answer here OpenSSL asks on the terminal.
        tls.load_cert_chain(store.certificate, store.private_key or None, password="")
    return Endpoint(
        host=store.host,
        port=store.port,
        database=store.database,
        username=store.username,
        password=partial(read_password, store.password_file) if store.password_file else None,
        tls=tls,
    )
