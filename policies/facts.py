"""The facts that rules may read: one table, each fact typed, total and known from a phase on.

Laws of this file:
- every fact always has a value; its default is the one that no rule mistakes for permission;
- rules, expressions, tests, the audit record and the reference page know a fact by the same name;
- what stands in a record or a test (`to_record`, `from_record`) is enough to ask the question again.

No I/O.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import Any, Final

import msgspec

from policies.request import AccessRequest, Operation

Scalar = str | int | bool
FactValue = Scalar | list[str]
"""How a fact is written down: in tests, in the audit record."""

MAX_RECORDED: Final = 6 * 1024
"""Characters of one fact's texts; a caller may name 1,024 tools, and an audit event holds 64 KiB."""

TRUNCATED: Final = "truncated"
"""Stands in a record beside the facts of which it holds only the first texts."""


class Kind(StrEnum):
    """What a fact's value is, and so how a rule compares it."""

    TEXT = "text"
    TEXTS = "texts"
    NUMBER = "number"
    SIZE = "size"
    DURATION = "duration"
    FLAG = "flag"
    ADDRESS = "address"
    INSTANT = "instant"


class Phase(StrEnum):
    """From when on a fact is known. Rules decide after `body`, before anything is forwarded."""

    CALLER = "caller"
    HEAD = "head"
    BODY = "body"
    RESPONSE = "response"


class Group(StrEnum):
    """What a fact is about."""

    IDENTITY = "identity"
    SESSION = "session"
    REQUEST = "request"
    PROVIDER = "provider"
    TIME = "time"
    CONTENT = "content"
    RESPONSE = "response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One fact. `where` is its place in an `AccessRequest`, "" where it is derived or not yet known."""

    name: str
    group: Group
    kind: Kind
    phase: Phase
    default: FactValue
    meaning: str
    where: str = ""
    derive: Callable[[AccessRequest], Any] | None = None

    @property
    def read(self) -> Callable[[AccessRequest], Any]:
        """Return the reader of this fact."""
        if self.derive is not None:
            return self.derive
        return attrgetter(self.where)


def _auth_age(request: AccessRequest) -> int:
    """Return the seconds since a person proved who they are, -1 where nobody says when."""
    proved = request.principal.authenticated_at
    return max(0, int(request.now) - proved) if proved else -1


def _fact(  # noqa: PLR0913, PLR0917 - a row of the table
    name: str,
    kind: Kind,
    phase: Phase,
    default: FactValue,
    where: str,
    meaning: str,
    derive: Callable[[AccessRequest], Any] | None = None,
) -> Fact:
    group = _GROUPS.get(where.partition(".")[0]) or (
        Group.RESPONSE if phase is Phase.RESPONSE else Group.SESSION
    )
    return Fact(
        name=name,
        group=_OWN_GROUP.get(name, group),
        kind=kind,
        phase=phase,
        default=default,
        meaning=meaning,
        where=where,
        derive=derive,
    )


