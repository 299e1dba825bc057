"""Edits of JSON bodies: what is edited is as it should be, and every other byte is as it was."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.providers.bodies import Governed, JsonObject
from gateway.providers.splicing import ObjectEdit, keep_items, put_first

EDITS: list[tuple[bytes, dict[str, bytes], list[str], bytes]] = [
    (b'{ "a" : 1 , "b":2 }', {}, [], b'{ "a" : 1 , "b":2 }'),
    (b'{ "a" : 1 , "b":2 }', {"a": b"9"}, [], b'{ "a" : 9 , "b":2 }'),
    (b'{ "a" : 1 , "b":2 }', {}, ["a"], b'{ "b":2 }'),
    (b'{ "a" : 1 , "b":2 }', {}, ["b"], b'{ "a" : 1 }'),
    (b'{ "a" : 1 , "b":2 }', {}, ["a", "b"], b"{  }"),
    (b'{"a":1,"b":2,"c":3}', {}, ["b"], b'{"a":1,"c":3}'),
    (b'{"a":1,"b":2,"c":3}', {}, ["b", "c"], b'{"a":1}'),
    (b'{"a":1}', {"n": b"[]"}, [], b'{"n":[],"a":1}'),
    (b'{"a":1}', {"n": b"[]"}, ["a"], b'{"n":[]}'),
    (b" {} ", {"n": b"0"}, [], b' {"n":0} '),
    (b'{"\\u0061":1.50e1,"b":"\\u00e9"}', {"b": b"2"}, [], b'{"\\u0061":1.50e1,"b":2}'),
    (b'{"a":1}', {}, ["z"], b'{"a":1}'),
]


@pytest.mark.parametrize(("body", "put", "removed", "expected"), EDITS)
def test_an_edit(body: bytes, put: dict[str, bytes], removed: list[str], expected: bytes) -> None:
    """Fields are put in, replaced and taken out; spaces, escapes and numbers elsewhere stay."""
    edit = ObjectEdit(JsonObject(body, Governed()))
    for name, value in put.items():
        edit.put(name, value)
    for name in removed:
        edit.remove(name)
    assert edit.result() == expected


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
_objects = st.dictionaries(st.text(max_size=4), _values, max_size=6)


@given(_objects, st.data(), st.sampled_from([None, 1]), st.booleans())
def test_edits_do_what_they_say_and_nothing_else(
    fields: dict[str, Any],
    data: st.DataObject,
    indent: int | None,
    ascii_only: bool,  # noqa: FBT001 - drawn by hypothesis
) -> None:
    """Whatever the body and its spelling, the edited one reads as the dictionary edited alike."""
    body = json.dumps(fields, indent=indent, ensure_ascii=ascii_only).encode()
    names = st.sampled_from(sorted(fields) or ["x"])
    removed = data.draw(st.sets(names, max_size=4))
    put = data.draw(
        st.dictionaries(names | st.text("pq", min_size=1, max_size=2), _values, max_size=3)
    )
    edit = ObjectEdit(JsonObject(body, Governed()))
    expected = {name: value for name, value in fields.items() if name not in removed}
    for name in removed:
        edit.remove(name)
    for name, value in put.items():
        if name not in removed:
            edit.put(name, json.dumps(value).encode())
            expected[name] = value
    assert json.loads(edit.result()) == expected


@given(st.lists(_values, max_size=6), st.data(), st.sampled_from([None, 1]))
def test_lists_lose_items_and_gain_a_first(
    items: list[Any], data: st.DataObject, indent: int | None
) -> None:
    """Items that do not stay go with their commas, and a first one comes before all others."""
    body = json.dumps(items, indent=indent).encode()
    kept = data.draw(st.lists(st.booleans(), min_size=len(items), max_size=len(items)))
    raw = [json.dumps(item, indent=indent).encode() for item in items]
    if indent:  # nested values are indented further where they stand
        raw = [item.replace(b"\n", b"\n ") for item in raw]
    left = [item for item, keep in zip(items, kept, strict=True) if keep]
    assert json.loads(keep_items(body, raw, kept)) == left
    assert json.loads(put_first(body, b'{"first":1}')) == [{"first": 1}, *items]
