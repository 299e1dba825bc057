"""The language as others read it: a page of all facts, and a JSON Schema for editors.

Both are made from the tables that the compiler reads, so that they cannot say anything else. No I/O.
"""

from collections.abc import Iterator
from typing import Any, Final

from policies.calendar import Period
from policies.document import DURATION_UNITS
from policies.facts import FACTS, Fact, Group, Kind, Phase
from policies.hours import DAYS
from policies.known import OPERATIONS
from policies.limits import KEY_PARTS, OnStoreError
from policies.rule import Effect

COMPARED: Final[dict[Kind, str]] = {
    Kind.TEXT: "one pattern, or a list of which one matches",
    Kind.TEXTS: "a pattern or a list of which one matches; or `{any, all, only, none: [...]}`",
    Kind.NUMBER: "`{min: 1, max: 4096}`",
    Kind.SIZE: "`{max: 1MiB}`",
    Kind.DURATION: "`{max: 15m}`",
    Kind.FLAG: "`true` or `false`",
    Kind.ADDRESS: '`["10.0.0.0/8", "2001:db8::/32"]`',
    Kind.INSTANT: "`time:` or `auth_age:`",
}

_INTRODUCTION: Final = """\
# Facts

Made by `veklom policy facts --markdown`; do not edit. Rules read these under `match:` and `that:`,
expressions under `when:`, tests under `fixtures:` and `with:`; the audit log holds them under `facts`.

A fact always has a value. Patterns may hold `*`, `?` and `[...]`; an absent text matches no pattern, an
absent number counts as unbounded. A fact of the phase `response` is recorded elsewhere, and no rule can
read it: rules decide before it is known.
"""


