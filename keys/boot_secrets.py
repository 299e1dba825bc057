"""The two secrets of one gateway's life: drawn once by the supervisor, inherited by its children.

The boot key wraps what workers hold of sessions; the token seed signs session tokens. Both outlive
any one child, so that a control process or a worker that is started again goes on where the last
one ended, and both end with the supervisor. They lie in pages that the kernel hides (`keys.region`),
or, where it has none, in an anonymous memory file that is sealed once written. No I/O but on that
memory.
"""

import fcntl
import mmap
import os
import secrets
from typing import Final, Self

from keys.envelope import KEY_BYTES
from keys.region import create_secret_fd

SEED_BYTES: Final = 32
"""Of an Ed25519 key (RFC 8032 5.1.5)."""

_SIZE: Final = KEY_BYTES + SEED_BYTES
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class BootSecrets:
    """The boot key and the token seed, as a child sees them: views of shared memory, no copies."""

    __slots__ = ("_memory", "boot_key", "token_seed")

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        view = memoryview(memory)
        self.boot_key = view[:KEY_BYTES]
        self.token_seed = view[KEY_BYTES:]

    @staticmethod
    def create() -> int:
        """Return the descriptor of new secrets, for children to inherit; it is closed on exec."""
        try:
            fd = create_secret_fd(_SIZE)
        except OSError:
            fd = os.memfd_create("veklom-secrets", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.write(fd, secrets.token_bytes(_SIZE))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return fd
        with mmap.mmap(fd, _SIZE) as memory:
            memory[:] = secrets.token_bytes(_SIZE)
        return fd

    @classmethod
    def open(cls, fd: int) -> Self:
        """Return the secrets behind an inherited descriptor, and close it: the mapping stays."""
        memory = mmap.mmap(fd, _SIZE, prot=mmap.PROT_READ)
        os.close(fd)
        return cls(memory)

    def __repr__(self) -> str:
        """Return nothing of what is inside."""
        return "BootSecrets(…)"
