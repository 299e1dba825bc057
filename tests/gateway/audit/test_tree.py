"""The Merkle tree against the vectors of Certificate Transparency and a naive reading of RFC 6962."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.audit.tree import EMPTY_ROOT, Frontier, leaf_hash, node_hash

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
