"""Tests of a policy: `*_test.yaml` beside its files, run with frozen time and without a gateway.

    now: 2027-01-15T09:00:00Z                # the instant of every test that names no other
    providers:                               # optional: what is vouched for, instead of the configuration
      mistral: {region: eu, no_training: true}
    fixtures:                                # facts under a name; what is not said has its default
      alice: {tenant: acme, subject: alice, roles: [engineer]}
      chat: {provider: openai, operation: chat, model: gpt-5, max_tokens: 100}
    tests:
      - name: engineers may chat
        given: [alice, chat]                 # later fixtures win over earlier ones
        with: {stream: true, auth_age: 5m}   # facts of this test alone
        expect: allow                        # or deny, error
      - name: long answers are cut
        given: [alice, chat]
        with: {max_tokens: 9000, generates: true}
        expect:
          verdict: allow
          rules: engineers                   # ids of the rules that settle it
          changes: [max_tokens = 4096]       # part of each change, in order
          would: deny                        # what rules in shadow would decide
          reason: tenant                     # part of some reason
          message: Not here.                 # what the caller is told
      - name: who may use what
        matrix: [[alice, bob], [chat, batch]]   # every combination of one of each
        allow: [[alice, chat]]                  # these pass, all others do not

No I/O.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from policies.conditions import Condition
from policies.decision import Decision, Verdict
from policies.document import DocumentError, Fault, Section, Value, nearest, read_document
from policies.engine import decide
from policies.facts import FACTS, from_record
from policies.known import Known
from policies.request import AccessRequest, ProviderFacts
from policies.rules import PolicySet

SUFFIX: Final = "_test.yaml"
"""What a file's name ends with that holds tests, not rules."""

MAX_COMBINATIONS: Final = 10_000
"""Of one matrix; a reload runs every test before it takes effect."""

_NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
_VERDICTS = [verdict.value for verdict in Verdict]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What a decision has to be; what is None is not looked at."""

    verdict: str
    rules: frozenset[str] | None = None
    changes: tuple[str, ...] | None = None
    would: str | None = None
    reason: str | None = None
    message: str | None = None

    def differences(self, decision: Decision) -> list[str]:
        """Return what is otherwise, in words; nothing where it is as expected."""
        found = []
        if decision.verdict != self.verdict:
            found.append(f"expected {self.verdict}, got {decision.verdict}")
        if self.rules is not None and self.rules != frozenset(decision.rules):
            found.append(f"expected rules {_listed(self.rules)}, got {_listed(decision.rules)}")
        if self.changes is not None and not _each_in(self.changes, decision.changes):
            found.append(
                f"expected changes {_listed(self.changes)}, got {_listed(decision.changes)}"
            )
        would = decision.would.verdict.value if decision.would else ""
        if self.would is not None and self.would != would:
            found.append(f"expected would {self.would or 'nothing'}, got {would or 'nothing'}")
        if self.reason is not None and not any(self.reason in each for each in decision.reasons):
            found.append(f"expected a reason with {self.reason!r}")
        if self.message is not None and self.message != decision.message:
            found.append(f"expected message {self.message!r}, got {decision.message!r}")
        if found and decision.reasons:
            found.append("because " + "; ".join(decision.reasons))
        return found


def _listed(texts: Iterable[str]) -> str:
    return "[" + ", ".join(sorted(texts)) + "]"


def _each_in(parts: Sequence[str], texts: Sequence[str]) -> bool:
    return len(parts) == len(texts) and all(
        part in text for part, text in zip(parts, texts, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question, and what is expected of the answer."""

    suite: str
    line: int
    name: str
    request: AccessRequest
    expected: Expectation
    known: Known


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One case, run: it failed where there are differences."""

    case: Case
    decision: Decision
    differences: tuple[str, ...]


@dataclass(slots=True)
class Seen:
    """Which answers a rule, or one of its conditions, gave in any test."""

    rule: str
    what: str
    answers: set[bool] = field(default_factory=set)

    @property
    def is_covered(self) -> bool:
        """Whether it was seen both true and false."""
        return len(self.answers) == 2


# --- running -------------------------------------------------------------------------------------


def run_cases(cases: Iterable[Case], policy_set: PolicySet) -> list[Outcome]:
    """Return what became of each case."""
    outcomes = []
    for case in cases:
        if case.known is not policy_set.known:
            policy_set = replace(policy_set, known=case.known)
        decision = decide(policy_set, case.request)
        differences = tuple(case.expected.differences(decision))
        outcomes.append(Outcome(case=case, decision=decision, differences=differences))
    return outcomes


def coverage(outcomes: Iterable[Outcome], policy_set: PolicySet) -> list[Seen]:
    """Return, for every rule and each of its conditions, which answers the cases made it give."""
    questions = [(each.case.request, each.decision.judged) for each in outcomes]
    found = []
    for rule in policy_set.rules:
        asked = [first if rule.change is not None else judged for first, judged in questions]
        whole = Seen(rule.id, "rule")
        parts = [(each, Seen(rule.id, each.name)) for each in (*rule.match, *rule.that)]
        for request in asked:
            answers = [_answer(condition, request) for condition, _ in parts]
            for (_, seen), answer in zip(parts, answers, strict=True):
                seen.answers.add(answer)
            whole.answers.add(all(answers))
        found += [whole, *(seen for _, seen in parts)]
    return found


def _answer(condition: Condition, request: AccessRequest) -> bool:
    try:
        return bool(condition.holds(request))
    except Exception:  # noqa: BLE001 - a condition that breaks did not hold
        return False


# --- reading -------------------------------------------------------------------------------------


def read_cases(sources: Sequence[tuple[str, str]], known: Known) -> list[Case]:
    """Return the cases of test files, pairs of path and text.

    Raises:
        DocumentError: Some file is wrong; every fault of every file is in it.
    """
    faults: list[Fault] = []
    cases: list[Case] = []
    for path, text in sources:
        try:
            top = Section(read_document(text, path), path, faults)
        except DocumentError as error:
            faults.extend(error.faults)
            continue
        cases += _read_suite(top, known)
    if faults:
        raise DocumentError(faults)
    return cases


def _read_suite(top: Section, known: Known) -> list[Case]:
    now = _instant(top, _NEW_YEAR)
    if "providers" in top:
        known = known.vouching(_read_providers(top.section("providers"), known))
    fixtures: dict[str, dict[str, Any]] = {}
    if "fixtures" in top:
        section = top.section("fixtures")
        for name in section.keys():  # noqa: SIM118 - a section is no dict
            fixtures[name] = _facts(section.section(name))
    cases: list[Case] = []
    for section in top.sections("tests"):
        cases += _read_test(section, fixtures, now, known)
    top.finish()
    return cases


def _read_providers(section: Section, known: Known) -> dict[str, ProviderFacts]:
    providers = {}
    for name in section.keys():  # noqa: SIM118 - a section is no dict
        if name not in known.providers:
            section.fault(
                name, f"is no configured provider{nearest(name, sorted(known.providers))}"
            )
        inner = section.section(name)
        dialect = known.providers[name].dialect if name in known.providers else ""
        providers[name] = ProviderFacts(
            dialect=dialect,
            region=inner.string("region", ""),
            baa=inner.boolean("baa", default=False),
            phi=inner.boolean("phi", default=False),
            zero_retention=inner.boolean("zero_retention", default=False),
            no_training=inner.boolean("no_training", default=False),
        )
        inner.finish()
    return providers


def _read_test(
    section: Section, fixtures: Mapping[str, dict[str, Any]], now: float, known: Known
) -> list[Case]:
    name = section.string("name")
    now = _instant(section, now)
    base: dict[str, Any] = {}
    for each in section.strings("given"):
        base |= _fixture(section, "given", each, fixtures)
    own = _facts(section.section("with")) if "with" in section else {}
    cases = []
    if "matrix" in section:
        combinations = _combinations(section, fixtures)
    else:
        combinations = [((), _expectation(section))]
    for names, expected in combinations:
        facts = dict(base)
        for each in names:
            facts |= fixtures.get(each, {})
        request = _request(section, facts | own, now, known)
        label = f"{name} [{', '.join(names)}]" if names else name
        if request is not None:
            cases.append(
                Case(
                    suite=section.path,
                    line=section.line,
                    name=label,
                    request=request,
                    expected=expected,
                    known=known,
                )
            )
    section.finish()
    return cases


def _combinations(
    section: Section, fixtures: Mapping[str, dict[str, Any]]
) -> list[tuple[tuple[str, ...], Expectation]]:
    lists = _lists_of_names(section, "matrix", fixtures)
    total = 1
    for each in lists:
        total *= len(each)
    if total > MAX_COMBINATIONS:
        section.fault("matrix", f"has more than {MAX_COMBINATIONS} combinations; split it")
        return []
    if "expect" in section:
        section.fault("expect", "and matrix cannot both be given; list what passes under allow")
    if "allow" not in section:
        section.fault("allow", "is required beside a matrix: the combinations that pass, or []")
    value = section.value("allow")
    is_none = value is not None and value.data == []
    allowed = set() if is_none else set(_lists_of_names(section, "allow", fixtures))
    combinations = list(itertools.product(*lists))
    for each in sorted(allowed - set(combinations)):
        section.fault("allow", f"names {_listed(each)}, which is no combination of the matrix")
    return [
        (names, Expectation(verdict="allow" if names in allowed else "deny"))
        for names in combinations
    ]


def _lists_of_names(
    section: Section, key: str, fixtures: Mapping[str, dict[str, Any]]
) -> list[tuple[str, ...]]:
    value = section.value(key)
    if value is None or not isinstance(value.data, list):
        section.fault(key, "must be a list of lists of fixtures, such as [[alice, bob], [chat]]")
        return []
    lists = []
    for item in value.data:
        row = Section(
            Value(item.line, item.column, {"names": item}), section.path, section.faults, key
        )
        names = row.strings("names")
        for each in names:
            _fixture(row, "names", each, fixtures)
        lists.append(names)
    return lists


def _fixture(
    section: Section, key: str, name: str, fixtures: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    if name not in fixtures:
        hint = nearest(name, sorted(fixtures))
        section.fault(key, f"names {name!r}, which is no fixture of this file{hint}")
    return fixtures.get(name, {})


def _expectation(section: Section) -> Expectation:
    value = section.value("expect")
    if value is None or isinstance(value.data, str):
        return Expectation(verdict=section.choice("expect", _VERDICTS))
    inner = section.section("expect")
    expected = Expectation(
        verdict=inner.choice("verdict", _VERDICTS),
        rules=_names(inner, "rules"),
        changes=_ordered(inner, "changes"),
        would=inner.choice("would", [*_VERDICTS, ""], "") if "would" in inner else None,
        reason=inner.string("reason") if "reason" in inner else None,
        message=inner.string("message") if "message" in inner else None,
    )
    inner.finish()
    return expected


def _names(section: Section, key: str) -> frozenset[str] | None:
    found = _ordered(section, key)
    return None if found is None else frozenset(found)


def _ordered(section: Section, key: str) -> tuple[str, ...] | None:
    if key not in section:
        return None
    value = section.value(key)
    return () if value is not None and value.data == [] else section.strings(key)


def _facts(section: Section, skip: str = "") -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in section.keys():  # noqa: SIM118 - a section is no dict
        if name == skip:
            continue
        value = section.value(name)
        fact = FACTS.get(name)
        if name == "auth_age" and value is not None:
            facts[name] = section.duration(name, "")
        elif fact is None or not fact.where or name == "now":
            hint = "; write now: beside the test" if name == "now" else nearest(name, sorted(FACTS))
            section.fault(name, f"is no fact that a call can be asked with{hint}")
        else:
            data = _plain(value)
            facts[name] = (
                [data] if isinstance(fact.default, list) and isinstance(data, str) else data
            )
    return facts


def _plain(value: Value | None) -> Any:
    if value is None:
        return None
    if isinstance(value.data, list):
        return [_plain(each) for each in value.data]
    if isinstance(value.data, dict):
        return {key: _plain(each) for key, each in value.data.items()}
    return value.data


def _request(
    section: Section, facts: dict[str, Any], now: float, known: Known
) -> AccessRequest | None:
    """Return the question of these facts; what is known of its provider need not be repeated."""
    facts = dict(facts)
    age = facts.pop("auth_age", None)
    if age is not None:
        facts["authenticated_at"] = int(now - age)
    vouched = known.providers.get(facts.get("provider", ""))
    if vouched is not None:
        for name in ProviderFacts.__struct_fields__:
            facts.setdefault(f"provider.{name}", getattr(vouched, name))
    try:
        return from_record({**facts, "now": now})
    except ValueError as error:
        section.fault("with", f"holds facts that no call has: {error}")
        return None


def read_question(section: Section, known: Known) -> AccessRequest | None:
    """Return the question that a mapping of facts asks, noting faults; `now:` is its instant."""
    now = _instant(section, _NEW_YEAR)
    facts = _facts(section, skip="now")
    return _request(section, facts, now, known)


def _instant(section: Section, default: float) -> float:
    text = section.string("now", "")
    if not text:
        return default
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        section.fault("now", f"{text!r} is no instant; write it as 2027-01-15T09:00:00Z")
        return default
    if instant.tzinfo is None:
        section.fault("now", f"{text!r} has no zone; write it as 2027-01-15T09:00:00Z")
        return default
    return instant.timestamp()


def uncovered(seen: Iterable[Seen]) -> Iterator[str]:
    """Yield a line for each rule and condition that no test saw both true and false."""
    for each in seen:
        if not each.is_covered:
            missing = "true or false" if not each.answers else str(False in each.answers).lower()
            yield f"rule {each.rule!r}: {each.what} was never seen {missing}"
