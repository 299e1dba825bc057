"""`match:` mappings, compiled to closures over the facts of a question.

A mapping holds when every key in it holds; a list under a key holds when one of its items does.
`all`, `any` and `not` nest. An empty mapping or list is refused when it is read: nothing ever
passes because nobody wrote down what should. An absent text matches no pattern, not even `*`; an
absent number counts as unbounded, so that a `max` never passes a call that committed itself to none.

No I/O.
"""

import fnmatch
import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from policies.document import DURATION_UNITS, SIZE_UNITS, Fault, Section, Value
from policies.expressions import ExpressionError, compile_expression
from policies.facts import FACTS, Fact, Kind, Phase
from policies.hours import read_hours
from policies.known import Known
from policies.request import AccessRequest

Predicate = Callable[[AccessRequest], bool]
Texts = Callable[[str], bool]
Spec = tuple[object, ...]

MAX_SHOWN: Final = 200
"""Characters of a value in a reason; reasons go into audit events, which hold 64 KiB."""


class Condition:
    """One key of a `match:` mapping.

    `holds` is its predicate, `reads` the facts it depends on, `patterns` the texts that one fact is
    compared with (empty for any other form), `spec` what it says in a form that can be compared.
    """

    __slots__ = ("holds", "name", "patterns", "reads", "spec", "wanted")

    def __init__(  # noqa: PLR0913 - what a condition is
        self,
        name: str,
        holds: Predicate,
        *,
        reads: frozenset[str],
        wanted: str = "",
        patterns: frozenset[str] = frozenset(),
        spec: Spec = (),
    ) -> None:
        self.name = name
        self.holds = holds
        self.reads = reads
        self.wanted = wanted
        self.patterns = patterns
        self.spec = spec

    @property
    def exact(self) -> frozenset[str]:
        """Return the only values that hold, where they are written out; else nothing."""
        return frozenset() if any(map(is_wild, self.patterns)) else self.patterns

    def failing(self, request: AccessRequest) -> str:
        """Return in words why it does not hold."""
        fact = FACTS.get(self.name)
        if fact is None or not self.wanted:
            return self.name
        return f"{self.name}: {_short(_shown(fact, request))} is not {_short(self.wanted)}"


