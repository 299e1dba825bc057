"""Finding a credential in what a provider sends back, and blotting it out.

Providers quote requests in error messages, and some quote too much. The credential is compared
where it lies, in a slot; the forms in which it may come back are laid out beside it and wiped. No
form is ever an object of Python's: only views of the slot and single bytes are.

What is looked for: the credential itself; as percent-encoding and JSON write it; and in base64, by
either alphabet and wherever it begins in the encoded text (there up to two bytes at each end stay,
mixed with what stood beside them). Every byte found becomes `*`, so that lengths stay. A form that
a provider has masked itself is none of these and passes. No I/O.
"""

from collections.abc import Callable, Iterator
from typing import Final

MIN_BYTES: Final = 8
"""A credential shorter than this cannot be told from chance; blotting it would garble answers."""

SCRATCH_FACTOR: Final = 3
"""How much longer the longest form is than the credential: percent-encoding of every byte."""

_BASE64: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_BASE64URL: Final = _BASE64[:-2] + b"-_"
_UNRESERVED: Final = frozenset(_BASE64[:-2] + b"-._~")
_IN_BOTH_ALPHABETS: Final = frozenset(_UNRESERVED - frozenset(b"~"))
"""Text of these alone encodes to neither of the two digits in which the alphabets differ."""


def blot(credential: memoryview, scratch: memoryview, data: bytearray) -> int:
    """Blot the credential out of `data`; return how many bytes at its end may begin another.

    `scratch` lies beside the credential in its slot and is `SCRATCH_FACTOR` times as long, or
    longer. What was laid out there is wiped when this returns.
    """
    if len(credential) < MIN_BYTES:
        return 0
    room = scratch[: SCRATCH_FACTOR * len(credential)]
    try:
        held = _blot_form(credential, data)
        for length in _forms(credential, room):
            held = max(held, _blot_form(room[:length], data))
    finally:
        room[:] = bytes(len(room))
    return held


def _blot_form(form: memoryview, data: bytearray) -> int:
    size = len(form)
    at = data.find(form)
    while at >= 0:
        data[at : at + size] = b"*" * size
        at = data.find(form, at + size)
    # The longest end of the data that the form begins with.
    first = form[0]
    with memoryview(data) as view:
        at = data.find(first, max(0, len(data) - size + 1))
        while at >= 0:
            if view[at:] == form[: len(data) - at]:
                return len(data) - at
            at = data.find(first, at + 1)
    return 0


def _forms(credential: memoryview, room: memoryview) -> Iterator[int]:
    """Lay the other forms out in `room`, one after another; yield the length of each."""
    special = frozenset(credential) - _UNRESERVED
    if special:
        yield _spell(credential, room, lambda byte: b"%%%02X" % byte, special)
        yield _spell(credential, room, lambda byte: b"%%%02x" % byte, special)
    for escaped in (frozenset(b'"\\'), frozenset(b'"\\/')):  # some writers of JSON escape "/"
        if special & escaped:
            yield _spell(credential, room, lambda byte: b"\\%c" % byte, escaped)
    both_alike = _IN_BOTH_ALPHABETS.issuperset(credential)
    for alphabet in (_BASE64,) if both_alike else (_BASE64, _BASE64URL):
        for skipped in range(3):
            yield _to_base64(credential[skipped:], room, alphabet)


def _spell(
    credential: memoryview, room: memoryview, spell: Callable[[int], bytes], special: frozenset[int]
) -> int:
    end = 0
    for byte in credential:
        if byte in special:
            spelt = spell(byte)
            room[end : end + len(spelt)] = spelt
            end += len(spelt)
        else:
            room[end] = byte
            end += 1
    return end


def _to_base64(text: memoryview, room: memoryview, alphabet: bytes) -> int:
    """Encode as many whole groups of three bytes as there are."""
    end = 0
    for at in range(0, len(text) - 2, 3):
        group = (text[at] << 16) | (text[at + 1] << 8) | text[at + 2]
        room[end] = alphabet[group >> 18]
        room[end + 1] = alphabet[(group >> 12) & 63]
        room[end + 2] = alphabet[(group >> 6) & 63]
        room[end + 3] = alphabet[group & 63]
        end += 4
    return end
