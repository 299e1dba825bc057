"""The supervisor: binds the sockets, keeps one control process and the workers running, reloads.

It has no event loop and speaks to no network. It hands each child its listening socket, its leash
and the gateway's secrets, and nothing in the environment. It wants one thing: every role filled by
a process of the current deployment (`_reconcile`); starting, restarting and reloading are all that.

Laws of this file:
- a child that dies is started again after a pause (`gateway.restarts`), and the others go on;
- a reload replaces workers one by one, each only once its successor serves, and then control; no
  listening socket ever closes meanwhile;
- policies that change are compiled, tested, and handed to every process; none is replaced for them,
  and where they are wrong those in force stay;
- a new deployment whose first process does not come to serve is given up for the one before it;
- a child that cannot be started, for its configuration or time and again, ends the gateway;
- with the supervisor everything ends: the leashes break.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gateway.audit.keyfile import UnsafeKeyFile, load_signer
from gateway.boot import EXIT_CONFIGURATION, Boot, write_boot
from gateway.bundles import fresh_bundle, stamp_of
from gateway.clock import SystemClock
from gateway.config import Config, ConfigurationError, child_environment
from gateway.deployment import Deployment, read_deployment, reload_deployment
from gateway.descriptors import raise_descriptor_limit
from gateway.hardening import WIPING_ENVIRONMENT, ProtectionMissing, demand, harden, to_reasons
from gateway.leash import (
    Holder,
    LookAtPolicies,
    NewRelay,
    PoliciesRefused,
    Restarts,
    Retire,
    Serving,
    UsePolicies,
)
from gateway.listening import Listening
from gateway.restarts import BackOff
from gateway.setup import Checked
from gateway.telemetry.logs import configure_logs, get_log
from keys.boot_secrets import BootSecrets

log = get_log()

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGIO}

KILL_AFTER_SECONDS = 5.0
"""How long past the drain a child may take to end before it is killed."""

START_SECONDS = 30.0
"""How long a child may take to serve before it is killed; keys are fetched for 10 at most."""

MAX_TOLD_FAULTS = 16
"""Of refused policies that are recorded; the operational log holds all."""

LOOK_AGAIN_SECONDS = 1.0
"""How long a word of a child that starts may wait, should its signal go astray."""


class _GiveUp(Exception):
    """The gateway cannot be kept running."""


class _Child:
    """A process, and the leash it is held by."""

    def __init__(
        self,
        post: "_Post",
        deployment: Deployment,
        process: subprocess.Popen[bytes],
        leash: Holder,
        began: float,
    ) -> None:
        self.post = post
        self.deployment = deployment
        self.process = process
        self.leash = leash
        self.began = began
        self.is_serving = False
        self.is_retiring = False
        self.kill_at: float | None = began + START_SECONDS


class _Post:
    """A role that is to be filled: by `child`, and soon by `successor` where that is set."""

    def __init__(self, role: str, worker: int | None) -> None:
        self.role = role
        self.worker = worker
        self.runs = 0
        self.child: _Child | None = None
        self.successor: _Child | None = None
        self.back_off = BackOff()
        self.start_at = 0.0


class Supervisor:
    """The parent of every process of one gateway."""

    def __init__(
        self, deployment: Deployment, protections: dict[str, str], *, is_dev: bool
    ) -> None:
        config = deployment.config
        self._deployment = self._proven = deployment
        self._protections = protections
        self._is_dev = is_dev
        self._clock = SystemClock()
        self._boot_id = f"{int(self._clock.now()):x}{secrets.token_hex(4)}"
        self._secrets = BootSecrets.create()
        self._listening = Listening(config.listeners, config.workers)
        self._workers = [_Post(f"worker-{index}", index) for index in range(config.workers)]
        self._control = _Post("control", None)
        self._children: list[_Child] = []
        self._restarts = {"control": 0, "worker": 0}
        self._look_at = self._clock.monotonic()
        self._used_stamp = self._last_stamp = stamp_of(config)
        self._refused: PoliciesRefused | None = None

    def run(self) -> int:
        """Start everything, keep it running until told to stop; return an exit code."""
        # Blocked, a signal waits to be taken here instead of interrupting; children unblock them.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        if self._is_dev:
            log.warning("gateway.development", hint="anyone on this machine can mint an identity")
        try:
            while True:
                self._reconcile()
                number = self._next_signal()
                if number in {signal.SIGTERM, signal.SIGINT}:
                    log.info("gateway.stopping")
                    return self._stop()
                if number == signal.SIGHUP:
                    self._reload()
                self._hear()
                self._reap()
                self._watch_policies()
        except _GiveUp:
            self._stop()
            return 1

    # --- waiting ---

    def _next_signal(self) -> int | None:
        """Return the next signal, or None when it is time to look again."""
        now = self._clock.monotonic()
        due = [post.start_at for post in self._posts() if post.child is None]
        due += [child.kill_at for child in self._children if child.kill_at is not None]
        if not all(child.is_serving for child in self._children):
            due.append(now + LOOK_AGAIN_SECONDS)
        if self._deployment.config.policies.watch:
            due.append(self._look_at)
        if not due:
            return signal.sigwaitinfo(_SIGNALS).si_signo
        found = signal.sigtimedwait(_SIGNALS, max(0.0, min(due) - now))
        return None if found is None else found.si_signo

    def _posts(self) -> Iterator[_Post]:
        yield from self._workers
        yield self._control

    def _hear(self) -> None:
        for child in self._children:
            for word in child.leash.words():
                match word:
                    case Serving() if not child.is_serving:
                        child.is_serving = True
                        if not child.is_retiring:
                            child.kill_at = None
                    case LookAtPolicies():
                        self._reload_policies()
                    case _:
                        pass

    # --- policies, which need no other process ---

    def _watch_policies(self) -> None:
        """Look whether policy files have changed, and have stood still since the last look."""
        now, every = self._clock.monotonic(), self._deployment.config.policies.watch
        if not every or now < self._look_at:
            return
        self._look_at = now + every
        stamp = stamp_of(self._deployment.config)
        is_still, self._last_stamp = stamp == self._last_stamp, stamp
        if is_still and stamp != self._used_stamp:
            self._reload_policies()

    def _reload_policies(self) -> None:
        """Give every process the policies that lie there now; keep those in force where they are wrong."""
        deployment = self._deployment
        self._used_stamp = stamp_of(deployment.config)
        try:
            bundle = fresh_bundle(deployment.config)
        except ConfigurationError as error:
            log.error("policies.refused", faults=list(error.faults))
            self._tell_of_policies(PoliciesRefused(faults=error.faults[:MAX_TOLD_FAULTS]))
            return
        if bundle == deployment.bundle and self._refused is None:
            return
        deployment.bundle = bundle
        log.info("policies.loaded", policy=bundle.digest)
        self._tell_of_policies(UsePolicies(bundle=bundle))

    def _tell_of_policies(self, order: UsePolicies | PoliciesRefused) -> None:
        self._refused = order if isinstance(order, PoliciesRefused) else None
        for child in self._children:
            # A child of another deployment is being replaced; these policies may name what it lacks.
            if child.deployment is self._deployment and not child.leash.order(order):
                child.process.kill()

    # --- every role filled by the current deployment ---

    def _reconcile(self) -> None:
        now = self._clock.monotonic()
        for child in self._children:
            if child.kill_at is not None and child.kill_at <= now:
                log.error("process.killed", role=child.post.role, pid=child.process.pid)
                child.process.kill()
                child.kill_at = now + KILL_AFTER_SECONDS
        for post in self._posts():
            if post.child is None and post.start_at <= now:
                post.child = self._spawn(post)
        if all(self._is_current(post) for post in self._workers):
            self._replace_control(now)
        else:
            self._replace_a_worker(now)

    def _is_current(self, post: _Post) -> bool:
        child = post.child
        return child is not None and child.is_serving and child.deployment is self._deployment

    def _replace_a_worker(self, now: float) -> None:
        """Take the next step of replacing the first worker that is of another deployment."""
        for post in self._workers:
            old, successor = post.child, post.successor
            if successor is not None:
                if successor.is_serving:
                    post.child, post.successor = successor, None
                    if old is not None:
                        self._retire(old, now)
                    continue
                return
            if old is None or not old.is_serving:
                return  # it will be of the current deployment, or there is nothing to hand over
            if old.deployment is not self._deployment:
                post.successor = self._spawn(post)
                return

    def _replace_control(self, now: float) -> None:
        child = self._control.child
        if child is None or not child.is_serving or child.is_retiring:
            return
        if child.deployment is not self._deployment:
            self._retire(child, now)
        elif self._proven is not self._deployment:
            self._proven = self._deployment
            log.info("reload.done")

    def _retire(self, child: _Child, now: float) -> None:
        child.leash.order(Retire())
        child.is_retiring = True
        child.kill_at = now + child.deployment.config.timeouts.drain + KILL_AFTER_SECONDS

    def _reload(self) -> None:
        try:
            fresh, kept = reload_deployment(self._deployment)
        except ConfigurationError as error:
            log.error("reload.refused", faults=list(error.faults))
            return
        if kept:
            log.warning("reload.needs_restart", fields=list(kept))
        log.info("reload.begun")
        self._deployment = fresh
        self._used_stamp = self._last_stamp = stamp_of(fresh.config)
        self._refused = None

    # --- starting ---

    def _spawn(self, post: _Post) -> _Child:
        deployment, leash = self._deployment, Holder()
        post.runs += 1
        listening = self._listening
        if post.worker is None:
            module = "gateway.control"
            listeners = {"sessions": listening.sessions, "admin": listening.admin}
            peers = [child for child in self._children if child.post.worker is not None]
        else:
            module = "gateway.worker"
            listeners = {"proxy": listening.proxies[post.worker]}
            peers = [self._control.child] if self._control.child is not None else []
        boot = Boot(
            config=deployment.config,
            role=post.role,
            run=post.runs,
            boot_id=self._boot_id,
            is_dev=self._is_dev,
            config_digest=deployment.config_digest,
            config_path=str(deployment.config_path),
            bundle=deployment.bundle,
            listeners={name: sock.fileno() for name, sock in listeners.items()},
            addresses=listening.addresses,
            secrets=self._secrets,
            leash=leash.child_end.fileno(),
            relays=len(peers),
            supervisor_protections=self._protections,
        )
        fd = write_boot(boot)
        wiping = WIPING_ENVIRONMENT if post.worker is None else {}
        inherited = [fd, boot.leash, boot.secrets, *boot.listeners.values()]
        process = subprocess.Popen(  # noqa: S603 - our own module, no shell
            [sys.executable, "-m", module, str(fd)],
            pass_fds=inherited,
            stdin=subprocess.DEVNULL,
            env={**child_environment(), **wiping},
        )
        os.close(fd)
        leash.child_end.close()
        child = _Child(post, deployment, process, leash, self._clock.monotonic())
        self._children.append(child)
        if post.worker is None:
            leash.order(Restarts(counts=self._restarts))
            if self._refused is not None:
                leash.order(self._refused)
        for peer in peers:
            self._connect(child, peer)
        return child

    @staticmethod
    def _connect(child: _Child, peer: _Child) -> None:
        """Give both an end of a new relay; one that does not take it is stuck, and killed."""
        worker = child.post.worker if child.post.worker is not None else peer.post.worker
        order = NewRelay(worker=worker or 0)
        ends = socket.socketpair()
        for each, end in zip((child, peer), ends, strict=True):
            if not each.leash.order(order, end):
                each.process.kill()
            end.close()

    # --- the dead ---

    def _reap(self) -> None:
        for child in [child for child in self._children if child.process.poll() is not None]:
            self._children.remove(child)
            child.leash.close()
            self._bury(child)

    def _bury(self, child: _Child) -> None:
        post, code = child.post, child.process.returncode
        if child.is_retiring:
            log.info("process.replaced", role=post.role, pid=child.process.pid, exit_code=code)
            if post.child is child:
                post.child, post.start_at = None, 0.0
            return
        kind = "control" if post.worker is None else "worker"
        self._restarts[kind] += 1
        if self._control.child is not None and self._control.child is not child:
            self._control.child.leash.order(Restarts(counts=self._restarts))
        if post.child is child:
            post.child, post.successor = post.successor, None
        else:
            post.successor = None
        log.error("process.died", role=post.role, pid=child.process.pid, exit_code=code)
        post.start_at = self._clock.monotonic() + self._pause_after(child)

    def _pause_after(self, child: _Child) -> float:
        """Return how long to wait before the next start; give up a deployment, or the gateway."""
        if not child.is_serving and child.deployment is not self._proven:
            if self._deployment is child.deployment:
                log.error("reload.abandoned", role=child.post.role)
                self._deployment = self._proven
            return 0.0
        now = self._clock.monotonic()
        pause = child.post.back_off.pause_after(
            now, lived_seconds=now - child.began, has_served=child.is_serving
        )
        if pause is None or (
            child.process.returncode == EXIT_CONFIGURATION and not child.is_serving
        ):
            log.error("gateway.given_up", role=child.post.role)
            raise _GiveUp
        return pause

    # --- the end ---

    def _stop(self) -> int:
        """Ask every child to end, wait for the drain and a little more, kill what is left."""
        # From here on connections are refused: nobody will come to accept them.
        self._listening.close()
        for child in self._children:
            child.process.send_signal(signal.SIGTERM)
        deadline = self._clock.monotonic()
        deadline += self._deployment.config.timeouts.drain + KILL_AFTER_SECONDS
        failed = False
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - self._clock.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("process.killed", role=child.post.role, pid=child.process.pid)
                child.process.kill()
                child.process.wait()
            failed = failed or child.process.returncode != 0
        return 1 if failed else 0


def _prepare(config: Config, *, is_dev: bool) -> dict[str, str]:
    """Make what every child takes for granted: folders, keys, and the key auditors pin.

    Return what protects this process, with the reason where it does not hold.
    """
    raise_descriptor_limit()
    signer = load_signer(Path(config.state_dir), config.origin)
    directory = Path(config.audit.directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "vkey").write_text(signer.vkey + "\n")
    findings = harden([Path(config.state_dir), directory])
    demand(findings, config.custody.required(is_dev=is_dev))
    return to_reasons(findings)


def serve(checked: Checked, config_path: Path, *, dev: bool = False) -> int:
    """Run a gateway until it is told to stop; return the exit code.

    Raises:
        ConfigurationError: A folder cannot be used, a port is in use, a development gateway is not
            on loopback, there are too few descriptors, or a required protection does not hold.
    """
    config = checked.config
    configure_logs(config.logs.format, config.logs.level, "supervisor")
    if dev and not config.listeners.sessions.is_loopback:
        raise ConfigurationError(("--dev: listeners.sessions must be a loopback address",))
    deployment = read_deployment(checked, config_path)
    try:
        protections = _prepare(config, is_dev=dev)
    except (ProtectionMissing, UnsafeKeyFile, OSError) as error:
        raise ConfigurationError((str(error),)) from None
    return Supervisor(deployment, protections, is_dev=dev).run()
