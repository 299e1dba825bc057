"""Slots are leased, bounded, and wiped when they come back."""

import pytest

from keys.errors import RegionExhausted
from keys.region import SecretRegion


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
