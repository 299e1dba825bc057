"""Every event, field by field: as a page for people and as a JSON Schema for programs. No I/O.

What a field means is said here once, since the same name means the same in every event. The
published files are made from this (`veklom audit schema`), and a test compares them.
"""

import inspect
from typing import Any, Final, get_origin

import msgspec

from gateway.audit import event as events
from gateway.audit.event import VERSION, Event

ENVELOPE: Final = {
    "v": ("integer", f"version of the envelope and of the event: {VERSION}"),
    "origin": ("string", "the log: deployment, replica, start of the gateway, process and its run"),
    "ts": ("string", "when it was recorded: UTC with microseconds"),
    "seq": ("integer", "index in its log, from 0; the leaf index of the Merkle tree"),
    "salt": ("string", "128 random bits, so that the hash of an erased event tells nothing"),
    "type": ("string", "which event this is"),
}

FIELDS: Final = {
    "action": "what was asked for",
    "address": "where the store was reached, without credentials",
    "by": "who did it",
    "by_issuer": "`iss` of the operator's token",
    "call": "the call's id, as in `X-Veklom-Call`; its first 12 digits are milliseconds",
    "changes": "what an obligation changed in the request, each with its rule",
    "checkpoints": "how many checkpoints were written before the one above the seal",
    "client_address": "the address that the caller connected from",
    "clock": "the key that puts the time on checkpoints",
    "closed_sessions": "how many sessions it closed",
    "code": "why, as callers and metrics have it; empty where the provider answered",
    "codes": "how many refusals had each code",
    "counted_for": "for whom a limit counts: the parts of its key, and the window",
    "credential": "fingerprint of the provider key: a keyed hash, never a part of the key",
    "credentials": "the deposited provider keys, by fingerprint",
    "cut_calls": "how many live calls were ended by it",
    "decided_us": "how long deciding took, in microseconds",
    "deposit": "how the keys came: `plain` or `hpke`",
    "dialect": "the API that was spoken: openai, anthropic or gemini",
    "digest": "SHA-256 of what was loaded",
    "durability": "what calls wait for: strict, bounded or async",
    "durable": "how many of the log's events are on the disk",
    "events": "the indices",
    "expires_at": "when the session ends at the latest, in seconds since the epoch",
    "facts": "what rules were asked about, without content: enough to decide again",
    "faults": "what is wrong, each with file:line:column",
    "fault": "whose fault it was: downstream, gateway, upstream, or empty",
    "files": "the policy files",
    "first_byte_us": "from sending the request to the first byte of the answer, in microseconds",
    "frontier": "roots (base64) of the complete subtrees over what was erased, largest first",
    "generation": "how often the session was renewed, from 1",
    "gone": "how many sessions were gone from the store",
    "has_forgotten": "whether the store had lost what it held",
    "held": "the protections that hold",
    "is_there": "whether the store of limits answers",
    "is_whole": "whether all is well",
    "issuer": "`iss` of the caller's token",
    "kill": "the kill's id",
    "kills": "how many kills stand",
    "limit": "the limit that it is about, or that refused; empty where none did",
    "limits": "limits that did not simply count the call: `name:shadow`, `name:local`, `name:allow`",
    "log": "the origin of the log that this is about",
    "lost": "how many events were lost",
    "max_tokens": "the most output tokens that the caller allowed, 0 for unsaid",
    "maximum": "what the budget allows in its window",
    "missing": "the protections that do not hold, with the reason",
    "model": "the model that was asked for",
    "note": "a checkpoint: a C2SP signed note",
    "operation": "what was asked of the provider",
    "outcome": "how the call ended",
    "overlap_seconds": "how long the old keys are still used",
    "path": "the file that was read",
    "percent": "how much of the budget is spent, in percent",
    "period_us": "how long ago the first of them was, in microseconds",
    "persistence": "what the store keeps on a disk",
    "policy": "digest of the policy set that decided",
    "provider": "the provider, by its configured name",
    "reason": "why",
    "reasons": "why each rule that mattered decided as it did",
    "replaced": "the provider keys that were replaced, by fingerprint",
    "request_bytes": "bytes of the request's body",
    "response_bytes": "bytes of the answer's body",
    "role": "which process: control or worker-N",
    "root": "root hash (base64) of the tree over the events",
    "rules": "the rules that decided",
    "run": "the how-manieth process of its role since the gateway started",
    "scope": "what kind of thing is stopped",
    "session": "the session's id",
    "sessions": "how many sessions",
    "size": "how many events",
    "spent": "what is spent of the budget in its window",
    "start": "index of the call's `call.start` in that log",
    "status": "the HTTP status that the caller saw, 0 for none",
    "stream": "whether a stream was asked for",
    "subject": "`sub` of the caller's token",
    "tenant": "the tenant that the caller's token names",
    "torn": "bytes of a last line that never became an event",
    "total": "the sum of all codes",
    "total_us": "from the first byte of the request to the end, in microseconds",
    "unit": "what is counted: tokens, or millionths of a US dollar (micro-usd)",
    "upstream": "the origin that the call was sent to",
    "upstream_status": "the HTTP status of the provider, 0 for none",
    "usage": "tokens as the provider counted them; `source` is `none` where it did not say",
    "value": "which one is stopped",
    "version": "of the program",
    "vkey": "the key that signs this log's checkpoints",
    "would": "what rules in shadow would have decided, where that differs",
    "would_reasons": "why they would have",
    "would_rules": "the rules in shadow that would have decided",
}


