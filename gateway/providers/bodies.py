"""Reading the governed facts out of a JSON body, in one way only.

Laws of this file:
- a name that stands twice in an object is refused, whichever it is: one reader takes the first value,
  another the last;
- a governed name in another spelling is refused: Go's decoder, for one, folds case, and K and s with
  signs that only look like them;
- this holds on every level that a rule reads from, and only there: what no rule reads stays undecoded;
- the work grows with the bytes, most of it in C, and with the fields of the levels that are read,
  which are limited.

No I/O.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

import msgspec

from gateway.errors import Refused

MAX_NAME: Final = 256
"""Longer names of models, tools or fields are refused: the first two are written to the audit log."""

MAX_FIELDS: Final = 256
"""Of one object that is read; the largest API has about 60."""

MAX_TOOLS: Final = 1024

_FIELD = re.compile(rb'[ \t\n\r]*+("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\n\r]*+:[ \t\n\r]*+', re.DOTALL)
_COMMA = re.compile(rb"[ \t\n\r]*+,")
_CLOSE = re.compile(rb"[ \t\n\r]*+\}")
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list = msgspec.json.Decoder(list[msgspec.Raw] | None)
_text_of = msgspec.json.Decoder(str | None).decode
_flag_of = msgspec.json.Decoder(bool | None).decode
_whole_of = msgspec.json.Decoder(int | None).decode
_Value = TypeVar("_Value")
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def invalid(message: str) -> Refused:
    """Return the refusal of a body."""
    return Refused("invalid_body", message)


class Governed:
    """The names in one object that rules depend on, and some that are known to be no others.

    Names in `beside` are the usual neighbours: they need not be compared each time.
    """

    __slots__ = ("folded", "plain")

    def __init__(self, *names: str, beside: str = "") -> None:
        self.plain = frozenset(names) | frozenset(beside.split())
        self.folded = frozenset(name.casefold() for name in names)


Span = tuple[int, int, int]
"""Where a field's name begins, its value begins, and its value ends."""


