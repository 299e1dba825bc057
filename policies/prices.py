"""What models cost: list prices for a million tokens, from the policy files.

    prices:
      - {provider: openai, model: "gpt-5-mini*", input: "0.25", cache_read: "0.025", output: "2"}

An exact name wins over a pattern, a longer pattern over a shorter, and the first written over later
ones. Prices are US dollars, written as text so that no float touches them. No I/O.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Final

import msgspec

from policies.conditions import globs
from policies.document import Section
from policies.known import Known
from policies.quota import Usage

MAX_KNOWN: Final = 4096
"""Models whose price is remembered; callers name models, and could name ever more."""

_PRICE = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6})?")


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Millionths of a millionth of a dollar for one token: dollars for a million, times a million."""

    input: int
    output: int
    cache_read: int
    cache_write: int

    def of(self, usage: Usage) -> Usage:
        """Return the usage with its costs, rounded up to a millionth of a dollar."""
        fresh = max(0, usage.input - usage.cache_read - usage.cache_write)
        cached = usage.cache_read * self.cache_read + usage.cache_write * self.cache_write
        return msgspec.structs.replace(
            usage,
            input_cost=-(-(fresh * self.input + cached) // 1_000_000),
            output_cost=-(-usage.output * self.output // 1_000_000),
        )


class PriceRow(msgspec.Struct, frozen=True, kw_only=True):
    """The price of the models of a provider that a pattern matches."""

    provider: str
    model: str
    price: Price


class PriceTable:
    """Every price of a policy set."""

    def __init__(self, rows: Sequence[PriceRow] = ()) -> None:
        patterned = sorted(rows, key=_vagueness)
        self._rows = [(row, globs([row.model])) for row in patterned]
        self._known: dict[tuple[str, str], Price | None] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, provider: str, model: str) -> Price | None:
        """Return the price of a model, None where nobody wrote one down."""
        key = (provider, model)
        if key not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = next(
                (
                    row.price
                    for row, matches in self._rows
                    if row.provider == provider and matches(model)
                ),
                None,
            )
        return self._known[key]


def _vagueness(row: PriceRow) -> tuple[bool, int]:
    return bool(re.search(r"[*?\[]", row.model)), -len(row.model)


def read_price(section: Section, known: Known) -> PriceRow:
    """Return the row that a section describes, noting faults in it."""
    provider, model = section.string("provider"), section.string("model")
    if provider and provider not in known.providers:
        section.fault("provider", f"{provider!r} is not configured")
    read, written = _price(section, "input"), _price(section, "output", "0")
    price = Price(
        input=read,
        output=written,
        cache_read=_price(section, "cache_read", section.string("input", "0")),
        cache_write=_price(section, "cache_write", section.string("input", "0")),
    )
    section.finish()
    return PriceRow(provider=provider, model=model, price=price)


def _price(section: Section, key: str, default: str | None = None) -> int:
    text = section.string(key, default)
    if not _PRICE.fullmatch(text):
        if text or key in section:
            section.fault(key, 'must be dollars for a million tokens, such as "1.25"')
        return 0
    return int(Decimal(text) * 1_000_000)
