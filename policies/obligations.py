"""What a transform obliges the gateway to change in a call, and the call as it is then.

    change:
      max_tokens: {max: 4096, default: 1024}   # capped, and put in where the caller set none
      set: {store: false}                      # top-level parameters of the body
      strip: [logprobs]
      tools: {only: [search]}                  # or {none: ["mcp:*"]}; the others are taken out
      model: gpt-5-mini                        # another of the same provider
      provider: azure-eu                       # another of the same dialect
      headers: {set: {openai-project: p1}, remove: [openai-beta]}
      system: Answer in English.               # put before the caller's own

Laws of this file:
- what is judged is what is sent: a policy decides about the call as its transforms leave it;
- several transforms add up without regard to order: the lowest cap, every strip, only tools that all
  leave; of two values for one thing that of the first id holds, and the other is named as overruled;
- what governs a call under its own name (`model`, `tools`, …) is no parameter to set or strip.

No I/O.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from policies.conditions import globs
from policies.document import Section, nearest
from policies.known import Known
from policies.request import AccessRequest, ModelCall, Operation

Scalar = str | int | float | bool

GOVERNED: Final = {
    "model": "model: gpt-5-mini",
    "max_tokens": "max_tokens: {max: 4096}",
    "max_completion_tokens": "max_tokens: {max: 4096}",
    "max_output_tokens": "max_tokens: {max: 4096}",
    "generationConfig": "max_tokens: {max: 4096}",
    "generation_config": "max_tokens: {max: 4096}",
    "tools": "tools: {only: [search]}",
    "functions": "tools: {only: [search]}",
    "mcp_servers": 'tools: {none: ["mcp:*"]}',
    "system": "system: <text>",
    "instructions": "system: <text>",
    "systemInstruction": "system: <text>",
    "system_instruction": "system: <text>",
    "provider": "provider: <name>",
}
"""Fields of a body that a change names in another way, and how."""

UNTOUCHABLE: Final = frozenset(
    {"stream", "stream_options", "messages", "input", "contents", "requests", "models", "preset"}
)
"""Fields that no change may touch: what is asked, and how the answer comes."""

UNCHANGEABLE_HEADERS: Final = frozenset(
    {
        "host", "authorization", "x-api-key", "x-goog-api-key", "api-key", "cookie", "content-length",
        "content-type", "content-encoding", "accept-encoding", "transfer-encoding", "connection",
        "keep-alive", "proxy-authorization", "proxy-authenticate", "proxy-connection", "te", "trailer",
        "upgrade", "expect",
    }
)  # fmt: skip
"""Credentials, framing and hop-by-hop fields (RFC 9110 7.6.1): the gateway's alone."""

MAX_SYSTEM: Final = 16 * 1024
"""Characters of a system text; it is sent with every call."""

MAX_NAMED: Final = 16
"""Tools of one call whose removal is recorded by name; an audit event holds 64 KiB."""

MAX_TOLD_NAME: Final = 64
"""Characters of each of these names."""

_TOKEN = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}")
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one transform changes; -1, "" and empty collections change nothing."""

    cap: int = -1
    default: int = -1
    set: tuple[tuple[str, Scalar], ...] = ()
    strip: frozenset[str] = frozenset()
    only_tools: tuple[str, ...] | None = None
    no_tools: tuple[str, ...] = ()
    model: str = ""
    provider: str = ""
    set_headers: tuple[tuple[str, str], ...] = ()
    remove_headers: frozenset[str] = frozenset()
    system: str = ""


class Unchangeable(Exception):
    """A call that cannot be changed as a transform says: it does not pass."""


class Obligations(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway must change in one call, from the transforms that apply to it.

    `max_tokens` is the value to send, -1 where the caller's stays. `tools` are those that stay, None
    where all do. `changes` says in words what changed and by which rule, for the record.
    """

    rules: tuple[str, ...]
    changes: tuple[str, ...] = ()
    max_tokens: int = -1
    set: tuple[tuple[str, Scalar], ...] = ()
    strip: tuple[str, ...] = ()
    tools: frozenset[str] | None = None
    model: str = ""
    provider: str = ""
    set_headers: tuple[tuple[str, str], ...] = ()
    remove_headers: frozenset[str] = frozenset()
    system: str = ""

    @property
    def touch_body(self) -> bool:
        """Whether anything in the body has to change."""
        return bool(
            self.max_tokens >= 0
            or self.set
            or self.strip
            or self.tools is not None
            or self.model
            or self.system
        )


