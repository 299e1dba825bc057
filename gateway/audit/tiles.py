"""The layout of C2SP tlog-tiles: where hashes and entries lie below a log's folder. No I/O.

A tile holds 256 hashes: those of level 0 are leaf hashes, each hash of level L + 1 is the root of a
whole tile of level L. A bundle holds the 256 entries whose hashes are in the level-0 tile beside it.
"""

from collections.abc import Iterable
from typing import Final

WIDTH: Final = 256


def tile_path(level: int | str, index: int, width: int = WIDTH) -> str:
    """Return the path of a tile, or with the level `entries` of a bundle; a narrow one is partial."""
    groups = [f"{index % 1000:03}"]
    while index := index // 1000:
        groups.insert(0, f"x{index % 1000:03}")
    suffix = "" if width == WIDTH else f".p/{width}"
    return f"tile/{level}/{'/'.join(groups)}{suffix}"


def tiles_of(size: int) -> Iterable[tuple[int, int, int]]:
    """Return level, index and width of every tile of a tree, the partial ones included."""
    level = 0
    while size:
        whole, rest = divmod(size, WIDTH)
        for index in range(whole):
            yield level, index, WIDTH
        if rest:
            yield level, whole, rest
        size, level = whole, level + 1


def bundle(entries: Iterable[bytes]) -> bytes:
    """Return a bundle of entries: each behind its length in two bytes."""
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)
