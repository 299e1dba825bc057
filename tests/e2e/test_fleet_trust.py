"""Which Redis a gateway trusts with sessions, which it refuses, and what it says then."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.conftest import KEY
from tests.simulators.fleet import shares, start_replica
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider
from tests.simulators.redis import MEMORY_ONLY, RedisServer

Start = Callable[..., Gateway]
Configuration = Callable[[Gateway], Mapping[str, Any]]
PASSWORD = "planted-password-of-the-store"
README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis without a disk."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


def refusal_of(start: Start, configuration: Configuration) -> str:
    """Return what the operator reads of a gateway that refuses to start."""
    with pytest.raises(AssertionError, match="did not start") as failed:
        start({}, verifies_log=False, extra_from=configuration)
    log = str(failed.value)
    assert "gateway.given_up" in log
    assert "Traceback" not in log
    (line,) = (line for line in log.splitlines() if '"configuration.refused"' in line)
    return str(json.loads(line)["error"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"save": "60 1000"}, "writes to disk (save 60 1000)"),
        ({"appendonly": "yes"}, "writes to disk (appendonly yes)"),
        ({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}, "evicts (allkeys-lru)"),
        ({"rename-command": "CONFIG "}, "does not say whether it writes to disk"),
    ],
)
def test_a_store_that_keeps_or_loses_records_is_refused(
    tmp_path: Path, start_gateway: Start, settings: dict[str, str], said: str
) -> None:
    """Sealed keys stay off disks and sessions do not vanish, unless an operator says why they may."""
    with RedisServer(tmp_path / "redis", {**MEMORY_ONLY, **settings}) as redis:
        assert said in refusal_of(start_gateway, shares(redis))


def test_a_reason_allows_a_persistent_store(tmp_path: Path, start_gateway: Start) -> None:
    """Where the operator gives a reason it is on record, beside what the store writes."""
    with RedisServer(tmp_path / "redis", {**MEMORY_ONLY, "appendonly": "yes"}) as redis:
        reason = "its volume is encrypted"
        gateway = start_gateway({}, extra_from=shares(redis, allow_persistent_store=reason))
        (connected,) = gateway.events("store.connected")
        assert (connected["persistence"], connected["reason"]) == ("appendonly yes", reason)
        assert connected["address"] == redis.url


def test_a_replica_without_the_deployment_key_is_refused(
    start_gateway: Start, redis: RedisServer
) -> None:
    """Another key, or another name, is another deployment: the message says what to copy."""
    start_gateway({}, extra_from=shares(redis))
    said = refusal_of(start_gateway, shares(redis, bytes(32)))
    assert "fingerprint.key is a copy" in said
    assert "another deployment's" in said
    start_gateway({}, extra_from=shares(redis, bytes(32), namespace="another"))


def test_a_gateway_waits_for_a_store_that_does_not_answer(
    tmp_path: Path, start_gateway: Start
) -> None:
    """A gateway may be started before its store: it is not ready, and is as soon as there is one."""
    redis = RedisServer(tmp_path / "redis")
    with redis:
        redis.kill()

        def begin(gateway: Gateway) -> Any:
            configuration = shares(redis)(gateway)
            gateway.wait_until_ready, wait = lambda: None, gateway.wait_until_ready  # type: ignore[method-assign]
            waiting.append(wait)
            return configuration

        waiting: list[Callable[[], None]] = []
        gateway = start_gateway({}, extra_from=begin)
        gateway.wait_for_log("store.lost")
        redis.start()
        waiting[0]()
        assert [event["reason"] for event in gateway.events("store.lost")] != []


async def test_tls_and_an_acl_user(
    tmp_path: Path, provider: Provider, start_gateway: Start
) -> None:
    """Through TLS, as a user who may do what README says and no more, sessions are served."""
    (rules,) = re.findall(
        r"^```text\n(resetchannels .*?)```", README.read_text(), re.MULTILINE | re.DOTALL
    )
    acl = tmp_path / "users.acl"
    acl.write_text(f"user default off\nuser veklom on >{PASSWORD} {' '.join(rules.split())}\n")
    password = tmp_path / "password"
    password.write_text(f"{PASSWORD}\n")
    settings = {**MEMORY_ONLY, "aclfile": str(acl)}
    with RedisServer(tmp_path / "redis", settings, trustme.CA()) as redis:
        user: dict[str, Any] = {"username": "veklom", "password_file": str(password)}
        trusted = {**user, "ca_file": str(tmp_path / "redis" / "ca.pem")}
        one = await start_replica(start_gateway, provider, redis, store=trusted)
        other = await start_replica(start_gateway, provider, redis, store=trusted)
        token, path = await one.open(KEY, idle_seconds=100)
        assert await other.status(token) == 200
        status, renewed = await other.ask("POST", f"{path}/renew", {}, session=token)
        assert status == 200
        assert await one.status(renewed["token"]) == 200
        assert (await one.ask("DELETE", path))[0] == 200
        assert await one.status(renewed["token"]) == 401
        metrics = await asyncio.to_thread(one.gateway.metrics)
        assert "veklom_store_errors_total 0.0" in metrics
        # Whoever sits in its place, and whoever does not know the password, gets nowhere.
        trustme.CA().cert_pem.write_to_path(tmp_path / "other-ca.pem")
        wrong_ca = {**user, "ca_file": str(tmp_path / "other-ca.pem")}
        said = await asyncio.to_thread(refusal_of, start_gateway, shares(redis, **wrong_ca))
        assert "certificate is not trusted" in said
        password.write_text("planted-wrong-password")
        said = await asyncio.to_thread(refusal_of, start_gateway, shares(redis, **trusted))
        assert "does not let us in" in said
        assert "planted" not in said
    for log in tmp_path.rglob("gateway.log"):
        assert "planted" not in log.read_text()
