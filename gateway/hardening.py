"""What the kernel and the allocator do for a process that may meet a key, and proof that they do.

Every process hardens itself before it opens a socket or starts a thread, then looks whether it
worked: a protection is reported as found, never as asked for. What is missing is a *degraded* state
that health, metrics and the audit log show; `custody.require` in the configuration makes it fatal.

    secret_memory     the region's pages are `memfd_secret` (keys.region)
    wipe_on_free      freed memory is overwritten: glibc's `perturb` without the thread cache, or
                      CPython's debug allocator on another libc. In the control process alone: it is
                      where keys arrive, and nothing there is in a hurry
    not_dumpable      no ptrace or /proc/PID/mem for the same user, no core (prctl(2))
    no_core           core files are limited to nothing
    no_swap           no page can be written to a disk
    no_key_log        SSLKEYLOGFILE is not set: Python's ssl would write session keys to it
    no_debug          no asyncio debug mode, development mode or tracemalloc: they print and keep values
    confined_writes   Landlock: files can be made and changed below the declared folders only
"""

import ctypes
import gc
import os
import platform
import resource
import struct
import sys
import tracemalloc
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from gateway.errors import GatewayError
from keys.region import MemoryProtection, SecretRegion, address_of


class Protection(StrEnum):
    """One thing that guards keys in memory."""

    SECRET_MEMORY = "secret_memory"  # noqa: S105 - a name
    WIPE_ON_FREE = "wipe_on_free"
    NOT_DUMPABLE = "not_dumpable"
    NO_CORE = "no_core"
    NO_SWAP = "no_swap"
    NO_KEY_LOG = "no_key_log"
    NO_DEBUG = "no_debug"
    CONFINED_WRITES = "confined_writes"


class ProtectionMissing(GatewayError):
    """A required protection does not hold; the process must not serve."""

    code = "protection_missing"


class Finding(msgspec.Struct, frozen=True):
    """A protection, and why it does not hold in this process; no reason where it does."""

    protection: Protection
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether the protection holds."""
        return not self.reason


WIPING_ENVIRONMENT: Final[Mapping[str, str]] = (
    {
        "PYTHONMALLOC": "malloc",
        "GLIBC_TUNABLES": "glibc.malloc.perturb=90:glibc.malloc.tcache_count=0",
    }
    if platform.libc_ver()[0] == "glibc"
    else {"PYTHONMALLOC": "pymalloc_debug"}
)
"""What a process must be started with to wipe what it frees. `perturb` alone is not enough: blocks
in the thread cache are not overwritten."""

ROOT = Path("/")
"""Where /proc and /sys are looked for."""

_DEBUG_VARIABLES: Final = ("PYTHONASYNCIODEBUG", "PYTHONTRACEMALLOC", "PYTHONDEVMODE")

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 3, 4, 38  # <linux/prctl.h>

# <linux/landlock.h>; the numbers of the calls are those of every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION, _PATH_BENEATH = 1, 1
_WRITE_FILE, _REMOVE_DIR, _REMOVE_FILE = 1 << 1, 1 << 4, 1 << 5
_MAKE_DIR, _MAKE_REG, _REFER, _TRUNCATE = 1 << 7, 1 << 8, 1 << 13, 1 << 14
_OTHER_MAKES = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12  # devices, sockets, pipes, links
_IN_FOLDER = _WRITE_FILE | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    """Make a system call; return what it returned, or raise its OSError."""
    result: int = _libc().syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# --- what is done ---


def forbid_dumps() -> None:
    """Close this process to debuggers of its own user, and to core dumps.

    Every process does it after its `exec`, which undoes it.
    """
    _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def confine_writes(folders: Iterable[Path]) -> None:
    """Let this thread, and all that it starts, write below `folders` and to /dev/null only.

    Irrevocable, so it comes before any other thread.

    Raises:
        OSError: The kernel has no Landlock (before 5.13, or not among its `lsm=`).
    """
    version = _call(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)
    truncate = _TRUNCATE if version >= 3 else 0
    handled = _IN_FOLDER | _REMOVE_DIR | _OTHER_MAKES | truncate | (_REFER if version >= 2 else 0)
    attribute = struct.pack("=Q", handled)
    ruleset = _call(_CREATE_RULESET, attribute, ctypes.c_size_t(len(attribute)), 0)
    try:
        for folder in folders:
            _allow(ruleset, folder, _IN_FOLDER | truncate)
        _allow(ruleset, Path(os.devnull), _WRITE_FILE | truncate)
        _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, fd), 0)
    finally:
        os.close(fd)


# --- what is found ---


def memory_finding(region: SecretRegion) -> Finding:
    """Return whether a region's pages are hidden by the kernel."""
    holds = region.protection is MemoryProtection.SECRET
    return Finding(Protection.SECRET_MEMORY, "" if holds else f"{region.protection} instead")


