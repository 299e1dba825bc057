"""The vault lays a head out with the credential in it, in a slot, and leaves nothing behind."""

import pytest

from keys.errors import CustodyError, NoCredential, RegionExhausted, UnknownSession, UnsealFailed
from keys.region import SecretRegion, Slot
from keys.secret import Secret
from keys.session import Deposit, SessionRecord, renew_session, rotate_session, seal_session
from keys.vault import HeldKey, SessionVault
from keys.wrapping import Wrapping

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
        self.wrapping = Wrapping(BOOT_KEY)
        self.vault = SessionVault(self.region, self.wrapping)
        blank = SessionRecord(
            session_id=SID,
            tenant="acme",
            issuer="https://idp",
            subject="alice",
            generation=1,
            revision=1,
            created_at=1,
            expires_at=100,
            idle_seconds=10,
            credentials=(),
        )
        deposit = Deposit(provider="openai", origin=ORIGIN, credential=Secret(PLAIN))
        self.record, self.secret = seal_session(blank, [deposit], b"f" * 32)
        self.vault.put(self.wrapping.wrap(self.record), 0.0)

    def compose(
        self,
        before: bytes = b"",
        after: bytes = b"",
        *,
        session: str = SID,
        secret: bytes | None = None,
        provider: str = "openai",
        origin: str = ORIGIN,
    ) -> Slot:
        """Lay a head out, as a call does."""
        key = self.vault.find(session, provider, origin)
        return self.vault.compose_head(key, secret or self.secret, before, after)

    def nonzero(self) -> int:
        """Return how many bytes of the region are not zero."""
        return len(self.memory) - self.memory[:].count(0)


def test_lays_out_a_head() -> None:
    """The slot shows what goes before, the credential, and what comes after."""
    bench = Bench()
    slot = bench.compose(b"key: ", b"\r\n\r\n")
    assert slot.view == b"key: " + PLAIN + b"\r\n\r\n"


def test_leaves_nothing_behind() -> None:
    """After release nothing is left in the region."""
    bench = Bench()
    bench.compose(b"a" * 300, b"b" * 300).release()
    assert bench.nonzero() == 0


def test_scratch_is_gone_while_the_head_is_in_use() -> None:
    """Beside the head, neither the derived key nor the sealed form is left in the slot."""
    bench = Bench()
    slot = bench.compose(b"a", b"b")
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
        bench.compose(
            b"a" * before, b"b", session=session, secret=secret, provider=provider, origin=origin
        )
    assert "planted" not in repr(caught.value)
    assert bench.region.free == free
    assert bench.nonzero() == 0


def test_a_dropped_session_is_gone_and_overwritten() -> None:
    """Closing overwrites what was held; the right secret then opens nothing."""
    bench = Bench()
    held = bench.vault.find(SID, "openai", ORIGIN)._wrapped
    assert bench.vault.drop(SID)
    assert held == bytes(len(held))
    assert not bench.vault.drop(SID)
    with pytest.raises(UnknownSession):
        bench.compose(b"", b"")


def test_what_is_held_does_not_open_with_the_session_secret() -> None:
    """In ordinary memory the sealed form itself never appears: it is wrapped under the boot key."""
    bench = Bench()
    assert (
        bench.record.credentials[0].sealed not in bench.vault.find(SID, "openai", ORIGIN)._wrapped
    )


def test_says_when_every_slot_is_in_use() -> None:
    """With no slot free a head is refused, not queued."""
    bench = Bench(slots=1)
    bench.compose(b"", b"")
    with pytest.raises(RegionExhausted):
        bench.compose(b"", b"")


def rotate(bench: Bench, key: bytes, overlap_seconds: int, now: float) -> int:
    """Replace the session's key; return how many that destroyed."""
    deposit = Deposit(provider="openai", origin=ORIGIN, credential=Secret(key))
    bench.record = rotate_session(
        bench.record, bench.secret, [deposit], b"f" * 32, overlap_seconds=overlap_seconds
    )
    return bench.vault.put(bench.wrapping.wrap(bench.record), now)


def plain(bench: Bench, key: HeldKey) -> bytes:
    """Return what a key that a call holds opens to."""
    slot = bench.vault.compose_head(key, bench.secret, b"", b"")
    try:
        return bytes(slot.view)
    finally:
        slot.release()


def test_a_call_keeps_its_key_for_the_overlap() -> None:
    """New calls get the new key at once; one under way keeps the old one, and loses it in time."""
    bench = Bench()
    old = bench.vault.find(SID, "openai", ORIGIN)
    assert rotate(bench, b"sk-second", overlap_seconds=10, now=100.0) == 0
    assert plain(bench, bench.vault.find(SID, "openai", ORIGIN)) == b"sk-second"
    assert plain(bench, old) == PLAIN
    assert bench.vault.sweep(109.9) == 0
    assert bench.vault.sweep(110.0) == 1
    assert old.is_destroyed
    with pytest.raises(UnknownSession):
        plain(bench, old)


def test_without_overlap_the_old_key_is_destroyed_at_once() -> None:
    """A key that leaked is not used once more."""
    bench = Bench()
    old = bench.vault.find(SID, "openai", ORIGIN)
    assert rotate(bench, b"sk-second", overlap_seconds=0, now=100.0) == 1
    assert old.is_destroyed
    assert old._wrapped == bytes(len(old._wrapped))


def test_a_third_key_ends_the_overlap_of_the_first() -> None:
    """However often a key is replaced, at most one that was replaced is kept."""
    bench = Bench()
    first = bench.vault.find(SID, "openai", ORIGIN)
    rotate(bench, b"sk-second", overlap_seconds=10, now=100.0)
    second = bench.vault.find(SID, "openai", ORIGIN)
    assert rotate(bench, b"sk-third!", overlap_seconds=10, now=101.0) == 1
    assert (first.is_destroyed, second.is_destroyed) == (True, False)


def test_closing_destroys_replaced_keys_too() -> None:
    """An overlap does not outlive its session."""
    bench = Bench()
    old = bench.vault.find(SID, "openai", ORIGIN)
    rotate(bench, b"sk-second", overlap_seconds=10, now=100.0)
    bench.vault.drop(SID)
    assert old.is_destroyed
    assert bench.vault.sweep(1000.0) == 0


def test_a_renewal_takes_no_key_from_a_call() -> None:
    """The key is the same, however it is sealed: who holds it goes on, with nothing to wait for."""
    bench = Bench()
    held = bench.vault.find(SID, "openai", ORIGIN)
    assert (
        bench.vault.put(bench.wrapping.wrap(renew_session(bench.record, bench.secret, 500)), 100.0)
        == 0
    )
    assert bench.vault.find(SID, "openai", ORIGIN) is held
    assert plain(bench, held) == PLAIN
