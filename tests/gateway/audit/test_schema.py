"""What is published about events is what events are."""

import json
from pathlib import Path

import msgspec
import pytest

from gateway.audit.envelope import Envelope
from gateway.audit.event import Event
from gateway.audit.mappings import MAPPINGS
from gateway.audit.schema import (
    ENVELOPE,
    FIELDS,
    fields_without_meaning,
    kinds,
    tag_of,
    to_json_schema,
    to_markdown,
)
from gateway.clock import SystemClock
from tests.gateway.audit.conftest import begun, ended, started

DOCS = Path(__file__).parents[3] / "docs"


def test_every_field_of_every_event_is_explained() -> None:
    """Each field has a meaning, and no meaning is without a field (`gateway.audit.schema.FIELDS`)."""
    assert fields_without_meaning() == []
    used = {field.name for kind in kinds() for field in msgspec.structs.fields(kind)}
    assert set(FIELDS) <= used


def test_the_published_files_are_up_to_date() -> None:
    """`veklom audit schema` makes the files in docs."""
    schema = json.dumps(to_json_schema(), indent=1) + "\n"
    assert (DOCS / "audit-events.schema.json").read_text() == schema
    assert (DOCS / "audit-events.md").read_text() == to_markdown()


@pytest.mark.parametrize(
    "event", [begun("c"), ended("c"), started()], ids=lambda each: type(each).__name__
)
def test_a_line_has_what_the_schema_requires(event: Event) -> None:
    """Every property of a line is in the schema, and every required one in the line."""
    line = json.loads(Envelope("test/log", SystemClock()).line(event, 7))
    schema = to_json_schema()["$defs"][type(event).__name__]
    assert set(line) == set(schema["properties"]) == set(schema["required"])
    assert set(ENVELOPE) <= set(line)
    assert (line["seq"], line["type"]) == (7, tag_of(type(event)))


def test_values_are_texts_numbers_and_lists() -> None:
    """No field is a float or may be missing: nothing can be spelt in two ways."""
    text = json.dumps(to_json_schema()["$defs"])
    assert '"number"' not in text
    assert '"null"' not in text


@pytest.mark.parametrize("form", MAPPINGS)
def test_events_in_others_words(form: str) -> None:
    """Every mapping keeps where an event stands, what its hash is, and who called."""
    envelope = Envelope("test/log", SystemClock())
    for seq, event in enumerate((begun("c"), ended("c"), started())):
        line = envelope.line(event, seq)
        mapped = json.dumps(MAPPINGS[form](json.loads(line), line))
        assert f"test/log#{seq}" in mapped
    start = envelope.line(begun("c"), 0)
    fields = MAPPINGS[form](json.loads(start), start)
    expected = {
        "ocsf": ("type_uid", 600399), "ecs": ("user", {"id": "s", "domain": "i"}),
        "cloudevents": ("type", "veklom.call.start.v1"),
    }  # fmt: skip
    name, value = expected[form]
    assert fields[name] == value
