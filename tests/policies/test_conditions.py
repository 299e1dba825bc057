"""A `match:` holds for exactly the calls it describes, and never for want of words."""

import fnmatch
import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.conditions import Condition, globs, read_conditions, reads_of
from policies.document import Fault, Section, read_document
from policies.request import AccessRequest, Operation
from tests.policies.asking import NOW, PROVIDERS, ask


def read(match: str) -> tuple[list[Condition], list[Fault]]:
    """Return the conditions and faults of a mapping in flow style."""
    faults: list[Fault] = []
    top = Section(read_document(f"match: {match}", "p.yaml"), "p.yaml", faults)
    return read_conditions(top.section("match"), PROVIDERS), faults


def holds(match: str, request: AccessRequest) -> bool:
    """Return whether a faultless mapping holds for a request."""
    conditions, faults = read(match)
    assert not faults
    assert conditions
    return all(condition.holds(request) for condition in conditions)


CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "tenant": ("{tenant: acme}", {}, True),
    "tenant-other": ("{tenant: acme}", {"tenant": "acme2"}, False),
    "tenant-case": ("{tenant: acme}", {"tenant": "ACME"}, False),
    "tenant-any": ('{tenant: "*"}', {"tenant": ""}, False),
    "absent-glob": ('{purpose: "?*"}', {}, False),
    "absent-not": ('{not: {purpose: "*"}}', {}, True),
    "tenant-list": ("{tenant: [beta, acme]}", {}, True),
    "tenant-glob": ('{tenant: "ac*"}', {}, True),
    "glob-is-whole": ('{tenant: "c*"}', {}, False),
    "glob-newline": ('{tenant: "acme"}', {"tenant": "acme\n"}, False),
    "glob-newline-wild": ('{tenant: "ac?e"}', {"tenant": "acme\n"}, False),
    "glob-question": ('{tenant: "acm?"}', {"tenant": "acm"}, False),
    "glob-class": ('{tenant: "acm[de]"}', {}, True),
    "glob-class-not": ('{tenant: "acm[!e]"}', {}, False),
    "glob-open-bracket": ('{tenant: "ac[me"}', {"tenant": "ac[me"}, True),
    "glob-dot-is-a-dot": ('{tenant: "a.m*"}', {}, False),
    "glob-mixed": ('{tenant: [beta, "x*", "*me"]}', {}, True),
    "subject": ("{subject: alice}", {}, True),
    "subject-other": ("{subject: alice}", {"subject": "bob"}, False),
    "issuer": ('{issuer: "https://idp.*"}', {}, True),
    "issuer-other": ('{issuer: "https://idp.test"}', {"issuer": "https://idp.test.evil"}, False),
    "roles": ("{roles: engineer}", {}, True),
    "roles-one-of": ("{roles: [admin, eng*]}", {"roles": ("x", "engineer")}, True),
    "roles-none": ('{roles: "*"}', {"roles": ()}, False),
    "roles-other": ("{roles: engineer}", {"roles": ("engineers",)}, False),
    "provider": ("{provider: openai}", {}, True),
    "provider-other": ("{provider: openai}", {"provider": "anthropic"}, False),
    "provider-glob": ('{provider: "*ai"}', {}, True),
    "operation": ("{operation: chat}", {}, True),
    "operation-glob": ('{operation: ["ch*"]}', {}, True),
    "operation-other": ("{operation: chat}", {"operation": Operation.BATCHES}, False),
    "model": ('{model: "gpt-5*"}', {}, True),
    "model-exact": ("{model: gpt-5}", {}, False),
    "model-slash": ('{model: "gpt*"}', {"model": "gpt/../x"}, True),
    "model-unknown": ('{model: "*"}', {"model": ""}, False),
    "stream": ("{stream: true}", {"stream": True}, True),
    "stream-not": ("{stream: true}", {}, False),
    "no-stream": ("{stream: false}", {}, True),
    "max-tokens": ("{max_tokens: {max: 1000}}", {}, True),
    "max-tokens-over": ("{max_tokens: {max: 999}}", {}, False),
    "max-tokens-under": ("{max_tokens: {min: 1001}}", {}, False),
    "max-tokens-both": ("{max_tokens: {min: 1000, max: 1000}}", {}, True),
    "max-tokens-zero": ("{max_tokens: {max: 0}}", {"max_tokens": 0}, True),
    "max-tokens-absent": ("{max_tokens: {max: 9007199254740992}}", {"max_tokens": -1}, False),
    "max-tokens-absent-min": ("{max_tokens: {min: 4096}}", {"max_tokens": -1}, True),
    "tools": ("{tools: [search, exec]}", {"tools": ("a", "exec")}, True),
    "tools-none": ('{tools: "*"}', {"tools": ()}, False),
    "tools-only": ("{tools: {only: [a, b]}}", {"tools": ("a", "b", "a")}, True),
    "tools-only-other": ('{tools: {only: ["a*"]}}', {"tools": ("a", "b")}, False),
    "tools-only-none": ("{tools: {only: [a]}}", {"tools": ()}, True),
    "body": ("{body_bytes: {max: 2048}}", {}, True),
    "body-over": ("{body_bytes: {max: 2047}}", {}, False),
    "body-unknown": ("{body_bytes: {max: 9007199254740992}}", {"body_bytes": -1}, False),
    "address": ("{client_address: 10.0.0.0/8}", {}, True),
    "address-one": ("{client_address: 10.1.2.3}", {}, True),
    "address-next": ("{client_address: 10.1.2.2}", {}, False),
    "address-other": ("{client_address: 10.0.0.0/8}", {"address": "11.0.0.0"}, False),
    "address-list": ('{client_address: ["::1", 10.0.0.0/8]}', {}, True),
    "address-v6": ('{client_address: "2001:db8::/32"}', {"address": "2001:db8:1::9"}, True),
    "address-v6-other": ('{client_address: "2001:db8::/32"}', {"address": "2001:db9::"}, False),
    "address-v6-scoped": ('{client_address: "fe80::/10"}', {"address": "fe80::1%eth0"}, True),
    "address-mapped": ("{client_address: 10.0.0.0/8}", {"address": "::ffff:10.9.9.9"}, True),
    "address-mapped-other": ("{client_address: 10.0.0.0/8}", {"address": "::ffff:11.0.0.1"}, False),
    "address-mapped-not-v6": ('{client_address: "::/0"}', {"address": "::ffff:10.0.0.1"}, False),
    "address-every-v4": ("{client_address: 0.0.0.0/0}", {"address": "::1"}, False),
    "and": ("{tenant: acme, stream: true}", {}, False),
    "all": ("{all: [{tenant: acme}, {provider: openai}]}", {}, True),
    "all-but-one": ("{all: [{tenant: acme}, {provider: gemini}]}", {}, False),
    "any": ("{any: [{tenant: beta}, {provider: openai}]}", {}, True),
    "any-none": ("{any: [{tenant: beta}, {provider: gemini}]}", {}, False),
    "any-item-is-and": ("{any: [{tenant: acme, provider: gemini}]}", {}, False),
    "any-beside": ("{tenant: beta, any: [{provider: openai}]}", {}, False),
    "not": ("{not: {tenant: beta}}", {}, True),
    "not-both": ("{not: {tenant: acme, provider: gemini}}", {}, True),
    "not-all": ("{not: {tenant: acme, provider: openai}}", {}, False),
    "not-absent-tokens": ("{not: {max_tokens: {max: 4096}}}", {"max_tokens": -1}, True),
    "not-not": ("{not: {not: {tenant: acme}}}", {}, True),
    "model-case": ("{model: GPT-5-mini}", {"model": "gpt-5-MINI"}, True),
    "model-case-glob": ('{model: "GPT-*"}', {}, True),
    "amr-all": ("{amr: {all: [pwd, otp]}}", {"amr": frozenset({"otp", "pwd", "x"})}, True),
    "amr-all-but-one": ("{amr: {all: [pwd, otp]}}", {"amr": frozenset({"pwd"})}, False),
    "amr-none": ("{amr: {none: [sms, 'voice*']}}", {"amr": frozenset({"voice1"})}, False),
    "amr-none-of-nothing": ("{amr: {none: sms}}", {}, True),
    "amr-any-and-none": ("{amr: {any: mfa, none: sms}}", {"amr": frozenset({"mfa"})}, True),
    "acr": ('{acr: "urn:mfa*"}', {"acr": "urn:mfa:2"}, True),
    "auth-age": ("{auth_age: {max: 15m}}", {"authenticated_at": int(NOW) - 900}, True),
    "auth-age-over": ("{auth_age: {max: 15m}}", {"authenticated_at": int(NOW) - 901}, False),
    "auth-age-ahead": ("{auth_age: {max: 0s}}", {"authenticated_at": int(NOW) + 5}, True),
    "auth-age-unknown": ("{auth_age: {max: 365d}}", {}, False),
    "size-with-unit": ("{body_bytes: {max: 2KiB}}", {}, True),
    "region": ("{provider.region: [eu, ch]}", {"vouched": {"region": "eu"}}, True),
    "region-unknown": ('{provider.region: "*"}', {}, False),
    "no-baa": ("{provider.baa: false}", {}, True),
    "labels": ("{labels: 'phi*'}", {"labels": frozenset({"phi.mrn"})}, True),
    "user-agent": ('{user_agent: "claude-cli/*"}', {"user_agent": "claude-cli/2.1"}, True),
    "hours": ('{time: {zone: UTC, from: "08:00", to: "09:00"}}', {}, True),
    "hours-end": ('{time: {zone: Europe/Paris, from: "08:00", to: "09:00"}}', {}, False),
    "hours-begin": ('{time: {zone: Europe/Paris, from: "09:00"}}', {}, True),
    "days": ("{time: {zone: UTC, days: [mon, fri]}}", {}, True),
    "days-run": ("{time: {zone: UTC, days: sat-thu}}", {}, False),
    "day-over-there": ("{time: {zone: Pacific/Kiritimati, days: sat}}", {"now": NOW + 7200}, True),
    "night": ('{time: {zone: UTC, from: "22:00", to: "06:00"}}', {"now": NOW - 7201}, True),
    "night-end": ('{time: {zone: UTC, from: "22:00", to: "06:00"}}', {"now": NOW - 7200}, False),
    "night-of-thursday": (
        '{time: {zone: UTC, days: thu, from: "22:00", to: "06:00"}}',
        {"now": NOW - 7201},
        True,
    ),
    "night-of-friday": (
        '{time: {zone: UTC, days: fri, from: "22:00", to: "06:00"}}',
        {"now": NOW - 7201},
        False,
    ),
    "since": ("{time: {zone: UTC, since: 2027-01-15}}", {}, True),
    "since-tomorrow": ("{time: {zone: UTC, since: 2027-01-16}}", {}, False),
    "until": ("{time: {zone: UTC, until: 2027-01-15}}", {}, True),
    "until-yesterday": ("{time: {zone: UTC, until: 2027-01-14}}", {}, False),
    "nested": ("{all: [{any: [{not: {tenant: acme}}, {roles: engineer}]}]}", {}, True),
}


