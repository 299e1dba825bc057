"""A credential is blotted out of what comes back, in every form it is looked for, and nothing else."""

import base64
import json
import mmap
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.echo import MIN_BYTES, SCRATCH_FACTOR, blot
from keys.region import SLOT_BYTES

KEY = b"sk-planted-5f1d7c0e9b8a4f6d"
MAX_KEY_BYTES = 4096

credentials = st.binary(min_size=MIN_BYTES, max_size=200).map(
    lambda raw: bytes(0x21 + byte % 94 for byte in raw).replace(b"*", b"+")
)


def blotted(credential: bytes, data: bytes) -> tuple[bytes, int]:
    """Return data and what may begin another, as `blot` leaves them; its scratch must be zeros."""
    memory = memoryview(mmap.mmap(-1, SLOT_BYTES))
    memory[: len(credential)] = credential
    buffer = bytearray(data)
    held = blot(memory[: len(credential)], memory[len(credential) :], buffer)
    assert memory[len(credential) :] == bytes(SLOT_BYTES - len(credential))
    assert len(buffer) == len(data)
    return bytes(buffer), held


def percent_small(key: bytes) -> bytes:
    """Return the percent-encoding that some write with small digits."""
    return b"".join(
        bytes([byte]) if chr(byte).isalnum() or byte in b"-._~" else b"%%%02x" % byte
        for byte in key
    )


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "itself": lambda key: key,
    "percent": lambda key: quote(key, safe="").encode(),
    "percent, small": percent_small,
    "json": lambda key: json.dumps(key.decode()).encode()[1:-1],
    "json, slashes too": lambda key: json.dumps(key.decode()).encode()[1:-1].replace(b"/", b"\\/"),
}


@given(credentials, st.binary(max_size=50), st.binary(max_size=50))
def test_the_credential_is_found_anywhere(key: bytes, before: bytes, after: bytes) -> None:
    """Whatever stands around it, the credential is gone and everything else is as it was."""
    data, _ = blotted(key, before + key + after)
    assert key not in data
    assert len(data) == len(before + key + after)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@given(key=credentials)
def test_each_form_is_found(form: Callable[[bytes], bytes], key: bytes) -> None:
    """As the credential may be written in a URL or in JSON, it is stars and the rest stays."""
    data, held = blotted(key, b"\n" + form(key) + b"\n")
    assert data.count(b"*") >= len(key)
    assert key not in data
    assert (data[:1], data[-1:], held) == (b"\n", b"\n", 0)


@given(credentials, st.binary(max_size=5), st.binary(max_size=5), st.booleans())
def test_base64_is_found(
    key: bytes,
    before: bytes,
    after: bytes,
    is_url: bool,  # noqa: FBT001 - drawn
) -> None:
    """Encoded with whatever stood beside it, not more than two bytes at each end can be read."""
    encode = base64.urlsafe_b64encode if is_url else base64.b64encode
    data, _ = blotted(key, b"<" + encode(before + key + after) + b">")
    stars = data.count(b"*")
    assert stars >= 4 * ((len(key) - 2) // 3)
    assert data.startswith(b"<")
    assert data.endswith(b">")


@given(credentials, st.binary(max_size=20), st.data())
def test_what_may_begin_another_is_held(key: bytes, before: bytes, data: st.DataObject) -> None:
    """At the end of the data, at least that much is held as the credential begins with."""
    begun = data.draw(st.integers(1, len(key) - 1))
    _, held = blotted(key, before + key[:begun])
    assert held >= begun


@given(credentials, st.text(alphabet="абв", max_size=30))
def test_nothing_else_is_touched(key: bytes, text: str) -> None:
    """Data in which the credential does not stand comes back as it was."""
    assert blotted(key, text.encode()) == (text.encode(), 0)


def test_masks_of_providers_stay() -> None:
    """A key that the provider has masked itself is left as it is."""
    message = b"Incorrect API key provided: sk-plant*******4f6d."
    assert blotted(KEY, message) == (message, 0)


def test_short_credentials_are_left() -> None:
    """What is too short to be told from chance garbles nothing."""
    assert blotted(b"k" * (MIN_BYTES - 1), b"kkkkkkkkkkkk") == (b"kkkkkkkkkkkk", 0)


def test_the_longest_credential_fits_a_slot() -> None:
    """Even when every byte of the longest key is percent-encoded, the slot has room."""
    assert MAX_KEY_BYTES * (1 + SCRATCH_FACTOR) <= SLOT_BYTES
    key = b"+" * MAX_KEY_BYTES
    assert set(blotted(key, b"%2b" * MAX_KEY_BYTES)[0]) == {ord("*")}
