"""What a child process is started with, and the first things that every child does with it.

The supervisor writes one `Boot` into a memory file and hands its descriptor down; nothing about a
deployment travels in an argument or in the environment, where others could read it.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from gateway.audit.durability import Durability
from gateway.audit.event import ProtectionsChecked
from gateway.audit.journal import Journal, JournalPlace
from gateway.audit.keeper import Keeper, Record
from gateway.audit.keyfile import load_signer
from gateway.audit.trust import LogKeys, Policy
from gateway.bundles import Bundle
from gateway.clock import Clock
from gateway.config import Config, ConfigurationError
from gateway.hardening import ProtectionMissing, demand, harden, to_reasons
from gateway.identity.dev_issuer import DEVELOPMENT
from gateway.identity.tokens import Issuer
from gateway.telemetry.logs import configure_logs, get_log
from keys.region import SecretRegion
from policies.document import DocumentError

EXIT_CONFIGURATION: Final = 78
"""EX_CONFIG of sysexits.h: starting again would change nothing."""

log = get_log()


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a child starts from.

    Descriptors are inherited; `listeners` names this child's by listener. `addresses` are the URLs
    at which each listener is really reached, whoever holds it. `run` counts the processes that
    have had this role; `relays` is how many relay ends are on their way over the leash.
    """

    config: Config
    role: str
    run: int
    boot_id: str
    is_dev: bool
    config_digest: str
    config_path: str
    bundle: Bundle
    listeners: dict[str, int]
    addresses: dict[str, str]
    secrets: int
    leash: int
    relays: int
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


def issuers_of(boot: Boot) -> tuple[Issuer, ...]:
    """Return the issuers that are trusted: the configured ones, and in development our own."""
    return (*boot.config.issuers, *((DEVELOPMENT,) if boot.is_dev else ()))


def open_journal(boot: Boot, clock: Clock, loop: asyncio.AbstractEventLoop) -> Journal:
    """Open this process's own audit log; one that died before it left its log as it was."""
    config = boot.config
    writer = f"{boot.role}.{boot.run}"

    def draw_keys(origin: str) -> LogKeys:
        # The deployment's key is read to vouch for a log's own keys, and not kept.
        return LogKeys.draw(origin, load_signer(Path(config.state_dir), config.origin))

    place = JournalPlace(
        directory=Path(config.audit.directory) / f"{boot.boot_id}-{writer}",
        origin=f"{config.origin}/{boot.boot_id}/{writer}",
        draw_keys=draw_keys,
        calls=config.limits.connections,
        durability=Durability(config.audit.durability),
    )
    return Journal.open(place, clock=clock, loop=loop)


def keeper_of(boot: Boot, clock: Clock, record: Record) -> Keeper:
    """Return the keeper of this gateway's logs.

    Raises:
        ConfigurationError: The witnesses' policy cannot be used.
    """
    config, audit = boot.config, boot.config.audit
    policy = None
    if audit.witnesses:
        try:
            policy = Policy.from_text(Path(audit.witnesses).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError((f"{audit.witnesses}: {error}",)) from None
    return Keeper(
        Path(audit.directory),
        load_signer(Path(config.state_dir), config.origin),
        clock,
        record=record,
        policy=policy,
        keep_seconds=audit.keep,
    )


def take_signals(stop: Callable[[str], None]) -> None:
    """Call `stop` on SIGTERM, and leave everything else that a terminal sends to the supervisor.

    SIGINT and SIGHUP from a terminal reach the whole group; the supervisor alone answers them.
    """
    loop = asyncio.get_running_loop()
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    loop.add_signal_handler(signal.SIGTERM, stop, "shutdown")
    signal.pthread_sigmask(signal.SIG_SETMASK, set())


def protections_event(role: str, protections: Mapping[str, str]) -> ProtectionsChecked:
    """Return the audit event for what a process found of its protections."""
    return ProtectionsChecked(
        role=role,
        held=tuple(name for name, reason in protections.items() if not reason),
        missing=tuple(f"{name}: {reason}" for name, reason in protections.items() if reason),
    )


Protections = dict[str, str]
"""Each protection of a process, with the reason why it does not hold, "" where it does."""

Main = Callable[[Boot, Protections], Coroutine[Any, Any, int]]


def run_child(
    main: Main,
    run: Callable[[Coroutine[Any, Any, int]], int],
    *,
    writes_to: Callable[[Config], Sequence[str]],
    region: SecretRegion | None = None,
    wipes: bool = False,
) -> int:
    """Run a child from the boot message whose descriptor is its only argument; return its exit code.

    Before its loop runs, by `run`, it is hardened, and can write to the folders `writes_to` only.
    """
    boot = read_boot(int(sys.argv[1]))
    config = boot.config
    configure_logs(config.logs.format, config.logs.level, boot.role)
    findings = harden(map(Path, writes_to(config)), region=region, wipes=wipes)
    try:
        demand(findings, config.custody.required(is_dev=boot.is_dev))
        return run(main(boot, to_reasons(findings)))
    except (ConfigurationError, DocumentError, ProtectionMissing) as error:
        log.error("configuration.refused", error=str(error))
        return EXIT_CONFIGURATION
