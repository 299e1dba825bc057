"""Reading deposited keys: the one place where a provider key arrives as plaintext.

What is read here goes into `Secret`s and on to `keys.session.seal_session`, nowhere else.
"""

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from gateway.errors import Refused
from gateway.providers.provider import Provider
from keys.secret import Secret
from keys.session import Deposit

MAX_BODY_BYTES: Final = 16 * 1024
MAX_KEYS: Final = 16
MAX_KEY_BYTES: Final = 4096

# A key becomes part of a header field: visible ASCII, or it could end the field (CR, LF).
_KEY = re.compile(rf"[\x21-\x7e]{{1,{MAX_KEY_BYTES}}}")


class OpenRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/sessions`. Never printed: it holds keys."""

    keys: dict[str, str]
    ttl_seconds: int | None = None
    idle_seconds: int | None = None
    label: str = ""

    def __repr__(self) -> str:
        """Return nothing of the keys."""
        return "OpenRequest(…)"


def read_open_request(
    body: bytes, providers: Mapping[str, Provider]
) -> tuple[OpenRequest, list[Deposit]]:
    """Return the request and its deposits, each for the origin of its configured provider.

    Raises:
        Refused: It is not as described, names an unknown provider, or a key is no key.
    """
    try:
        request = msgspec.json.decode(body, type=OpenRequest)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # The decoder's message may quote the body; it stays here.
        raise Refused("invalid_body", 'Send {"keys": {"<provider>": "<key>"}} as JSON.') from None
    if not 1 <= len(request.keys) <= MAX_KEYS:
        raise Refused("invalid_body", f"Deposit 1 to {MAX_KEYS} keys.")
    if len(request.label) > 128:
        raise Refused("invalid_body", "The label is too long.")
    for name, key in request.keys.items():
        if name not in providers:
            known = ", ".join(sorted(providers))
            raise Refused("unknown_provider", f"Providers here are: {known}.")
        if not _KEY.fullmatch(key):
            raise Refused("invalid_body", f"The key for {name!r} is empty or not plain ASCII.")
    return request, [
        Deposit(provider=name, origin=providers[name].origin, credential=Secret(key.encode()))
        for name, key in request.keys.items()
    ]