class JsonObject:
    """One JSON object in which no name stands twice; its values are decoded when asked for."""

    __slots__ = ("_fields", "_spans", "_where", "data")

    def __init__(self, data: bytes, governed: Governed, where: str = "The body") -> None:
        """Read the object; `where` says in a refusal which one it is.

        Raises:
            Refused: It is none, or can be read in two ways.
        """
        if not data.isascii() and not _is_utf8(data):
            raise invalid(f"{where} is not UTF-8.")
        self.data = data
        self._where = where
        self._spans: dict[str, Span] | None = None
        try:
            self._fields = _object.decode(data)
        except _UNREADABLE:
            raise invalid(f"{where} is not a JSON object.") from None
        if len(self._fields) > MAX_FIELDS:
            raise invalid(f"{where} has too many fields.")
        unknown = self._fields.keys() - governed.plain
        if unknown:
            self._check_spelling(unknown, governed)
        if not _is_plain(data, self._fields):
            self._spans = self._walk()

    def __contains__(self, name: str) -> bool:
        """Return whether the field is there."""
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        """Return the fields' names."""
        return iter(self._fields)

    def spans(self) -> "dict[str, Span]":
        """Return where each field stands, in their order."""
        if self._spans is None:
            self._spans = self._walk()
        return self._spans

    def span(self, name: str) -> tuple[int, int]:
        """Return where the value of a field that is there begins and ends."""
        return self.spans()[name][1:]

    def raw(self, name: str) -> bytes:
        """Return the bytes of a value, none where it is absent or null."""
        raw = self._fields.get(name)
        return b"" if raw is None or (data := bytes(raw)) == b"null" else data

    def model(self, name: str = "model") -> str:
        """Return a model's name, "" where it is absent or null."""
        return checked_model(self.text(name))

    def text(self, name: str) -> str:
        """Return a text, "" where it is absent or null."""
        value = self._get(name, _text_of) or ""
        if len(value) > MAX_NAME:
            raise invalid(f"The field {name!r} is too long.")
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean, false where it is absent or null."""
        return bool(self._get(name, _flag_of))

    def whole(self, *names: str) -> int:
        """Return the largest of the whole numbers under `names`, -1 where all are absent."""
        values = [self._get(name, _whole_of) for name in names]
        return max((value for value in values if value is not None), default=-1)

    def inner(self, name: str, governed: Governed) -> "JsonObject | None":
        """Return the object at `name`, None where it is absent or null."""
        raw = self._fields.get(name)
        if raw is None or (data := bytes(raw)) == b"null":
            return None
        return JsonObject(data, governed, f"The field {name!r}")

    def items(self, name: str, governed: Governed, most: int = MAX_TOOLS) -> "list[JsonObject]":
        """Return the objects of a list, none where it is absent or null."""
        raw = self._fields.get(name)
        if raw is None:
            return []
        try:
            found = _list.decode(raw) or []
        except _UNREADABLE:
            raise self._mistyped(name) from None
        if len(found) > most:
            raise invalid(f"The field {name!r} has too many items.")
        where = f"An item of {name!r}"
        return [JsonObject(bytes(each), governed, where) for each in found]

    def _get(self, name: str, decode: Callable[[msgspec.Raw], _Value | None]) -> _Value | None:
        raw = self._fields.get(name)
        if raw is None:
            return None
        try:
            return decode(raw)
        except _UNREADABLE:
            raise self._mistyped(name) from None

    @staticmethod
    def _mistyped(name: str) -> Refused:
        return invalid(f"The field {name!r} has another type than the API's.")

    def _check_spelling(self, names: set[str], governed: Governed) -> None:
        for name in names:
            if len(name) > MAX_NAME:
                raise invalid(f"{self._where} has a field with too long a name.")
            if (folded := name.casefold()) in governed.folded:
                raise invalid(f"{self._where} has the field {folded!r} in another spelling.")

    def _walk(self) -> "dict[str, Span]":
        """Go through the object name by name, and return where each field stands.

        The decoder has found the bytes to be one JSON object, and keeps the last value of each
        name. So a name's value must stand behind it as it was decoded: where it does not, or where
        the name has been passed before, it stands twice. Values are compared and skipped, not read.
        """
        data, fields = self.data, self._fields
        spans: dict[str, Span] = {}
        position = data.index(b"{") + 1
        while (field := _FIELD.match(data, position)) is not None:
            name = _text(field[1])
            start = field.end()
            value = bytes(fields[name])
            if name in spans or not data.startswith(value, start):
                break
            position = start + len(value)
            spans[name] = field.start(1), start, position
            if (comma := _COMMA.match(data, position)) is None:
                break
            position = comma.end()
        if len(spans) != len(fields) or _CLOSE.match(data, position) is None:
            raise invalid(f"{self._where} has a field that stands twice.")
        return spans


def _is_utf8(data: bytes) -> bool:
    """Return whether any decoder reads these bytes as the same text (RFC 8259 8.1)."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _text(token: bytes) -> str:
    return str(json.loads(token)) if b"\\" in token else token[1:-1].decode()


def _is_plain(data: bytes, fields: dict[str, msgspec.Raw]) -> bool:
    """Return whether these fields, written as most SDKs write them, are the whole object.

    That is without spaces, or with one behind each comma and colon, and without escapes in names.
    Then no name can stand twice: the repetition would be left over. The walk finds the same, slower.
    """
    first = next(iter(fields), "").encode()
    comma, colon = (b', "', b'": ') if data.startswith(b'": ', len(first) + 2) else (b',"', b'":')
    parts: list[bytes | msgspec.Raw] = []
    mark = b'{"'
    for name, raw in fields.items():
        parts += (mark, name.encode(), colon, raw)
        mark = comma
    parts.append(b"}")
    return data == b"".join(parts) and "\\" not in "".join(fields)


def checked_model(name: str) -> str:
    """Return a model's name; one that a provider may trim or cut to another is refused."""
    if name != name.strip() or not name.isprintable():
        raise invalid("The model's name has spaces around it, or control characters.")
    return name


def names(values: Iterable[str]) -> tuple[str, ...]:
    """Return tools' names without those that are empty, each once."""
    found = tuple(dict.fromkeys(value for value in values if value))
    if len(found) > MAX_TOOLS:
        raise invalid("The body names too many tools.")
    return found
