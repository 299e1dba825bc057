"""The set of rules and limits in force: read from YAML, compiled once, never changed.

    names: {tenant: [acme], roles: [engineer]}   # optional: other names are then faults
    mode: enforce                                # or shadow: every rule of this file is tried only
    rules:
      - id: engineering-models
        effect: allow                 # allow | deny | require | transform
        match: {roles: engineer, model: ["gpt-5*", "claude-*"]}
      - id: no-long-answers
        effect: require               # every matching call must also satisfy `that`
        match: {tenant: acme}
        that: {max_tokens: {max: 4096}}
        message: Ask for at most 4096 tokens.
      - id: nothing-kept
        effect: transform             # every matching call is changed before it is judged
        match: {operation: responses}
        change: {set: {store: false}}
        mode: shadow                  # this rule is only tried: what it would do is recorded

All faults of all files are reported together. No I/O: the shell reads the files.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Self

from policies.conditions import Condition, read_conditions, read_when, reads_of
from policies.document import DocumentError, Fault, Section, read_document
from policies.facts import BODY_FACTS, FACTS, Kind
from policies.index import RuleIndex
from policies.known import Known
from policies.limits import MAX_LIMITS, Limit, read_limit
from policies.obligations import Change, read_change
from policies.prices import PriceRow, PriceTable, read_price
from policies.rule import PHI, Effect, Place, Rule, is_phi

__all__ = ["Effect", "PolicySet", "Rule", "RuleBook", "load_policy_set"]

MAX_MESSAGE: Final = 512
"""Characters of a rule's message: it goes to callers in every denial."""

_ID = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_MODES = ("enforce", "shadow")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleBook:
    """Rules that are enforced together, by effect."""

    denies: RuleIndex
    requires: RuleIndex
    allows: RuleIndex
    transforms: RuleIndex
    reads_body: bool

    @classmethod
    def of(cls, rules: Iterable[Rule], *, reads_body: bool = False) -> Self:
        """Return the book of these rules; `reads_body` says so of what stands beside them."""
        rules = list(rules)
        by_effect = {effect: [each for each in rules if each.effect is effect] for effect in Effect}
        return cls(
            denies=RuleIndex(by_effect[Effect.DENY]),
            requires=RuleIndex(by_effect[Effect.REQUIRE]),
            allows=RuleIndex(by_effect[Effect.ALLOW]),
            transforms=RuleIndex(by_effect[Effect.TRANSFORM]),
            reads_body=reads_body or any(map(_reads_body, rules)),
        )


def _reads_body(rule: Rule) -> bool:
    if rule.change is not None and rule.change != Change(
        provider=rule.change.provider,
        set_headers=rule.change.set_headers,
        remove_headers=rule.change.remove_headers,
    ):
        return True
    return not BODY_FACTS.isdisjoint(reads_of((*rule.match, *rule.that)))


@dataclass(frozen=True, kw_only=True)
class PolicySet:
    """Every rule, limit and price in force, and the digest of the files that they came from.

    `enforced` decides; `trial`, where there is one, says what would be decided otherwise.
    """

    rules: tuple[Rule, ...]
    limits: tuple[Limit, ...]
    prices: PriceTable
    known: Known
    digest: str
    enforced: RuleBook
    trial: RuleBook | None

    @classmethod
    def of(
        cls,
        rules: Iterable[Rule],
        limits: Iterable[Limit],
        known: Known,
        digest: str,
        prices: PriceTable | None = None,
    ) -> Self:
        """Return the set of these rules, limits and prices."""
        rules = tuple(sorted(rules, key=lambda rule: rule.id))
        limits = tuple(limits)
        facts = frozenset().union(*(limit.reads for limit in limits))
        reads_body = not facts.isdisjoint(BODY_FACTS)
        enforced = [rule for rule in rules if not rule.is_shadow]
        return cls(
            rules=rules,
            limits=limits,
            prices=prices or PriceTable(),
            known=known,
            digest=digest,
            enforced=RuleBook.of(enforced, reads_body=reads_body),
            trial=RuleBook.of(rules, reads_body=reads_body) if len(enforced) < len(rules) else None,
        )

    @cached_property
    def by_id(self) -> Mapping[str, Rule]:
        """Return every rule by its id."""
        return {rule.id: rule for rule in self.rules}

    @cached_property
    def reckons(self) -> bool:
        """Whether a limit counts what a call has to be estimated for."""
        return any(limit.reckons for limit in self.limits)

    @cached_property
    def reroutes(self) -> bool:
        """Whether a rule may send a call to another provider than the caller asked for."""
        changes = [rule.change for rule in self.enforced.transforms]
        return any(change is not None and change.provider for change in changes)

    def trying(self, candidate: "PolicySet") -> "PolicySet":
        """Return this set with all rules of another one tried beside it, instead of its own shadows."""
        return replace(self, trial=candidate.trial or candidate.enforced)