_GROUPS = {
    "principal": Group.IDENTITY,
    "call": Group.REQUEST,
    "provider": Group.PROVIDER,
    "now": Group.TIME,
}
_OWN_GROUP = {
    "auth_age": Group.IDENTITY,
    "labels": Group.CONTENT,
    "purpose": Group.CONTENT,
    "provider": Group.PROVIDER,
}
_K, _P = Kind, Phase
_ROWS: Final = (
    _fact("tenant", _K.TEXT, _P.CALLER, "", "principal.tenant", "The customer that the caller belongs to."),
    _fact("subject", _K.TEXT, _P.CALLER, "", "principal.subject", "The caller, as its issuer names it."),
    _fact("issuer", _K.TEXT, _P.CALLER, "", "principal.issuer", "Who vouches for the caller."),
    _fact("client_id", _K.TEXT, _P.CALLER, "", "principal.client_id", "The application that the token was issued to."),
    _fact("roles", _K.TEXTS, _P.CALLER, [], "principal.roles", "What the issuer says the caller may act as."),
    _fact("scopes", _K.TEXTS, _P.CALLER, [], "principal.scopes", "What the token was issued for."),
    _fact("acr", _K.TEXT, _P.CALLER, "", "principal.acr", "How strongly the caller was authenticated, in the issuer's words."),
    _fact("amr", _K.TEXTS, _P.CALLER, [], "principal.amr", "How the caller was authenticated: `pwd`, `otp`, `mfa`, `hwk` (RFC 8176)."),
    _fact("authenticated_at", _K.INSTANT, _P.CALLER, 0, "principal.authenticated_at", "When a person last proved who they are (`auth_time`); compared as `auth_age`."),
    _fact("auth_age", _K.DURATION, _P.CALLER, -1, "", "How long ago that was; unknown counts as for ever.", _auth_age),
    _fact("session", _K.TEXT, _P.CALLER, "", "session_id", "The session that holds the key."),
    _fact("client_address", _K.ADDRESS, _P.HEAD, "", "client_address", "Where the connection comes from."),
    _fact("user_agent", _K.TEXT, _P.HEAD, "", "user_agent", "What the client calls itself: a hint, never a proof."),
    _fact("provider", _K.TEXT, _P.HEAD, "", "call.provider", "The configured provider that the call goes to."),
    _fact("provider.dialect", _K.TEXT, _P.HEAD, "", "provider.dialect", "The API it speaks: `openai`, `anthropic` or `gemini`."),
    _fact("provider.region", _K.TEXT, _P.HEAD, "", "provider.region", "Where it processes data, as configured."),
    _fact("provider.baa", _K.FLAG, _P.HEAD, False, "provider.baa", "A business associate agreement covers it, as configured."),
    _fact("provider.phi", _K.FLAG, _P.HEAD, False, "provider.phi", "It may be sent protected health information, as configured."),
    _fact("provider.zero_retention", _K.FLAG, _P.HEAD, False, "provider.zero_retention", "It keeps nothing of a call, as configured."),
    _fact("provider.no_training", _K.FLAG, _P.HEAD, False, "provider.no_training", "It trains on nothing of a call, as configured."),
    _fact("operation", _K.TEXT, _P.HEAD, "", "call.operation", "What is asked: " + ", ".join(f"`{each}`" for each in Operation) + "."),
    _fact("generates", _K.FLAG, _P.HEAD, False, "call.generates", "A model is asked to write an answer."),
    _fact("body_bytes", _K.SIZE, _P.HEAD, 0, "call.body_bytes", "Length of the body; not known before it has come counts as unbounded."),
    _fact("labels", _K.TEXTS, _P.HEAD, [], "labels", "What the content is declared to hold (`X-Veklom-Labels`), such as `phi`."),
    _fact("purpose", _K.TEXT, _P.HEAD, "", "purpose", "What the call is declared to be for (`X-Veklom-Purpose`)."),
    _fact("model", _K.TEXT, _P.BODY, "", "call.model", "The model that is asked; compared without regard to case."),
    _fact("stream", _K.FLAG, _P.BODY, False, "call.stream", "The answer comes as a stream of events."),
    _fact("max_tokens", _K.NUMBER, _P.BODY, -1, "call.max_tokens", "The most output tokens asked for; none asked for counts as unbounded."),
    _fact("tools", _K.TEXTS, _P.BODY, [], "call.tools", "Names of all tools the model may use: functions, the provider's own, `mcp:<server>`."),
    _fact("server_tools", _K.TEXTS, _P.BODY, [], "call.server_tools", "Those of them that the provider runs itself."),
    _fact("parameters", _K.TEXTS, _P.BODY, [], "call.parameters", "Names of the body's top-level fields."),
    _fact("store", _K.FLAG, _P.BODY, False, "call.store", "The provider is asked to keep the answer (OpenAI's Responses does unless told not to)."),
    _fact("now", _K.INSTANT, _P.CALLER, 0, "now", "The instant of the decision; compared with `time:`."),
    _fact("response.model", _K.TEXT, _P.RESPONSE, "", "", "The model that answered."),
    _fact("response.input_tokens", _K.NUMBER, _P.RESPONSE, -1, "", "Input tokens, as the provider counted them."),
    _fact("response.output_tokens", _K.NUMBER, _P.RESPONSE, -1, "", "Output tokens, as the provider counted them."),
)  # fmt: skip

FACTS: Final[Mapping[str, Fact]] = {fact.name: fact for fact in _ROWS}
"""Every fact, by name."""

BODY_FACTS: Final = frozenset(fact.name for fact in _ROWS if fact.phase is Phase.BODY)
"""Facts that are read from the body; a body that hides them is denied where a rule reads one."""

_RECORDED = tuple((fact, attrgetter(fact.where)) for fact in _ROWS if fact.where)
_UNPARSED = "unparsed"
"""Stands in a record where the body could not be read."""


def to_record(request: AccessRequest) -> dict[str, FactValue]:
    """Return what is to be written down of a question: every fact that is not its default."""
    record: dict[str, FactValue] = {}
    truncated: list[str] = []
    for fact, read in _RECORDED:
        value = read(request)
        if value == fact.default or (not value and fact.default != -1):
            continue
        if fact.kind is Kind.TEXTS:
            texts = sorted(value) if isinstance(value, frozenset) else list(value)
            record[fact.name] = kept = _first(texts)
            if len(kept) < len(texts):
                truncated.append(fact.name)
        elif fact.kind is Kind.INSTANT:
            record[fact.name] = int(value)
        else:
            record[fact.name] = value
    if truncated:
        record[TRUNCATED] = truncated
    if not request.call.is_parsed:
        record[_UNPARSED] = True
    return record


def _first(texts: list[str]) -> list[str]:
    """Return as many of the texts as may be recorded, by what they take as JSON at worst."""
    room = MAX_RECORDED
    for number, text in enumerate(texts):
        room -= len(text) if text.isprintable() and text.isascii() else 6 * len(text)
        if room < 0:
            return texts[:number]
    return texts


def from_record(record: Mapping[str, Any]) -> AccessRequest:
    """Return the question that a record holds.

    Raises:
        ValueError: A name is no fact that is recorded, or a value has another type.
    """
    parts: dict[str, dict[str, Any]] = {"principal": {}, "call": {}, "provider": {}, "": {}}
    for name, value in record.items():
        if name == TRUNCATED:
            continue
        if name == _UNPARSED:
            parts["call"]["is_parsed"] = not value
            continue
        fact = FACTS.get(name)
        if fact is None or not fact.where:
            raise ValueError(f"{name!r} is no fact that a call can be asked with")
        owner, _, field = fact.where.rpartition(".")
        parts[owner][field] = value
    parts["principal"] = {"issuer": "", "subject": "", "tenant": "", **parts["principal"]}
    parts["call"] = {"provider": "", "operation": "chat", **parts["call"]}
    try:
        return msgspec.convert(
            {
                "principal": parts["principal"],
                "call": parts["call"],
                "provider": parts["provider"],
                **parts[""],
            },
            AccessRequest,
        )
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
