"""The Merkle tree of RFC 6962 section 2.1, kept as its frontier: append a leaf, ask for the root.

No I/O.
"""

import hashlib

EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """Return SHA-256(0x00 ‖ data)."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return SHA-256(0x01 ‖ left ‖ right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """The roots of the complete subtrees of a tree of `size` leaves, largest first."""

    __slots__ = ("_roots", "size")

    def __init__(self) -> None:
        self.size = 0
        self._roots: list[bytes] = []

    def append(self, data: bytes) -> None:
        """Add one leaf."""
        self._roots.append(leaf_hash(data))
        # Each trailing one bit of the old size is a pair of equal subtrees that now joins.
        size = self.size
        while size & 1:
            right = self._roots.pop()
            self._roots[-1] = node_hash(self._roots[-1], right)
            size >>= 1
        self.size += 1

    def root(self) -> bytes:
        """Return the root hash of the tree as it is."""
        if not self._roots:
            return EMPTY_ROOT
        root = self._roots[-1]
        for left in reversed(self._roots[:-1]):
            root = node_hash(left, root)
        return root
