"""A real gateway for tests: `veklom serve --dev` as a subprocess, and a caller's way in."""

import http.client
import itertools
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

ALLOW_ALL = """\
rules:
  - id: allow-all
    effect: allow
    match: {tenant: "*"}
"""


# Each process begins elsewhere, so that two that test at once do not follow each other.
_FIRST_PORT = 10_000 + os.getpid() * 101 % 20_000
_PORTS: Iterator[int] = itertools.cycle([*range(_FIRST_PORT, 30_000), *range(10_000, _FIRST_PORT)])
"""Below those that Linux gives to outgoing connections: none of them comes in between."""


def free_port() -> int:
    """Return a loopback port that nobody listens on, and never the same one soon again."""
    for port in _PORTS:
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("every port is taken")


def wait_for_port(port: int) -> None:
    """Return when somebody listens on a loopback port."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)  # polling a process that is starting, not synchronising a test
        else:
            return
    raise AssertionError(f"nobody listens on port {port}")


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""  # it ended meanwhile


@dataclass
class Gateway:
    """One gateway on loopback with its own folder; ends with the `with` block."""

    folder: Path
    providers: Mapping[str, Mapping[str, Any]]
    policy: str = ALLOW_ALL
    extra: Mapping[str, Any] = field(default_factory=dict)
    extra_from: Callable[["Gateway"], Mapping[str, Any]] = field(default=lambda _: {})
    workers: int = 1
    verifies_log: bool = True
    program: tuple[str, ...] = ("-m", "gateway")
    environment: Mapping[str, str] = field(default_factory=dict)
    tls: Mapping[str, ssl.SSLContext] = field(default_factory=dict)
    """How to speak to the listeners that were given a certificate."""

    def __enter__(self) -> Self:
        """Start and wait until it is ready."""
        self.proxy, self.sessions, self.admin = (free_port() for _ in range(3))
        (self.folder / "policies").mkdir(parents=True)
        (self.folder / "policies" / "test.yaml").write_text(self.policy)
        config = {
            "name": "test",
            "state_dir": str(self.folder / "state"),
            "workers": self.workers,
            "listeners": {
                "proxy": {"address": f"127.0.0.1:{self.proxy}"},
                "sessions": {"address": f"127.0.0.1:{self.sessions}"},
                "admin": {"address": f"127.0.0.1:{self.admin}"},
            },
            "providers": self.providers,
            "policies": {"path": str(self.folder / "policies")},
            "audit": {"directory": str(self.folder / "audit")},
            **self.extra,
            **self.extra_from(self),
        }
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML 1.2
        self.log = self.folder / "gateway.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.program, "serve", "--dev", "--config", str(path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
            )
        self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        """Return when the gateway says that it is ready; fail if it ends or does not."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                with self._open("admin", "/readyz", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.02)  # polling a process that is starting, not synchronising a test
        raise AssertionError(f"the gateway did not start:\n{self.log.read_text()}")

    def __exit__(self, *_: object) -> None:
        """Stop in good order; then the log must verify, whatever the test did."""
        self.stop()
        assert '"dropped"' not in self.log.read_text(), "a log line had a key that is not allowed"
        if self.verifies_log:
            self.verify_log()

    def stop(self) -> int:
        """End the gateway as an operator would; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def verify_log(self) -> None:
        """Fail unless `veklom audit verify` accepts everything that was written."""
        command = [sys.executable, "-m", "gateway", "audit", "verify", str(self.folder / "audit")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """Return the audit events of every process, optionally of one type."""
        lines = []
        for segment in sorted((self.folder / "audit").rglob("*.jsonl")):
            if segment.parent.name == "seg":
                lines += [json.loads(line) for line in segment.read_text().splitlines()]
        return [line for line in lines if not kind or line["type"] == kind]

    # --- a caller's way in ---

    def _open(
        self, listener: str, path: str, timeout: float, *asked: Any
    ) -> "http.client.HTTPResponse":
        context = self.tls.get(listener)
        scheme = "https" if context else "http"
        url = f"{scheme}://127.0.0.1:{getattr(self, listener)}{path}"
        request = urllib.request.Request(url, *asked)
        response: http.client.HTTPResponse = urllib.request.urlopen(
            request, timeout=timeout, context=context
        )
        return response

    def post(
        self, path: str, body: object, token: str = "", headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """POST JSON to the sessions listener."""
        fields = {"content-type": "application/json", **(headers or {})}
        if token:
            fields["authorization"] = f"Bearer {token}"
        with self._open("sessions", path, 30, json.dumps(body).encode(), fields) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def identity(self, subject: str = "alice", tenant: str = "acme", **claims: Any) -> str:
        """Return a token of the development issuer."""
        return str(
            self.post("/dev/token", {"subject": subject, "tenant": tenant, **claims})["token"]
        )

    def open_session(self, keys: Mapping[str, str], **who: Any) -> dict[str, Any]:
        """Open a session as a development identity; return the 201's body."""
        return self.post("/v1/sessions", {"keys": dict(keys)}, self.identity(**who))

    def url(self, provider: str) -> str:
        """Return the base URL an application would set."""
        return f"http://127.0.0.1:{self.proxy}/{provider}"

    def metrics(self) -> str:
        """Return the Prometheus page."""
        with self._open("admin", "/metrics", 10) as page:
            return page.read().decode()

    def children(self) -> list[int]:
        """Return the process ids of control and workers."""
        tasks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in tasks.split()]

    def pids(self, role: str) -> list[int]:
        """Return the process ids of `control` or of the workers, oldest first."""
        module = f"gateway.{role}".encode()
        return [pid for pid in self.children() if module in _command_line(pid)]

    def reload(self) -> None:
        """Tell the gateway to read its configuration and policies again."""
        self.process.send_signal(signal.SIGHUP)

    def wait_for_log(self, event: str, count: int = 1) -> None:
        """Return when the operational log holds an event so many times."""
        deadline = time.monotonic() + 30
        while self.log.read_text().count(f'"{event}"') < count:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)  # polling a file that another process writes

    def kill(self) -> None:
        """End everything at once, as a power cut would."""
        for pid in [*self.children(), self.process.pid]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
