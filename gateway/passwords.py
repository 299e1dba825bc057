"""Passwords that stand in files of their own, and nowhere else."""

from pathlib import Path
from typing import Final

MAX_PASSWORD_BYTES: Final = 4096


def read_password(path: str) -> str:
    """Return the password in a file, without the line feed that editors leave.

    Raises:
        OSError: It cannot be read.
        ValueError: There is none in it.
    """
    with Path(path).open("rb") as file:
        text = file.read(MAX_PASSWORD_BYTES + 1).decode()
    password = text.removesuffix("\n").removesuffix("\r")
    if not password or len(text) > MAX_PASSWORD_BYTES:
        raise ValueError(f"it does not hold 1 to {MAX_PASSWORD_BYTES} bytes")
    return password
