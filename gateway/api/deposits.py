"""Reading deposited keys: the one place where a provider key arrives as plaintext.

What is read here goes into `Secret`s and on to `keys.session.seal_session`, nowhere else. A key is
taken as bytes out of the buffer that it came in; it becomes text only where JSON escapes stand in it.
"""

import base64
import re
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import msgspec

from gateway.errors import Refused
from gateway.providers.provider import Provider
from keys.hpke import SealedDeposit
from keys.secret import Secret
from keys.session import Deposit

MAX_BODY_BYTES: Final = 16 * 1024
MAX_KEYS: Final = 16
MAX_KEY_BYTES: Final = 4096
MAX_LABEL: Final = 128

# A key becomes part of a header field: visible ASCII, or it could end the field (CR, LF).
_KEY = re.compile(rb"[\x21-\x7e]{1,%d}" % MAX_KEY_BYTES)

Request = TypeVar("Request", bound="_Deposited")

OpenSealed = Callable[[SealedDeposit], bytearray]
"""Returns the plaintext of a sealed deposit, to be wiped; raises `Refused` if it does not open."""


class Enc(msgspec.Struct, forbid_unknown_fields=True):
    """Keys sealed by HPKE: `ct` is base64url, without padding, of encapsulated key ‖ ciphertext."""

    kid: str
    kem: str
    ct: str


class _Deposited(msgspec.Struct, forbid_unknown_fields=True):
    """Keys in clear or sealed: `keys` or `enc`. Never printed."""

    keys: dict[str, msgspec.Raw] | None = None
    enc: Enc | None = None

    def __repr__(self) -> str:
        """Return nothing of the keys."""
        return f"{type(self).__name__}(…)"

    @property
    def form(self) -> str:
        """How the keys came: `plain` or `hpke`."""
        return "plain" if self.enc is None else "hpke"


class OpenRequest(_Deposited):
    """The body of `POST /v1/sessions`."""

    ttl_seconds: int | None = None
    idle_seconds: int | None = None
    label: str = ""


class RotateRequest(_Deposited):
    """The body of `POST /v1/sessions/{session_id}/rotate`."""

    overlap_seconds: int | None = None


_open_request = msgspec.json.Decoder(OpenRequest)
_rotate_request = msgspec.json.Decoder(RotateRequest)
_keys = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text = msgspec.json.Decoder(str)


def read_open_request(
    body: bytes, providers: Mapping[str, Provider], open_sealed: OpenSealed
) -> tuple[OpenRequest, list[Deposit]]:
    """Return the request and its deposits, each for the origin of its configured provider.

    Raises:
        Refused: It is not as described, does not open, names an unknown provider, or a key is no
            key.
    """
    request = _decode(body, _open_request)
    if len(request.label) > MAX_LABEL:
        raise Refused("invalid_body", "The label is too long.")
    return request, _read_keys(request, providers, open_sealed)


def read_rotate_request(
    body: bytes, providers: Mapping[str, Provider], open_sealed: OpenSealed
) -> tuple[RotateRequest, list[Deposit]]:
    """Return the request and its deposits, as `read_open_request` does."""
    request = _decode(body, _rotate_request)
    return request, _read_keys(request, providers, open_sealed)


def _decode(body: bytes, decoder: msgspec.json.Decoder[Request]) -> Request:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # The decoder's message may quote the body; it stays here.
        raise Refused("invalid_body", 'Send {"keys": {"<provider>": "<key>"}} as JSON.') from None


def _read_keys(
    request: _Deposited, providers: Mapping[str, Provider], open_sealed: OpenSealed
) -> list[Deposit]:
    if request.enc is None and request.keys is not None:
        return _deposits(request.keys, providers)
    if request.enc is None or request.keys is not None:
        raise Refused("invalid_body", 'Send either "keys" or "enc".')
    plain = open_sealed(_sealed(request.enc))
    try:
        return _deposits(_keys.decode(plain), providers)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Refused("invalid_body", 'Seal {"<provider>": "<key>"} as JSON.') from None
    finally:
        plain[:] = bytes(len(plain))


def _sealed(enc: Enc) -> SealedDeposit:
    try:
        ciphertext = from_base64url(enc.ct)
    except ValueError:
        raise Refused("invalid_body", '"ct" must be base64url without padding.') from None
    return SealedDeposit(kid=enc.kid, kem=enc.kem, ciphertext=ciphertext)


def _deposits(keys: Mapping[str, msgspec.Raw], providers: Mapping[str, Provider]) -> list[Deposit]:
    if not 1 <= len(keys) <= MAX_KEYS:
        raise Refused("invalid_body", f"Deposit 1 to {MAX_KEYS} keys.")
    deposits: list[Deposit] = []
    try:
        for name, raw in keys.items():
            if name not in providers:
                known = ", ".join(sorted(providers))
                raise Refused("unknown_provider", f"Providers here are: {known}.")
            credential = _credential(memoryview(raw))
            if credential is None:
                raise Refused("invalid_body", f"The key for {name!r} is empty or not plain ASCII.")
            deposits.append(
                Deposit(provider=name, origin=providers[name].origin, credential=credential)
            )
    except BaseException:
        for deposit in deposits:
            deposit.credential.wipe()
        raise
    return deposits


def _credential(raw: memoryview) -> Secret | None:
    """Return the key that a JSON value is, None where it is none."""
    if raw[0] != 0x22:  # a quotation mark begins a string, and only that
        return None
    inner: memoryview | bytes = raw[1:-1]
    if 0x5C in inner:
        inner = _text.decode(raw).encode()
    return Secret(inner) if _KEY.fullmatch(inner) else None


def to_base64url(data: bytes) -> str:
    """Return base64url without padding (RFC 4648 5)."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def from_base64url(text: str) -> bytes:
    """Return what `to_base64url` makes this text of.

    Raises:
        ValueError: It makes it of nothing: another alphabet, padding, or spare bits that are set.
    """
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if to_base64url(data) != text:
        raise ValueError("not canonical base64url")
    return data
