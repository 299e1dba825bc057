"""Signed notes against the vector that every implementation shares, and every other spelling refused."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.signing import (
    MAX_SIGNATURES,
    BadSignature,
    CosignatureVerifier,
    Cosigner,
    Note,
    Signer,
    Verifier,
    is_key_name,
)

# The example of golang.org/x/mod/sumdb/note, which C2SP signed-note took over.
SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
NOTE = (
    TEXT + "\n\u2014 PeterNeumann "
    "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)


def test_the_shared_vector() -> None:
    """The published seed gives the published key and the published note, and opens it."""
    signer = Signer("PeterNeumann", SEED)
    assert signer.vkey == VKEY
    assert signer.sign_note(TEXT) == NOTE
    assert Verifier.from_vkey(VKEY).open_note(NOTE) == TEXT


def test_prints_only_its_public_side() -> None:
    """Neither the seed nor its base64 is in the representation."""
    shown = repr(Signer("PeterNeumann", SEED))
    assert VKEY in shown
    assert SEED.hex() not in shown
    assert base64.b64encode(SEED).decode() not in shown


@given(st.data())
def test_no_other_bytes_open(data: st.DataObject) -> None:
    """Whatever single character is changed, dropped or doubled, the note is refused."""
    verifier = Verifier.from_vkey(VKEY)
    at = data.draw(st.integers(0, len(NOTE) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda char: char != NOTE[at]))
    for changed in (
        NOTE[:at] + other + NOTE[at + 1 :],
        NOTE[:at] + NOTE[at + 1 :],
        NOTE[:at] + NOTE[at] * 2 + NOTE[at + 1 :],
    ):
        with pytest.raises(BadSignature):
            verifier.open_note(changed)


@pytest.mark.parametrize(
    "vkey",
    [
        "",
        "PeterNeumann",
        VKEY.replace("c74f20a3", "c74f20a4"),
        VKEY.replace("c74f20a3", "C74F20A3"),
        VKEY.replace("PeterNeumann", "Peter"),
        VKEY.replace("+ARpc", "+ARpd"),
        VKEY.replace("+ARpc", "+AhPc"),
        VKEY[:-4],
        VKEY.replace("/", "!"),
        "+" + VKEY.partition("+")[2],
    ],
)
def test_malformed_verification_keys(vkey: str) -> None:
    """A key whose id, kind, length or alphabet is wrong is refused."""
    with pytest.raises(ValueError, match="key"):
        Verifier.from_vkey(vkey)


def test_another_key_opens_nothing() -> None:
    """A note opens only under the key that signed it, even where the names agree."""
    other = Signer("PeterNeumann", bytes(32))
    with pytest.raises(BadSignature):
        Verifier.from_vkey(other.vkey).open_note(NOTE)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb"])
def test_names_that_would_break_a_line(name: str) -> None:
    """A name that the format cannot carry is refused where the key is made."""
    assert not is_key_name(name)
    with pytest.raises(ValueError, match="name"):
        Signer(name, bytes(32))


def test_lines_of_other_keys_are_passed_over() -> None:
    """A note bears signatures of several keys; each opens it, and a forged one of a key spoils it."""
    other = Signer("Other", bytes(32))
    both = NOTE + other.sign_note(TEXT).partition("\n\n")[2]
    for vkey in (VKEY, other.vkey):
        assert Verifier.from_vkey(vkey).open_note(both) == TEXT
    forged = both + NOTE.partition("\n\n")[2].replace("x08go/ZJ", "x08go/ZK")
    with pytest.raises(BadSignature):
        Verifier.from_vkey(VKEY).open_note(forged)
    assert Verifier.from_vkey(other.vkey).open_note(forged) == TEXT


def test_a_cosignature_bears_its_time() -> None:
    """The latest time that a cosigner put on a note is read; no other time, text or key verifies."""
    cosigner = Cosigner("w.example", bytes(range(32)))
    verifier = CosignatureVerifier.from_vkey(cosigner.vkey)
    note = NOTE + cosigner.cosign(TEXT, 1000) + cosigner.cosign(TEXT, 2000)
    assert verifier.time_of(note) == 2000
    assert Verifier.from_vkey(VKEY).open_note(note) == TEXT
    with pytest.raises(BadSignature):
        verifier.time_of(NOTE)
    with pytest.raises(BadSignature):
        verifier.time_of(NOTE + cosigner.cosign(TEXT + "more\n", 1000))
    line = base64.b64decode(cosigner.cosign(TEXT, 1000).split()[2])
    later = line[:4] + (3000).to_bytes(8, "big") + line[12:]
    with pytest.raises(BadSignature):
        verifier.time_of(f"{NOTE}\u2014 w.example {base64.b64encode(later).decode()}\n")


def test_kinds_of_keys_are_not_confused() -> None:
    """A signing key is no cosigning key, even with the same bytes."""
    with pytest.raises(ValueError, match="kind 4"):
        CosignatureVerifier.from_vkey(VKEY)
    with pytest.raises(ValueError, match="kind 1"):
        Verifier.from_vkey(Cosigner("PeterNeumann", SEED).vkey)


def test_signatures_are_counted() -> None:
    """A note with more lines than anybody needs is refused before any of them is verified."""
    with pytest.raises(BadSignature, match="more signatures"):
        Note.from_text(NOTE + NOTE.partition("\n\n")[2] * MAX_SIGNATURES)
