"""What rules may name: providers and what the operator vouches for, tenants, and declared names.

A name that nothing is called by is a fault when a policy is loaded, not a rule that never matches.
No I/O.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from policies.document import nearest
from policies.request import Operation, ProviderFacts

OPERATIONS: Final = frozenset(operation.value for operation in Operation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The providers, by name, and for each fact whose names are all known, these names."""

    providers: Mapping[str, ProviderFacts]
    names: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        providers: Mapping[str, ProviderFacts] | Iterable[str],
        *,
        tenants: Iterable[str] | None = None,
    ) -> Self:
        """Return what is known of a configuration; `tenants` is None where issuers may name any."""
        if not isinstance(providers, Mapping):
            providers = {name: ProviderFacts() for name in providers}
        names = {"provider": frozenset(providers), "operation": OPERATIONS}
        dialects = frozenset(facts.dialect for facts in providers.values() if facts.dialect)
        if dialects:
            names["provider.dialect"] = dialects
        if tenants is not None:
            names["tenant"] = frozenset(tenants)
        return cls(providers=providers, names=names)

    def with_names(self, declared: Mapping[str, frozenset[str]]) -> "Known":
        """Return the same with names that a policy declares."""
        return Known(providers=self.providers, names={**declared, **self.names})

    def vouching(self, providers: Mapping[str, ProviderFacts]) -> "Known":
        """Return the same with other things vouched for of some providers."""
        return Known(providers={**self.providers, **providers}, names=self.names)

    def fault_of(self, fact: str, pattern: str) -> str:
        """Return what is wrong with naming this, "" where something is called so."""
        known = self.names.get(fact)
        if known is None or any(
            fnmatch.fnmatchcase(name.casefold(), pattern.casefold()) for name in known
        ):
            return ""
        return f"names {pattern!r}, which is no {_WHAT.get(fact, f'known {fact}')}; " + _choices(
            pattern, sorted(known)
        )


_WHAT = {
    "provider": "configured provider",
    "operation": "operation",
}


def _choices(word: str, known: Sequence[str]) -> str:
    if not known:
        return "there is none"
    few = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"write one of {few}{nearest(word, known)}"