def to_markdown() -> str:
    """Return the page of all facts."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield _INTRODUCTION
    for group in Group:
        yield f"## {group.value.capitalize()}\n"
        yield "| fact | kind | known from | default | what it is |"
        yield "|---|---|---|---|---|"
        for fact in FACTS.values():
            if fact.group is group:
                cells = (f"`{fact.name}`", fact.kind, fact.phase, _default(fact), fact.meaning)
                yield f"| {' | '.join(cells)} |"
        yield ""
    yield "## How each kind is compared\n"
    yield "| kind | under `match:` |"
    yield "|---|---|"
    for kind, words in COMPARED.items():
        yield f"| {kind} | {words} |"
    yield ""
    yield "`time:` compares the instant with a clock on a wall: `{zone: Europe/Paris, days: mon-fri,"
    yield 'from: "08:00", to: "18:00", since: 2027-01-01, until: 2027-12-31}`; a window over midnight'
    yield "belongs to the day on which it begins. `all: [...]`, `any: [...]` and `not: {...}` nest."


def _default(fact: Fact) -> str:
    if fact.default == -1:
        return "unbounded"
    if fact.default in ("", []) or (fact.kind is Kind.INSTANT and not fact.default):
        return "none"
    return f"`{str(fact.default).lower()}`"


# --- JSON Schema ---------------------------------------------------------------------------------

_TEXTS: Final = {
    "oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
}
_ID: Final = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$"}
_DURATION: Final = {"type": "string", "pattern": f"^[0-9.]+({'|'.join(DURATION_UNITS)})$"}
_COUNT: Final = {"type": "integer", "minimum": 0}


def _mapping(
    properties: dict[str, Any], required: tuple[str, ...] = (), **more: Any
) -> dict[str, Any]:
    found = {"type": "object", "properties": properties, "additionalProperties": False, **more}
    return {**found, "required": list(required)} if required else found


def _range(bound: dict[str, Any]) -> dict[str, Any]:
    return _mapping({"min": bound, "max": bound}, minProperties=1)


_BY_KIND: Final[dict[Kind, dict[str, Any]]] = {
    Kind.TEXT: _TEXTS,
    Kind.TEXTS: {
        "oneOf": [
            *_TEXTS["oneOf"],
            _mapping(dict.fromkeys(("any", "all", "only", "none"), _TEXTS), minProperties=1),
        ]
    },
    Kind.NUMBER: _range(_COUNT),
    Kind.SIZE: _range(
        {"oneOf": [_COUNT, {"type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)$"}]}
    ),
    Kind.DURATION: _range(_DURATION),
    Kind.FLAG: {"type": "boolean"},
    Kind.ADDRESS: _TEXTS,
}


def _match() -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for fact in FACTS.values():
        if fact.phase is Phase.RESPONSE or fact.kind is Kind.INSTANT:
            continue
        properties[fact.name] = {**_BY_KIND[fact.kind], "description": fact.meaning}
    words = [*sorted(OPERATIONS)]
    properties["operation"]["examples"] = words
    clock = {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$|^24:00$"}
    day = {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}
    properties["time"] = _mapping(
        {
            "zone": {"type": "string", "examples": ["UTC", "Europe/Paris"]},
            "days": {**_TEXTS, "examples": [*DAYS, "mon-fri"]},
            "from": clock,
            "to": clock,
            "since": day,
            "until": day,
        },
        required=("zone",),
    )
    nested = {"$ref": "#/$defs/match"}
    for name in ("all", "any"):
        properties[name] = {"type": "array", "items": nested, "minItems": 1}
    properties["not"] = nested
    return _mapping(properties, minProperties=1)


def _change() -> dict[str, Any]:
    scalar = {"type": ["string", "number", "boolean"]}
    return _mapping(
        {
            "max_tokens": _mapping({"max": _COUNT, "default": _COUNT}, minProperties=1),
            "set": {"type": "object", "additionalProperties": scalar, "minProperties": 1},
            "strip": _TEXTS,
            "tools": _mapping(
                {
                    "only": {"oneOf": [*_TEXTS["oneOf"], {"type": "array", "maxItems": 0}]},
                    "none": _TEXTS,
                },
                minProperties=1,
            ),
            "model": {"type": "string"},
            "provider": {"type": "string"},
            "headers": _mapping(
                {
                    "set": {"type": "object", "additionalProperties": {"type": "string"}},
                    "remove": _TEXTS,
                },
                minProperties=1,
            ),
            "system": {"type": "string"},
        },
        minProperties=1,
    )


def _rule() -> dict[str, Any]:
    return _mapping(
        {
            "id": _ID,
            "effect": {"enum": [effect.value for effect in Effect]},
            "mode": {"enum": ["enforce", "shadow"]},
            "match": {"$ref": "#/$defs/match"},
            "when": {"type": "string", "description": "A CEL expression over the facts."},
            "that": {"$ref": "#/$defs/match"},
            "change": {"$ref": "#/$defs/change"},
            "message": {
                "type": "string",
                "description": "What callers are told.",
                "maxLength": 512,
            },
        },
        required=("id", "effect"),
    )


def _limit() -> dict[str, Any]:
    key = {"enum": list(KEY_PARTS)}
    kinds = _limit_kinds()
    override = _mapping({"match": {"$ref": "#/$defs/match"}, **kinds}, required=("match",))
    return _mapping(
        {
            "name": _ID,
            "key": {"oneOf": [key, {"type": "array", "items": key, "minItems": 1}]},
            "match": {"$ref": "#/$defs/match"},
            **kinds,
            "overrides": {"type": "array", "items": override},
            "mode": {"enum": ["enforce", "shadow"]},
            "on_store_error": {"enum": [each.value for each in OnStoreError]},
            "on_unknown_price": {"enum": ["deny", "allow"]},
        },
        required=("name", "key"),
    )


def _limit_kinds() -> dict[str, Any]:
    rate = {"type": "string", "pattern": "^[0-9]+/(s|min|h|d)$"}
    byte_rate = {"type": "string", "pattern": "^[0-9]+(B|KiB|MiB|GiB)/(s|min|h|d)$"}
    weight, share = {"type": "number", "minimum": 0, "maximum": 10}, {"minimum": 0, "maximum": 1}
    counted = {
        "cache_read": weight,
        "cache_write": weight,
        "reserve_output": share,
        "count": _TEXTS,
    }
    budget = {
        "max": {"type": "string", "pattern": "^[0-9.]+ (USD|tokens)$"},
        "per": {"enum": [each.value for each in Period]},
        "zone": {"type": "string"},
        "warn_at": {"type": ["integer", "array"]},
    }
    return {
        "requests": _mapping({"rate": rate, "burst": _COUNT}, required=("rate",)),
        "tokens": _mapping({"rate": rate, "burst": _COUNT, **counted}, required=("rate",)),
        "bytes": _mapping(
            {"rate": byte_rate, "burst": {"type": "string"}, "count": _TEXTS}, required=("rate",)
        ),
        "concurrent": _mapping({"max": _COUNT, "lease": _DURATION}, required=("max",)),
        "budget": _mapping({**budget, **counted}, required=("max", "per")),
    }


def _price() -> dict[str, Any]:
    dollars = {"type": "string", "pattern": "^[0-9]+([.][0-9]+)?$"}
    prices = dict.fromkeys(("input", "output", "cache_read", "cache_write"), dollars)
    texts = {"provider": {"type": "string"}, "model": {"type": "string"}}
    return _mapping({**texts, **prices}, required=("provider", "model", "input"))


def to_schema() -> dict[str, Any]:
    """Return the JSON Schema of a policy file."""
    named = [fact.name for fact in FACTS.values() if fact.kind in {Kind.TEXT, Kind.TEXTS}]
    top = _mapping(
        {
            "names": _mapping(dict.fromkeys(named, _TEXTS)),
            "mode": {"enum": ["enforce", "shadow"]},
            "rules": {"type": "array", "items": {"$ref": "#/$defs/rule"}},
            "limits": {"type": "array", "items": {"$ref": "#/$defs/limit"}},
            "prices": {"type": "array", "items": _price()},
        }
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Veklom Gateway policy",
        **top,
        "$defs": {"rule": _rule(), "limit": _limit(), "match": _match(), "change": _change()},
    }
