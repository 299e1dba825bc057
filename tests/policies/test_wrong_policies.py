"""A hundred wrong policy files, and what their authors read: where it is, what it is, what to write.

`wrong_policies.txt` holds the files and the messages. Run this module to write the messages anew;
then read every one that changed, as somebody who has to repair the file.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from policies.document import DocumentError
from policies.rules import load_policy_set
from tests.policies.asking import PROVIDERS

CORPUS = Path(__file__).with_name("wrong_policies.txt")
_CASE = re.compile(r"=== (?P<name>\S+)\n(?P<text>.*?)\n---\n(?P<said>.*?)(?==== |\Z)", re.DOTALL)


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield name, file and messages of each case."""
    for found in _CASE.finditer(CORPUS.read_text()):
        yield found["name"], found["text"], found["said"]


def messages(text: str) -> str:
    """Return what is said of a policy file, one fault a line."""
    with pytest.raises(DocumentError) as caught:
        load_policy_set([("p.yaml", text)], PROVIDERS)
    return "".join(f"{fault}\n" for fault in caught.value.faults)


def test_the_corpus_is_large_and_its_cases_differ() -> None:
    """There are at least a hundred wrong files, each with a name and a text of its own."""
    found = list(cases())
    assert len(found) >= 100
    assert len({name for name, _, _ in found}) == len({text for _, text, _ in found}) == len(found)
    assert CORPUS.read_text().count("=== ") == len(found)


@pytest.mark.parametrize(
    ("text", "said"), [case[1:] for case in cases()], ids=[c[0] for c in cases()]
)
def test_a_wrong_file_says_what_to_write(text: str, said: str) -> None:
    """Every fault is a `path:line:column: message` that an editor can follow and a person act on."""
    assert messages(text) == said


if __name__ == "__main__":
    CORPUS.write_text("".join(f"=== {n}\n{t}\n---\n{messages(t)}" for n, t, _ in cases()))
