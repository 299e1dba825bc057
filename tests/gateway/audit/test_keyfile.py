"""Key files are made once, private, and refused where others could have read them."""

from pathlib import Path

import pytest

from gateway.audit.keyfile import SEED_BYTES, UnsafeKeyFile, load_or_create_seed, load_signer


def test_made_once(tmp_path: Path) -> None:
    """The first start draws a private key; the next one reads the same."""
    path = tmp_path / "state" / "audit.key"
    seed = load_or_create_seed(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert (len(seed), load_or_create_seed(path)) == (SEED_BYTES, seed)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_readable_by_others(tmp_path: Path, mode: int) -> None:
    """A key that others may read is no key; the message says what to do and not what it is."""
    path = tmp_path / "audit.key"
    seed = load_or_create_seed(path)
    path.chmod(mode)
    with pytest.raises(UnsafeKeyFile, match="chmod 600") as refused:
        load_or_create_seed(path)
    assert seed.hex() not in str(refused.value)


@pytest.mark.parametrize("size", [0, 31, 33, 4096])
def test_of_another_length(tmp_path: Path, size: int) -> None:
    """A truncated or foreign file is refused, not padded."""
    path = tmp_path / "audit.key"
    path.touch(0o600)
    path.write_bytes(bytes(size))
    with pytest.raises(UnsafeKeyFile, match="32 bytes"):
        load_signer(tmp_path, "name")