# --- one call ------------------------------------------------------------------------------------


class _Work:
    """Gathers what several transforms do to one call, in the order of their ids."""

    def __init__(self, request: AccessRequest) -> None:
        self.request = request
        self.said: list[str] = []
        self._first: dict[str, object] = {}

    def note(self, rule: str, what: str) -> None:
        self.said.append(f"{rule}: {what}")

    def choose(self, rule: str, what: str, value: object) -> bool:
        """Return whether `value` holds: it is the first for this thing, in the order of ids."""
        first = self._first.setdefault(what, value)
        if first != value:
            self.note(rule, f"{what} is overruled")
        return first is value


def oblige(
    changes: Sequence[tuple[str, Change]], request: AccessRequest, known: Known
) -> tuple[Obligations, AccessRequest]:
    """Return what `changes`, pairs of rule id and change in order, oblige to, and the call then.

    Raises:
        Unchangeable: The call has no place for a change, or the provider speaks another dialect.
    """
    work, call = _Work(request), request.call
    is_json = call.operation is not Operation.BATCHES and bool(call.parameters)
    parameters = _parameters(changes, work) if is_json else ({}, ())
    tools = _tools(changes, work, call) if is_json else None
    tokens = _max_tokens(changes, work, call) if call.generates else -1
    model = _model(changes, work, call)
    provider = _provider(changes, work, request, known)
    set_headers, removed = _headers(changes, work)
    systems = [(rule, change.system) for rule, change in changes if change.system]
    for rule, text in systems if call.generates else ():
        work.note(rule, f"system text of {len(text)} characters")
    _check_place(changes, call, is_json=is_json)
    set_parameters, stripped = parameters
    obligations = Obligations(
        rules=tuple(rule for rule, _ in changes),
        changes=tuple(work.said),
        max_tokens=tokens,
        set=tuple(set_parameters.items()),
        strip=stripped,
        tools=tools,
        model=model,
        provider=provider,
        set_headers=tuple(set_headers.items()),
        remove_headers=removed,
        system="\n\n".join(text for _, text in systems) if call.generates else "",
    )
    return obligations, _changed(obligations, request, known)


def _check_place(changes: Sequence[tuple[str, Change]], call: ModelCall, *, is_json: bool) -> None:
    """Refuse what must be changed in a body that is no JSON object, or is not read as one."""
    for rule, change in changes:
        needs_fields = bool(change.set or change.strip or (change.model and call.model))
        if call.operation is Operation.BATCHES and call.parameters:
            raise Unchangeable(f"transform {rule!r} cannot change a batch; deny batches")
        if needs_fields and not is_json and call.body_bytes:
            raise Unchangeable(f"transform {rule!r} cannot change this body; match operations")


def _parameters(
    changes: Sequence[tuple[str, Change]], work: _Work
) -> tuple[dict[str, Scalar], tuple[str, ...]]:
    present = work.request.call.parameters
    stripped: dict[str, None] = {}
    for rule, change in changes:
        for name in present:
            if name in change.strip and name not in stripped:
                stripped[name] = None
                work.note(rule, f"{name} stripped")
    chosen: dict[str, Scalar] = {}
    for rule, change in changes:
        for name, value in change.set:
            if work.choose(rule, name, value):
                chosen[name] = value
                stripped.pop(name, None)
                work.note(rule, f"{name} = {_literal(value)}")
    return chosen, tuple(stripped)


def _literal(value: Scalar) -> str:
    return msgspec.json.encode(value).decode()


def _tools(
    changes: Sequence[tuple[str, Change]], work: _Work, call: ModelCall
) -> frozenset[str] | None:
    left = dict.fromkeys(call.tools)
    for rule, change in changes:
        only = globs(change.only_tools) if change.only_tools is not None else None
        none = globs(change.no_tools)
        out = [tool for tool in left if (only is not None and not only(tool)) or none(tool)]
        if out:
            more = f" and {len(out) - MAX_NAMED} more" if len(out) > MAX_NAMED else ""
            named = ", ".join(tool[:MAX_TOLD_NAME] for tool in out[:MAX_NAMED])
            work.note(rule, f"tools taken out: {named}{more}")
        left = {tool: None for tool in left if tool not in set(out)}
    return None if len(left) == len(call.tools) else frozenset(left)


