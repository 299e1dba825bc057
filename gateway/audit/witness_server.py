"""`veklom audit witness serve`: a witness for somebody else's logs. One key, one small state file.

Laws of this file:
- what was seen is on the disk before it is cosigned: after a crash nothing smaller is cosigned;
- a second server with the same state refuses to start (flock).
"""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from aiohttp import web

from gateway.audit.checkpoint import Checkpoint
from gateway.audit.witness import MAX_REQUEST_BYTES, Witness
from gateway.clock import Clock
from keys.signing import Cosigner, Verifier


class _Seen(msgspec.Struct, frozen=True):
    size: int
    root: bytes


class WitnessServer:
    """A witness and its state file."""

    def __init__(
        self, cosigner: Cosigner, logs: Sequence[Verifier], state: Path, clock: Clock
    ) -> None:
        """Take up what was seen before.

        Raises:
            OSError: The state is in use, or cannot be read or written.
            ValueError: The state is not what a witness wrote.
        """
        self._state = state
        self._clock = clock
        state.parent.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(state.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen: dict[str, _Seen] = {}
        if state.exists():
            seen = msgspec.json.decode(state.read_bytes(), type=dict[str, _Seen])
        checkpoints = {
            origin: Checkpoint(origin, each.size, each.root) for origin, each in seen.items()
        }
        self._witness = Witness(cosigner, logs, checkpoints)

    def app(self) -> web.Application:
        """Return the application."""
        app = web.Application(client_max_size=MAX_REQUEST_BYTES)
        app.add_routes([web.post("/add-checkpoint", self.add_checkpoint)])
        return app

    async def add_checkpoint(self, request: web.Request) -> web.Response:
        """Cosign a checkpoint that grows out of what was seen."""
        body = await request.read()
        # Nothing is awaited from here on: checking and remembering are one step.
        answer = self._witness.add_checkpoint(body, int(self._clock.now()))
        if answer.seen is not None:
            self._witness.seen[answer.seen.origin] = answer.seen
            self._persist()
        return web.Response(
            status=answer.status, text=answer.body, content_type=answer.content_type
        )

    def _persist(self) -> None:
        seen = {origin: _Seen(each.size, each.root) for origin, each in self._witness.seen.items()}
        temporary = self._state.with_name(self._state.name + ".new")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(seen))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._state)
        os.fsync(self._folder)
