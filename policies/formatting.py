"""One way to lay a policy file out: keys in their usual order, two spaces, comments where they were.

What a file says never changes: the new text is read again, and has to be the same document. No I/O.
"""

import io
from typing import Any, Final

from ruamel.yaml import YAML

from policies.document import DocumentError, Fault, Value, read_document

ORDER: Final = ("id", "name", "effect", "mode", "key", "match", "when", "that", "change", "message")
"""The order of a rule's or a limit's keys; others come behind, as they stood."""

WIDTH: Final = 120
_ANY_WIDTH: Final = 2**20


def formatted(text: str, path: str) -> str:
    """Return the text of a policy file, laid out.

    Raises:
        DocumentError: It is no document, or cannot be laid out without changing what it says.
    """
    before = _content(read_document(text, path))
    # A text that is folded over lines may lose a space there; then lines are left as long as they are.
    for width in (WIDTH, _ANY_WIDTH):
        result = _laid_out(text, width)
        if _content(read_document(result, path)) == before:
            return result
    raise DocumentError([Fault(path, 1, 1, "cannot be laid out without changing what it says")])


def _laid_out(text: str, width: int) -> str:
    yaml = YAML(typ="rt", pure=True)
    yaml.preserve_quotes = True
    yaml.width = width
    yaml.indent(mapping=2, sequence=4, offset=2)
    document = yaml.load(text)
    for listed in ("rules", "limits"):
        for item in document.get(listed) or ():
            _reorder(item)
    out = io.StringIO()
    yaml.dump(document, out)
    return "\n".join(line.rstrip() for line in out.getvalue().split("\n")).rstrip("\n") + "\n"


def _reorder(item: Any) -> None:
    """Put an item's keys into their usual order, its comments with them."""
    present = [key for key in ORDER if key in item] + [key for key in item if key not in ORDER]
    if list(item) == present:
        return
    # A comment hangs on the key before it: an item that has any is left as its author wrote it.
    if item.ca.items:
        return
    for key in present:
        item.move_to_end(key)


def _content(value: Value) -> Any:
    if isinstance(value.data, list):
        return [_content(each) for each in value.data]
    if isinstance(value.data, dict):
        return {key: _content(each) for key, each in value.data.items()}
    return value.data
