"""Room on a disk, taken before it is needed."""

import ctypes
import errno
import os
from typing import Final

_KEEP_SIZE: Final = 1
"""FALLOC_FL_KEEP_SIZE of <linux/falloc.h>: the file's length stays what was written."""

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_POSSIBLE: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def allocate(fd: int, begin: int, length: int) -> bool:
    """Take `length` bytes of the disk for a file from `begin` on; return whether the disk can do so.

    Raises:
        OSError: There is no room, or the disk is broken.
    """
    if _libc.fallocate(fd, _KEEP_SIZE, begin, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_POSSIBLE:
        return False
    raise OSError(number, os.strerror(number))
