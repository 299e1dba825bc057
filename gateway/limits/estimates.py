"""What a call is expected to take, and what it took where the provider did not say. No I/O.

No tokenizer is asked: those of most providers are not public, and that of the others costs more than
the rest of a governed call. Bytes are counted by class instead; figures are meant to err upwards,
because settling puts the truth in their place.
"""

from typing import Final

import msgspec

from gateway.audit.event import UsageRecord
from policies.prices import PriceTable
from policies.quota import NOTHING, Usage
from policies.request import ModelCall, Operation

ASSUMED_OUTPUT: Final = 4096
"""Tokens of an answer to a call that sets no cap: what most answers stay below."""

MEDIA_BYTES: Final = 2048
"""A JSON string of so many bytes without a space is an image or a sound, not words."""

MEDIA_TOKENS: Final = 1600
"""What a large image costs at most providers."""

_GENERATING = frozenset(
    {Operation.CHAT, Operation.RESPONSES, Operation.MESSAGES, Operation.GENERATE_CONTENT}
)
_READING = _GENERATING | {Operation.EMBEDDINGS}

_LETTERS = bytes(byte for byte in range(128) if chr(byte).isalpha())
_TOKENS: Final = (
    (_LETTERS, 0.28),
    (b"0123456789", 0.45),
    (bytes(range(0x21, 0x7F)), 0.55),  # the marks: all that is left of ASCII but spaces
    (bytes(range(0xC0, 0xE0)), 0.35),  # the first bytes of characters of two: Cyrillic, Greek
    (bytes(range(0xE0, 0xF8)), 0.9),  # and of three or four: Chinese, Japanese
)
"""Tokens for a byte of each class: measured with OpenAI's o200k vocabulary on prose in English, German,
Russian and Chinese, on code and on JSON, whose counts these exceed by 3 to 40 %."""

_ESCAPE_EXCESS: Final = 1.5
"""Tokens that the six bytes of an escaped character count above what the character is."""


def estimate_tokens(text: bytes) -> int:
    """Return about how many tokens a JSON body, or any UTF-8 text, is."""
    media = [part for part in text.split(b'"') if len(part) >= MEDIA_BYTES and b" " not in part]
    for part in media:
        text = text.replace(part, b"", 1)
    tokens = -_ESCAPE_EXCESS * text.count(b"\\u")
    for kind, weight in _TOKENS:
        rest = text.translate(None, kind)
        tokens += (len(text) - len(rest)) * weight
        text = rest
    return max(1, int(tokens)) + len(media) * MEDIA_TOKENS


def expected_usage(asked: ModelCall, body: bytes | None, prices: PriceTable) -> Usage:
    """Return what a call may take at most, as far as its head and body tell."""
    usage = NOTHING
    if asked.operation in _READING and body:
        output = 0
        if asked.operation in _GENERATING:
            output = asked.max_tokens if asked.max_tokens >= 0 else ASSUMED_OUTPUT
        usage = Usage(input=estimate_tokens(body), output=output)
    usage = msgspec.structs.replace(usage, request_bytes=max(0, asked.body_bytes))
    return priced(usage, asked, prices)


def priced(usage: Usage, asked: ModelCall, prices: PriceTable) -> Usage:
    """Return the usage with what it costs; a call that names no model costs nothing."""
    if not asked.model:
        return usage
    price = prices.find(asked.provider, asked.model)
    return price.of(usage) if price else msgspec.structs.replace(usage, is_priced=False)


def true_usage(  # noqa: PLR0913 - one argument for each thing that is known of the end
    asked: ModelCall,
    body: bytes | None,
    said: UsageRecord,
    *,
    status: int,
    was_sent: bool,
    is_whole: bool,
    passed: int,
) -> UsageRecord:
    """Return what the provider said it counted; where it did not say, an estimate marked as such.

    A call that the provider refused took nothing; one that it never answered took its input if it
    was sent. `passed` is about how many tokens of the answer
    came, which counts where it broke off before the provider had told the sum.
    """
    is_counted = 200 <= status < 300 or (status == 0 and was_sent)
    if not is_counted or asked.operation not in _READING or not body:
        return said
    if said.source != "none" and is_whole:
        return said
    written = passed if asked.operation in _GENERATING else 0
    return msgspec.structs.replace(
        said,
        input=said.input or estimate_tokens(body),
        output=max(said.output, written),
        source="estimate",
    )
