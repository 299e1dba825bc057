"""Looking for keys in another process's memory, in every form that a text takes there.

The planted keys alternate digits with letters that no hexadecimal number has. Such runs hardly occur
in a process by themselves, so one regular expression finds the candidates at the speed of C, and
only those are compared. Needs the right to trace (root in CI): no hardened process is readable
to its own user.
"""

import base64
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

WINDOW = 16
"""A fragment this long counts as found: 8 digits and 8 letters are 2^60 guesses less to make."""

_PAGE = 4096
_DIGITS, _LETTERS = "0123456789", "ghijkmnopqrstuvwxyz"
_PAIRS = re.compile(rb"(?:[0-9][g-z]){7,}")
_PAIRS_UTF16 = re.compile(rb"(?:[0-9]\0[g-z]\0){7,}")
_PAIRS_UTF32 = re.compile(rb"(?:[0-9]\0{3}[g-z]\0{3}){7,}")
# Three bytes make four characters: digit, letter, digit; then letter, digit, letter.
_ODD = rb"[MNO][GHWXmn23][AEIMQUYcgkosw048][w-z0-5]"
_EVEN = rb"[Zabcde][DTjz][BFJNRVZdhlptx159][n-z0-6]"
_RUN_BASE64 = re.compile(rb"(?:%b)?(?:%b%b){2,}(?:%b)?" % (_EVEN, _ODD, _EVEN, _ODD))


def planted_key() -> str:
    """Return a random key that the scanner knows when it sees any part of it."""
    pairs = (secrets.choice(_DIGITS) + secrets.choice(_LETTERS) for _ in range(48))
    return "sk-" + "".join(pairs)


class Scanner:
    """Knows every fragment of some keys."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._windows = {
            key[at : at + WINDOW].encode()
            for key in keys
            for at in range(len("sk-"), len(key) - WINDOW + 1)
        }

    def find(self, memory: bytes) -> set[bytes]:
        """Return the fragments that `memory` holds, plain, in UTF-16, UTF-32 or base64."""
        found = set()
        for pattern, step in ((_PAIRS, 1), (_PAIRS_UTF16, 2), (_PAIRS_UTF32, 4)):
            for run in pattern.finditer(memory):
                # A fragment may begin with a letter and end with a digit.
                start = max(run.start() - step, run.start() % step)
                found |= self._known(memory[start : run.end() + step : step])
        for run in _RUN_BASE64.finditer(memory):
            found |= self._known(base64.b64decode(run[0][: len(run[0]) & ~3]))
        return found

    def _known(self, text: bytes) -> set[bytes]:
        windows = {text[at : at + WINDOW] for at in range(len(text) - WINDOW + 1)}
        return windows & self._windows


def scan(pid: int, scanner: Scanner) -> tuple[dict[bytes, str], list[str]]:
    """Return the fragments in a process's memory, each with where it lies, and what is unreadable.

    Pages that the process cannot write are left out: they are files of programs.
    """
    found: dict[bytes, str] = {}
    hidden = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            where, rights, _, _, _, *name = line.split(maxsplit=5)
            if "w" not in rights:
                continue
            start, end = (int(part, 16) for part in where.split("-"))
            try:
                held = _read(memory.fileno(), start, end - start)
            except OSError:
                hidden.append(name[0] if name else "anonymous")
            else:
                found |= dict.fromkeys(scanner.find(held), line)
    return found, hidden


def _read(fd: int, start: int, size: int) -> bytes:
    """Return the pages of a mapping that hold anything."""
    pieces = []
    for at in range(start, start + size, _PAGE):
        piece = os.pread(fd, min(_PAGE, start + size - at), at)
        if piece.count(0) < len(piece):
            pieces.append(piece)
    return b"".join(pieces)
