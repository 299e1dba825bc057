"""The secrets of one gateway's life: the same for every child, different for every gateway."""

import os

import pytest

from keys import region
from keys.boot_secrets import BootSecrets


def opened(fd: int) -> BootSecrets:
    """Open the secrets as one child does: with a descriptor of its own."""
    return BootSecrets.open(os.dup(fd))


@pytest.fixture(params=["secret pages", "a sealed file"], autouse=True)
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep them in either way."""
    if request.param == "a sealed file":
        monkeypatch.setattr(region, "_MEMFD_SECRET", 99_999)


def test_every_child_sees_the_same() -> None:
    """Two openings of one file agree; another gateway's are different; nothing is empty."""
    ours, theirs = BootSecrets.create(), BootSecrets.create()
    one, two, other = opened(ours), opened(ours), opened(theirs)
    assert (one.boot_key, one.token_seed) == (two.boot_key, two.token_seed)
    assert len({bytes(one.boot_key), bytes(one.token_seed), bytes(other.boot_key)}) == 3
    assert (len(one.boot_key), len(one.token_seed)) == (32, 32)
    for fd in (ours, theirs):
        os.close(fd)


def test_nobody_changes_or_prints_them() -> None:
    """Nobody writes to the file, its views are read-only, and it says nothing of itself."""
    fd = BootSecrets.create()
    secrets = opened(fd)
    with pytest.raises(OSError, match=r"not permitted|Illegal seek"):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(TypeError):
        secrets.boot_key[0] = 0
    assert repr(secrets) == "BootSecrets(…)"
    os.close(fd)
