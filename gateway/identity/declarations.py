"""What a caller declares of a call: labels of its content, and its purpose.

A declaration never gives a permission of its own: rules decide what follows from it. The fields stay
here; providers do not see them. No I/O.
"""

import re
from collections.abc import Sequence
from typing import Final

from gateway.errors import Refused

LABELS: Final = b"x-veklom-labels"
PURPOSE: Final = b"x-veklom-purpose"
MAX_LABELS: Final = 16

_WORD = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")


def declared_labels(headers: Sequence[tuple[bytes, bytes]]) -> frozenset[str]:
    """Return the labels of all `X-Veklom-Labels` fields, separated by commas, in lower case.

    Raises:
        Refused: One is no label, or there are too many.
    """
    found = [value for name, value in headers if name == LABELS]
    if not found:
        return frozenset()
    labels = frozenset(_word(each, "X-Veklom-Labels") for each in b",".join(found).split(b","))
    if len(labels) > MAX_LABELS:
        raise Refused("invalid_request", f"X-Veklom-Labels holds more than {MAX_LABELS} labels.")
    return labels


def declared_purpose(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """Return the purpose in `X-Veklom-Purpose`, "" where there is none.

    Raises:
        Refused: It is no single word.
    """
    found = [value for name, value in headers if name == PURPOSE]
    if len(found) > 1:
        raise Refused("invalid_request", "X-Veklom-Purpose is given twice.")
    return _word(found[0], "X-Veklom-Purpose") if found else ""


def _word(value: bytes, field: str) -> str:
    word = value.strip().decode(errors="replace").lower()
    if not _WORD.fullmatch(word):
        raise Refused("invalid_request", f"{field} may hold a-z, 0-9, '.', '_' and '-'.")
    return word