@pytest.mark.parametrize(("match", "facts", "expected"), CASES.values(), ids=CASES)
def test_a_match_holds_for_what_it_describes(
    match: str, facts: dict[str, Any], *, expected: bool
) -> None:
    """Each kind of condition holds for its facts and for no other."""
    assert holds(match, ask(**facts)) is expected


@pytest.mark.parametrize("address", ["", "unix:", "10.1.2.3:80", "10.1.2.300", "localhost"])
def test_an_address_that_cannot_be_read_is_an_error(address: str) -> None:
    """An unreadable address neither matches nor fails to: the rule breaks, also under `not`."""
    for match in ("{client_address: 0.0.0.0/0}", "{not: {client_address: 0.0.0.0/0}}"):
        with pytest.raises(ValueError, match="address"):
            holds(match, ask(address=address))


def test_a_hollow_group_holds_for_nothing() -> None:
    """An empty mapping in `all` or `any` is a fault, and even used it would match no call."""
    for group in ("all", "any"):
        conditions, faults = read(f"{{{group}: [{{}}]}}")
        assert faults
        assert not conditions[0].holds(ask())


def test_faults_add_up() -> None:
    """All wrong conditions of a mapping, however deep, are reported at once."""
    _, faults = read("{tenant: 5, any: [{stream: yes}, {not: {provider: x}}], rolls: a}")
    assert len(faults) == 4


