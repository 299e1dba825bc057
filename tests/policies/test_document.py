"""Documents are read strictly: what two readers could understand differently is a fault."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.document import (
    MAX_DEPTH,
    MAX_DOCUMENT_BYTES,
    DocumentError,
    Fault,
    Section,
    Value,
    read_document,
)


def plain(value: Value) -> Any:
    """Return a value without its places."""
    if isinstance(value.data, dict):
        return {key: plain(each) for key, each in value.data.items()}
    if isinstance(value.data, list):
        return [plain(each) for each in value.data]
    return value.data


def faults_of(text: str) -> list[str]:
    """Return the lines that reading `text` is refused with."""
    with pytest.raises(DocumentError) as caught:
        read_document(text, "p.yaml")
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a: no\nb: on\nc: off\nd: yes\ne: y",
            {"a": "no", "b": "on", "c": "off", "d": "yes", "e": "y"},
        ),
        ("a: true\nb: False\nc: TRUE", {"a": True, "b": False, "c": True}),
        ("a: 12:30", {"a": "12:30"}),
        ("a: 2026-01-01", {"a": "2026-01-01"}),
        ("a: 2026-01-01T10:00:00Z", {"a": "2026-01-01T10:00:00Z"}),
        ("a: 010\nb: 0o10\nc: 0x10\nd: -7", {"a": 10, "b": 8, "c": 16, "d": -7}),
        ("a: 1.5\nb: 1e3", {"a": 1.5, "b": 1000.0}),
        ("a:\nb: ~\nc: null", {"a": None, "b": None, "c": None}),
        ("a: 'true'\nb: \"5\"\nc: ''", {"a": "true", "b": "5", "c": ""}),
        ("\ufeffa: 1", {"a": 1}),
        ("---\na: 1\n...\n", {"a": 1}),
        ("%YAML 1.2\n---\na: 1", {"a": 1}),
        ("a: 1 # why\r\nb: 2\r\n", {"a": 1, "b": 2}),
        ("a: {b: [1, {c: d}]}", {"a": {"b": [1, {"c": "d"}]}}),
        ('"1": 2', {"1": 2}),
    ],
    ids=[
        "no-means-no",
        "booleans",
        "not-sexagesimal",
        "date",
        "timestamp",
        "integers",
        "numbers",
        "nothing",
        "quoted",
        "byte-order-mark",
        "markers",
        "yaml-1.2",
        "comments-and-crlf",
        "flow",
        "quoted-key",
    ],
)
def test_values_are_what_yaml_1_2_says(text: str, expected: dict[str, Any]) -> None:
    """Nothing is guessed: words, times and dates stay text, numbers are decimal."""
    assert plain(read_document(text, "p.yaml")) == expected


TRAPS = {
    "duplicate": ("a: 1\nb: 2\na: 3", ["3:1: duplicate key 'a'"]),
    "duplicate-quoted": ("a: 1\n'a': 3", ["2:1: duplicate key 'a'"]),
    "duplicate-nested": ("x: {a: 1, a: 2}", ["1:11: duplicate key 'a'"]),
    "anchor": ("a: &x 1", ["1:4: anchors and aliases are not allowed; write the value out"]),
    "alias": (
        "a: &x [1]\nb: *x",
        ["1:4: anchors and aliases are not allowed; write the value out"],
    ),
    "alias-of-itself": (
        "a: &x [*x]",
        ["1:4: anchors and aliases are not allowed; write the value out"],
    ),
    "unknown-alias": ("a: *x", ["1:4: found undefined alias 'x'"]),
    "merge": (
        "a: 1\n<<: {b: 2}",
        ["2:1: a key must be text", "2:1: the tag tag:yaml.org,2002:merge is not allowed"],
    ),
    "own-tag": ("a: !mine b", ["1:4: the tag !mine is not allowed"]),
    "tagged-mapping": ("a: !mine {b: c}", ["1:4: the tag !mine is not allowed"]),
    "tagged-list": ("a: !mine [b]", ["1:4: the tag !mine is not allowed"]),
    "tagged-top": ("!mine {b: c}", ["1:1: the tag !mine is not allowed"]),
    "tagged-key": (
        "!mine a: b",
        ["1:1: a key must be text", "1:1: the tag !mine is not allowed"],
    ),
    "python-tag": (
        "a: !!python/name:os.system",
        ["1:4: the tag tag:yaml.org,2002:python/name:os.system is not allowed"],
    ),
    "set": ("a: !!set {b}", ["1:4: the tag tag:yaml.org,2002:set is not allowed"]),
    "core-tag": ("a: !!bool yes", ["1:4: the tag tag:yaml.org,2002:bool is not allowed"]),
    "verbatim-tag": (
        "a: !<tag:yaml.org,2002:bool> yes",
        ["1:4: 'yes' is neither true nor false nor nothing"],
    ),
    "yaml-1.1": (
        "%YAML 1.1\n---\na: yes\nb: 12:30",
        [
            "3:4: 'yes' is neither true nor false nor nothing",
            "4:4: '12:30' is not a whole number",
        ],
    ),
    "two-documents": ("a: 1\n---\nb: 2", ["2:1: but found another document"]),
    "trailing-text": ("a: 1\n...\nb", ["3:1: but found another document"]),
    "tab": (
        "a:\n\tb: 1",
        ["2:1: found character '\\t' that cannot start any token; indent with spaces"],
    ),
    "null-byte": ("a: 1\nb: \0", ["2:4: the character U+0000 is not allowed"]),
    "surrogate": ("a: \ud800", ["1:4: the character U+D800 is not allowed"]),
    "escaped-surrogate": ('a: "\\ud800"', ["1:4: half a surrogate pair is no text"]),
    "empty": ("", ["1:1: expected a mapping at the top"]),
    "list": ("- a", ["1:1: expected a mapping at the top"]),
    "text": ("a", ["1:1: expected a mapping at the top"]),
    "number-key": ("1: a", ["1:1: a key must be text"]),
    "boolean-key": ("a: 1\ntrue: a", ["2:1: a key must be text"]),
    "list-key": ("? [a]\n: b", ["1:3: a key must be text"]),
    "infinity": ("a: .inf", ["1:4: '.inf' is not a number"]),
    "huge-number": ("a: " + "9" * 5000, [f"1:4: '{'9' * 40}' is not a whole number"]),
    "unclosed": ('a: "b', ["1:6: found unexpected end of stream"]),
    "several": (
        "a: &x 1\nb: !y 2\nc: 3\nc: {1: 2}",
        [
            "1:4: anchors and aliases are not allowed; write the value out",
            "2:4: the tag !y is not allowed",
            "4:1: duplicate key 'c'",
            "4:5: a key must be text",
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), TRAPS.values(), ids=TRAPS)
def test_traps_are_refused_where_they_stand(text: str, expected: list[str]) -> None:
    """Every trap is a fault with its line and column, one line of text each, all of them at once."""
    assert faults_of(text) == [f"p.yaml:{each}" for each in expected]


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 1000,
        "{a: " * 1000,
        "a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH,
        "".join(" " * n + "a:\n" for n in range(MAX_DEPTH + 1)) + " " * (MAX_DEPTH + 1) + "b: 1",
    ],
    ids=["lists", "mappings", "just-over", "blocks"],
)
def test_deep_nesting_is_a_fault(text: str) -> None:
    """Nesting beyond the limit is refused, and never a crash."""
    (fault,) = faults_of(text)
    assert "nested deeper than 32 levels" in fault or "not YAML that can be read" in fault


def test_the_deepest_allowed_nesting_is_read() -> None:
    """A document that reaches the limit, and no further, is read."""
    depth = MAX_DEPTH - 1
    read_document("a: " + "[" * depth + "]" * depth, "p.yaml")


def test_aliases_do_not_multiply() -> None:
    """A billion laughs cost one fault an anchor."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 200)]
    assert len(faults_of("\n".join(lines))) == 200


