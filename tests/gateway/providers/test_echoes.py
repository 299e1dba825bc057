"""What a provider quotes of a credential does not reach the caller, however it is cut up."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Refused
from gateway.providers.echoes import EchoFilter, without_echo
from keys.echo import blot

KEY = b"sk-planted-5f1d7c0e9b8a4f6d"


class Slot:
    """Memory that holds the key, and how often it was looked at."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(4 * len(KEY)))
        self.memory[: len(KEY)] = KEY
        self.times = 0

    def blot(self, data: bytearray) -> int:
        """Blot the key out."""
        self.times += 1
        return blot(self.memory[: len(KEY)], self.memory[len(KEY) :], data)


@given(
    st.lists(st.sampled_from([KEY, KEY[:20], KEY[:3], b"s", b"x", b"\xff\x00", b"sk-sk-"])),
    st.lists(st.integers(0, 400)),
)
def test_however_a_body_is_cut(parts: list[bytes], cuts: list[int]) -> None:
    """Fed in any pieces, what comes out is as long, without the key, and else the same."""
    body = b"".join(parts) + b"."
    edges = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    filtered = EchoFilter(Slot().blot, len(KEY))
    out = b"".join(filtered.feed(body[a:b]) for a, b in pairwise(edges) if a < b)
    out += filtered.end()
    assert out == body.replace(KEY, b"*" * len(KEY))


def test_no_more_is_held_than_may_begin_the_key() -> None:
    """Whole events pass at once; of a begun key not a byte does."""
    filtered = EchoFilter(Slot().blot, len(KEY))
    assert filtered.feed(b"data: {}\n\n") == b"data: {}\n\n"
    assert filtered.feed(b"data: " + KEY[:-1]) == b"data: "
    assert filtered.feed(b"!") == KEY[:-1] + b"!"


@pytest.mark.parametrize(("kept", "seen"), [(5, KEY[:5]), (20, b"*" * 20)])
def test_a_body_that_ends_within_the_key(kept: int, seen: bytes) -> None:
    """Most of a key is as good as all of it; a few bytes are not."""
    filtered = EchoFilter(Slot().blot, len(KEY))
    assert filtered.feed(KEY[:kept]) + filtered.end() == seen


def test_header_fields() -> None:
    """Wherever in a field the key stands it is stars, and every other field is as it was."""
    fields = [(b"a", b""), (b"x-echo", b"Bearer " + KEY), (b"x-" + KEY, b": :"), (b"b", b"c")]
    stars = b"*" * len(KEY)
    assert without_echo(fields, Slot().blot, len(KEY)) == [
        (b"a", b""),
        (b"x-echo", b"Bearer " + stars),
        (b"x-" + stars, b": :"),
        (b"b", b"c"),
    ]


def test_short_fields_cost_nothing() -> None:
    """Where no field is long enough to hold the key, it is not taken out to compare."""
    slot = Slot()
    fields = [(b"content-type", b"application/json"), (b"x-request-id", b"r" * (len(KEY) - 1))]
    assert without_echo(fields, slot.blot, len(KEY)) is fields
    assert slot.times == 0


def test_nothing_passes_unseen() -> None:
    """Where the key cannot be compared any more, nothing of the answer passes."""

    def closed(_data: bytearray) -> int:
        raise Refused("session_unknown", "closed")

    with pytest.raises(Refused):
        EchoFilter(closed, len(KEY)).feed(b"anything")
    with pytest.raises(Refused):
        without_echo([(b"a", b"x" * 100)], closed, len(KEY))
