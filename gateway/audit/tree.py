"""The Merkle tree of RFC 6962 section 2.1: its frontier, and proofs about it. No I/O.

A node is named as in C2SP tlog-tiles: the node `index` of `level` is the root of the complete subtree
over the leaves from `index` · 2^level on, 2^level of them. Proofs are asked of a function that knows
such nodes (`Nodes`), and verified without one.
"""

import hashlib
from collections.abc import Callable, Sequence

EMPTY_ROOT = hashlib.sha256(b"").digest()

Nodes = Callable[[int, int], bytes]
"""Returns the hash of the node at `(level, index)`."""

Joined = Callable[[int, bytes], None]
"""Hears of each complete subtree of 256, 65,536, ... leaves: its level and its root."""

_sha256 = hashlib.sha256


class ProofRefused(Exception):
    """A proof does not show what it claims."""

    code = "proof_refused"


def leaf_hash(data: bytes) -> bytes:
    """Return SHA-256(0x00 ‖ data)."""
    return _sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return SHA-256(0x01 ‖ left ‖ right)."""
    return _sha256(b"\x01" + left + right).digest()


class Frontier:
    """The roots of the complete subtrees of a tree of `size` leaves, largest first."""

    __slots__ = ("_joined", "roots", "size")

    def __init__(
        self, size: int = 0, roots: Sequence[bytes] = (), *, joined: Joined | None = None
    ) -> None:
        """Begin with a tree of `size` leaves and these roots.

        Raises:
            ValueError: So many roots do not make a tree of this size.
        """
        if size.bit_count() != len(roots):
            raise ValueError("a frontier has a root for each bit of its size")
        self.size = size
        self.roots = list(roots)
        self._joined = joined

    @classmethod
    def at(cls, size: int, nodes: Nodes, *, joined: Joined | None = None) -> "Frontier":
        """Return the frontier of the first `size` leaves."""
        levels = [level for level in reversed(range(size.bit_length())) if size >> level & 1]
        return cls(size, [nodes(level, (size >> level) - 1) for level in levels], joined=joined)

    def append(self, data: bytes) -> None:
        """Add one leaf."""
        self.append_hash(_sha256(b"\x00" + data).digest())

    def append_hash(self, node: bytes) -> None:
        """Add the leaf that has this hash."""
        # Each trailing one bit of the old size is a pair of equal subtrees that now joins.
        size, level = self.size, 0
        while size & 1:
            node = _sha256(b"\x01" + self.roots.pop() + node).digest()
            size >>= 1
            level += 1
            if level & 7 == 0 and self._joined is not None:
                self._joined(level, node)
        self.roots.append(node)
        self.size += 1

    def root(self) -> bytes:
        """Return the root hash of the tree as it is."""
        if not self.roots:
            return EMPTY_ROOT
        root = self.roots[-1]
        for left in reversed(self.roots[:-1]):
            root = node_hash(left, root)
        return root


def _half(width: int) -> int:
    """Return the largest power of two below `width`."""
    half = 1 << (width - 1).bit_length() - 1
    return half if half < width else half >> 1


def _range_root(nodes: Nodes, begin: int, end: int) -> bytes:
    width = end - begin
    if width & (width - 1) == 0:
        level = width.bit_length() - 1
        return nodes(level, begin >> level)
    middle = begin + _half(width)
    return node_hash(_range_root(nodes, begin, middle), _range_root(nodes, middle, end))


def inclusion_proof(index: int, size: int, nodes: Nodes) -> list[bytes]:
    """Return the hashes from the leaf `index` to the root of `size` leaves (RFC 6962 2.1.1)."""
    proof: list[bytes] = []
    begin, end = 0, size
    while end - begin > 1:
        middle = begin + _half(end - begin)
        if index < middle:
            proof.append(_range_root(nodes, middle, end))
            end = middle
        else:
            proof.append(_range_root(nodes, begin, middle))
            begin = middle
    return proof[::-1]


def consistency_proof(old: int, size: int, nodes: Nodes) -> list[bytes]:
    """Return the hashes that lead from the root of `old` leaves to that of `size` (RFC 6962 2.1.2)."""
    if old in {0, size}:
        return []
    proof: list[bytes] = []
    begin, end = 0, size
    while old != end:
        middle = begin + _half(end - begin)
        if old <= middle:
            proof.append(_range_root(nodes, middle, end))
            end = middle
        else:
            proof.append(_range_root(nodes, begin, middle))
            begin = middle
    if begin:
        proof.append(_range_root(nodes, begin, end))
    return proof[::-1]


def verify_inclusion(
    leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes
) -> None:
    """Return if the leaf hash is at `index` below `root` (RFC 9162 2.1.3.2).

    Raises:
        ProofRefused: The proof does not show it.
    """
    if not 0 <= index < size:
        raise ProofRefused("no such index in a tree of this size")
    number, last, node = index, size - 1, leaf
    for other in proof:
        if not last:
            raise ProofRefused("the proof is too long")
        if number & 1 or number == last:
            node = node_hash(other, node)
            while number and not number & 1:
                number >>= 1
                last >>= 1
        else:
            node = node_hash(node, other)
        number >>= 1
        last >>= 1
    if last or node != root:
        raise ProofRefused("the proof does not lead to the root")


def verify_consistency(
    old: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]
) -> None:
    """Return if the tree of `size` leaves begins with the one of `old` (RFC 9162 2.1.4.2).

    Raises:
        ProofRefused: The proof does not show it.
    """
    if not 0 <= old <= size:
        raise ProofRefused("a tree does not shrink")
    if old in {0, size}:
        if proof or (old == size and old_root != root) or (not old and old_root != EMPTY_ROOT):
            raise ProofRefused("the roots of equal trees differ")
        return
    path = list(proof) if old & (old - 1) else [old_root, *proof]
    if not path:
        raise ProofRefused("the proof is too short")
    number, last = old - 1, size - 1
    while number & 1:
        number >>= 1
        last >>= 1
    first = second = path[0]
    for other in path[1:]:
        if not last:
            raise ProofRefused("the proof is too long")
        if number & 1 or number == last:
            first, second = node_hash(other, first), node_hash(other, second)
            while number and not number & 1:
                number >>= 1
                last >>= 1
        else:
            second = node_hash(second, other)
        number >>= 1
        last >>= 1
    if last or first != old_root or second != root:
        raise ProofRefused("the proof does not lead from the one root to the other")