def test_an_oversized_document_is_refused_unread() -> None:
    """A file above the limit is refused whatever it holds."""
    text = "a: 1 #" + "x" * MAX_DOCUMENT_BYTES
    assert faults_of(text) == ["p.yaml:1:1: the document is larger than 1 MiB"]


@given(st.text(alphabet="ab:- \n\t{}[],&*!|>'\"%#?~0\ufeff\0", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Whatever a file holds, the answer is a mapping or faults of one line with a real place."""
    faults: tuple[Fault, ...] = ()
    try:
        value = read_document(text, "p.yaml")
    except DocumentError as error:
        faults = error.faults
    else:
        assert isinstance(value.data, dict)
    for fault in faults:
        assert "\n" not in str(fault)
        assert fault.line >= 1
        assert fault.column >= 1


def test_faults_are_sorted_and_said_once() -> None:
    """Faults come in the order of files and lines, each once."""
    one, two, three = Fault("a", 1, 9, "x"), Fault("a", 2, 1, "x"), Fault("b", 1, 1, "x")
    error = DocumentError([three, two, one, two])
    assert error.faults == (one, two, three)
    assert str(error) == "a:1:9: x\na:2:1: x\nb:1:1: x"


def section_of(text: str) -> Section:
    """Return a section that reads `text`."""
    return Section(read_document(text, "p.yaml"), "p.yaml", [])


READERS: dict[str, tuple[str, Callable[[Section], Any], Any]] = {
    "string": ("k: v", lambda s: s.string("k"), "v"),
    "string-default": ("x: v", lambda s: s.string("k", "d"), "d"),
    "string-null": ("k:", lambda s: s.string("k", "d"), "d"),
    "boolean": ("k: true", lambda s: s.boolean("k", default=False), True),
    "boolean-default": ("x: 1", lambda s: s.boolean("k", default=True), True),
    "integer": ("k: 7", lambda s: s.integer("k"), 7),
    "integer-lowest": ("k: 3", lambda s: s.integer("k", low=3, high=9), 3),
    "integer-highest": ("k: 9", lambda s: s.integer("k", low=3, high=9), 9),
    "choice": ("k: b", lambda s: s.choice("k", ["a", "b"]), "b"),
    "strings": ("k: [a, b]", lambda s: s.strings("k"), ("a", "b")),
    "strings-one": ("k: a", lambda s: s.strings("k"), ("a",)),
    "strings-default": ("x: a", lambda s: s.strings("k", ["d"]), ("d",)),
    "milliseconds": ("k: 250ms", lambda s: s.duration("k", "1s"), 0.25),
    "seconds": ("k: 30s", lambda s: s.duration("k", "1s"), 30.0),
    "minutes": ("k: 1.5m", lambda s: s.duration("k", "1s"), 90.0),
    "hours": ("k: 8h", lambda s: s.duration("k", "1s"), 28800.0),
    "days": ("k: 30d", lambda s: s.duration("k", "1s"), 2592000.0),
    "no-duration": ("k: 0s", lambda s: s.duration("k", "1s"), 0.0),
    "duration-default": ("x: 1", lambda s: s.duration("k", "5m"), 300.0),
    "bytes": ("k: 512B", lambda s: s.size("k", "1B"), 512),
    "kibibytes": ("k: 64KiB", lambda s: s.size("k", "1B"), 65536),
    "mebibytes": ("k: 64MiB", lambda s: s.size("k", "1B"), 67108864),
    "gibibytes": ("k: 2GiB", lambda s: s.size("k", "1B"), 2147483648),
    "size-default": ("x: 1", lambda s: s.size("k", "1KiB"), 1024),
    "sections-absent": ("x: 1", lambda s: s.sections("k"), []),
    "keys": ("x: 1\ny: 2", lambda s: s.keys(), ["x", "y"]),
}


@pytest.mark.parametrize(("text", "read", "expected"), READERS.values(), ids=READERS)
def test_readers_return_what_is_written(
    text: str, read: Callable[[Section], Any], expected: Any
) -> None:
    """A right value is returned in its type and unit, an absent one as its default, faultlessly."""
    section = section_of(text)
    assert read(section) == expected
    assert not section.faults


MISREADINGS: dict[str, tuple[str, Callable[[Section], Any], str]] = {
    "required": ("x: 1", lambda s: s.string("k"), "1:1: k is required"),
    "not-text": ("k: 5", lambda s: s.string("k"), "1:4: k must be text, not a whole number"),
    "not-boolean": (
        "k: yes",
        lambda s: s.boolean("k", default=False),
        "1:4: k must be true or false, not text",
    ),
    "not-integer": (
        "k: 1.5",
        lambda s: s.integer("k"),
        "1:4: k must be a whole number, not a number",
    ),
    "boolean-integer": (
        "k: true",
        lambda s: s.integer("k"),
        "1:4: k must be a whole number, not true or false",
    ),
    "too-low": ("k: 2", lambda s: s.integer("k", low=3, high=9), "1:4: k must be between 3 and 9"),
    "too-high": (
        "k: 10",
        lambda s: s.integer("k", low=3, high=9),
        "1:4: k must be between 3 and 9",
    ),
    "no-choice": (
        "k: alow",
        lambda s: s.choice("k", ["allow", "deny"]),
        "1:4: k must be one of allow, deny (did you mean 'allow'?)",
    ),
    "no-unit": (
        "k: '30'",
        lambda s: s.duration("k", "1s"),
        "1:4: k must be a duration such as 30s or 5m",
    ),
    "negative-duration": (
        "k: -1s",
        lambda s: s.duration("k", "1s"),
        "1:4: k must be a duration such as 30s or 5m",
    ),
    "endless-duration": (
        f"k: {'9' * 400}d",
        lambda s: s.duration("k", "1s"),
        "1:4: k must be a duration such as 30s or 5m",
    ),
    "wrong-unit": (
        "k: 64MB",
        lambda s: s.size("k", "1B"),
        "1:4: k must be a size such as 64KiB or 1MiB",
    ),
    "fraction-of-a-byte": (
        "k: 1.5KiB",
        lambda s: s.size("k", "1B"),
        "1:4: k must be a size such as 64KiB or 1MiB",
    ),
    "endless-size": (
        f"k: {'9' * 400}B",
        lambda s: s.size("k", "1B"),
        "1:4: k must be a size such as 64KiB or 1MiB",
    ),
    "other-digits": (
        "k: ٣KiB",
        lambda s: s.size("k", "1B"),
        "1:4: k must be a size such as 64KiB or 1MiB",
    ),
    "text-in-list": (
        "k: [a, 5]",
        lambda s: s.strings("k"),
        "1:8: k must hold texts, not a whole number",
    ),
    "mapping-for-texts": (
        "k: {}",
        lambda s: s.strings("k"),
        "1:4: k must hold texts, not a mapping",
    ),
    "empty-list": (
        "k: []",
        lambda s: s.strings("k"),
        "1:4: k must not be empty; give at least one text, or leave it out",
    ),
    "not-mapping": ("k: [a]", lambda s: s.section("k"), "1:4: k must be a mapping, not a list"),
    "not-list": ("k: {}", lambda s: s.sections("k"), "1:4: k must be a list, not a mapping"),
    "not-mapping-in-list": (
        "k: [{}, 5]",
        lambda s: s.sections("k"),
        "1:9: k[1] must be a mapping, not a whole number",
    ),
    "nested": (
        "k:\n  - a: {b: x}",
        lambda s: s.sections("k")[0].section("a").integer("b"),
        "2:12: k[0].a.b must be a whole number, not text",
    ),
}


@pytest.mark.parametrize(("text", "read", "expected"), MISREADINGS.values(), ids=MISREADINGS)
def test_readers_note_what_is_wrong_and_go_on(
    text: str, read: Callable[[Section], Any], expected: str
) -> None:
    """A wrong value is one fault that names the key and its place, and never an exception."""
    section = section_of(text)
    read(section)
    assert [*map(str, section.faults)] == [f"p.yaml:{expected}"]


def test_unasked_keys_are_faults_with_the_nearest_known_one() -> None:
    """A key that no reader asked for is a fault; a misspelling is told from a stray."""
    section = section_of("tenent: a\nzzz: b\nrole: c\n")
    section.string("tenant", "")
    section.string("role", "")
    section.finish()
    assert [*map(str, section.faults)] == [
        "p.yaml:1:9: unknown key 'tenent' (did you mean 'tenant'?)",
        "p.yaml:2:6: unknown key 'zzz'",
    ]


@given(st.integers(0, 999_999_999_999), st.sampled_from(["B", "KiB", "MiB"]))
def test_sizes_are_exact(count: int, unit: str) -> None:
    """A size within what a float holds exactly is the very number of bytes."""
    wanted = count * {"B": 1, "KiB": 2**10, "MiB": 2**20}[unit]
    read = section_of(f"k: {count}{unit}").size("k", "0B")
    assert read == wanted if wanted < 2**53 else abs(read - wanted) <= wanted * 2**-52


@given(st.dictionaries(st.text("abcdefgh", min_size=1), st.integers() | st.booleans(), max_size=6))
def test_places_are_those_of_the_text(mapping: dict[str, int | bool]) -> None:
    """Line and column of every value point at the value in the text."""
    lines = [f"{key}: {str(value).lower()}" for key, value in mapping.items()]
    text = "\n".join(lines) or "{}"
    data = read_document(text, "p.yaml").data
    assert isinstance(data, dict)
    for number, (key, value) in zip(itertools.count(1), data.items(), strict=False):
        assert value.line == number
        assert lines[number - 1][value.column - 1 :] == str(mapping[key]).lower()