def wiping_finding() -> Finding:
    """Return whether what this process frees is overwritten: freed blocks are read back.

    Needs /proc/self/mem, so it comes before `forbid_dumps`.
    """
    try:
        memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return Finding(Protection.WIPE_ON_FREE, "cannot be tested")
    try:
        kept = sum(_survives_free(memory, size) for size in (48, 400, 4096, 65_536))
    finally:
        os.close(memory)
    return Finding(Protection.WIPE_ON_FREE, "freed memory is readable" if kept else "")


def _survives_free(memory: int, size: int) -> bool:
    read, value = bytearray(size), os.urandom(size)
    for _ in range(8):  # a block may be taken again by something else before it is looked at
        block = bytearray(value)
        address = address_of(block)
        gc.collect(0)  # `address_of` leaves a view behind until its cycle is gone
        del block
        try:
            os.preadv(memory, [read], address)
        except OSError:
            continue  # the page went back to the kernel
        if any(value[at : at + 16] in read for at in range(0, size - 16, 16)):
            return True
    return False


def process_findings() -> list[Finding]:
    """Return what holds for this process whatever its role."""
    is_dumpable = _libc().prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0
    core_limit, _ = resource.getrlimit(resource.RLIMIT_CORE)
    set_variables = [name for name in _DEBUG_VARIABLES if os.environ.get(name)]
    debugs = bool(set_variables) or sys.flags.dev_mode or tracemalloc.is_tracing()
    logs_keys = bool(os.environ.get("SSLKEYLOGFILE"))
    return [
        Finding(Protection.NOT_DUMPABLE, "dumpable" if is_dumpable else ""),
        Finding(Protection.NO_CORE, "core files are allowed" if core_limit else ""),
        Finding(Protection.NO_SWAP, _swap_in_reach()),
        Finding(Protection.NO_KEY_LOG, "SSLKEYLOGFILE is set" if logs_keys else ""),
        Finding(
            Protection.NO_DEBUG,
            (" ".join(set_variables) or "a debug mode is on") if debugs else "",
        ),
    ]


def _swap_in_reach() -> str:
    """Return which swap this process's pages may go to, "" for none."""
    try:
        devices = (ROOT / "proc/swaps").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return "unknown"
    if not devices or _cgroup_forbids_swap():
        return ""
    return "swap is on: " + devices[0].split()[0]


def _cgroup_forbids_swap() -> bool:
    """Return whether a control group (v2) of this process, or one above it, may not swap."""
    with suppress(OSError, ValueError):
        lines = (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        path = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
        root = ROOT / "sys/fs/cgroup"
        group = root / path.lstrip("/")
        for each in (group, *group.parents):
            # The host's own root has no such file; the root that a container sees is its group.
            limit = each / "memory.swap.max"
            if limit.exists() and limit.read_text(encoding="ascii").strip() == "0":
                return True
            if each == root:
                break
    return False


def writes_finding(folders: Iterable[Path]) -> Finding:
    """Confine this process's writes to `folders`; return whether a write elsewhere is refused."""
    elsewhere = "/tmp"  # noqa: S108 - where everybody may write, but for Landlock
    could = _can_write(elsewhere)
    try:
        confine_writes(folders)
    except OSError as error:
        return Finding(Protection.CONFINED_WRITES, f"Landlock: {error.strerror}")
    fails = could and _can_write(elsewhere)
    return Finding(Protection.CONFINED_WRITES, "a write elsewhere succeeded" if fails else "")


def _can_write(folder: str) -> bool:
    try:
        # A file without a name needs no cleaning up, and the same right as one with a name.
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError:
        return False
    return True


# --- both ---


def harden(
    folders: Iterable[Path], *, region: SecretRegion | None = None, wipes: bool = False
) -> tuple[Finding, ...]:
    """Protect this process, which writes below `folders` only, and return what was found.

    `wipes` says that it should have been started with `WIPING_ENVIRONMENT`. Comes before any thread,
    loop or socket.
    """
    findings = [wiping_finding()] if wipes else []
    if region is not None:
        findings.append(memory_finding(region))
    forbid_dumps()
    return (*findings, *process_findings(), writes_finding(folders))


def demand(findings: Iterable[Finding], required: Collection[str]) -> None:
    """Return if every required protection holds.

    Raises:
        ProtectionMissing: One does not; the message names each, and why.
    """
    missing = [each for each in findings if not each.holds and each.protection in required]
    if missing:
        named = "; ".join(f"{each.protection}: {each.reason}" for each in missing)
        raise ProtectionMissing(f"custody.require is not met: {named}")


def to_reasons(findings: Iterable[Finding]) -> dict[str, str]:
    """Return each protection with the reason why it does not hold, "" where it does."""
    return {str(each.protection): each.reason for each in findings}
