"""A gateway without custody, for `bench/run.py --custody` to measure against, and for nothing else.

On PYTHONPATH this makes a worker keep each key in clear from its first use on: no wrapping, no
derived key, no sealing, no slot, no wiping. Everything else is as in service.
"""

from keys.vault import HeldKey, SessionVault

_compose_head = SessionVault.compose_head
_plain: dict[HeldKey, bytes] = {}


class _Head:
    """What a slot is to the transport."""

    def __init__(self, head: bytes) -> None:
        self.view = self.whole = memoryview(head)

    def release(self) -> None:
        """Do nothing."""


def _without_custody(
    self: SessionVault, key: HeldKey, session_secret: bytes, before: bytes, after: bytes
) -> _Head:
    plain = _plain.get(key)
    if plain is None:
        slot = _compose_head(self, key, session_secret, b"", b"")
        plain = _plain[key] = bytes(slot.view)
        slot.release()
    return _Head(before + plain + after)


SessionVault.compose_head = _without_custody
