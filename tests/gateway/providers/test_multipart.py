"""Multipart bodies are followed byte by byte: one model, seen whole, or none at all."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Refused
from gateway.providers.multipart import MAX_PARTS, MultipartScanner

TYPE = b"multipart/form-data; boundary=b"


def part(name: bytes, content: bytes, more: bytes = b"") -> bytes:
    """Return one part, its boundary in front."""
    head = b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n' % (name, more)
    return head + content + b"\r\n"


MODEL = part(b"model", b"whisper-1")
FILE = part(b"file", b"\x00--b\r--b\n--c\r\n-" * 50, b'; filename="model"')
END = b"--b--\r\n"


def read(body: bytes, expected: str | None = None, cuts: tuple[int, ...] = ()) -> MultipartScanner:
    """Feed a whole body to a scanner, cut at these places."""
    scanner = MultipartScanner(TYPE, expected)
    places = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    for start, end in pairwise(places):
        scanner.feed(body[start:end])
    scanner.finish()
    return scanner


@given(
    parts=st.permutations([MODEL, FILE, part(b"language", b"en"), part(b"empty", b"")]),
    cuts=st.lists(st.integers(1, 2000), max_size=20),
)
def test_a_model_is_found_wherever_it_stands(parts: list[bytes], cuts: list[int]) -> None:
    """In any order of parts and any cutting the model is the same, and known once it has passed."""
    scanner = read(b"".join(parts) + END, cuts=tuple(cuts))
    assert scanner.model == "whisper-1"
    assert scanner.is_decided


def test_a_body_without_a_model_is_decided_at_its_end() -> None:
    """Until the closing boundary a model may still come."""
    scanner = MultipartScanner(TYPE)
    scanner.feed(FILE)
    assert not scanner.is_decided
    scanner.feed(END)
    assert (scanner.is_decided, scanner.model) == (True, "")


@pytest.mark.parametrize(
    "body",
    [
        MODEL + part(b"model", b"other") + END,
        MODEL + part(b"MODEL", b"other") + END,
        MODEL + part(b"model[]", b"other") + END,
        part(b"m%6fdel", b"other") + END,
        part(b"model", b"x" * 300) + END,
        b"--b\r\nX: y\r\n\r\nno name\r\n" + END,
        MODEL.replace(b"name", b"name*=utf-8''x; name") + END,
        MODEL.replace(b"name", b'name="a"; name') + END,
        b"--bx\r\n" + MODEL + END,
        b"a preamble\r\n" + MODEL + END,
        b"\r\n" + MODEL + END,
        MODEL.replace(b"\r\n", b"\n") + b"--b--\n",
        b"no boundary at all",
        b"",
        MODEL,
        FILE + b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nother',
        part(b"a", b"") * (MAX_PARTS + 1) + END,
        b'--b\r\nContent-Disposition: form-data; name="' + b"a" * 9000 + b'"\r\n\r\n\r\n' + END,
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(body: bytes) -> None:
    """A second model, hidden, encoded or unended, and bodies that lenient readers read otherwise."""
    with pytest.raises(Refused) as refused:
        read(body)
    assert refused.value.code == "invalid_body"


@pytest.mark.parametrize("expected", ["whisper-1", "other", ""])
def test_the_model_must_be_the_one_that_was_judged(expected: str) -> None:
    """While a body streams, any other model than the judged one breaks it off."""
    if expected == "whisper-1":
        assert read(MODEL + FILE + END, expected).model == expected
    else:
        with pytest.raises(Refused, match="another model"):
            read(FILE + MODEL + END, expected)


@pytest.mark.parametrize(
    "content_type",
    [
        b"",
        b"application/json",
        b"multipart/form-data",
        b"multipart/form-data; boundary=a; boundary=b",
        b"multipart/form-data; boundary=" + b"a" * 71,
        b"multipart/mixed; boundary=b",
        b"multipart/form-data; boundary=a; boundary*=utf-8''b",
        b"multipart/form-data; boundary=a; boundary*0=b",
    ],
)
def test_a_content_type_names_one_boundary(content_type: bytes) -> None:
    """Without exactly one boundary nobody can say where parts begin."""
    with pytest.raises(Refused):
        MultipartScanner(content_type)
