"""A secret can be used, and every ordinary way of showing or copying it is shut."""

import copy
import pickle
from collections.abc import Callable

import pytest

from keys.secret import Secret

PLAIN = b"sk-planted-secret"


@pytest.mark.parametrize("show", [repr, str, format, "{!r:>40}".format, lambda s: f"{s}"])
def test_shows_nothing(show: Callable[[Secret], str]) -> None:
    """However a secret is formatted, none of it appears."""
    assert "planted" not in show(Secret(PLAIN))


@pytest.mark.parametrize(
    "use",
    [
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        hash,
        list,
        bytes,
        lambda s: s == Secret(PLAIN),
        lambda s: s == PLAIN,
    ],
)
def test_refuses_to_be_copied_or_compared(use: Callable[[Secret], object]) -> None:
    """Copying, hashing, comparing, iterating and pickling raise, and the error tells nothing."""
    with pytest.raises(TypeError) as caught:
        use(Secret(PLAIN))
    assert "planted" not in str(caught.value)


def test_is_wiped_at_the_end_of_its_block() -> None:
    """A view that outlives the block shows zeros."""
    with Secret(PLAIN) as secret:
        view = secret.reveal()
        assert view == PLAIN
    assert view == bytes(len(PLAIN))
