"""Strict YAML 1.2 with a place for every fault. The only module that knows the YAML library.

Laws of this file:
- one document, a mapping at its top; duplicate keys, anchors, aliases and tags are refused;
- nothing is guessed: `no`, `12:30` and `2026-01-01` are strings, as YAML 1.2 says;
- a fault never hides the next: readers note it and go on, and all are raised together;
- a key that nobody asked for is a fault, with the nearest known key named.

No I/O.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

MAX_DOCUMENT_BYTES: Final = 1024 * 1024
"""Far above any policy written by hand; a limit so that a wrong path does not fill memory."""

MAX_DEPTH: Final = 32
"""Thrice what a policy needs; a limit so that rules compiled from it never exhaust the stack."""

_CORE = "tag:yaml.org,2002:"
_SCALARS = frozenset(
    _CORE + name for name in ("null", "bool", "int", "float", "str", "timestamp")
)  # the library knows dates, which YAML 1.2 does not; they are read as text
_NULLS = frozenset({"", "~", "null"})
_BOOLS = frozenset({"true", "false"})
_NO_TABS = "; indent with spaces"
_DURATION = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"([0-9]{1,15})(B|KiB|MiB|GiB)")
_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DURATION_UNITS: Final = tuple(_SECONDS)
SIZE_UNITS: Final = tuple(_BYTES)


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing wrong with a document; prints as `path:line:column: message`."""

    path: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        """Return the form that editors and terminals make clickable."""
        return f"{self.path}:{self.line}:{self.column}: {self.message}"


class DocumentError(Exception):
    """A document, or several, that cannot be used; `faults` holds all of what is wrong."""

    code = "invalid_document"

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(sorted(set(faults)))
        super().__init__("\n".join(map(str, self.faults)))


@dataclass(frozen=True, slots=True)
class Value:
    """A value and where it stands: a scalar, a list of values, or a mapping of keys to values."""

    line: int
    column: int
    data: "str | int | float | bool | list[Value] | dict[str, Value] | None"

    @property
    def kind(self) -> str:
        """Return what a person would call it."""
        match self.data:
            case None:
                return "nothing"
            case bool():
                return "true or false"
            case int():
                return "a whole number"
            case float():
                return "a number"
            case str():
                return "text"
            case list():
                return "a list"
            case _:
                return "a mapping"


def read_document(text: str, path: str) -> Value:
    """Return the mapping that `text` holds.

    Raises:
        DocumentError: It is not one strict YAML 1.2 mapping.
    """
    if len(text) > MAX_DOCUMENT_BYTES:
        raise DocumentError([Fault(path, 1, 1, "the document is larger than 1 MiB")])
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        problem = (error.problem or "not YAML") + (_NO_TABS if "'\\t'" in str(error) else "")
        raise DocumentError([Fault(path, line, column, problem)]) from None
    except ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"the character U+{error.character:04X} is not allowed"
        raise DocumentError([Fault(path, line, column, message)]) from None
    except YAMLError as error:
        raise DocumentError([Fault(path, 1, 1, f"not YAML: {error}")]) from None
    except (ValueError, RecursionError):
        raise DocumentError([Fault(path, 1, 1, "not YAML that can be read")]) from None
    if not isinstance(node, MappingNode):
        raise DocumentError([Fault(path, 1, 1, "expected a mapping at the top")])
    faults: list[Fault] = []
    value = _value(node, path, faults, MAX_DEPTH)
    if faults:
        raise DocumentError(faults)
    return value


