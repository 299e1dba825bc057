"""The files of one audit log, as whoever reads it sees them: lines, notes, and nodes of the tree.

Tiles are a convenience: what is missing of them, and the partial ones, is made from the lines.
"""

import base64
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from gateway.audit.tiles import WIDTH, tile_path
from gateway.audit.tree import leaf_hash, node_hash

REDACTED = b'{"redacted":"'
"""How the line of an erased event begins; its hash follows, in base64."""


class Damaged(Exception):
    """A log whose files do not fit together; the message says where."""

    code = "log_damaged"


class LogFiles:
    """One log's folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.node = lru_cache(maxsize=4096)(self._node)
        self._leaf_tile = lru_cache(maxsize=64)(self._read_leaves)
        self._tile = lru_cache(maxsize=64)(self._read_tile)

    def read(self, name: str) -> bytes | None:
        """Return a file of the log, None where it is missing."""
        try:
            return (self.directory / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def notes(self) -> list[str]:
        """Return every note of a growth, oldest first; a torn last one is left out."""
        whole, _, _ = (self.read("checkpoints.jsonl") or b"").rpartition(b"\n")
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            raise Damaged("checkpoints.jsonl is not a list of notes") from None

    def segments(self) -> list[tuple[int, Path]]:
        """Return the first index and the path of every segment, in order."""
        found = sorted((self.directory / "seg").glob("*.jsonl"))
        return [(int(path.stem), path) for path in found if path.stem.isdigit()]

    def lines(self, begin: int = 0) -> Iterator[tuple[int, bytes]]:
        """Return index and line of every whole event from `begin` on, without line feeds."""
        segments = self.segments()
        for position, (first, path) in enumerate(segments):
            if position + 1 < len(segments) and segments[position + 1][0] <= begin:
                continue
            with path.open("rb") as file:
                for index, line in enumerate(file, first):
                    if index >= begin and line.endswith(b"\n"):
                        yield index, line[:-1]

    # --- the tree ---

    def _node(self, level: int, index: int) -> bytes:
        row, height = divmod(level, 8)
        hashes = self._tile(row, index << height >> 8)
        begin = index << height & WIDTH - 1
        if hashes is None or len(hashes) < begin + (1 << height):
            if level == 0:
                return self._leaf_tile(index >> 8)[index & WIDTH - 1]
            return node_hash(self.node(level - 1, 2 * index), self.node(level - 1, 2 * index + 1))
        nodes = hashes[begin : begin + (1 << height)]
        while len(nodes) > 1:
            nodes = [node_hash(*nodes[at : at + 2]) for at in range(0, len(nodes), 2)]
        return nodes[0]

    def _read_tile(self, row: int, index: int) -> list[bytes] | None:
        data = self.read(tile_path(row, index))
        if data is None or len(data) != WIDTH * 32:
            return None
        return [data[at : at + 32] for at in range(0, len(data), 32)]

    def _read_leaves(self, tile: int) -> list[bytes]:
        leaves = []
        for index, line in self.lines(tile * WIDTH):
            if index >= (tile + 1) * WIDTH:
                break
            leaves.append(line_hash(line))
        return leaves


def line_hash(line: bytes) -> bytes:
    """Return the leaf hash of a line, also of one that was erased.

    Raises:
        Damaged: It says that it was erased, and does not say its hash.
    """
    return redacted_hash(line) if line.startswith(REDACTED) else leaf_hash(line)


def redacted_line(leaf: bytes) -> bytes:
    """Return what stands in place of an event that was erased."""
    return REDACTED + base64.b64encode(leaf) + b'"}'


def redacted_hash(line: bytes) -> bytes:
    """Return the hash that stands in place of an event.

    Raises:
        Damaged: There is none.
    """
    try:
        leaf = base64.b64decode(line.removeprefix(REDACTED).removesuffix(b'"}'), validate=True)
    except ValueError:
        leaf = b""
    if len(leaf) != 32 or redacted_line(leaf) != line:
        raise Damaged("a line says that it was erased, but not what its hash was")
    return leaf
