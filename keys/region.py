"""The region: the only memory of a worker where a key is ever plaintext.

Slots of one size, leased for the moment of use and wiped on release. Today the region is anonymous
memory of its own, outside the Python heap; a kernel-protected one takes its place behind the same
three names. No I/O.
"""

import mmap
from typing import Final, Self

from keys.errors import RegionExhausted

SLOT_BYTES: Final = 80 * 1024
"""A request head (64 KiB at most) with the longest credential (a few KiB) in it."""

SLOTS: Final = 64
"""Slots are held for microseconds; more than this at once means that providers do not read."""


class Slot:
    """A leased part of the region; `view` shows as much of it as is in use."""

    __slots__ = ("_region", "_whole", "view")

    def __init__(self, region: "SecretRegion", whole: memoryview) -> None:
        self._region: SecretRegion | None = region
        self._whole = whole
        self.view = whole

    @property
    def whole(self) -> memoryview:
        """Return all of the slot's memory."""
        return self._whole

    def use(self, length: int) -> None:
        """Say how much of the slot is in use: `view` shows that much."""
        self.view = self._whole[:length]

    def release(self) -> None:
        """Wipe what was in use and give the slot back; a second time does nothing."""
        region, self._region = self._region, None
        if region is not None:
            used = len(self.view)
            self._whole[:used] = bytes(used)
            region.take_back(self._whole)

    def __repr__(self) -> str:
        """Return nothing of what is inside."""
        return "Slot(…)"


class SecretRegion:
    """A fixed number of slots."""

    def __init__(self, memory: mmap.mmap, slot_bytes: int) -> None:
        self._memory = memory
        view = memoryview(memory)
        self._free = [
            view[start : start + slot_bytes]
            for start in range(0, len(view) - slot_bytes + 1, slot_bytes)
        ]

    @classmethod
    def open(cls, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> Self:
        """Return a region with `slots` free slots of `slot_bytes` each."""
        return cls(mmap.mmap(-1, slots * slot_bytes), slot_bytes)

    @property
    def free(self) -> int:
        """Return how many slots are free."""
        return len(self._free)

    def lease(self) -> Slot:
        """Return a free slot.

        Raises:
            RegionExhausted: Every slot is in use.
        """
        if not self._free:
            raise RegionExhausted
        return Slot(self, self._free.pop())

    def take_back(self, whole: memoryview) -> None:
        """Count a wiped slot as free again; `Slot.release` calls this."""
        self._free.append(whole)