def _value(node: Node, path: str, faults: list[Fault], depth: int) -> Value:
    line, column = node.start_mark.line + 1, node.start_mark.column + 1

    def fault(message: str) -> Value:
        faults.append(Fault(path, line, column, message))
        return Value(line, column, None)

    if getattr(node, "anchor", None):
        # Not read further: an alias may hold itself, or what it names many times over.
        return fault("anchors and aliases are not allowed; write the value out")
    if _is_tagged(node):
        return fault(f"the tag {node.tag} is not allowed")
    if not depth and not isinstance(node, ScalarNode):
        return fault(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(node, MappingNode):
        mapping: dict[str, Value] = {}
        for key_node, value_node in node.value:
            key = _value(key_node, path, faults, depth - 1)
            value = _value(value_node, path, faults, depth - 1)
            if value.data is None and value_node.value == "":
                # The library places what is not there at the next token, on another line.
                value = replace(value, line=key.line, column=key.column)
            if not isinstance(key.data, str):
                faults.append(Fault(path, key.line, key.column, "a key must be text"))
            elif key.data in mapping:
                faults.append(Fault(path, key.line, key.column, f"duplicate key {key.data!r}"))
            else:
                mapping[key.data] = value
        return Value(line, column, mapping)
    if isinstance(node, SequenceNode):
        return Value(line, column, [_value(each, path, faults, depth - 1) for each in node.value])
    return Value(line, column, _scalar(node, fault))


def _is_tagged(node: Node) -> bool:
    if getattr(node.ctag, "handle", None) is not None:
        return True
    if isinstance(node, ScalarNode):
        return str(node.tag) not in _SCALARS
    return str(node.tag) != _CORE + ("map" if isinstance(node, MappingNode) else "seq")


def _scalar(node: Node, fault: Callable[[str], Value]) -> str | int | float | bool | None:
    text: str = node.value
    match str(node.tag).removeprefix(_CORE):
        case "null" if text.lower() in _NULLS:
            return None
        case "bool" if text.lower() in _BOOLS:
            return text.lower() == "true"
        case "null" | "bool":
            # A %YAML 1.1 directive or a tag made `yes` a word of its own; YAML 1.2 has no such word.
            fault(f"{text!r} is neither true nor false nor nothing")
            return None
        case "int":
            try:
                return int(text.replace("_", ""), 0) if text[:2] in {"0x", "0o"} else int(text)
            except ValueError:
                fault(f"{text[:40]!r} is not a whole number")
                return 0
        case "float":
            try:
                return float(text)
            except ValueError:
                fault(f"{text[:40]!r} is not a number")
                return 0.0
        case _:
            if not text.isascii() and any("\ud800" <= each <= "\udfff" for each in text):
                fault("half a surrogate pair is no text")
            return text


class Section:
    """Reads one mapping key by key, notes every fault, and at `finish` every key not asked for."""

    def __init__(self, value: Value, path: str, faults: list[Fault], name: str = "") -> None:
        self.path = path
        self.faults = faults
        self.name = name
        self.line, self.column = value.line, value.column
        self._asked: set[str] = set()
        self._values: dict[str, Value] = {}
        if isinstance(value.data, dict):
            self._values = value.data
        elif value.data is not None:
            self.fault_at(value, f"{self._label()} must be a mapping, not {value.kind}")

    def _label(self, key: str = "") -> str:
        return ".".join(part for part in (self.name, key) if part) or "the document"

    def fault_at(self, value: Value, message: str) -> None:
        """Note a fault at a value."""
        self.faults.append(Fault(self.path, value.line, value.column, message))

    def fault(self, key: str, message: str) -> None:
        """Note a fault at a key's value, or at the section where the key is absent."""
        value = self._values.get(key)
        line, column = (value.line, value.column) if value else (self.line, self.column)
        self.faults.append(Fault(self.path, line, column, f"{self._label(key)} {message}"))

    def __contains__(self, key: str) -> bool:
        """Return whether the key is there at all; who looks for a key knows it."""
        self._asked.add(key)
        return key in self._values

    def keys(self) -> list[str]:
        """Return every key, and count all of them as asked for: for mappings of free names."""
        self._asked.update(self._values)
        return list(self._values)

    def value(self, key: str) -> Value | None:
        """Return what stands at `key`, unread."""
        self._asked.add(key)
        value = self._values.get(key)
        return None if value is None or value.data is None else value

    def _required(self, key: str) -> None:
        self.fault(key, "is required")

    def string(self, key: str, default: str | None = None) -> str:
        """Return text; without a default the key is required."""
        value = self.value(key)
        if value is None:
            if default is None:
                self._required(key)
            return default or ""
        if not isinstance(value.data, str):
            self.fault(key, f"must be text, not {value.kind}")
            return default or ""
        return value.data

    def boolean(self, key: str, default: bool) -> bool:  # noqa: FBT001 - a default, not a switch
        """Return true or false."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value.data, bool):
            self.fault(key, f"must be true or false, not {value.kind}")
            return default
        return value.data

    def integer(
        self, key: str, default: int | None = None, *, low: int = 0, high: int = 2**53
    ) -> int:
        """Return a whole number within bounds."""
        value = self.value(key)
        if value is None:
            if default is None:
                self._required(key)
            return default or 0
        if isinstance(value.data, bool) or not isinstance(value.data, int):
            self.fault(key, f"must be a whole number, not {value.kind}")
            return default or low
        if not low <= value.data <= high:
            self.fault(key, f"must be between {low} and {high}")
        return value.data

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """Return one of a closed set of words."""
        if default is None and self.value(key) is None:
            self.fault(key, f"is required: one of {', '.join(choices)}")
            return ""
        text = self.string(key, default)
        if text not in choices and (key in self._values or default is not None):
            self.fault(key, f"must be one of {', '.join(choices)}{nearest(text, choices)}")
        return text

    def duration(self, key: str, default: str) -> float:
        """Return seconds, written as `250ms`, `30s`, `5m`, `8h` or `30d`; `0s` means none."""
        return self._measured(key, default, _DURATION, _SECONDS, "a duration such as 30s or 5m")

    def size(self, key: str, default: str) -> int:
        """Return bytes, written as `512B`, `64KiB`, `64MiB` or `1GiB`; `0B` means none."""
        return int(self._measured(key, default, _SIZE, _BYTES, "a size such as 64KiB or 1MiB"))

    def _measured(
        self,
        key: str,
        default: str,
        form: re.Pattern[str],
        units: Mapping[str, float],
        what: str,
    ) -> float:
        text = self.string(key, default)
        match = form.fullmatch(text)
        if match is None:
            self.fault(key, f"must be {what}")
            return 0.0
        return float(match[1]) * units[match[2]]

    def strings(self, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        """Return a list of texts; a single text counts as a list of one."""
        value = self.value(key)
        if value is None:
            return tuple(default)
        items = value.data if isinstance(value.data, list) else [value]
        texts = []
        for item in items:
            if isinstance(item.data, str):
                texts.append(item.data)
            else:
                self.fault_at(item, f"{self._label(key)} must hold texts, not {item.kind}")
        if not items:
            self.fault(key, "must not be empty; give at least one text, or leave it out")
        return tuple(texts)

    def section(self, key: str) -> "Section":
        """Return the mapping at `key`, an empty one where it is absent."""
        value = self.value(key) or Value(self.line, self.column, {})
        return Section(value, self.path, self.faults, self._label(key))

    def sections(self, key: str) -> "list[Section]":
        """Return the mappings of the list at `key`."""
        value = self.value(key)
        if value is None:
            return []
        if not isinstance(value.data, list):
            self.fault(key, f"must be a list, not {value.kind}")
            return []
        label = self._label(key)
        return [
            Section(item, self.path, self.faults, f"{label}[{n}]")
            for n, item in enumerate(value.data)
        ]

    def finish(self) -> None:
        """Note every key that nobody asked for."""
        for key, value in self._values.items():
            if key not in self._asked:
                hint = nearest(key, sorted(self._asked))
                where = f" in {self.name}" if self.name else ""
                self.fault_at(value, f"unknown key {key!r}{where}{hint}")


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint at the known word that this may have been meant for, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
