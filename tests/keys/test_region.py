"""Slots are leased, bounded, and wiped when they come back; their pages are out of reach."""

import errno
import os
from pathlib import Path

import pytest

from keys import region as region_module
from keys.errors import RegionExhausted
from keys.region import MemoryProtection, SecretRegion, address_of


def test_a_released_slot_holds_nothing() -> None:
    """What was in use is overwritten on release."""
    region = SecretRegion.open(slots=1, slot_bytes=64)
    slot = region.lease()
    slot.whole[:6] = b"secret"
    slot.use(6)
    slot.release()
    assert region.lease().whole == bytes(64)


def test_an_unmeasured_slot_is_wiped_whole() -> None:
    """Without a word on how much is in use, all of the slot is overwritten."""
    region = SecretRegion.open(slots=1, slot_bytes=64)
    slot = region.lease()
    slot.whole[-6:] = b"secret"
    slot.release()
    assert region.lease().whole == bytes(64)


def test_a_second_release_does_nothing() -> None:
    """A slot that went back is not handed out twice."""
    region = SecretRegion.open(slots=2, slot_bytes=64)
    slot = region.lease()
    slot.release()
    slot.release()
    assert region.free == 2


def test_is_bounded() -> None:
    """When every slot is in use the next lease is refused, and one release makes room."""
    region = SecretRegion.open(slots=2, slot_bytes=64)
    first = region.lease()
    region.lease()
    with pytest.raises(RegionExhausted):
        region.lease()
    first.release()
    region.lease()


def test_a_released_slot_shows_nothing_of_the_next_lease() -> None:
    """Who keeps a slot past its release sees neither old nor new content."""
    region = SecretRegion.open(slots=1, slot_bytes=64)
    stale = region.lease()
    stale.use(6)
    stale.release()
    region.lease().whole[:6] = b"secret"
    assert bytes(stale.view) == bytes(stale.whole) == b""


def read_from_outside(region: SecretRegion, size: int) -> bytes:
    """Read a region as a debugger would, through /proc."""
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        return os.pread(memory.fileno(), size, address_of(region.memory))


def test_secret_pages_cannot_be_read_through_proc() -> None:
    """The kernel itself cannot read them for anybody, root included."""
    region = SecretRegion.open(slots=1, slot_bytes=4096)
    if region.protection is not MemoryProtection.SECRET:
        pytest.skip("this kernel has no memfd_secret")
    region.lease().whole[:6] = b"secret"
    with pytest.raises(OSError, match="Input/output") as refused:
        read_from_outside(region, 6)
    assert refused.value.errno == errno.EIO


def test_without_secret_pages_the_region_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a kernel without the call slots work all the same, under a weaker name."""
    monkeypatch.setattr(region_module, "_MEMFD_SECRET", 99_999)
    region = SecretRegion.open(slots=1, slot_bytes=4096)
    assert region.protection in {MemoryProtection.LOCKED, MemoryProtection.NONE}
    region.lease().whole[:6] = b"secret"
    assert read_from_outside(region, 6) == b"secret"
