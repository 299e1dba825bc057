"""What transforms oblige to: judged as sent, added up without order, named in the record."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.decision import Decision, Verdict
from policies.engine import decide
from policies.known import Known
from policies.request import AccessRequest, Operation, ProviderFacts
from policies.rules import load_policy_set
from tests.policies.asking import ask

KNOWN = Known.of(
    {
        "openai": ProviderFacts(dialect="openai", region="us"),
        "azure-eu": ProviderFacts(dialect="openai", region="eu"),
        "anthropic": ProviderFacts(dialect="anthropic"),
    }
)
CALL: dict[str, Any] = {
    "generates": True,
    "parameters": ("model", "messages", "max_tokens", "logprobs", "tools"),
    "tools": ("a", "b", "mcp:git"),
    "server_tools": ("mcp:git",),
    "vouched": {"region": "us"},
}


def judge(*changes: str, rules: str = "", request: AccessRequest | None = None) -> Decision:
    """Return the decision of transforms t0, t1, … beside an allow and some rules."""
    lines = ['  - {id: a, effect: allow, match: {tenant: "*"}}\n', rules]
    lines += [
        f"  - {{id: t{n}, effect: transform, match: {{tenant: acme}}, change: {change}}}\n"
        for n, change in enumerate(changes)
    ]
    policy = load_policy_set([("p", "rules:\n" + "".join(lines))], KNOWN)
    return decide(policy, request or ask(**CALL))


JUDGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "cap": ("{max_tokens: {max: 500}}", {"max_tokens": 500}, "max_tokens = 500, asked 1000"),
    "set": (
        "{set: {store: true}}",
        {"store": True, "parameters": (*CALL["parameters"], "store")},
        "store = true",
    ),
    "strip": (
        "{strip: [logprobs]}",
        {"parameters": ("model", "messages", "max_tokens", "tools")},
        "logprobs stripped",
    ),
    "tools": (
        "{tools: {only: [a]}}",
        {"tools": ("a",), "server_tools": ()},
        "tools taken out: b, mcp:git",
    ),
    "model": (
        "{model: gpt-5-nano}",
        {"model": "gpt-5-nano"},
        "model = gpt-5-nano, asked gpt-5-mini",
    ),
    "provider": (
        "{provider: azure-eu}",
        {"provider": "azure-eu"},
        "provider = azure-eu, asked openai",
    ),
    "system": ("{system: Be kind.}", {}, "system text of 8 characters"),
    "headers": ("{headers: {set: {openai-project: p}}}", {}, "header openai-project set"),
}


@pytest.mark.parametrize(("change", "facts", "said"), JUDGED.values(), ids=JUDGED)
def test_the_call_is_judged_as_it_is_sent(change: str, facts: dict[str, Any], said: str) -> None:
    """Each change shows in the facts that the other rules see, and in words in the record."""
    decision = judge(change)
    assert decision.changes == (f"t0: {said}",)
    assert decision.judged.call == ask(**{**CALL, **facts}).call


def test_a_change_can_make_a_call_pass_and_a_route_its_region() -> None:
    """A require sees the capped tokens, and the facts of the provider that the call is sent to."""
    small = "  - {id: r, effect: require, that: {max_tokens: {max: 500}}}\n"
    europe = "  - {id: e, effect: require, that: {provider.region: eu}}\n"
    assert judge(rules=small).rules == ("r",)
    assert judge("{max_tokens: {max: 500}}", rules=small).is_allowed
    assert judge(rules=europe).rules == ("e",)
    assert judge("{provider: azure-eu}", rules=europe).is_allowed


@given(
    st.lists(
        st.sampled_from(
            [
                "{max_tokens: {max: 500}}", "{max_tokens: {max: 700, default: 600}}", "{strip: logprobs}",
                "{tools: {only: [a, b]}}", "{tools: {none: [b]}}", "{set: {n: 1}}", "{strip: [n]}",
                "{headers: {remove: [openai-beta]}}",
            ]
        ),
        min_size=1, max_size=4, unique=True,
    ),
    st.sampled_from([-1, 100, 650, 9000]),
)  # fmt: skip
def test_changes_add_up_whatever_their_order(changes: list[str], tokens: int) -> None:
    """The lowest cap, every strip, only the tools that all leave: under any order of ids."""
    asked = ask(**{**CALL, "max_tokens": tokens})
    calls = {judge(*order, request=asked).judged.call for order in itertools.permutations(changes)}
    assert len({(call.max_tokens, call.tools, frozenset(call.parameters)) for call in calls}) == 1


@pytest.mark.parametrize(("asked", "sent"), [(650, 500), (9000, 500), (499, 499), (-1, 400)])
def test_of_several_caps_the_lowest_holds(asked: int, sent: int) -> None:
    """Between the caps, above both, below both, and where the caller set none."""
    caps = ("{max_tokens: {max: 700, default: 600}}", "{max_tokens: {max: 500, default: 400}}")
    for changes in (caps, caps[::-1]):
        decision = judge(*changes, request=ask(**{**CALL, "max_tokens": asked}))
        assert decision.judged.call.max_tokens == sent


def test_of_two_values_the_first_id_holds() -> None:
    """Where two transforms want different values the first by id decides, and the other is named."""
    decision = judge("{model: m1, set: {n: 1}}", "{model: m2, set: {n: 2}}")
    assert decision.judged.call.model == "m1"
    assert "t1: model is overruled" in decision.changes
    assert "t1: n is overruled" in decision.changes
    same = judge("{model: m1}", "{model: m1}")
    assert same.changes == ("t0: model = m1, asked gpt-5-mini",)


IMPOSSIBLE: dict[str, tuple[str, dict[str, Any]]] = {
    "dialect": ("{provider: anthropic}", {}),
    "batch": ("{strip: [n]}", {"operation": Operation.BATCHES, "parameters": ("requests",)}),
    "upload": ("{set: {n: 1}}", {"operation": Operation.AUDIO, "parameters": (), "body_bytes": -1}),
    "model-of-upload": ("{model: x}", {"operation": Operation.AUDIO, "parameters": ()}),
}


@pytest.mark.parametrize(("change", "facts"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_changed_is_denied(change: str, facts: dict[str, Any]) -> None:
    """A change that the call has no place for denies it, and names the transform."""
    decision = judge(change, request=ask(**{**CALL, **facts}))
    assert (decision.verdict, decision.rules) == (Verdict.DENY, ("t0",))
    assert "'t0'" in decision.reasons[0]
    assert decision.obligations is None


def test_a_call_without_the_fields_is_left_alone() -> None:
    """A cap, a system text or a tool list says nothing about a call that no model answers."""
    asked = ask(operation=Operation.MODELS, max_tokens=-1, model="", body_bytes=0)
    decision = judge("{max_tokens: {max: 5}, system: x, tools: {only: [a]}}", request=asked)
    assert decision.is_allowed
    assert decision.changes == ()
    assert decision.obligations is not None
    assert not decision.obligations.touch_body