def _max_tokens(changes: Sequence[tuple[str, Change]], work: _Work, call: ModelCall) -> int:
    asked = call.max_tokens
    caps = [(change.cap, rule) for rule, change in changes if change.cap >= 0]
    defaults = [(change.default, rule) for rule, change in changes if change.default >= 0]
    wanted, rule = min(defaults, default=(-1, "")) if asked < 0 else (asked, "")
    if caps and (wanted < 0 or wanted > min(caps)[0]):
        wanted, rule = min(caps)
    if wanted == asked:
        return -1
    was = f", asked {asked}" if asked >= 0 else ""
    work.note(rule, f"max_tokens = {wanted}{was}")
    return wanted


def _model(changes: Sequence[tuple[str, Change]], work: _Work, call: ModelCall) -> str:
    model = ""
    for rule, change in changes:
        if change.model and call.model and work.choose(rule, "model", change.model):
            model = change.model if change.model != call.model else ""
            if model:
                work.note(rule, f"model = {model}, asked {call.model}")
    return model


def _provider(
    changes: Sequence[tuple[str, Change]], work: _Work, request: AccessRequest, known: Known
) -> str:
    provider = ""
    for rule, change in changes:
        if change.provider and work.choose(rule, "provider", change.provider):
            if change.provider == request.call.provider:
                continue
            if known.providers[change.provider].dialect != request.provider.dialect:
                raise Unchangeable(f"transform {rule!r} routes to a provider of another dialect")
            provider = change.provider
            work.note(rule, f"provider = {provider}, asked {request.call.provider}")
    return provider


def _headers(
    changes: Sequence[tuple[str, Change]], work: _Work
) -> tuple[dict[str, str], frozenset[str]]:
    chosen: dict[str, str] = {}
    removed: set[str] = set()
    for rule, change in changes:
        for name, value in change.set_headers:
            if work.choose(rule, f"header {name}", value):
                chosen[name] = value
                work.note(rule, f"header {name} set")
        for name in sorted(change.remove_headers):
            removed.add(name)
            work.note(rule, f"header {name} removed")
    return chosen, frozenset(removed - chosen.keys())


def _changed(obligations: Obligations, request: AccessRequest, known: Known) -> AccessRequest:
    """Return the question about the call as it is to be sent."""
    call, kept = request.call, obligations.tools
    stays = frozenset(call.tools) if kept is None else kept
    chosen = dict(obligations.set)
    names = [name for name in call.parameters if name not in obligations.strip]
    changed = msgspec.structs.replace(
        call,
        model=obligations.model or call.model,
        provider=obligations.provider or call.provider,
        max_tokens=call.max_tokens if obligations.max_tokens < 0 else obligations.max_tokens,
        tools=tuple(tool for tool in call.tools if tool in stays),
        server_tools=tuple(tool for tool in call.server_tools if tool in stays),
        parameters=tuple(dict.fromkeys([*names, *chosen])),
        store=bool(chosen.get("store", call.store)),
    )
    facts = known.providers.get(changed.provider, request.provider)
    if changed.provider == call.provider:
        facts = request.provider
    return msgspec.structs.replace(request, call=changed, provider=facts)


# --- reading -------------------------------------------------------------------------------------


def read_change(section: Section, known: Known) -> Change:
    """Return the change that a section describes, noting faults in it."""
    if not section.keys():
        section.fault(
            "max_tokens", "or another change is needed: max_tokens, set, strip, tools, model, "
            "provider, headers or system"
        )  # fmt: skip
        return Change()
    cap, default = _read_tokens(section)
    only, none = _read_tools(section, known)
    provider = section.string("provider", "")
    if provider and (fault := known.fault_of("provider", provider)):
        section.fault("provider", fault)
    elif provider and provider not in known.providers:
        section.fault("provider", f"{provider!r} must be one provider, without wildcards")
    model = section.string("model", "")
    if model and (re.search(r"[*?\[\]\s]", model) or not model.isprintable()):
        section.fault("model", f"{model!r} must be one model's name, without wildcards or spaces")
    elif model and (fault := known.fault_of("model", model)):
        section.fault("model", fault)
    system = section.string("system", "")
    if len(system) > MAX_SYSTEM:
        section.fault("system", f"is longer than {MAX_SYSTEM} characters; shorten it")
    set_headers, removed = _read_headers(section)
    change = Change(
        cap=cap,
        default=default,
        set=_read_set(section),
        strip=_read_strip(section),
        only_tools=only,
        no_tools=none,
        model=model,
        provider=provider,
        set_headers=set_headers,
        remove_headers=removed,
        system=system,
    )
    for name in change.strip & {each for each, _ in change.set}:
        section.fault("strip", f"holds {name!r}, which set puts in; leave one of them out")
    known_keys = ("max_tokens", "set", "strip", "tools", "model", "provider", "headers", "system")
    for key in section.keys():  # noqa: SIM118 - a section is no dict
        if key not in known_keys:
            section.fault(key, f"is no change{nearest(key, known_keys)}; set: puts parameters in")
        elif section.value(key) is None:
            section.fault(key, "must not be empty; leave it out")
    return change


