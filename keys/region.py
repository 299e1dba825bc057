"""The region: the only memory of a worker where a key is ever plaintext.

Slots of one size, leased for the moment of use and wiped on release. Its pages come from
`memfd_secret(2)`: the kernel takes them out of its own map, so that they are never swapped, stand in
no core dump, and cannot be read through /proc or ptrace even by root. Where the kernel has no such
pages, locked ones that are left out of dumps take their place, and `protection` says so.

No I/O but the system calls that make memory.
"""

import ctypes
import mmap
import os
from enum import StrEnum
from typing import Final, Self

from keys.errors import RegionExhausted

SLOT_BYTES: Final = 80 * 1024
"""A request head (64 KiB at most) with the longest credential (a few KiB) in it."""

SLOTS: Final = 64
"""Slots are held for microseconds; more than this at once means that providers do not read. All of
them are 5 MiB, inside the 8 MiB that Linux lets a process lock by default (RLIMIT_MEMLOCK)."""

_MEMFD_SECRET: Final = 447
"""The number of `memfd_secret(2)`, one for every architecture (asm-generic/unistd.h)."""

_NOTHING: Final = memoryview(b"")


class MemoryProtection(StrEnum):
    """What guards a region's pages, the strongest first."""

    SECRET = "memfd_secret"  # noqa: S105 - the name of a system call
    LOCKED = "mlock"
    NONE = "none"


def create_secret_fd(size: int) -> int:
    """Return the descriptor of `size` bytes of secret memory; children may inherit and map it.

    Raises:
        OSError: The kernel has none (before 5.14, or without `secretmem.enable`), or denies it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(_MEMFD_SECRET, 0)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        os.set_inheritable(fd, False)
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def map_secret_memory(size: int) -> tuple[mmap.mmap, MemoryProtection]:
    """Return `size` bytes of zeros under the strongest protection that is to be had here."""
    try:
        fd = create_secret_fd(size)
        try:
            return mmap.mmap(fd, size), MemoryProtection.SECRET
        finally:
            os.close(fd)
    except OSError:  # no such call here, or more than RLIMIT_MEMLOCK
        memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_DONTDUMP)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(address_of(memory))
    is_locked = libc.mlock(address, ctypes.c_size_t(size)) == 0
    return memory, MemoryProtection.LOCKED if is_locked else MemoryProtection.NONE


def address_of(memory: mmap.mmap | bytearray) -> int:
    """Return where a writable buffer lies in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Slot:
    """A leased part of the region; `view` shows as much of it as is in use, nothing once released.

    One object is one lease: who keeps it past its release sees nothing of the next one.
    """

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
            whole, used = self._whole, len(self.view)
            self._whole = self.view = _NOTHING
            whole[:used] = bytes(used)
            region.take_back(whole)

    def __repr__(self) -> str:
        """Return nothing of what is inside."""
        return "Slot(…)"


class SecretRegion:
    """A fixed number of slots."""

    def __init__(self, memory: mmap.mmap, slot_bytes: int, protection: MemoryProtection) -> None:
        self.protection = protection
        self.memory = memory
        view = memoryview(memory)
        self._free = [
            view[start : start + slot_bytes]
            for start in range(0, len(view) - slot_bytes + 1, slot_bytes)
        ]

    @classmethod
    def open(cls, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> Self:
        """Return a region with `slots` free slots of `slot_bytes` each."""
        memory, protection = map_secret_memory(slots * slot_bytes)
        return cls(memory, slot_bytes, protection)

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
