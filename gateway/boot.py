"""What a child process is started with, and the first things that every child does with it.

The supervisor writes one `Boot` into a memory file and hands its descriptor down; nothing about a
deployment travels in an argument or in the environment, where others could read it.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from gateway.audit.event import ProtectionsChecked
from gateway.audit.journal import Journal
from gateway.audit.keyfile import load_signer
from gateway.clock import Clock
from gateway.config import Config
from gateway.hardening import demand, harden, to_reasons
from gateway.identity.dev_issuer import DEVELOPMENT
from gateway.identity.tokens import Issuer
from keys.region import SecretRegion
from policies.rules import PolicySet, load_policy_set


class PolicySource(msgspec.Struct, frozen=True):
    """One policy file as the supervisor read it: every process compiles the same bytes."""

    path: str
    text: str


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a child starts from.

    Descriptors are inherited; `listeners` names this child's by listener. `addresses` are the URLs
    at which each listener is really reached, whoever holds it.
    """

    config: Config
    role: str
    boot_id: str
    is_dev: bool
    config_digest: str
    config_path: str
    policies: tuple[PolicySource, ...]
    listeners: dict[str, int]
    addresses: dict[str, str]
    relays: tuple[int, ...]
    lifeline: int
    supervisor_protections: dict[str, str]


def write_boot(boot: Boot) -> int:
    """Return the descriptor of a memory file that holds `boot`, at its start."""
    fd = os.memfd_create("veklom-boot", 0)
    os.write(fd, msgspec.msgpack.encode(boot))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def read_boot(fd: int) -> Boot:
    """Return what the supervisor wrote, and close the descriptor."""
    with os.fdopen(fd, "rb") as file:
        return msgspec.msgpack.decode(file.read(), type=Boot)


def policy_set_of(boot: Boot) -> PolicySet:
    """Return the policy set that the boot message carries."""
    providers = frozenset(boot.config.providers)
    return load_policy_set([(source.path, source.text) for source in boot.policies], providers)


def issuers_of(boot: Boot) -> tuple[Issuer, ...]:
    """Return the issuers that are trusted: the configured ones, and in development our own."""
    return (*boot.config.issuers, *((DEVELOPMENT,) if boot.is_dev else ()))


def open_journal(boot: Boot, clock: Clock, loop: asyncio.AbstractEventLoop) -> Journal:
    """Open this process's own audit log."""
    config = boot.config
    signer = load_signer(Path(config.state_dir), config.name)
    origin = f"{config.name}/{boot.boot_id}/{boot.role}"
    directory = Path(config.audit.directory) / f"{boot.boot_id}-{boot.role}"
    return Journal.open(directory, origin=origin, signer=signer, clock=clock, loop=loop)


def protect(
    boot: Boot, folders: Iterable[str], *, region: SecretRegion | None = None, wipes: bool = False
) -> dict[str, str]:
    """Harden this process; return each protection, with the reason where it does not hold.

    Raises:
        ProtectionMissing: The configuration requires one that does not hold.
    """
    findings = harden(map(Path, folders), region=region, wipes=wipes)
    demand(findings, boot.config.custody.required(is_dev=boot.is_dev))
    return to_reasons(findings)


def protections_event(role: str, protections: Mapping[str, str]) -> ProtectionsChecked:
    """Return the audit event for what `protect` found."""
    return ProtectionsChecked(
        role=role,
        held=tuple(name for name, reason in protections.items() if not reason),
        missing=tuple(f"{name}: {reason}" for name, reason in protections.items() if reason),
    )


def watch_over(boot: Boot, stop: Callable[[str], None]) -> None:
    """Call `stop` with a reason on SIGTERM, and when the supervisor is gone.

    The lifeline is a pipe that the supervisor never writes to: it ends with it, however it ends.
    SIGINT from a terminal reaches the whole group; the supervisor turns it into an orderly stop.
    """
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop.add_signal_handler(signal.SIGTERM, stop, "shutdown")
    loop.add_reader(boot.lifeline, stop, "supervisor_lost")
    signal.pthread_sigmask(signal.SIG_SETMASK, set())


def boot_argument() -> Boot:
    """Return the boot message whose descriptor is this process's only argument."""
    return read_boot(int(sys.argv[1]))
