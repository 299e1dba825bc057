"""Reading the governed facts out of a JSON body, in one way only.

A body that two readers could understand differently is refused: a governed key twice (one reader
takes the first, another the last), or spelt in another case (Go's decoder does not mind), or as an
escape. Everything that no rule reads stays undecoded. No I/O.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from gateway.errors import Refused

MAX_NAME: Final = 256
"""Longer model or tool names are refused: they are written to the audit log."""

MAX_TOOLS: Final = 1024

_ESCAPED_LETTER = re.compile(rb"\\u00[4-7][0-9a-fA-F]")
_top = msgspec.json.Decoder(dict[str, msgspec.Raw])


def invalid(message: str) -> Refused:
    """Return the refusal of a body."""
    return Refused("invalid_body", message)


class Governed:
    """The keys that rules depend on, in every form that reading needs."""

    __slots__ = ("exact", "folded", "quoted")

    def __init__(self, *keys: str) -> None:
        self.exact = frozenset(keys)
        self.folded = frozenset(key.lower() for key in keys)
        self.quoted = tuple(b'"%b"' % key.encode() for key in keys)


class Body:
    """The top-level fields of a JSON object, decoded one by one when asked for."""

    def __init__(self, body: bytes, governed: Governed) -> None:
        """Read the object.

        Raises:
            Refused: It is none, or a governed key can be read in two ways.
        """
        try:
            self._fields = _top.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise invalid("The body is not a JSON object.") from None
        for key in self._fields:
            if key not in governed.exact and key.lower() in governed.folded:
                raise invalid(f"The field {key.lower()!r} is spelt in another case.")
        if any(body.count(quoted) > 1 for quoted in governed.quoted) or (
            _ESCAPED_LETTER.search(body) is not None
        ):
            _refuse_duplicates(body, governed)

    def __contains__(self, key: str) -> bool:
        """Return whether the field is there."""
        return key in self._fields

    def _get(self, key: str, kind: Any) -> Any:
        raw = self._fields.get(key)
        if raw is None:
            return None
        try:
            return msgspec.json.decode(raw, type=kind | None)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise invalid(f"The field {key!r} has another type than the API's.") from None

    def text(self, key: str) -> str:
        """Return a text, "" where it is absent or null."""
        value = self._get(key, str) or ""
        if len(value) > MAX_NAME:
            raise invalid(f"The field {key!r} is too long.")
        return str(value)

    def flag(self, key: str) -> bool:
        """Return a boolean, false where it is absent or null."""
        return bool(self._get(key, bool))

    def whole(self, *keys: str) -> int:
        """Return the largest of the whole numbers under `keys`, -1 where all are absent."""
        values = [self._get(key, int) for key in keys]
        return max((value for value in values if value is not None), default=-1)

    def items(self, key: str) -> list[dict[str, Any]]:
        """Return the objects of a list, none where it is absent or null."""
        value = self._get(key, list[dict[str, Any]]) or []
        if len(value) > MAX_TOOLS:
            raise invalid(f"The field {key!r} has too many items.")
        return list(value)

    def inner(self, key: str) -> dict[str, Any]:
        """Return the object at `key`, an empty one where it is absent or null."""
        return self._get(key, dict[str, Any]) or {}


def names(values: Iterable[object]) -> tuple[str, ...]:
    """Return the texts among `values`; too long ones are refused."""
    found = tuple(value for value in values if isinstance(value, str))
    if any(len(value) > MAX_NAME for value in found):
        raise invalid("A tool's name is too long.")
    return found


def _refuse_duplicates(body: bytes, governed: Governed) -> None:
    def check(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            folded = key.lower()
            if folded in governed.folded and folded in seen:
                raise invalid(f"The field {folded!r} stands twice in one object.")
            seen.add(folded)

    try:
        json.loads(body, object_pairs_hook=check)
    except (ValueError, RecursionError):
        raise invalid("The body is not a JSON object.") from None
