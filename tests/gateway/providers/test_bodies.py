"""Reading one level of a JSON object: the same as every other reader, or not at all."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.errors import Refused
from gateway.providers.bodies import MAX_FIELDS, Governed, JsonObject

NONE = Governed()
SPACE = st.text(" \t\r\n", max_size=3)
NAMES = st.sampled_from(["model", "a", "", 'q"q', "b\\c", "é", "\u2028", "😀", "x\ny"])


@st.composite
def token(draw: st.DrawFn, text: str) -> str:
    """One way to write a string: each character as itself or as an escape."""
    written = ""
    for char in text:
        must = char in '"\\' or char < " "
        if must or draw(st.booleans()):
            units = char.encode("utf-16-be").hex()
            written += "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
        else:
            written += char
    return f'"{written}"'


@st.composite
def value(draw: st.DrawFn, depth: int) -> str:
    """Some JSON."""
    kinds = ["number", "word", "text", *(["list", "object"] if depth else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "number":
        return draw(st.sampled_from(["1", "12", "-0", "1.5", "1.50", "1e3", "1E+3"]))
    if kind == "word":
        return draw(st.sampled_from(["null", "true", "false"]))
    if kind == "text":
        return draw(token(draw(st.sampled_from(["", "1", "model", '{"a":1}', "\\", "é"]))))
    if kind == "list":
        return "[" + ",".join(draw(st.lists(value(depth - 1), max_size=3))) + "]"
    return draw(written_object(depth - 1))


@st.composite
def written_object(draw: st.DrawFn, depth: int = 2) -> str:
    """One way to write an object; names may repeat, and there may be spaces anywhere."""
    styles = [(",", ":", False), (", ", ": ", False), ("", "", True)]
    comma, colon, is_free = draw(st.sampled_from(styles))
    fields = []
    for name in draw(st.lists(NAMES, max_size=5)):
        if not is_free:
            fields.append(json.dumps(name, ensure_ascii=False) + colon + draw(value(depth)))
            continue
        spaces = [draw(SPACE) for _ in range(4)]
        parts = [spaces[0], draw(token(name)), spaces[1], ":", spaces[2], draw(value(depth))]
        fields.append("".join([*parts, spaces[3]]))
    return "{" + (draw(SPACE) if is_free else "") + (comma or ",").join(fields) + "}"


class Twice(ValueError):
    """A name stands twice."""


def naively(data: str) -> dict[str, Any]:
    """Return the fields as the standard library reads them, duplicates of the top level refused."""
    levels: list[list[tuple[str, Any]]] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        levels.append(pairs)
        return dict(pairs)

    found: dict[str, Any] = json.loads(data, object_pairs_hook=keep)
    if len(found) != len(levels[-1]):  # the outermost object ends last
        raise Twice
    return found


@given(data=written_object())
@example(data='{"a":1,"a":1}')
@example(data='{"a":12,"a":1}')
@example(data='{"a":1,"a":12}')
@example(data='{"a":1, "\\u0061":1}')
@example(data='{"a": 1, "a": 1}')
@example(data='{"a": 1,"b":2,"a":1}')
@example(data='{"b\\\\u0061": 1, "a": 1}')
@example(data="{ }")
def test_the_reader_agrees_with_the_standard_library(data: str) -> None:
    """Whatever is written: the same fields in the same places, or a refusal where one stands twice."""
    raw = data.encode()
    try:
        expected = naively(data)
    except Twice:
        with pytest.raises(Refused, match="twice"):
            JsonObject(raw, NONE)
        return
    found = JsonObject(raw, NONE)
    assert list(found) == list(expected)
    for name, each in expected.items():
        start, end = found.span(name)
        assert json.loads(raw[start:end]) == each


NESTED = Governed("name")


@given(inside=written_object(depth=1), spaces=st.booleans())
def test_inner_objects_and_items_are_read_as_strictly(inside: str, *, spaces: bool) -> None:
    """The objects that a rule reads from, in a field or in a list, take no name twice either."""
    colon = " : " if spaces else ":"
    ways: list[tuple[str, Callable[[JsonObject], Any]]] = [
        (f'{{"x"{colon}{inside}}}', lambda it: it.inner("x", NONE)),
        (f'{{"x"{colon}[{{}},{inside}]}}', lambda it: it.items("x", NONE)[1]),
    ]
    for written, read in ways:
        outer = JsonObject(written.encode(), NONE)
        try:
            expected = naively(inside)
        except Twice:
            with pytest.raises(Refused, match="twice"):
                read(outer)
        else:
            assert list(read(outer)) == list(expected)


@pytest.mark.parametrize(
    "name", ["Model", "MODEL", "tool\u017f", "\\u0054ools", "\\u212aey", "tool\\u017f"]
)
def test_other_spellings_are_refused(name: str) -> None:
    """Case, escapes of another case, and the two signs that fold to s and k: all are refused."""
    governed = Governed("model", "tools", "key")
    with pytest.raises(Refused, match="another spelling"):
        JsonObject(f'{{"{name}":1}}'.encode(), governed)
    assert "model" in JsonObject(b'{"mod\\u0065l":1}', governed)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"null", b'{"a":1', b'{"a":1}x', b'\xef\xbb\xbf{"a":1}', b'{"a":1,}', b"{'a':1}",
        b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}', b'{"a":NaN}', b'{"a":01}', '{"a":1}'.encode("utf-16"),
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{" + b",".join(b'"%d":1' % n for n in range(MAX_FIELDS + 1)) + b"}",
        b'{"%b":1}' % (b"n" * 300),
    ],
)  # fmt: skip
def test_what_is_no_plain_json_object(data: bytes) -> None:
    """Anything that some reader might take for another thing is refused."""
    with pytest.raises(Refused):
        JsonObject(data, NONE)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "data",
    [
        b'{"model":"m","x":[{"model":1},' + b'{"a":1},' * 2_000_000 + b"1]}",
        b'{"model":"m","x": "' + b'\\"' * 8_000_000 + b'"}',
        b'{"' + b'\\"' * 8_000_000 + b'":1, "a":2}',
        b'{"a":1,' * 1 + b'"a":1,' * 2_000_000 + b'"b":1}',
    ],
    ids=["nested", "text", "name", "repeated"],
)
def test_large_bodies_are_read_at_once(data: bytes) -> None:
    """16 MiB that no rule reads are passed over, whatever stands in them."""
    for _ in range(10):
        try:
            JsonObject(data, Governed("model"))
        except Refused:
            continue
