"""Events in the words of others: OCSF, ECS and CloudEvents. Export only, never on the disk. No I/O.

Version 1 of each mapping. OCSF 1.9 (API Activity 6003, Authorize Session 3003, Event Log Activity 1008,
Application Lifecycle 6002; profiles ai_operation, security_control, record_integrity), ECS 9.5,
CloudEvents 1.0. A field that has no place there stays in the event as it was recorded.
"""

import base64
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from gateway.audit.tree import leaf_hash

Fields = dict[str, Any]
Mapping = Callable[[Fields, bytes], Fields]

PRODUCT: Final = {"name": "Veklom Gateway", "vendor_name": "Veklom"}

# class_uid and activity_id by the first word, or the whole, of an event's type.
_OCSF: Final = {
    "call": (6003, 99),
    "session.opened": (3003, 1),
    "session": (3003, 99),
    "sessions": (3003, 99),
    "refusals": (6003, 99),
    "log.opened": (1008, 6),
    "log.sealed": (1008, 7),
    "log.redacted": (1008, 2),
    "log.pruned": (1008, 2),
    "log": (1008, 99),
    "anchor": (1008, 99),
    "process.started": (6002, 3),
    "process.stopped": (6002, 4),
}
_OCSF_OTHER: Final = (6002, 99)
_CATEGORY: Final = {6003: 6, 3003: 3, 1008: 1, 6002: 6}


def to_ocsf(event: Fields, line: bytes) -> Fields:
    """Return the event as OCSF."""
    kind = event["type"]
    class_uid, activity = _OCSF.get(kind) or _OCSF.get(kind.partition(".")[0], _OCSF_OTHER)
    mapped: Fields = {
        "category_uid": _CATEGORY[class_uid],
        "class_uid": class_uid,
        "activity_id": activity,
        "activity_name": kind,
        "type_uid": class_uid * 100 + activity,
        "severity_id": 1,
        "time": int(datetime.fromisoformat(event["ts"]).timestamp() * 1000),
        "metadata": {
            "version": "1.9.0", "product": PRODUCT, "uid": f"{event['origin']}#{event['seq']}",
            "sequence": event["seq"], "profiles": ["record_integrity"],
        },
        "attestation_list": [
            {
                "uid": f"{event['origin']}#{event['seq']}",
                "chain_uid": event["origin"],
                "fingerprint": {"algorithm_id": 3, "value": leaf_hash(line).hex()},
            }
        ],
        "raw_data": line.decode(),
    }  # fmt: skip
    if "subject" in event:
        mapped["actor"] = {"user": {"uid": event["subject"], "domain": event["issuer"]}}
    if kind in {"call.start", "call.denied"}:
        is_denied = kind == "call.denied"
        mapped["action_id"] = mapped["disposition_id"] = 2 if is_denied else 1
        mapped["ai_model"] = {"ai_provider": event["provider"], "name": event["model"]}
        mapped["api"] = {"operation": event["operation"], "service": {"name": event["provider"]}}
        mapped["src_endpoint"] = {"ip": event["client_address"]}
        mapped["metadata"]["profiles"] += ["ai_operation", "security_control"]
    if kind == "call.end":
        usage = event["usage"]
        mapped["message_context"] = {
            "prompt_tokens": usage.get("input", 0),
            "completion_tokens": usage.get("output", 0),
            "total_tokens": usage.get("input", 0) + usage.get("output", 0),
        }
    return mapped


_ECS_CATEGORY: Final = {
    "call": "api", "refusals": "api", "session": "session", "sessions": "session",
    "configuration": "configuration", "policy": "configuration", "process": "process",
}  # fmt: skip


def to_ecs(event: Fields, line: bytes) -> Fields:
    """Return the event as ECS."""
    kind = event["type"]
    mapped: Fields = {
        "@timestamp": event["ts"],
        "ecs": {"version": "9.5.0"},
        "event": {
            "kind": "event",
            "id": f"{event['origin']}#{event['seq']}",
            "category": [_ECS_CATEGORY.get(kind.partition(".")[0], "host")],
            "action": kind,
            "outcome": _outcome(event),
            "sequence": event["seq"],
            "hash": leaf_hash(line).hex(),
            "original": line.decode(),
            "provider": event["origin"],
        },
        "observer": {"product": PRODUCT["name"], "vendor": PRODUCT["vendor_name"]},
    }
    if event.get("subject"):
        mapped["user"] = {"id": event["subject"], "domain": event["issuer"]}
    if event.get("tenant"):
        mapped["organization"] = {"id": event["tenant"]}
    if event.get("client_address"):
        mapped["source"] = {"ip": event["client_address"]}
    if event.get("model"):
        mapped["gen_ai"] = {
            "provider": {"name": event["provider"]},
            "operation": {"name": event["operation"]},
            "request": {"model": event["model"]},
        }
    if "usage" in event:
        usage = event["usage"]
        mapped["gen_ai"] = {
            "usage": {
                "input_tokens": usage.get("input", 0),
                "output_tokens": usage.get("output", 0),
            }
        }
    return mapped


def _outcome(event: Fields) -> str:
    kind = event["type"]
    if kind in {"call.denied", "session.refused", "refusals.counted", "log.gap", "call.unclosed"}:
        return "failure"
    if kind == "call.end":
        return "success" if event["outcome"] == "complete" else "failure"
    return "success"


def to_cloudevents(event: Fields, line: bytes) -> Fields:
    """Return the event as a CloudEvent."""
    return {
        "specversion": "1.0",
        "id": f"{event['origin']}#{event['seq']}",
        "source": event["origin"],
        "type": f"veklom.{event['type']}.v{event['v']}",
        "time": event["ts"],
        "sequence": f"{event['seq']:020}",
        "datacontenttype": "application/json",
        "leafhash": base64.b64encode(leaf_hash(line)).decode(),
        "data": event,
    }


MAPPINGS: Final[dict[str, Mapping]] = {
    "ocsf": to_ocsf,
    "ecs": to_ecs,
    "cloudevents": to_cloudevents,
}
