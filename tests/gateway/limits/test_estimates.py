"""What a call is expected to take, and what it took where nobody said."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.audit.event import UsageRecord
from gateway.limits.estimates import (
    ASSUMED_OUTPUT,
    MEDIA_TOKENS,
    estimate_tokens,
    expected_usage,
    priced,
    true_usage,
)
from policies.prices import PriceTable
from policies.quota import Usage
from policies.request import ModelCall, Operation
from tests.policies.asking import policy_set_of

PRICES = policy_set_of("prices: [{provider: openai, model: m, input: '1', output: '2'}]").prices
CALL = ModelCall(provider="openai", operation=Operation.CHAT, model="m", max_tokens=100)
BODY = b'{"model":"m","messages":[{"role":"user","content":"Why is the sky blue?"}]}'

MEASURED = {
    "english": (
        "The quick development of large language models has changed how people write software, "
        "and many teams now depend on providers that charge by the token. ",
        28,
    ),
    "german": (
        "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung "
        "aller staatlichen Gewalt. ",
        26,
    ),
    "chinese": ("人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心", 24),
    "russian": ("Все люди рождаются свободными и равными в своем достоинстве и правах. ", 18),  # noqa: RUF001 - it is Russian
}


@pytest.mark.parametrize(("text", "tokens"), MEASURED.values(), ids=MEASURED)
def test_estimates_are_near_and_above_what_a_tokenizer_counts(text: str, tokens: int) -> None:
    """Prose in several scripts is estimated between its o200k count and twice that."""
    assert tokens <= estimate_tokens(text.encode()) <= 2 * tokens


def test_an_image_is_not_counted_as_words() -> None:
    """A megabyte of base64 counts as one image, and the words beside it as words."""
    image = base64.b64encode(bytes(range(256)) * 4096).decode()
    words = json.dumps({"text": "Why is the sky blue?"}).encode()
    both = json.dumps({"text": "Why is the sky blue?", "data": image}).encode()
    extra = estimate_tokens(both) - estimate_tokens(words)
    assert MEDIA_TOKENS <= extra <= MEDIA_TOKENS + 10


@given(st.binary(max_size=8192))
def test_any_bytes_are_estimated(text: bytes) -> None:
    """Whatever a body is, it counts as at least one token, and never as more than its bytes."""
    assert 1 <= estimate_tokens(text) <= max(1, len(text)) + MEDIA_TOKENS * (len(text) // 2048)


EXPECTED: dict[str, tuple[dict[str, Any], bytes | None, int]] = {
    "capped": ({}, BODY, 100),
    "uncapped": ({"max_tokens": -1}, BODY, ASSUMED_OUTPUT),
    "embedding": ({"operation": Operation.EMBEDDINGS}, BODY, 0),
}


@pytest.mark.parametrize(("facts", "body", "output"), EXPECTED.values(), ids=EXPECTED)
def test_a_call_may_write_what_it_asks_for(
    facts: dict[str, Any], body: bytes | None, output: int
) -> None:
    """The answer is expected to be as long as the call allows, or as most answers are."""
    call = ModelCall(**{"provider": "openai", "operation": Operation.CHAT, "model": "m", "max_tokens": 100, **facts})  # fmt: skip  # noqa: E501 - one call
    usage = expected_usage(call, body, PRICES)
    assert (usage.input, usage.output) == (estimate_tokens(BODY), output)
    assert (usage.input_cost, usage.output_cost) == (usage.input, 2 * output)


@pytest.mark.parametrize("operation", [Operation.FILES, Operation.MODELS])
def test_what_reads_no_tokens_is_expected_to_take_none(operation: Operation) -> None:
    """A call that no model reads takes bytes and nothing else."""
    call = ModelCall(provider="openai", operation=operation, body_bytes=12)
    assert expected_usage(call, BODY, PRICES) == Usage(request_bytes=12)


def test_a_model_without_a_price_is_said_to_have_none() -> None:
    """An unknown price is told apart from a price of nothing."""
    assert priced(Usage(input=5), CALL, PriceTable()).is_priced is False
    assert priced(Usage(input=5), CALL, PRICES).is_priced is True


SAID = UsageRecord(input=10, output=20, source="provider")
NONE = UsageRecord()
BEGUN = UsageRecord(input=10, output=1, source="provider")
TRUE: dict[str, tuple[UsageRecord, dict[str, Any], tuple[int, int, str]]] = {
    "said": (SAID, {}, (10, 20, "provider")),
    "said-in-an-error": (SAID, {"status": 500}, (10, 20, "provider")),
    "not-said": (NONE, {}, (estimate_tokens(BODY), 7, "estimate")),
    "refused": (NONE, {"status": 429}, (0, 0, "none")),
    "never-sent": (NONE, {"status": 0, "was_sent": False}, (0, 0, "none")),
    "never-answered": (NONE, {"status": 0, "passed": 0}, (estimate_tokens(BODY), 0, "estimate")),
    "broken-off": (BEGUN, {"is_whole": False}, (10, 7, "estimate")),
    "broken-off-late": (SAID, {"is_whole": False}, (10, 20, "estimate")),
}


@pytest.mark.parametrize(("said", "how", "expected"), TRUE.values(), ids=TRUE)
def test_what_was_not_said_is_estimated_and_marked(
    said: UsageRecord, how: dict[str, Any], expected: tuple[int, int, str]
) -> None:
    """The provider's word stands where it is whole; else an estimate, which never passes for it."""
    end = {"status": 200, "was_sent": True, "is_whole": True, "passed": 7} | how
    usage = true_usage(CALL, BODY, said, **end)
    assert (usage.input, usage.output, usage.source) == expected
