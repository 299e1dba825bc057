"""What is published about the language is what the compiler reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.document import DocumentError, read_document
from policies.facts import FACTS, Kind, Phase
from policies.formatting import formatted
from policies.reference import to_markdown, to_schema

ROOT = Path(__file__).resolve().parents[2]


def test_the_published_pages_are_up_to_date() -> None:
    """docs/facts.md and docs/policy.schema.json are what `veklom policy facts` prints now."""
    assert (ROOT / "docs/facts.md").read_text() == to_markdown()
    assert json.loads((ROOT / "docs/policy.schema.json").read_text()) == to_schema()


def test_the_schema_knows_every_fact_that_rules_may_compare() -> None:
    """An editor completes what a rule may read, and marks what it may not."""
    known = set(to_schema()["$defs"]["match"]["properties"])
    readable = {
        name
        for name, fact in FACTS.items()
        if fact.phase is not Phase.RESPONSE and fact.kind is not Kind.INSTANT
    }
    assert known == readable | {"time", "all", "any", "not"}


LAID_OUT = """\
# A comment at the top.
rules:
  - id: a  # beside
    match: {tenant: "*"}
    effect: allow
  # Before the second.
  - {effect: deny, match: {model: [a,   b]}, id: d}
"""


def test_laying_out_keeps_comments_and_meaning() -> None:
    """Keys come in their usual order, comments stay, and a second time changes nothing."""
    once = formatted(LAID_OUT, "p.yaml")
    assert "# A comment at the top." in once
    assert "# Before the second." in once
    assert "  - {id: d, effect: deny, match: {model: [a, b]}}\n" in once
    assert formatted(once, "p.yaml") == once
    with pytest.raises(DocumentError):
        formatted("rules: [", "p.yaml")


_rules = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.text("ab-", min_size=1, max_size=4),
            "effect": st.sampled_from(["allow", "deny"]),
        },
        optional={
            "match": st.dictionaries(
                st.sampled_from(["tenant", "model"]), st.text("ab #:-'\"\n\\ü ", max_size=6)
            )
        },
    ),
    max_size=4,
)


@given(_rules, st.booleans())
def test_laying_out_never_changes_what_a_file_says(
    rules: list[dict[str, Any]],
    flow: bool,  # noqa: FBT001 - drawn by hypothesis
) -> None:
    """Whatever the document, it reads the same before and after, or is refused."""
    text = json.dumps({"rules": rules}, indent=None if flow else 1, ensure_ascii=False)

    def plain(value: Any) -> Any:
        data = value.data
        if isinstance(data, list):
            return [plain(each) for each in data]
        return {key: plain(each) for key, each in data.items()} if isinstance(data, dict) else data

    assert plain(read_document(formatted(text, "p"), "p")) == plain(read_document(text, "p"))
