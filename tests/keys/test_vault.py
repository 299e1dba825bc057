"""The vault lays a head out with the credential in it, in a slot, and leaves nothing behind."""

import pytest

from keys.errors import CustodyError, NoCredential, RegionExhausted, UnknownSession, UnsealFailed
from keys.region import SecretRegion
from keys.secret import Secret
from keys.session import Deposit, SessionRecord, seal_session
from keys.vault import SessionVault

BOOT_KEY = b"b" * 32

PLAIN = b"sk-planted-credential"
ORIGIN = "https://api.openai.com"
SLOT_BYTES = 1024
SID = "ab" * 16


class Bench:
    """A vault with one open session, and the memory below its region."""

    def __init__(self, slots: int = 3) -> None:
        self.region = SecretRegion.open(slots, SLOT_BYTES)
        self.memory = self.region.memory
        self.vault = SessionVault(self.region, BOOT_KEY)
        blank = SessionRecord(
            session_id=SID,
            tenant="acme",
            issuer="https://idp",
            subject="alice",
            generation=1,
            created_at=1,
            expires_at=100,
            idle_seconds=10,
            credentials=(),
        )
        deposit = Deposit(provider="openai", origin=ORIGIN, credential=Secret(PLAIN))
        self.record, self.secret = seal_session(blank, [deposit], b"f" * 32)
        self.vault.put(self.record)

    def nonzero(self) -> int:
        """Return how many bytes of the region are not zero."""
        return len(self.memory) - self.memory[:].count(0)


def test_lays_out_a_head() -> None:
    """The slot shows what goes before, the credential, and what comes after."""
    bench = Bench()
    slot = bench.vault.compose_head(SID, bench.secret, "openai", ORIGIN, b"key: ", b"\r\n\r\n")
    assert slot.view == b"key: " + PLAIN + b"\r\n\r\n"


def test_leaves_nothing_behind() -> None:
    """After release nothing is left in the region."""
    bench = Bench()
    bench.vault.compose_head(SID, bench.secret, "openai", ORIGIN, b"a" * 300, b"b" * 300).release()
    assert bench.nonzero() == 0


def test_scratch_is_gone_while_the_head_is_in_use() -> None:
    """Beside the head, neither the derived key nor the sealed form is left in the slot."""
    bench = Bench()
    slot = bench.vault.compose_head(SID, bench.secret, "openai", ORIGIN, b"a", b"b")
    assert slot.whole[len(slot.view) :] == bytes(SLOT_BYTES - len(slot.view))


@pytest.mark.parametrize(
    ("session", "secret", "provider", "origin", "before", "error"),
    [
        ("cd" * 16, None, "openai", ORIGIN, 10, UnknownSession),
        (SID, None, "anthropic", ORIGIN, 10, NoCredential),
        (SID, None, "openai", "evil.example", 10, NoCredential),
        (SID, bytes(32), "openai", ORIGIN, 10, UnsealFailed),
        (SID, b"short", "openai", ORIGIN, 10, UnsealFailed),
        (SID, None, "openai", ORIGIN, SLOT_BYTES, UnsealFailed),
        (SID, None, "openai", ORIGIN, SLOT_BYTES - 64, UnsealFailed),
    ],
)
def test_refuses_and_leaves_nothing(
    session: str,
    secret: bytes | None,
    provider: str,
    origin: str,
    before: int,
    error: type[CustodyError],
) -> None:
    """Whatever is wrong, the slot comes back wiped and the error holds no key."""
    bench = Bench()
    free = bench.region.free
    with pytest.raises(error) as caught:
        bench.vault.compose_head(
            session, secret or bench.secret, provider, origin, b"a" * before, b"b"
        )
    assert "planted" not in repr(caught.value)
    assert bench.region.free == free
    assert bench.nonzero() == 0


def test_a_dropped_session_is_gone_and_overwritten() -> None:
    """Closing overwrites what was held; the right secret then opens nothing."""
    bench = Bench()
    held = bench.vault._sessions[SID]["openai"].ciphertext
    assert bench.vault.drop(SID)
    assert held == bytes(len(held))
    assert not bench.vault.drop(SID)
    with pytest.raises(UnknownSession):
        bench.vault.compose_head(SID, bench.secret, "openai", ORIGIN, b"", b"")


def test_what_is_held_does_not_open_with_the_session_secret() -> None:
    """In ordinary memory the sealed form itself never appears: it is wrapped under the boot key."""
    bench = Bench()
    assert bench.record.credentials[0].sealed not in bench.vault._sessions[SID]["openai"].ciphertext


def test_says_when_every_slot_is_in_use() -> None:
    """With no slot free a head is refused, not queued."""
    bench = Bench(slots=1)
    bench.vault.compose_head(SID, bench.secret, "openai", ORIGIN, b"", b"")
    with pytest.raises(RegionExhausted):
        bench.vault.compose_head(SID, bench.secret, "openai", ORIGIN, b"", b"")