@pytest.mark.parametrize(
    ("match", "facts"),
    [
        ("{tenant: a, model: b}", {"tenant", "model"}),
        ("{any: [{tools: a}], not: {all: [{stream: true}]}}", {"tools", "stream"}),
    ],
    ids=["flat", "nested"],
)
def test_the_facts_a_match_reads_are_known(match: str, facts: set[str]) -> None:
    """A mapping knows which facts it reads, nested ones included."""
    assert reads_of(read(match)[0]) == facts


@given(
    st.lists(st.text("ab*?[]!-.", min_size=1, max_size=5), min_size=1, max_size=4),
    st.text("ab[]!-.\n", max_size=5),
)
def test_globs_agree_with_the_shell(patterns: list[str], text: str) -> None:
    """A list of patterns matches where one of them does, as fnmatch has it."""
    expected = any(fnmatch.fnmatchcase(text, each) for each in patterns)
    assert globs(patterns)(text) is expected


@given(st.ip_addresses(), st.ip_addresses(), st.integers(0, 128))
def test_networks_agree_with_arithmetic(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
    other: ipaddress.IPv4Address | ipaddress.IPv6Address,
    bits: int,
) -> None:
    """An address is within a network when the first bits are the same, and the version is."""
    bits = min(bits, other.max_prefixlen)
    network = ipaddress.ip_network((other, bits), strict=False)
    conditions, faults = read(f'{{client_address: "{network}"}}')
    mapped = getattr(address, "ipv4_mapped", None) or address
    shift = other.max_prefixlen - bits
    expected = mapped.version == other.version and int(mapped) >> shift == int(other) >> shift
    if not faults:
        assert conditions[0].holds(ask(address=str(address))) is expected
