"""Issuers' keys: how long they are trusted, and whom a silent issuer keeps waiting."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from gateway.identity import jwks as jwks_module
from gateway.identity.dev_issuer import DEVELOPMENT, ISSUER, DevelopmentIssuer
from gateway.identity.jwks import COOLDOWN_SECONDS, REFRESH_SECONDS, STALE_SECONDS, JwksCache
from gateway.identity.tokens import JwksSource, KeysNeeded, TokenVerifier


class MovableClock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.at = 1_800_000_000.0

    def now(self) -> float:
        """Return the instant."""
        return self.at

    def monotonic(self) -> float:
        """Return the same."""
        return self.at


class House:
    """A cache that reads one issuer's keys from a file, and a verifier that hears of them."""

    def __init__(self, file: Path) -> None:
        self.clock = MovableClock()
        self.issuer = DevelopmentIssuer()
        self.file = file
        self.verifier = TokenVerifier([DEVELOPMENT])
        self.heard: list[bytes | None] = []
        file.write_bytes(self.issuer.jwks())
        self.cache = JwksCache(
            [JwksSource(issuer=ISSUER, file=str(file))], self.clock, self.on_keys
        )

    def on_keys(self, issuer: str, jwks: bytes | None) -> None:
        """Do what every verifying process does."""
        self.heard.append(jwks)
        if jwks is None:
            self.verifier.remove_keys(issuer)
        else:
            self.verifier.install_keys(issuer, jwks)

    def verify(self) -> str:
        """Return the subject of a fresh token."""
        token = self.issuer.mint(
            subject="alice", tenant="acme", roles=(), now=int(self.clock.at), ttl_seconds=60
        )
        return self.verifier.verify(token.encode(), self.clock.at).principal.subject


@pytest_asyncio.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """One that has fetched."""
    house = House(tmp_path / "jwks.json")
    await house.cache.start()
    yield house
    await house.cache.close()


async def test_young_keys_outlive_a_failure(house: House) -> None:
    """While the issuer cannot be reached its keys go on to verify, and nobody is told to forget them."""
    house.file.unlink()
    for _ in range(int(STALE_SECONDS / REFRESH_SECONDS)):
        house.clock.at += REFRESH_SECONDS
        await house.cache.refresh_due()
        assert house.verify() == "alice"
    assert None not in house.heard


async def test_old_keys_are_forgotten(house: House) -> None:
    """A day after they were fetched keys verify nothing, not even what they had verified; new ones do."""
    token = house.issuer.mint(
        subject="alice", tenant="acme", roles=(), now=int(house.clock.at), ttl_seconds=80_000
    ).encode()
    house.file.unlink()
    house.clock.at += STALE_SECONDS - 30
    house.verifier.verify(token, house.clock.at - STALE_SECONDS + 60)  # now it is cached
    house.clock.at += 31
    await house.cache.refresh_due()
    assert house.heard[-1] is None
    with pytest.raises(KeysNeeded):
        house.verifier.verify(token, house.clock.at - STALE_SECONDS + 60)
    house.file.write_bytes(house.issuer.jwks())
    house.clock.at += 2
    await house.cache.refresh_due()
    assert house.verify() == "alice"


async def test_age_counts_although_nobody_may_ask_again(house: House) -> None:
    """Whoever needs keys in the pause after a failure hears what is true then, not what was."""
    house.file.unlink()
    house.clock.at += STALE_SECONDS - 1
    await house.cache.refresh_due()
    assert house.heard[-1] is not None
    house.clock.at += 2
    assert COOLDOWN_SECONDS > 2
    await house.cache.need(ISSUER)
    assert house.heard[-1] is None


async def test_nothing_is_said_of_issuers_that_are_not_fetched(house: House) -> None:
    """A need for somebody else's keys must not make anybody forget them."""
    heard = len(house.heard)
    await house.cache.need("urn:somebody-else")
    assert len(house.heard) == heard


async def test_the_cache_keeps_itself_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are refreshed in the cache's own task, which goes on whatever a fetch meets, and ends."""
    monkeypatch.setattr(jwks_module, "REFRESH_CHECK_SECONDS", 0.01)
    house = House(tmp_path / "jwks.json")
    await house.cache.start()
    replaced = DevelopmentIssuer()
    house.file.write_bytes(b"[" * 100_000)  # what cannot be read is met first
    house.clock.at += REFRESH_SECONDS + 1
    async with asyncio.timeout(10):
        while house.heard[-1] != replaced.jwks():
            await asyncio.sleep(0.01)  # polling for what the task does in time
            house.file.write_bytes(replaced.jwks())
            house.clock.at += COOLDOWN_SECONDS + 1
    await house.cache.close()
    assert {task.get_name() for task in asyncio.all_tasks()} == {asyncio.current_task().get_name()}  # type: ignore[union-attr]
