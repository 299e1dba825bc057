"""Rules by what they can apply to, so that a call pays only for those that may concern it.

A rule that names values of tenant, model, provider or operation, without wildcards and under no
`any` or `not`, is looked up by the first of these; every other rule is looked at for each call. What
an index leaves out would not have matched; it never changes an answer. No I/O.
"""

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Final

from policies.request import AccessRequest
from policies.rule import Rule

_Placed = tuple[int, Rule]
_in_order = itemgetter(0)


def _model(request: AccessRequest) -> str:
    return request.call.model.casefold()


DIMENSIONS: Final[dict[str, Callable[[AccessRequest], str]]] = {
    "tenant": attrgetter("principal.tenant"),
    "model": _model,
    "provider": attrgetter("call.provider"),
    "operation": attrgetter("call.operation"),
}
"""The facts that rules are looked up by, the most telling first."""


class RuleIndex:
    """Rules of one effect, in the order of their ids."""

    __slots__ = ("_always", "_by", "rules")

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(sorted(rules, key=attrgetter("id")))
        self._always: tuple[_Placed, ...] = ()
        by: dict[str, dict[str, tuple[_Placed, ...]]] = {name: {} for name in DIMENSIONS}
        for placed in enumerate(self.rules):
            name, values = _key_of(placed[1])
            if not values:
                self._always += (placed,)
            for value in values:
                by[name][value] = (*by[name].get(value, ()), placed)
        self._by = [(DIMENSIONS[name], found) for name, found in by.items() if found]

    def __iter__(self) -> Iterator[Rule]:
        """Return every rule."""
        return iter(self.rules)

    def candidates(self, request: AccessRequest) -> Sequence[Rule]:
        """Return the rules that may apply to a call, in order."""
        found = self._always
        for read, rules in self._by:
            placed = rules.get(read(request))
            if placed is not None:
                found = found + placed if found else placed
        if not self._by:
            return self.rules
        return [rule for _, rule in sorted(found, key=_in_order)]


def _key_of(rule: Rule) -> tuple[str, frozenset[str]]:
    by_name = {condition.name: condition for condition in rule.match}
    for name in DIMENSIONS:
        if name in by_name and (values := by_name[name].exact):
            return name, values
    return "", frozenset()
