"""The supervisor: binds the sockets, starts one control process and the workers, waits.

It has no event loop and speaks to no network. It hands each child its listening socket and its
ends of the relays, and nothing in the environment. When one child dies unasked the whole gateway
stops: a data plane without its control process, or the reverse, is not a state to serve from.
"""

import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway.audit.keyfile import load_signer
from gateway.boot import Boot, PolicySource, write_boot
from gateway.clock import SystemClock
from gateway.config import (
    Config,
    ConfigurationError,
    Listener,
    child_environment,
    read_policy_sources,
)
from gateway.descriptors import raise_descriptor_limit, require_descriptors
from gateway.hardening import WIPING_ENVIRONMENT, ProtectionMissing, demand, harden, to_reasons
from gateway.setup import load_policies
from gateway.telemetry.logs import configure_logs, get_log

log = get_log()

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}

KILL_AFTER_SECONDS = 5.0
"""How long past the drain a child may take to end before it is killed."""


class Supervisor:
    """The parent of every process of one gateway."""

    def __init__(self, config: Config, config_path: Path, *, is_dev: bool) -> None:
        self._config = config
        self._config_path = config_path
        self._is_dev = is_dev
        clock = SystemClock()
        self._clock = clock
        self._boot_id = f"{int(clock.now()):x}{secrets.token_hex(4)}"
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._lifeline, self._lifeline_end = os.pipe()
        self._protections: dict[str, str] = {}

    def run(self) -> int:
        """Start everything, wait for a signal or a death, stop everything; return an exit code."""
        # Blocked, a signal waits to be taken here instead of interrupting; children unblock them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._prepare()
        self._start()
        return self._wait()

    def _prepare(self) -> None:
        """Make what every child takes for granted: folders, keys, and the key auditors pin."""
        config = self._config
        require_descriptors(config)
        raise_descriptor_limit()
        signer = load_signer(Path(config.state_dir), config.name)
        directory = Path(config.audit.directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / "vkey").write_text(signer.vkey + "\n")
        load_policies(config)
        findings = harden([Path(config.state_dir), directory])
        demand(findings, config.custody.required(is_dev=self._is_dev))
        self._protections = to_reasons(findings)
        if self._is_dev:
            log.warning("gateway.development", hint="anyone on this machine can mint an identity")

    def _start(self) -> None:
        config = self._config
        policies = tuple(
            PolicySource(path, text) for path, text in read_policy_sources(config.policies.path)
        )
        sessions = _bind(config.listeners.sessions)
        admin = _bind(config.listeners.admin)
        proxies = _bind_shared(config.listeners.proxy, config.workers)
        pairs = [socket.socketpair() for _ in proxies]
        digest = "sha256:" + hashlib.sha256(self._config_path.read_bytes()).hexdigest()

        addresses = {
            "proxy": _url(config.listeners.proxy, proxies[0]),
            "sessions": _url(config.listeners.sessions, sessions),
            "admin": _url(config.listeners.admin, admin),
        }

        def boot(
            role: str, listeners: dict[str, socket.socket], ends: Sequence[socket.socket]
        ) -> Boot:
            return Boot(
                config=config,
                role=role,
                boot_id=self._boot_id,
                is_dev=self._is_dev,
                config_digest=digest,
                config_path=str(self._config_path),
                policies=policies,
                listeners={name: sock.fileno() for name, sock in listeners.items()},
                addresses=addresses,
                relays=tuple(end.fileno() for end in ends),
                lifeline=self._lifeline,
                supervisor_protections=self._protections,
            )

        control = {"sessions": sessions, "admin": admin}
        ends = [mine for mine, _ in pairs]
        self._spawn("gateway.control", boot("control", control, ends), wipes=True)
        for index, (sock, (_, theirs)) in enumerate(zip(proxies, pairs, strict=True)):
            self._spawn("gateway.worker", boot(f"worker-{index}", {"proxy": sock}, [theirs]))
        for held in [sessions, admin, *proxies, *(end for pair in pairs for end in pair)]:
            held.close()

    def _spawn(self, module: str, boot: Boot, *, wipes: bool = False) -> None:
        fd = write_boot(boot)
        inherited = [fd, boot.lifeline, *boot.relays, *boot.listeners.values()]
        child = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", module, str(fd)],
            pass_fds=inherited,
            stdin=subprocess.DEVNULL,
            env={**child_environment(), **(WIPING_ENVIRONMENT if wipes else {})},
        )
        os.close(fd)
        self._children[child.pid] = child

    def _wait(self) -> int:
        while True:
            number = signal.sigwaitinfo(_SIGNALS).si_signo
            if number in {signal.SIGTERM, signal.SIGINT}:
                log.info("gateway.stopping")
                return self._stop()
            dead = [child for child in self._children.values() if child.poll() is not None]
            if dead:
                log.error("process.died", pid=dead[0].pid, exit_code=dead[0].returncode)
                self._stop()
                return 1

    def _stop(self) -> int:
        """Ask every child to end, wait for the drain and a little more, kill what is left."""
        for child in self._children.values():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        deadline = self._clock.monotonic() + self._config.timeouts.drain + KILL_AFTER_SECONDS
        failed = False
        for child in self._children.values():
            try:
                child.wait(max(0.0, deadline - self._clock.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("process.killed", pid=child.pid)
                child.kill()
                child.wait()
            failed = failed or child.returncode != 0
        os.close(self._lifeline_end)
        return 1 if failed else 0


def _bind(listener: Listener) -> socket.socket:
    return _bind_shared(listener, 1)[0]


def _bind_shared(listener: Listener, count: int) -> list[socket.socket]:
    """Return `count` sockets on one address; the kernel spreads connections over them."""
    sockets: list[socket.socket] = []
    host, port = listener.host, listener.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(count):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if count > 1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(1024)
        port = sock.getsockname()[1]
        sockets.append(sock)
    return sockets


def _url(listener: Listener, sock: socket.socket) -> str:
    scheme = "https" if listener.certificate else "http"
    host = f"[{listener.host}]" if ":" in listener.host else listener.host
    return f"{scheme}://{host}:{sock.getsockname()[1]}"


def serve(config: Config, config_path: Path, *, dev: bool = False) -> int:
    """Run a gateway until it is told to stop; return the exit code.

    Raises:
        ConfigurationError: The policies are wrong, a development gateway is not on loopback, or there
            are too few descriptors.
    """
    configure_logs(config.logs.format, config.logs.level, "supervisor")
    if dev and not config.listeners.sessions.is_loopback:
        raise ConfigurationError(("--dev: listeners.sessions must be a loopback address",))
    try:
        return Supervisor(config, config_path, is_dev=dev).run()
    except ProtectionMissing as missing:
        raise ConfigurationError((str(missing),)) from None