def kinds() -> list[type[Event]]:
    """Return every kind of event, in the order of the module that defines them."""
    return [
        each
        for each in vars(events).values()
        if inspect.isclass(each) and issubclass(each, Event) and each is not Event
    ]


def tag_of(kind: type[Event]) -> str:
    """Return the `type` of a kind."""
    return str(kind.__struct_config__.tag)


def fields_without_meaning() -> list[str]:
    """Return the fields of which nothing is said."""
    return sorted(
        f"{tag_of(kind)}.{field.name}"
        for kind in kinds()
        for field in msgspec.structs.fields(kind)
        if field.name not in FIELDS
    )


def to_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a line."""
    listed, components = msgspec.json.schema_components(kinds(), ref_template="#/$defs/{name}")
    for component in components.values():
        component["description"] = inspect.cleandoc(component.get("description", ""))
        properties = component.get("properties", {})
        for name, each in properties.items():
            if name in FIELDS:
                each["description"] = FIELDS[name]
        if "type" in properties:
            for name, (form, meaning) in ENVELOPE.items():
                properties.setdefault(name, {"type": form})["description"] = meaning
            component["required"] = sorted(properties)  # a line says all of it, defaults too
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A line of an audit log of Veklom Gateway, version {VERSION}",
        "oneOf": list(listed),
        "$defs": dict(sorted(components.items())),
    }


def to_markdown() -> str:
    """Return the page."""
    lines = [
        "# Audit events",
        "",
        "Made by `veklom audit schema --markdown`; the JSON Schema beside this page without `--markdown`.",
        "",
        "A log is JSON lines. Each begins with an envelope, and its own fields follow. Values are text,",
        "whole numbers, booleans and lists of them. Never a key, a token, a header or content.",
        "",
        "| envelope | is | means |",
        "|---|---|---|",
        *(f"| `{name}` | {form} | {meaning} |" for name, (form, meaning) in ENVELOPE.items()),
        "",
        "Not recorded: health, readiness and metrics; the lists that callers read of their own sessions;",
        "and what is no request at all (broken TLS or HTTP), which metrics count.",
    ]
    for kind in kinds():
        lines += [
            "",
            f"## {tag_of(kind)}",
            "",
            *inspect.cleandoc(kind.__doc__ or "").split("\n"),
            "",
        ]
        fields = msgspec.structs.fields(kind)
        if fields:
            lines += ["| field | is | means |", "|---|---|---|"]
            lines += [
                f"| `{each.name}` | {_form(each.type)} | {FIELDS.get(each.name, '')} |"
                for each in fields
            ]
    return "\n".join(lines) + "\n"


def _form(kind: Any) -> str:
    simple = {str: "text", int: "number", bool: "true or false"}
    if kind in simple:
        return simple[kind]
    if get_origin(kind) is dict:
        return "object: values by name"
    if getattr(kind, "__args__", None):
        return f"list of {_form(kind.__args__[0])}"
    parts = ", ".join(f"`{each.name}`" for each in msgspec.structs.fields(kind))
    return f"object: {parts}"
