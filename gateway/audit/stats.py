"""What a log adds up to. No I/O."""

from collections import Counter
from collections.abc import Iterable
from typing import Any


def count(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return counts of events by type, and of calls by what came of them and what they used."""
    types: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    models: Counter[str] = Counter()
    tenants: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    first = last = ""
    for event in events:
        kind = event["type"]
        types[kind] += 1
        ts = event["ts"]
        first, last = min(first or ts, ts), max(last, ts)
        if kind == "call.start":
            models[f"{event['provider']}/{event['model']}"] += 1
            tenants[event["tenant"]] += 1
        elif kind == "call.end":
            outcomes[event["outcome"]] += 1
            for name in ("input", "output"):
                tokens[name] += event["usage"].get(name, 0)
        elif kind == "call.denied":
            codes[event["code"]] += 1
    return {
        "first": first,
        "last": last,
        "events": sum(types.values()),
        "types": dict(types.most_common()),
        "outcomes": dict(outcomes.most_common()),
        "denials": dict(codes.most_common()),
        "models": dict(models.most_common()),
        "tenants": dict(tenants.most_common()),
        "tokens": dict(tokens),
    }
