"""The way to the shared store: how it is dialled, and what it must be to be trusted with sessions.

Laws of this file:
- nothing is tried twice here: whoever asks knows best whether that is safe;
- the password is read from its file at every connection, and is in no message, log or repr;
- a store that writes to its disk, or may throw records away, is refused as soon as it is met.
"""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    NoScriptError,
    RedisError,
    ResponseError,
)

from gateway.config import Store
from gateway.errors import GatewayError
from gateway.passwords import read_password
from gateway.store.sessions import StoreUnavailable


class StoreRefused(GatewayError):
    """The store answers, and must not be used as it is; the message says what to change."""

    code = "store_refused"


def check_tls_files(store: Store) -> None:
    """Return if the files that TLS takes can be used.

    Raises:
        OSError: One cannot be read, or they do not belong together.
    """
    # Not the default context: that one begins to write SSLKEYLOGFILE, which nobody has refused yet.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if store.ca_file:
        context.load_verify_locations(store.ca_file)
    if store.certificate:
        # A key under a passphrase is refused: without an answer here OpenSSL asks on the terminal.
        context.load_cert_chain(store.certificate, store.private_key or None, password="")


class _FromFile(CredentialProvider):
    """The user's name and the password as its file has it now."""

    def __init__(self, store: Store) -> None:
        self._username = store.username or "default"
        self._path = store.password_file

    def get_credentials(self) -> tuple[str, str]:
        """Return both."""
        try:
            return self._username, read_password(self._path)
        except ValueError as error:
            raise AuthenticationError(str(error)) from None


def connect(store: Store, *, connections: int, wait_seconds: float = 0.0) -> Redis:
    """Return a client that dials when it is first asked; an answer may take `wait_seconds` longer."""
    settings: dict[str, Any] = {
        "host": store.host,
        "port": store.port,
        "db": store.database,
        "protocol": 2,
        "socket_timeout": store.timeout + wait_seconds,
        "socket_connect_timeout": store.timeout,
        "retry": Retry(NoBackoff(), 0),
        "driver_info": None,
    }
    if store.password_file:
        settings["credential_provider"] = _FromFile(store)
    if store.is_tls:
        settings |= {
            "ssl_ca_certs": store.ca_file or None,
            "ssl_certfile": store.certificate or None,
            "ssl_keyfile": store.private_key or None,
            "ssl_min_version": ssl.TLSVersion.TLSv1_2,
        }
    pool = BlockingConnectionPool(
        connection_class=SSLConnection if store.is_tls else Connection,
        max_connections=connections,
        timeout=store.timeout,
        **settings,
    )
    return Redis.from_pool(pool)


@contextmanager
def errors_translated() -> Iterator[None]:
    """Turn what the client raises into what the gateway knows.

    Raises:
        StoreRefused: The store does not let us in, or is not the one that our authorities vouch for.
        StoreUnavailable: It does not answer.
        NoScriptError: It has to be told the script once more.
    """
    try:
        yield
    except NoScriptError:
        raise
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        raise StoreRefused(f"the store does not let us in: {error}") from None
    except (RedisError, OSError) as error:
        verification = _verification_error(error)
        if verification is not None:
            raise StoreRefused(
                f"the store's certificate is not trusted: {verification.verify_message}"
            ) from None
        raise StoreUnavailable from error


def _verification_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None


async def check_server(client: Redis, store: Store) -> str:
    """Return what the store writes to its disk: `off`, `unknown`, or its settings.

    Raises:
        StoreRefused: It writes, or hides whether it does, and no reason allows that; or it evicts.
        StoreUnavailable: It does not answer.
    """
    asked = ("save", "appendonly", "maxmemory", "maxmemory-policy")
    try:
        with errors_translated():
            answer = await client.config_get(*asked)
    except StoreRefused:
        persistence, policy = "unknown", ""
    except StoreUnavailable as error:
        if not isinstance(error.__cause__, ResponseError):  # such as: CONFIG has another name
            raise
        persistence, policy = "unknown", ""
    else:
        settings = _texts(answer)
        writes = [f"save {settings['save']}"] if settings.get("save") else []
        if settings.get("appendonly") != "no":
            writes.append("appendonly yes")
        persistence = ", ".join(writes) or "off"
        policy = settings["maxmemory-policy"] if settings.get("maxmemory") != "0" else ""
    if policy not in {"", "noeviction"}:
        raise StoreRefused(
            f"the store evicts ({policy}): sessions would vanish; set maxmemory-policy noeviction"
        )
    if persistence != "off" and not store.allow_persistent_store:
        said = (
            "does not say whether it writes to disk (CONFIG GET)"
            if persistence == "unknown"
            else f"writes to disk ({persistence})"
        )
        raise StoreRefused(
            f"the store {said}: set save '' and appendonly no there, or give the reason why it may "
            "in store.allow_persistent_store"
        )
    return persistence


def _texts(answer: Any) -> dict[str, str]:
    """Return settings as text, whether they came as a map or as a list of both."""
    pairs = answer.items() if isinstance(answer, dict) else zip(*[iter(answer)] * 2, strict=True)
    return {_text(key): _text(value) for key, value in pairs}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
