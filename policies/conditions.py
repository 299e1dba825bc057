"""`match:` mappings, compiled to closures over the total facts of an `AccessRequest`.

A mapping holds when every key in it holds; a list under a key holds when one of its items does.
`all`, `any` and `not` nest. An empty mapping or list is refused when it is read: nothing ever
passes because nobody wrote down what should. Absent numbers (`max_tokens`, `body_bytes`) count as
unbounded, so that a `max` never passes a call that did not commit itself to one.

No I/O.
"""

import fnmatch
import ipaddress
import math
import re
from collections.abc import Callable, Sequence
from typing import Final

from policies.document import Fault, Section
from policies.request import AccessRequest, Operation

Predicate = Callable[[AccessRequest], bool]
Texts = Callable[[str], bool]

BODY_FACTS: Final = frozenset({"model", "stream", "max_tokens", "tools"})
"""Facts that are read from the body; a body that hides them is denied where a rule reads one."""


class Condition:
    """One key of a `match:` mapping: its name, for explanations, and its predicate."""

    __slots__ = ("holds", "name")

    def __init__(self, name: str, holds: Predicate) -> None:
        self.name = name
        self.holds = holds


def globs(patterns: Sequence[str]) -> Texts:
    """Return whether a text equals one of the patterns, in which `*`, `?` and `[…]` are wild."""
    if "*" in patterns:
        return lambda _text: True
    exact = frozenset(each for each in patterns if not re.search(r"[*?\[]", each))
    wild = [fnmatch.translate(each) for each in patterns if each not in exact]
    if not wild:
        return exact.__contains__
    compiled = re.compile("|".join(wild)).match
    return lambda text: text in exact or compiled(text) is not None


def read_match(section: Section, providers: frozenset[str]) -> tuple[list[Condition], set[str]]:
    """Return the conditions of a `match:` mapping and the names of the facts that they read.

    Faults are noted in the section; a mapping with faults yields conditions nobody will use.
    """
    conditions: list[Condition] = []
    facts: set[str] = set()

    def add(name: str, predicate: Predicate | None) -> None:
        if predicate is not None:
            conditions.append(Condition(name, predicate))
            facts.add(name)

    for name, read in _READERS.items():
        if name in section and section.value(name) is None:
            section.fault(name, "must not be empty")
        elif name in section:
            add(name, read(section, name, providers))
    for name in ("all", "any"):
        if name in section:
            groups = []
            for each in section.sections(name):
                nested, read_facts = read_match(each, providers)
                groups.append(_conjunction(nested))
                facts |= read_facts
            if not groups:
                section.fault(name, "must hold at least one mapping")
            else:
                combine = _conjunction_of if name == "all" else _disjunction_of
                conditions.append(Condition(name, combine(groups)))
    if "not" in section:
        nested, read_facts = read_match(section.section("not"), providers)
        facts |= read_facts
        conditions.append(Condition("not", _negation(_conjunction(nested))))
    section.finish()
    if not section.keys():
        message = f"{section.name or 'match'} must hold at least one condition"
        section.faults.append(Fault(section.path, section.line, section.column, message))
    return conditions, facts


def _conjunction(conditions: Sequence[Condition]) -> Predicate:
    return _conjunction_of([each.holds for each in conditions])


def _conjunction_of(predicates: Sequence[Predicate]) -> Predicate:
    # `all` of nothing is true in logic; here nothing written must never mean everything allowed.
    return lambda request: bool(predicates) and all(holds(request) for holds in predicates)


def _disjunction_of(predicates: Sequence[Predicate]) -> Predicate:
    return lambda request: any(holds(request) for holds in predicates)


def _negation(predicate: Predicate) -> Predicate:
    return lambda request: not predicate(request)


# --- one reader for each fact --------------------------------------------------------------------


def _texts(section: Section, name: str) -> Texts:
    return globs(section.strings(name))


def _tenant(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    match = _texts(section, name)
    return lambda request: match(request.principal.tenant)


def _subject(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    match = _texts(section, name)
    return lambda request: match(request.principal.subject)


def _issuer(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    match = _texts(section, name)
    return lambda request: match(request.principal.issuer)


def _roles(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    match = _texts(section, name)
    return lambda request: any(match(role) for role in request.principal.roles)


def _provider(section: Section, name: str, providers: frozenset[str]) -> Predicate:
    names = section.strings(name)
    for each in names:
        if not any(fnmatch.fnmatchcase(known, each) for known in providers):
            section.fault(name, f"names {each!r}, which is no configured provider")
    match = globs(names)
    return lambda request: match(request.call.provider)


def _operation(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    names = section.strings(name)
    known = [operation.value for operation in Operation]
    for each in names:
        if not fnmatch.filter(known, each):
            section.fault(name, f"names {each!r}; operations are {', '.join(known)}")
    match = globs(names)
    return lambda request: match(request.call.operation)


def _model(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    match = _texts(section, name)
    return lambda request: request.call.model != "" and match(request.call.model)


def _stream(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    wanted = section.boolean(name, default=False)
    return lambda request: request.call.stream is wanted


def _tools(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    value = section.value(name)
    if value is not None and isinstance(value.data, dict):
        inner = section.section(name)
        only = globs(inner.strings("only"))
        if "only" not in inner:
            inner.fault("only", "is required")
        inner.finish()
        return lambda request: all(only(tool) for tool in request.call.tools)
    match = _texts(section, name)
    return lambda request: any(match(tool) for tool in request.call.tools)


def _range(section: Section, name: str) -> Callable[[int], bool]:
    inner = section.section(name)
    low = inner.integer("min") if "min" in inner else 0
    high = inner.integer("max") if "max" in inner else math.inf
    if "min" not in inner and "max" not in inner:
        section.fault(name, "needs min, max or both")
    elif low > high:
        section.fault(name, "can never hold: min is above max")
    inner.finish()

    def within(number: int) -> bool:
        known = number if number >= 0 else math.inf
        return low <= known <= high

    return within


def _max_tokens(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    within = _range(section, name)
    return lambda request: within(request.call.max_tokens)


def _body_bytes(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    within = _range(section, name)
    return lambda request: within(request.call.body_bytes)


def _client_address(section: Section, name: str, _providers: frozenset[str]) -> Predicate:
    networks = []
    for each in section.strings(name):
        try:
            network = ipaddress.ip_network(each)
        except ValueError:
            section.fault(name, f"{each!r} is no network such as 10.0.0.0/8")
            continue
        if network.version == 6 and network.network_address.ipv4_mapped:
            # Mapped addresses are compared as IPv4, so that one spelling of a rule covers both.
            section.fault(name, f"{each!r} must be written as an IPv4 network")
        networks.append(network)

    def within(request: AccessRequest) -> bool:
        # An address that does not parse raises: an erroring deny denies, an erroring allow does not.
        address = ipaddress.ip_address(request.client_address)
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        return any(address.version == each.version and address in each for each in networks)

    return within


_READERS: dict[str, Callable[[Section, str, frozenset[str]], Predicate]] = {
    "tenant": _tenant,
    "subject": _subject,
    "roles": _roles,
    "issuer": _issuer,
    "provider": _provider,
    "operation": _operation,
    "model": _model,
    "stream": _stream,
    "max_tokens": _max_tokens,
    "tools": _tools,
    "body_bytes": _body_bytes,
    "client_address": _client_address,
}