def _short(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _shown(fact: Fact, request: AccessRequest) -> str:
    value = fact.read(request)
    match fact.kind:
        case Kind.TEXTS:
            texts = sorted(value)
            return "[" + ", ".join(texts[:8]) + (", …]" if len(texts) > 8 else "]")
        case Kind.FLAG:
            return "true" if value else "false"
        case Kind.NUMBER | Kind.SIZE | Kind.DURATION:
            return str(value) if value >= 0 else "unbounded"
        case _:
            return repr(str(value)) if value else "nothing"


def reads_of(conditions: Iterable[Condition]) -> frozenset[str]:
    """Return the facts that any of these conditions depends on."""
    return frozenset().union(*(condition.reads for condition in conditions))


# --- texts ---------------------------------------------------------------------------------------


def is_wild(pattern: str) -> bool:
    """Return whether a pattern may match more than itself."""
    return re.search(r"[*?\[]", pattern) is not None


def globs(patterns: Iterable[str]) -> Texts:
    """Return whether a text equals one of the patterns, in which `*`, `?` and `[…]` are wild."""
    patterns = list(patterns)
    if "*" in patterns:
        return lambda _text: True
    exact = frozenset(each for each in patterns if not is_wild(each))
    wild = [fnmatch.translate(each) for each in patterns if each not in exact]
    if not wild:
        return exact.__contains__
    compiled = re.compile("|".join(wild)).match
    return lambda text: text in exact or compiled(text) is not None


# --- reading a mapping ---------------------------------------------------------------------------


def read_conditions(section: Section, known: Known) -> list[Condition]:
    """Return the conditions of a `match:` mapping, in the order of the facts' table.

    Faults are noted in the section; a mapping with faults yields conditions nobody will use.
    """
    conditions: list[Condition] = []
    for name, fact in FACTS.items():
        if name not in section:
            continue
        if section.value(name) is None:
            section.fault(name, f"must not be empty; leave it out, or write {_EXAMPLES[fact.kind]}")
        elif fault := _not_comparable(fact):
            section.fault(name, fault)
        else:
            conditions.append(_READERS[fact.kind](section, fact, known))
    if "time" in section:
        holds, words = read_hours(section.section("time"))
        conditions.append(
            Condition("time", holds, reads=frozenset({"now"}), wanted=words, spec=("time", words))
        )
    conditions += [_read_group(section, name, known) for name in ("all", "any") if name in section]
    if "not" in section:
        nested = read_conditions(section.section("not"), known)
        inner = _conjunction(nested)
        conditions.append(
            Condition(
                "not",
                lambda request: not inner(request),
                reads=reads_of(nested),
                spec=("not", *_specs(nested)),
            )
        )
    section.finish()
    if not section.keys():
        message = (
            f"{section.name or 'match'} must hold at least one condition; "
            'every call is {tenant: "*"}'
        )
        section.faults.append(Fault(section.path, section.line, section.column, message))
    return conditions


def read_when(section: Section, known: Known) -> list[Condition]:
    """Return the condition of a rule's `when:`, none where there is none."""
    text = section.string("when", "")
    if not text:
        if "when" in section:
            section.fault("when", "must not be empty; leave it out, or write a CEL expression")
        return []
    try:
        holds, reads = compile_expression(text, known)
    except ExpressionError as error:
        place = f" (line {error.line}, column {error.column} of it)" if error.column > 1 else ""
        section.fault("when", f"{error.message}{place}")
        return []
    return [Condition("when", holds, reads=reads, wanted=text, spec=("when", text))]


def _read_group(section: Section, name: str, known: Known) -> Condition:
    groups = [read_conditions(each, known) for each in section.sections(name)]
    if not groups and isinstance(getattr(section.value(name), "data", []), list):
        section.fault(name, "must hold at least one mapping, such as [{roles: engineer}]")
    predicates = [_conjunction(each) for each in groups]
    # `all` of nothing is true in logic; here nothing written must never mean everything allowed.
    every = _all_of(predicates)
    some: Predicate = lambda request: any(holds(request) for holds in predicates)  # noqa: E731 - one of two
    return Condition(
        name,
        every if name == "all" else some,
        reads=frozenset().union(*map(reads_of, groups)),
        spec=(name, *(tuple(_specs(each)) for each in groups)),
    )


def _specs(conditions: Iterable[Condition]) -> list[Spec]:
    return sorted((each.spec for each in conditions), key=repr)


def _conjunction(conditions: Sequence[Condition]) -> Predicate:
    return _all_of([each.holds for each in conditions])


def _all_of(predicates: Sequence[Predicate]) -> Predicate:
    return lambda request: bool(predicates) and all(holds(request) for holds in predicates)


def _not_comparable(fact: Fact) -> str:
    if fact.phase is Phase.RESPONSE:
        return "is known only when the provider has answered; rules decide before that"
    if fact.kind is Kind.INSTANT:
        return f"is compared as {'time:' if fact.name == 'now' else 'auth_age:'}, such as " + (
            "time: {zone: Europe/Paris, from: '08:00', to: '18:00'}"
            if fact.name == "now"
            else "auth_age: {max: 15m}"
        )
    return ""


# --- one reader for each kind of fact ------------------------------------------------------------


def _patterns(section: Section, key: str, fact: Fact, known: Known) -> frozenset[str]:
    patterns = section.strings(key)
    for each in patterns:
        if not each:
            section.fault(key, "holds an empty text, which nothing equals; leave it out")
        elif fault := known.fault_of(fact.name, each):
            section.fault(key, fault)
    if fact.name == "model":  # providers do not agree on case, so that no rule may depend on it
        return frozenset(each.casefold() for each in patterns)
    return frozenset(patterns)


def _in_words(patterns: frozenset[str]) -> str:
    listed = sorted(patterns)
    return listed[0] if len(listed) == 1 else "one of " + ", ".join(listed)


def _text(section: Section, fact: Fact, known: Known) -> Condition:
    value = section.value(fact.name)
    if isinstance(value, Value) and isinstance(value.data, dict):
        inner = [f"{fact.name}.{key}" for key in value.data if f"{fact.name}.{key}" in FACTS]
        hint = f"; write {inner[0]}: beside it" if inner else ""
        section.fault(fact.name, f"must be a text or a list of texts, not a mapping{hint}")
        return Condition(fact.name, lambda _request: False, reads=frozenset())
    patterns = _patterns(section, fact.name, fact, known)
    return Condition(
        fact.name,
        _text_predicate(globs(patterns), fact),
        reads=frozenset({fact.name}),
        wanted=_in_words(patterns),
        patterns=patterns,
        spec=("text", fact.name, patterns),
    )


def _text_predicate(matches: Texts, fact: Fact) -> Predicate:
    get = fact.read
    if fact.name == "model":
        return lambda request: (text := get(request)) != "" and matches(text.casefold())
    if matches(""):
        return lambda request: (text := get(request)) != "" and matches(text)
    return lambda request: matches(get(request))


def _texts(section: Section, fact: Fact, known: Known) -> Condition:
    value, get = section.value(fact.name), fact.read
    parts: list[Predicate] = []
    words: list[str] = []
    spec: list[Spec] = []
    patterns: frozenset[str] = frozenset()
    if isinstance(value, Value) and isinstance(value.data, dict):
        inner = section.section(fact.name)
        for how, combine in _SETS.items():
            if how in inner:
                wanted = _patterns(inner, how, fact, known)
                parts.append(combine(wanted, get))
                words.append(f"{how} of " + ", ".join(sorted(wanted)))
                spec.append((how, wanted))
        if not parts:
            section.fault(fact.name, "needs any, all, only or none, such as {only: [search]}")
        inner.finish()
    else:
        patterns = _patterns(section, fact.name, fact, known)
        parts.append(_SETS["any"](patterns, get))
        words.append(_in_words(patterns))
        spec.append(("any", patterns))
    return Condition(
        fact.name,
        parts[0] if len(parts) == 1 else _all_of(parts),
        reads=frozenset({fact.name}),
        wanted=" and ".join(words),
        patterns=patterns,
        spec=("texts", fact.name, *spec),
    )


Get = Callable[[AccessRequest], Iterable[str]]


def _any(patterns: frozenset[str], get: Get) -> Predicate:
    if not any(map(is_wild, patterns)):
        return lambda request: not patterns.isdisjoint(get(request))
    matches = globs(patterns)
    return lambda request: any(map(matches, get(request)))


def _every(patterns: frozenset[str], get: Get) -> Predicate:
    each_matches = [globs([each]) for each in patterns]
    return lambda request: all(any(map(matches, get(request))) for matches in each_matches)


def _only(patterns: frozenset[str], get: Get) -> Predicate:
    matches = globs(patterns)
    return lambda request: all(map(matches, get(request)))


def _none(patterns: frozenset[str], get: Get) -> Predicate:
    some = _any(patterns, get)
    return lambda request: not some(request)


_SETS: Final = {"any": _any, "all": _every, "only": _only, "none": _none}
"""How the texts of a fact are compared with patterns."""


def _flag(section: Section, fact: Fact, _known: Known) -> Condition:
    wanted, get = section.boolean(fact.name, default=False), fact.read
    return Condition(
        fact.name,
        (lambda request: bool(get(request))) if wanted else (lambda request: not get(request)),
        reads=frozenset({fact.name}),
        wanted="true" if wanted else "false",
        spec=("flag", fact.name, wanted),
    )


def _range(section: Section, fact: Fact, _known: Known) -> Condition:
    inner, get = section.section(fact.name), fact.read
    low, high = _bound(inner, "min", fact.kind, 0), _bound(inner, "max", fact.kind, math.inf)
    if "min" not in inner and "max" not in inner:
        section.fault(fact.name, f"needs min, max or both, such as {_EXAMPLES[fact.kind]}")
    elif low > high:
        section.fault(fact.name, "can never hold: min is above max; exchange them")
    inner.finish()

    def within(request: AccessRequest) -> bool:
        number = get(request)
        return low <= (number if number >= 0 else math.inf) <= high

    words = [
        f"{name} {bound:g}"
        for name, bound in (("at least", low), ("at most", high))
        if 0 < bound < math.inf
    ]
    return Condition(
        fact.name,
        within,
        reads=frozenset({fact.name}),
        wanted=" and ".join(words) or "a number",
        spec=("range", fact.name, low, high),
    )


def _bound(section: Section, key: str, kind: Kind, default: float) -> float:
    value = section.value(key)
    if value is None:
        if key in section:
            section.fault(key, f"must not be empty; write {_EXAMPLES[kind]}")
        return default
    if isinstance(value.data, str) and kind in {Kind.SIZE, Kind.DURATION}:
        return section.size(key, "") if kind is Kind.SIZE else section.duration(key, "")
    if kind is Kind.DURATION:
        section.fault(
            key, f"needs a unit, one of {', '.join(DURATION_UNITS)}: write {{{key}: 15m}}"
        )
        return default
    if kind is Kind.SIZE and not isinstance(value.data, int):
        section.fault(key, f"must be bytes, or a size with one of {', '.join(SIZE_UNITS)}")
        return default
    return section.integer(key)


def _address(section: Section, fact: Fact, _known: Known) -> Condition:
    networks = []
    for each in section.strings(fact.name):
        try:
            network = ipaddress.ip_network(each)
        except ValueError:
            section.fault(fact.name, f"{each!r} is no network such as 10.0.0.0/8{_masked(each)}")
            continue
        if network.version == 6 and network.network_address.ipv4_mapped:
            # Mapped addresses are compared as IPv4, so that one spelling of a rule covers both.
            section.fault(
                fact.name,
                f"{each!r} must be written as an IPv4 network, such as "
                f"{network.network_address.ipv4_mapped}/{max(0, network.prefixlen - 96)}",
            )
        networks.append(network)

    def within(request: AccessRequest) -> bool:
        # An address that does not parse raises: an erroring deny denies, an erroring allow does not.
        address = ipaddress.ip_address(request.client_address)
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        return any(address.version == each.version and address in each for each in networks)

    return Condition(
        fact.name,
        within,
        reads=frozenset({fact.name}),
        wanted="in " + ", ".join(map(str, networks)),
        spec=("networks", frozenset(map(str, networks))),
    )


def _masked(text: str) -> str:
    """Return a hint at the network that an address with host bits was meant for."""
    try:
        return f" (did you mean {str(ipaddress.ip_network(text, strict=False))!r}?)"
    except ValueError:
        return ""


_READERS: Final[dict[Kind, Callable[[Section, Fact, Known], Condition]]] = {
    Kind.TEXT: _text,
    Kind.TEXTS: _texts,
    Kind.NUMBER: _range,
    Kind.SIZE: _range,
    Kind.DURATION: _range,
    Kind.FLAG: _flag,
    Kind.ADDRESS: _address,
}

_EXAMPLES: Final = {
    Kind.TEXT: '"*"',
    Kind.TEXTS: "[engineer]",
    Kind.NUMBER: "{max: 4096}",
    Kind.SIZE: "{max: 1MiB}",
    Kind.DURATION: "{max: 15m}",
    Kind.FLAG: "true",
    Kind.ADDRESS: '["10.0.0.0/8"]',
    Kind.INSTANT: "{max: 15m}",
}
