"""A real Redis for tests: `redis-server` on a loopback port, without a disk unless it is asked for."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import trustme

from tests.simulators.gateway import free_port, wait_for_port

MEMORY_ONLY = {"save": "", "appendonly": "no"}


@dataclass
class RedisServer:
    """One Redis; ends with the `with` block. With `tls` it speaks nothing else."""

    folder: Path
    settings: Mapping[str, str] = field(default_factory=lambda: MEMORY_ONLY)
    tls: trustme.CA | None = None

    def __enter__(self) -> Self:
        """Start, and return when it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.start()
        return self

    def start(self) -> None:
        """Start it, with an empty memory."""
        settings = {"bind": "127.0.0.1", "port": str(self.port), "dir": str(self.folder)}
        settings |= self.settings
        if self.tls is not None:
            certificate = self.tls.issue_cert("127.0.0.1")
            certificate.private_key_and_cert_chain_pem.write_to_path(self.folder / "redis.pem")
            self.tls.cert_pem.write_to_path(self.folder / "ca.pem")
            settings |= {
                "port": "0",
                "tls-port": str(self.port),
                "tls-cert-file": str(self.folder / "redis.pem"),
                "tls-key-file": str(self.folder / "redis.pem"),
                "tls-ca-cert-file": str(self.folder / "ca.pem"),
                "tls-auth-clients": "no",
            }
        arguments = [
            part for key, value in settings.items() for part in (f"--{key}", *value.split(" "))
        ]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["redis-server", *arguments], stdout=log, stderr=log, cwd=self.folder
            )
        wait_for_port(self.port)

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.kill()

    def kill(self) -> None:
        """End it at once: whatever it held is gone."""
        self.process.kill()
        self.process.wait(10)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let it answer nobody, and forget nothing, for as long as the block runs."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    def ask(self, *words: str | bytes) -> Any:
        """Return the answer to one command, asked in plain."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as sock:
            parts = [word.encode() if isinstance(word, str) else word for word in words]
            sock.sendall(
                b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)
            )
            with sock.makefile("rb") as stream:
                return _answer(stream)

    @property
    def url(self) -> str:
        """Where it is, as a gateway is told."""
        return f"{'redis' if self.tls is None else 'rediss'}://127.0.0.1:{self.port}"


def _answer(stream: Any) -> Any:
    line = stream.readline().rstrip(b"\r\n")
    kind, rest = line[:1], line[1:]
    if kind == b"$":
        return None if rest == b"-1" else stream.read(int(rest) + 2)[:-2]
    if kind == b"*":
        return None if rest == b"-1" else [_answer(stream) for _ in range(int(rest))]
    if kind == b"-":
        raise AssertionError(rest.decode())
    return int(rest) if kind == b":" else rest
