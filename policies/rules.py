"""Rules and the set of them: read from YAML, compiled once, never changed.

    rules:
      - id: engineering-models
        effect: allow                 # allow | deny | require
        match: {roles: engineer, model: ["gpt-5*", "claude-*"]}
      - id: no-long-answers
        effect: require               # every matching call must also satisfy `that`
        match: {tenant: acme}
        that: {max_tokens: {max: 4096}}
        message: Ask for at most 4096 tokens.

All faults of all files are reported together. No I/O: the shell reads the files.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from policies.conditions import BODY_FACTS, Condition, read_match
from policies.document import DocumentError, Fault, Section, read_document
from policies.limits import MAX_LIMITS, Limit, read_limit
from policies.prices import PriceRow, PriceTable, read_price

_ID = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")


class Effect(StrEnum):
    """What a matching rule does."""

    ALLOW = "allow"
    DENY = "deny"
    REQUIRE = "require"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One compiled rule. `that` is empty but for `require`."""

    id: str
    effect: Effect
    match: tuple[Condition, ...]
    that: tuple[Condition, ...]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySet:
    """Every rule, limit and price in force, and the digest of the files that they came from.

    `reckons` is whether any limit counts what a call has to be estimated for.
    """

    denies: tuple[Rule, ...]
    requires: tuple[Rule, ...]
    allows: tuple[Rule, ...]
    limits: tuple[Limit, ...]
    prices: PriceTable
    reckons: bool
    reads_body: bool
    digest: str

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return every rule, denies first."""
        return self.denies + self.requires + self.allows


def load_policy_set(sources: Sequence[tuple[str, str]], providers: frozenset[str]) -> PolicySet:
    """Return the set that `sources`, pairs of path and text, compile to.

    Raises:
        DocumentError: Some file is wrong; every fault of every file is in it.
    """
    faults: list[Fault] = []
    rules: dict[str, Rule] = {}
    limits: dict[str, Limit] = {}
    prices: list[PriceRow] = []
    facts: set[str] = set()
    for path, text in sources:
        try:
            document = read_document(text, path)
        except DocumentError as error:
            faults.extend(error.faults)
            continue
        top = Section(document, path, faults)
        for section in top.sections("rules"):
            rule, read = _read_rule(section, providers)
            if rule.id and rule.id in rules:
                section.fault("id", f"{rule.id!r} is used twice")
            rules[rule.id] = rule
            facts |= read
        for section in top.sections("limits"):
            limit, read = read_limit(section, providers)
            if limit.name and limit.name in limits:
                section.fault("name", f"{limit.name!r} is used twice")
            limits[limit.name] = limit
            facts |= read
            if len(limits) > MAX_LIMITS:
                section.fault("", f"is one too many: there may be {MAX_LIMITS} limits")
        prices += [read_price(section, providers) for section in top.sections("prices")]
        top.finish()
    if faults:
        raise DocumentError(faults)
    # By id, so that no answer depends on the order in files or of them.
    in_order = [rule for _, rule in sorted(rules.items())]
    by_effect = {
        effect: tuple(rule for rule in in_order if rule.effect is effect) for effect in Effect
    }
    return PolicySet(
        denies=by_effect[Effect.DENY],
        requires=by_effect[Effect.REQUIRE],
        allows=by_effect[Effect.ALLOW],
        limits=tuple(limits.values()),
        prices=PriceTable(prices),
        reckons=any(limit.reckons for limit in limits.values()),
        reads_body=bool(facts & BODY_FACTS),
        digest=_digest(sources),
    )


def _read_rule(section: Section, providers: frozenset[str]) -> tuple[Rule, set[str]]:
    rule_id = section.string("id")
    if rule_id and not _ID.fullmatch(rule_id):
        section.fault("id", "must be 1 to 64 of a-z, 0-9, '.', '_' and '-'")
    effect = section.choice("effect", [effect.value for effect in Effect])
    message = section.string("message", "")
    match: list[Condition] = []
    that: list[Condition] = []
    facts: set[str] = set()
    if "match" in section:
        match, facts = read_match(section.section("match"), providers)
    elif effect != Effect.REQUIRE:
        section.fault("match", 'is required; to match every call write {tenant: "*"}')
    if effect == Effect.REQUIRE and "that" not in section:
        section.fault("that", "is required: what must a matching call satisfy?")
    elif "that" in section and effect != Effect.REQUIRE:
        section.fault("that", "belongs to rules with effect: require")
    if "that" in section:
        that, more = read_match(section.section("that"), providers)
        facts |= more
    section.finish()
    known = effect in list(Effect)
    rule = Rule(
        id=rule_id,
        effect=Effect(effect) if known else Effect.DENY,
        match=tuple(match),
        that=tuple(that),
        message=message,
    )
    return rule, facts


def _digest(sources: Sequence[tuple[str, str]]) -> str:
    """Return the digest of the files, whatever the order they were read in."""
    total = hashlib.sha256()
    for path, text in sorted(sources):
        for part in (path.rpartition("/")[2].encode(), text.encode()):
            total.update(len(part).to_bytes(8, "big"))
            total.update(part)
    return f"sha256:{total.hexdigest()}"
