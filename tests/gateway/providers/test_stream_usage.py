"""Asking a chat stream for usage, and the filter that takes the extra event out again."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.providers import stream_usage
from gateway.providers.dialect import BothEnds
from gateway.providers.stream_usage import UsageEventFilter

USAGE = b'data: {"choices":[],"usage":{"total_tokens":1}}'
EVENTS = [
    USAGE,
    b'data: {"choices":[{"delta":{"content":"\\"usage\\""}}],"usage":null}',
    b'data: {"choices":[]}',
    b"event: ping\ndata: 1",
    b"event: ping\rdata: 1\r\ndata: 2",
    b": comment",
    b'data: "usage"',
    b"data: [DONE]",
]
BLANKS = [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\n\n", b"\n\r\n", b"\r\n\n", b"\r\r\n"]


def filtered(stream: bytes, sizes: list[int]) -> bytes:
    """Return what passes of a stream that comes in reads of these sizes, over and over."""
    watching = UsageEventFilter()
    passed = []
    start = turn = 0
    while start < len(stream):
        size = sizes[turn % len(sizes)]
        passed.append(watching.feed(stream[start : start + size]))
        start += size
        turn += 1
    return b"".join([*passed, watching.end()])


def naively(stream: bytes) -> bytes:
    """Return the same, from the whole stream, line by line."""
    passed, event = b"", b""
    for line in [*re.findall(rb"[^\r\n]+(?:\r\n|\r|\n)?|\r\n|\r|\n", stream), b""]:
        event += line
        if line.strip(b"\r\n"):
            continue
        text = event.strip()
        is_usage = b'"usage":{' in text and text.startswith(b'data: {"choices":[],')
        if not is_usage:
            passed += event
        event = b""
    return passed


@given(
    parts=st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from(BLANKS[:3])), max_size=12),
    tail=st.sampled_from([b"", b"data: {", USAGE]),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6),
)
def test_the_usage_event_goes_and_all_else_stays(
    parts: list[tuple[bytes, bytes]], tail: bytes, sizes: list[int]
) -> None:
    """In any chunking exactly the usage events are missing, byte for byte."""
    stream = b"".join(event + blank for event, blank in parts) + tail
    assert filtered(stream, sizes) == naively(stream)


@given(
    parts=st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from(BLANKS)), max_size=12),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6),
)
def test_the_chunking_changes_nothing(parts: list[tuple[bytes, bytes]], sizes: list[int]) -> None:
    """However lines end, one read and many let the same bytes pass."""
    stream = b"".join(event + blank for event, blank in parts)
    assert filtered(stream, sizes) == filtered(stream, [len(stream) or 1])


def test_an_event_too_large_to_hold_passes_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large event passes before it is complete, and the usage event behind it still goes."""
    monkeypatch.setattr(stream_usage, "MAX_HELD_BYTES", 200)
    watching = UsageEventFilter()
    large = b"data: " + b"x" * 1000
    assert len(watching.feed(large)) > 990
    rest = watching.feed(b'\n\n"usage"\n\n' + USAGE + b"\n\ndata: 1\n\n")
    assert rest.endswith(b'x\n\n"usage"\n\ndata: 1\n\n')
    assert USAGE not in rest


@pytest.mark.timeout(10)
@pytest.mark.parametrize("event", [b"data: {}\n\n", b'data: "usage"\n\n'])
def test_the_work_grows_with_the_bytes(event: bytes) -> None:
    """A stream of tiny events in large reads is searched once, not once for every event."""
    stream = event * (4 * 1024 * 1024 // len(event))
    assert filtered(stream, [256 * 1024]) == stream


@pytest.mark.timeout(10)
def test_an_event_that_never_ends_is_searched_once() -> None:
    """Bytes that are held are not searched again with every read."""
    stream = b"data: " + b"x" * 60_000
    for _ in range(8):
        assert filtered(stream, [1]) == stream


@pytest.mark.timeout(10)
@pytest.mark.parametrize("nested", [b'"usage":{', b'"usage":[', b'"usage":'])
def test_a_hostile_end_costs_little(nested: bytes) -> None:
    """Of an end that says `usage` thousands of times only the last few are tried."""
    body = nested * (65536 // len(nested))
    for _ in range(100):
        ends = BothEnds()
        ends.feed(body)
        assert ends.last(b"usage") == {}


def test_usage_before_many_nulls_is_found() -> None:
    """The last object counts, though a few events without one follow it."""
    ends = BothEnds()
    usage = json.dumps({"usage": {"prompt_tokens": 3}}).encode()
    ends.feed(usage + b'{"usage":null}' * 20)
    assert ends.last(b"usage") == {"prompt_tokens": 3}
