"""What operators have stopped: kills, which stand until they are lifted.

A kill of a session, a subject, a tenant, a key or everything ends the sessions that it hits, and no
new one opens; a kill of a provider ends calls to it, and the sessions stay. No I/O.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import msgspec

from policies.request import Principal

MAX_KILLS: Final = 1000
"""How many may stand at once: each is told to every worker, in one message of at most 3 MB."""

MAX_VALUE: Final = 512
MAX_REASON: Final = 512


class Scope(StrEnum):
    """What a kill hits."""

    SESSION = "session"
    SUBJECT = "subject"
    TENANT = "tenant"
    FINGERPRINT = "fingerprint"
    PROVIDER = "provider"
    ALL = "all"


class Kill(msgspec.Struct, frozen=True, kw_only=True):
    """One kill: `value` names what of `scope` it hits, nothing for `all`.

    `issuer` narrows a subject; without it the subject of any issuer is hit. `placed_by` is the
    operator, `placed_at` in seconds since the epoch.
    """

    kill_id: str
    scope: Scope
    value: str = ""
    issuer: str = ""
    reason: str
    placed_by: str
    placed_at: int


class KillTable:
    """The kills that stand."""

    def __init__(self, kills: Iterable[Kill] = ()) -> None:
        self._kills: dict[str, Kill] = {}
        self._hits: dict[tuple[Scope, str], list[Kill]] = {}
        self.replace(kills)

    def __len__(self) -> int:
        """Return how many stand."""
        return len(self._kills)

    def replace(self, kills: Iterable[Kill]) -> None:
        """Let these stand, and no others."""
        self._kills = {kill.kill_id: kill for kill in kills}
        self._hits = {}
        for kill in self._kills.values():
            self._hits.setdefault((kill.scope, kill.value), []).append(kill)

    def standing(self) -> tuple[Kill, ...]:
        """Return the kills that stand, the oldest first."""
        return tuple(self._kills.values())

    def get(self, kill_id: str) -> Kill | None:
        """Return the standing kill of this id."""
        return self._kills.get(kill_id)

    def find(
        self, principal: Principal, session_id: str, fingerprint: str, provider: str
    ) -> Kill | None:
        """Return a kill that hits a call with this key to this provider."""
        if not self._kills:
            return None
        hit = self._first(Scope.PROVIDER, provider, "")
        return hit or self.find_session(principal, session_id, (fingerprint,))

    def find_session(
        self, principal: Principal, session_id: str, fingerprints: Iterable[str]
    ) -> Kill | None:
        """Return a kill that ends this session, or forbids to open it."""
        if not self._kills:
            return None
        asked = [
            (Scope.ALL, ""),
            (Scope.TENANT, principal.tenant),
            (Scope.SUBJECT, principal.subject),
            (Scope.SESSION, session_id),
            *((Scope.FINGERPRINT, fingerprint) for fingerprint in fingerprints),
        ]
        hits = (self._first(scope, value, principal.issuer) for scope, value in asked)
        return next(filter(None, hits), None)

    def find_provider(self, providers: Iterable[str]) -> Kill | None:
        """Return a kill that hits one of these providers."""
        hits = (self._first(Scope.PROVIDER, provider, "") for provider in providers)
        return next(filter(None, hits), None)

    def _first(self, scope: Scope, value: str, issuer: str) -> Kill | None:
        for kill in self._hits.get((scope, value), ()):
            if kill.issuer in {"", issuer}:
                return kill
        return None
