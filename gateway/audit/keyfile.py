"""Key files of a deployment: created once with mode 0600, refused where others may read them."""

import os
import secrets
import stat
from pathlib import Path

from keys.signing import Signer

SEED_BYTES = 32


class UnsafeKeyFile(Exception):
    """A key file that others may read, or that is not a key."""

    code = "unsafe_key_file"


def load_or_create_seed(path: Path) -> bytes:
    """Return the 32 bytes kept at `path`, drawing them on the first start.

    Raises:
        UnsafeKeyFile: The file is readable by others, or has another length.
        OSError: It can be neither read nor made.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return _load(path)
    with os.fdopen(fd, "wb") as file:
        seed = secrets.token_bytes(SEED_BYTES)
        file.write(seed)
        file.flush()
        os.fsync(fd)
    return seed


def _load(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        seed = file.read(SEED_BYTES + 1)
    if stat.S_IMODE(mode) & 0o077:
        raise UnsafeKeyFile(f"{path} may be read by others; run chmod 600 on it")
    if len(seed) != SEED_BYTES:
        raise UnsafeKeyFile(f"{path} is not a key of {SEED_BYTES} bytes")
    return seed


def load_signer(state_dir: Path, name: str) -> Signer:
    """Return the deployment's audit signer, from `audit.key` in the state directory."""
    return Signer(name, load_or_create_seed(state_dir / "audit.key"))
