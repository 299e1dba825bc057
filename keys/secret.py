"""A secret that can be used but not shown: it never prints, compares, copies, pickles or formats.

Python cannot promise that no copy was ever made; this type keeps the ordinary ways of making one
shut, and `wipe` overwrites the one it holds. No I/O.
"""

from types import TracebackType
from typing import NoReturn, Self, SupportsIndex


class Secret:
    """Bytes in a buffer of their own, wiped on `wipe` or at the end of a `with`."""

    __slots__ = ("_buffer",)

    def __init__(self, value: bytes | bytearray | memoryview) -> None:
        self._buffer = bytearray(value)

    def reveal(self) -> memoryview:
        """Return a view of the bytes themselves; it shows zeros once the secret is wiped."""
        return memoryview(self._buffer)

    def wipe(self) -> None:
        """Overwrite the bytes."""
        self._buffer[:] = bytes(len(self._buffer))

    def __len__(self) -> int:
        """Return how long the secret is."""
        return len(self._buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _tb: TracebackType | None,
    ) -> None:
        self.wipe()

    def __repr__(self) -> str:
        """Return a fixed text: not even the length is anyone's business."""
        return "Secret(…)"

    __str__ = __repr__

    def __format__(self, _spec: str) -> str:
        return "Secret(…)"

    def __eq__(self, _other: object) -> NoReturn:
        raise _refusal()

    def __hash__(self) -> NoReturn:
        raise _refusal()

    def __reduce__(self) -> NoReturn:
        raise _refusal()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise _refusal()

    def __copy__(self) -> NoReturn:
        raise _refusal()

    def __deepcopy__(self, _memo: object) -> NoReturn:
        raise _refusal()

    def __iter__(self) -> NoReturn:
        raise _refusal()

    def __bytes__(self) -> NoReturn:
        raise _refusal()


def _refusal() -> TypeError:
    return TypeError("a secret cannot be compared, copied, hashed, pickled or iterated")