def _read_tokens(section: Section) -> tuple[int, int]:
    value = section.value("max_tokens")
    if value is None:
        return -1, -1
    inner = section.section("max_tokens")
    cap = inner.integer("max", low=1) if "max" in inner else -1
    default = inner.integer("default", low=1) if "default" in inner else -1
    if isinstance(value.data, dict) and cap == default == -1:
        section.fault("max_tokens", "needs max, default or both, such as {max: 4096}")
    if 0 <= cap < default:
        inner.fault("default", f"is above max; write at most {cap}")
    inner.finish()
    return cap, default


def _read_tools(section: Section, known: Known) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    value = section.value("tools")
    if value is None:
        return None, ()
    if not isinstance(value.data, dict):
        section.fault("tools", 'needs only or none, such as {only: [search]} or {none: ["mcp:*"]}')
        return None, ()
    inner = section.section("tools")
    # An empty `only` is no slip here: it leaves no tool.
    given = inner.value("only")
    is_empty = given is not None and given.data == []
    only = () if is_empty else (inner.strings("only") if "only" in inner else None)
    none = inner.strings("none")
    if only is None and not none:
        section.fault("tools", 'needs only or none, such as {only: [search]} or {none: ["mcp:*"]}')
    for each in (*(only or ()), *none):
        if fault := known.fault_of("tools", each):
            section.fault("tools", fault)
    inner.finish()
    return only, none


def _read_set(section: Section) -> tuple[tuple[str, Scalar], ...]:
    if section.value("set") is None:
        return ()
    inner = section.section("set")
    chosen: list[tuple[str, Scalar]] = []
    for name in inner.keys():  # noqa: SIM118 - a section is no dict
        value = inner.value(name)
        _check_parameter(inner, name)
        if value is None or isinstance(value.data, list | dict):
            inner.fault(name, "must be a text, a number, true or false; strip takes fields out")
        elif value.data is not None:
            chosen.append((name, value.data))
    return tuple(chosen)


def _read_strip(section: Section) -> frozenset[str]:
    names = section.strings("strip")
    for name in names:
        _check_parameter(section, name, key="strip")
    return frozenset(names)


def _check_parameter(section: Section, name: str, key: str = "") -> None:
    if name in GOVERNED:
        section.fault(key or name, f"names {name!r}; write {GOVERNED[name]} under change")
    elif name in UNTOUCHABLE:
        section.fault(
            key or name, f"names {name!r}, which no rule may change; deny the call instead"
        )
    elif not _PARAMETER.fullmatch(name):
        section.fault(key or name, f"names {name!r}, which is no top-level field of a body")


def _read_headers(section: Section) -> tuple[tuple[tuple[str, str], ...], frozenset[str]]:
    if section.value("headers") is None:
        return (), frozenset()
    inner = section.section("headers")
    chosen: list[tuple[str, str]] = []
    if inner.value("set") is not None:
        fields = inner.section("set")
        for name in fields.keys():  # noqa: SIM118 - a section is no dict
            _check_header(fields, name, name)
            text = fields.string(name, "")
            if not text.isascii() or not text.isprintable() or not text.strip():
                fields.fault(name, "must be printable ASCII; remove takes fields out")
            chosen.append((name, text))
    removed = inner.strings("remove")
    for name in removed:
        _check_header(inner, "remove", name)
    if not chosen and not removed:
        section.fault("headers", "needs set or remove, such as {remove: [openai-beta]}")
    inner.finish()
    return tuple(chosen), frozenset(removed)


def _check_header(section: Section, key: str, name: str) -> None:
    if name != name.lower():
        section.fault(
            key, f"names {name!r}; header fields are written in lower case: {name.lower()}"
        )
    elif name in UNCHANGEABLE_HEADERS or name.startswith("x-veklom-"):
        section.fault(key, f"names {name!r}, which is the gateway's own; leave it out")
    elif not _TOKEN.fullmatch(name):
        section.fault(key, f"names {name!r}, which is no header field")
