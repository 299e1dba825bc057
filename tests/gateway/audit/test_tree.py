"""The Merkle tree against the vectors of Certificate Transparency and a naive reading of RFC 6962."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.audit.tree import (
    EMPTY_ROOT,
    Frontier,
    Nodes,
    ProofRefused,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)

# The leaves and roots of certificate-transparency's merkle_tree_test.
LEAVES = [
    bytes.fromhex(leaf)
    for leaf in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def naive_root(leaves: list[bytes]) -> bytes:
    """RFC 6962 2.1, as it is written."""
    if not leaves:
        return EMPTY_ROOT
    if len(leaves) == 1:
        return leaf_hash(leaves[0])
    half = 1
    while half * 2 < len(leaves):
        half *= 2
    return node_hash(naive_root(leaves[:half]), naive_root(leaves[half:]))


def test_the_published_roots() -> None:
    """Each prefix of the published leaves has the published root."""
    tree = Frontier()
    for size, (leaf, root) in enumerate(zip(LEAVES, ROOTS, strict=True), 1):
        tree.append(leaf)
        assert (tree.size, tree.root().hex()) == (size, root)


def test_the_empty_tree() -> None:
    """A tree of nothing has the hash of nothing."""
    assert Frontier().root() == EMPTY_ROOT


@given(st.lists(st.binary(max_size=8), max_size=70))
def test_agrees_with_the_recursive_definition(leaves: list[bytes]) -> None:
    """The frontier's root is the recursive one after every leaf."""
    tree = Frontier()
    for leaf in leaves:
        tree.append(leaf)
    assert tree.root() == naive_root(leaves)


def nodes_of(leaves: list[bytes]) -> Nodes:
    """Return a function that knows every node, by definition."""
    return lambda level, index: naive_root(leaves[index << level : (index + 1) << level])


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=40), st.data())
def test_a_leaf_is_proved_at_its_index_and_nowhere_else(
    leaves: list[bytes], data: st.DataObject
) -> None:
    """An inclusion proof leads from its leaf to the root, and from no other leaf, index or size."""
    index = data.draw(st.integers(0, len(leaves) - 1))
    root, leaf, size = naive_root(leaves), leaf_hash(leaves[index]), len(leaves)
    proof = inclusion_proof(index, size, nodes_of(leaves))
    verify_inclusion(leaf, index, size, proof, root)
    for bad_leaf, bad_index, bad_size, bad_proof in (
        (leaf_hash(leaves[index] + b"!"), index, size, proof),
        (leaf, size, size, proof),
        (leaf, -1, size, proof),
        (leaf, index, size, [*proof, root]),
        (leaf, index, size * 2 + 1, proof),
        *(
            (leaf, index, size, [*proof[:at], bytes(32), *proof[at + 1 :]])
            for at in range(len(proof))
        ),
        *((leaf, index, size, proof[:at]) for at in range(len(proof))),
    ):
        with pytest.raises(ProofRefused):
            verify_inclusion(bad_leaf, bad_index, bad_size, bad_proof, root)


@given(st.lists(st.binary(max_size=4), max_size=40), st.data())
def test_a_tree_is_proved_to_begin_with_an_older_one(
    leaves: list[bytes], data: st.DataObject
) -> None:
    """A consistency proof leads between the two roots; any other hash in it or behind it is refused."""
    old, size = data.draw(st.integers(0, len(leaves))), len(leaves)
    before, after = naive_root(leaves[:old]), naive_root(leaves)
    proof = consistency_proof(old, size, nodes_of(leaves))
    verify_consistency(old, before, size, after, proof)
    for bad_before, bad_proof in (
        (bytes(32), proof),
        (before, [*proof, after]),
        *((before, [*proof[:at], bytes(32), *proof[at + 1 :]]) for at in range(len(proof))),
        *((before, proof[:at]) for at in range(len(proof))),
    ):
        with pytest.raises(ProofRefused):
            verify_consistency(old, bad_before, size, after, bad_proof)
    with pytest.raises(ProofRefused):
        verify_consistency(size + 1, after, size, after, [])


@given(st.lists(st.binary(max_size=4), max_size=40), st.data())
def test_a_frontier_can_begin_anywhere(leaves: list[bytes], data: st.DataObject) -> None:
    """A frontier made from nodes goes on as the one that saw every leaf."""
    at = data.draw(st.integers(0, len(leaves)))
    tree = Frontier.at(at, nodes_of(leaves))
    for leaf in leaves[at:]:
        tree.append(leaf)
    assert tree.root() == naive_root(leaves)
    with pytest.raises(ValueError, match="root for each bit"):
        Frontier(at + 1, tree.roots[:0])
