"""Changing a JSON body where something has to change, and no byte elsewhere.

An edit knows where each field of an object, or item of a list, stands, and puts bytes in or takes
them out there. What is not edited keeps its spaces, its order, its spelling of numbers and escapes.

No I/O.
"""

from collections.abc import Sequence

from gateway.providers.bodies import JsonObject
from gateway.providers.dialect import to_json

_BETWEEN = b" \t\n\r,"


class ObjectEdit:
    """Changes to one JSON object; `result` is the object with them made."""

    def __init__(self, fields: JsonObject) -> None:
        self._fields = fields
        self._put: dict[str, bytes] = {}
        self._removed: set[str] = set()

    def put(self, name: str, value: bytes) -> None:
        """Let the field `name` have this value, which is JSON; a new field comes first."""
        self._put[name] = value

    def remove(self, name: str) -> None:
        """Take the field out, if it is there."""
        if name in self._fields:
            self._removed.add(name)

    def result(self) -> bytes:
        """Return the object as it is then."""
        if not self._put and not self._removed:
            return self._fields.data
        data, spans = self._fields.data, self._fields.spans()
        pieces = [
            None
            if name in self._removed
            else data[begin:start] + self._put.get(name, data[start:end])
            for name, (begin, start, end) in spans.items()
        ]
        kept = _keep(data, [(begin, end) for begin, _, end in spans.values()], pieces)
        fresh = [to_json(name) + b":" + self._put[name] for name in self._put if name not in spans]
        if not fresh:
            return kept
        opening = kept.index(b"{") + 1
        comma = b"," if any(piece is not None for piece in pieces) else b""
        return kept[:opening] + b",".join(fresh) + comma + kept[opening:]


def keep_items(data: bytes, items: Sequence[bytes], kept: Sequence[bool]) -> bytes:
    """Return the JSON list `data`, which holds `items`, with only those that are kept."""
    spans: list[tuple[int, int]] = []
    position = data.index(b"[") + 1
    for item in items:
        while data[position] in _BETWEEN:
            position += 1
        spans.append((position, position + len(item)))
        position += len(item)
    pieces = [item if keep else None for item, keep in zip(items, kept, strict=True)]
    return _keep(data, spans, pieces)


def put_first(data: bytes, item: bytes) -> bytes:
    """Return the JSON list `data` with an item put before the others."""
    opening = data.index(b"[") + 1
    is_empty = data[opening:].lstrip(_BETWEEN).startswith(b"]")
    return data[:opening] + item + (b"" if is_empty else b",") + data[opening:]


def _keep(data: bytes, spans: Sequence[tuple[int, int]], pieces: Sequence[bytes | None]) -> bytes:
    """Return `data` with pieces at their spans, and without those spans that have none.

    Each piece but the first keeps what separates it from what stood before it.
    """
    if not spans:
        return data
    parts = [data[: spans[0][0]]]
    for number, piece in enumerate(pieces):
        if piece is not None:
            if len(parts) > 1:
                parts.append(data[spans[number - 1][1] : spans[number][0]])
            parts.append(piece)
    parts.append(data[spans[-1][1] :])
    return b"".join(parts)
