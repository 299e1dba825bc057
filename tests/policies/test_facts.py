"""The table of facts: total, consistent, and enough to ask a recorded question again."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.facts import FACTS, MAX_RECORDED, TRUNCATED, Kind, Phase, from_record, to_record
from policies.request import AccessRequest, ModelCall, Operation, Principal, ProviderFacts
from tests.policies.asking import ask

BLANK = from_record({})
_texts = st.text(max_size=8)
_sets = st.frozensets(_texts, max_size=3)
_lists = st.lists(_texts, max_size=3).map(tuple)

requests = st.builds(
    AccessRequest,
    principal=st.builds(
        Principal,
        issuer=_texts,
        subject=_texts,
        tenant=_texts,
        client_id=_texts,
        roles=_sets,
        scopes=_sets,
        acr=_texts,
        amr=_sets,
        authenticated_at=st.integers(0, 2**40),
    ),
    call=st.builds(
        ModelCall,
        provider=_texts,
        operation=st.sampled_from(Operation),
        model=_texts,
        stream=st.booleans(),
        max_tokens=st.integers(-1, 2**53),
        tools=_lists,
        server_tools=_lists,
        parameters=_lists,
        generates=st.booleans(),
        store=st.booleans(),
        body_bytes=st.integers(-1, 2**53),
        is_parsed=st.booleans(),
    ),
    provider=st.builds(
        ProviderFacts,
        dialect=_texts,
        region=_texts,
        baa=st.booleans(),
        phi=st.booleans(),
        zero_retention=st.booleans(),
        no_training=st.booleans(),
    ),
    client_address=_texts,
    session_id=_texts,
    user_agent=_texts,
    labels=_sets,
    purpose=_texts,
    now=st.integers(0, 2**40).map(float),
)


@pytest.mark.parametrize("fact", FACTS.values(), ids=FACTS)
def test_every_fact_is_total(fact: Any) -> None:
    """A fact of an empty question has its documented default, and a type of its kind."""
    assert fact.meaning.endswith(".")
    if fact.phase is Phase.RESPONSE:
        return
    value = fact.read(BLANK)
    if fact.name == "operation":
        assert value in list(Operation)
    elif fact.kind is Kind.TEXTS:
        assert list(value) == fact.default
    else:
        assert value == fact.default


@given(requests)
def test_a_record_holds_the_question(request: AccessRequest) -> None:
    """What is written down of any question is that question when it is read again."""
    assert from_record(to_record(request)) == request


def test_a_record_is_bounded_and_says_so() -> None:
    """Of a thousand long names the first are kept, and the record names the fact that was cut."""
    tools = tuple(f"{n}-" + "x" * 200 for n in range(1000))
    record = to_record(ask(tools=tools, labels=frozenset({"a"})))
    kept = record["tools"]
    assert isinstance(kept, list)
    assert sum(map(len, kept)) <= MAX_RECORDED
    assert tuple(kept) == tools[: len(kept)]
    assert record[TRUNCATED] == ["tools"]
    escaped = to_record(ask(tools=tuple("\x01" * 100 for _ in range(100))))["tools"]
    assert isinstance(escaped, list)
    assert len(escaped) == MAX_RECORDED // 600


@pytest.mark.parametrize(
    "record",
    [{"tennant": "x"}, {"auth_age": 5}, {"response.model": "m"}, {"stream": "yes"}, {"tools": "a"},
     {"operation": "chats"}],
    ids=str,
)  # fmt: skip
def test_what_is_no_record_is_refused(record: dict[str, Any]) -> None:
    """A name that is no fact, one that is derived or not known yet, and a wrong type are refused."""
    with pytest.raises(ValueError, match=r"fact|Expected|Invalid"):
        from_record(record)