def load_policy_set(sources: Sequence[tuple[str, str]], known: Known) -> PolicySet:
    """Return the set that `sources`, pairs of path and text, compile to.

    Raises:
        DocumentError: Some file is wrong; every fault of every file is in it.
    """
    faults: list[Fault] = []
    tops: list[Section] = []
    for path, text in sources:
        try:
            tops.append(Section(read_document(text, path), path, faults))
        except DocumentError as error:
            faults.extend(error.faults)
    known = known.with_names(_declared_names(tops))
    rules: dict[str, Rule] = {}
    limits: dict[str, Limit] = {}
    prices: list[PriceRow] = []
    for top in tops:
        is_shadow = top.choice("mode", _MODES, "enforce") == "shadow"
        for section in top.sections("rules"):
            rule = _read_rule(section, known, is_shadow=is_shadow)
            if rule.id and rule.id in rules:
                there = rules[rule.id].place
                section.fault("id", f"{rule.id!r} is used twice, also at {there.path}:{there.line}")
            rules.setdefault(rule.id, rule)
        for section in top.sections("limits"):
            limit = read_limit(section, known)
            if limit.name and limit.name in limits:
                section.fault("name", f"{limit.name!r} is used twice")
            limits[limit.name] = limit
            if len(limits) > MAX_LIMITS:
                section.fault("", f"is one too many: there may be {MAX_LIMITS} limits")
        prices += [read_price(section, known) for section in top.sections("prices")]
        top.finish()
    if faults:
        raise DocumentError(faults)
    digest, table = digest_of(sources), PriceTable(prices)
    return PolicySet.of(rules.values(), limits.values(), known, digest, table)


def _declared_names(tops: Sequence[Section]) -> dict[str, frozenset[str]]:
    """Return the names that files declare, by fact; those of several files add up."""
    declared: dict[str, frozenset[str]] = {}
    for top in tops:
        if top.value("names") is None:
            continue
        section = top.section("names")
        for name, fact in FACTS.items():
            if fact.kind in {Kind.TEXT, Kind.TEXTS} and name in section:
                declared[name] = declared.get(name, frozenset()) | set(section.strings(name))
        section.finish()
    return declared


def _read_rule(section: Section, known: Known, *, is_shadow: bool) -> Rule:
    rule_id = section.string("id")
    if rule_id and not _ID.fullmatch(rule_id):
        section.fault("id", "must be 1 to 64 of a-z, 0-9, '.', '_' and '-'")
    if rule_id == PHI:
        section.fault(
            "id", "'phi' is the rule that is built in; choose another, such as phi-clinic"
        )
    effect = section.choice("effect", [effect.value for effect in Effect])
    message = section.string("message", "")
    if len(message) > MAX_MESSAGE:
        section.fault("message", f"is longer than {MAX_MESSAGE} characters; shorten it")
    mode = section.choice("mode", _MODES, "enforce")
    match = read_conditions(section.section("match"), known) if "match" in section else []
    match += read_when(section, known)
    if "match" not in section and "when" not in section and effect != Effect.REQUIRE:
        section.fault("match", 'is required; to match every call write {tenant: "*"}')
    that = _read_that(section, effect, known)
    change = _read_change(section, effect, known)
    section.finish()
    return Rule(
        id=rule_id,
        effect=Effect(effect) if effect in list(Effect) else Effect.DENY,
        match=tuple(match),
        that=tuple(that),
        change=change,
        message=message,
        is_shadow=is_shadow or mode == "shadow",
        authorises_phi=effect == Effect.ALLOW and _authorises_phi(section, match),
        place=Place(path=section.path, line=section.line, column=section.column),
    )


def _read_that(section: Section, effect: str, known: Known) -> list[Condition]:
    if "that" not in section:
        if effect == Effect.REQUIRE:
            section.fault(
                "that", "is required: what must a matching call satisfy? For example {stream: true}"
            )
        return []
    if effect != Effect.REQUIRE:
        section.fault("that", "belongs to rules with effect: require")
    return read_conditions(section.section("that"), known)


def _read_change(section: Section, effect: str, known: Known) -> Change | None:
    if "change" not in section:
        if effect == Effect.TRANSFORM:
            section.fault(
                "change", "is required: what is to change? For example {max_tokens: {max: 4096}}"
            )
        return None
    if effect != Effect.TRANSFORM:
        section.fault("change", "belongs to rules with effect: transform")
    return read_change(section.section("change"), known)


def _authorises_phi(section: Section, match: Sequence[Condition]) -> bool:
    """Return whether an allow names PHI; one that does must name its purposes and tenants too."""
    by_name = {condition.name: condition for condition in match}
    labels = by_name.get("labels")
    if labels is None or not any(map(is_phi, _labels_named(labels))):
        return False
    for name, example in (("purpose", "treatment"), ("tenant", "clinic")):
        if name not in by_name or not by_name[name].exact:
            section.fault(
                "match",
                f"authorises PHI, so it must name its {name}s one by one: {name}: {example}",
            )
    return True


def _labels_named(condition: Condition) -> frozenset[str]:
    parts = [part for part in condition.spec[2:] if isinstance(part, tuple)]
    return frozenset().union(*(wanted for how, wanted in parts if how in {"any", "all"}))


def digest_of(sources: Iterable[tuple[str, str]]) -> str:
    """Return the digest of the files, whatever the order they were read in."""
    total = hashlib.sha256()
    for path, text in sorted(sources):
        for part in (path.rpartition("/")[2].encode(), text.encode()):
            total.update(len(part).to_bytes(8, "big"))
            total.update(part)
    return f"sha256:{total.hexdigest()}"
