"""The worker's side of custody: what is held of each key, and the moment of use.

What a worker holds of a session is wrapped (`keys.wrapping`), and held here alone, so that a dump of
the worker's ordinary memory opens nothing even with a token in it. A call takes a `HeldKey` once and
uses that one to its end; `compose_head` is the one way out: it lays an upstream head with the
credential out in a slot.

Laws of this file:
- a key that is destroyed is overwritten, and whoever still has its `HeldKey` can use it no more;
- a key that another replaces is destroyed when its overlap is over, and at once where a third comes.

No I/O.
"""

from dataclasses import replace

from keys.envelope import KEY_BYTES, OVERHEAD_BYTES, Buffer, derive_key_into, unseal_into
from keys.errors import NoCredential, UnknownSession, UnsealFailed
from keys.region import SecretRegion, Slot
from keys.session import SealedCredential, SessionRecord
from keys.wrapping import WRAPPING_BYTES, Wrapping


class HeldKey:
    """One session's sealed key for one provider, wrapped. It opens nothing alone."""

    __slots__ = (
        "_wrapped", "associated_data", "fingerprint", "is_destroyed", "origin", "provider",
        "session_id", "size",
    )  # fmt: skip

    def __init__(self, record: SessionRecord, sealed: SealedCredential) -> None:
        self.session_id = record.session_id
        self.provider = sealed.provider
        self.origin = sealed.origin
        self.fingerprint = sealed.fingerprint
        self.size = len(sealed.sealed) - WRAPPING_BYTES - OVERHEAD_BYTES
        self.is_destroyed = False
        self._wrapped = bytearray()
        self.take(record, sealed)

    def take(self, record: SessionRecord, sealed: SealedCredential) -> None:
        """Hold this sealed form of the same key from now on."""
        binding = record.binding(sealed.provider, sealed.origin, sealed.revision)
        self.associated_data = binding.to_associated_data()
        self._wrapped[:] = bytes(len(self._wrapped))
        self._wrapped = bytearray(sealed.sealed)

    @property
    def wrapped(self) -> bytearray:
        """What is held.

        Raises:
            UnknownSession: The key was destroyed.
        """
        if self.is_destroyed:
            raise UnknownSession
        return self._wrapped

    def destroy(self) -> None:
        """Overwrite the key."""
        self._wrapped[:] = bytes(len(self._wrapped))
        self.is_destroyed = True

    def is_same_key(self, sealed: SealedCredential) -> bool:
        """Return whether this is another sealed form of the key that is held."""
        return (self.fingerprint, self.origin) == (sealed.fingerprint, sealed.origin)

    def is_in_place_of(self, other: "HeldKey") -> bool:
        """Return whether both are keys of one session for one provider."""
        return (self.session_id, self.provider) == (other.session_id, other.provider)

    def __repr__(self) -> str:
        """Return what may be said of it."""
        return f"HeldKey({self.provider}, {self.fingerprint})"


class SessionVault:
    """The keys of every open session, by session and provider."""

    def __init__(self, region: SecretRegion, wrapping: Wrapping) -> None:
        self._region = region
        self._wrapping = wrapping
        self._sessions: dict[str, dict[str, HeldKey]] = {}
        self._replaced: list[tuple[float, HeldKey]] = []

    def __len__(self) -> int:
        """Return how many sessions are held."""
        return len(self._sessions)

    def put(self, record: SessionRecord, now: float) -> int:
        """Hold a session's keys, which are wrapped, in place of an earlier revision's.

        A key that is the same stays with the calls that use it; one that is replaced stays for
        its successor's `overlap_seconds` from `now`, which is monotonic. Return how many keys were
        destroyed.
        """
        before = self._sessions.get(record.session_id, {})
        held = {}
        for sealed in record.credentials:
            key = before.get(sealed.provider)
            if key is not None and key.is_same_key(sealed):
                key.take(record, sealed)
                del before[sealed.provider]
            else:
                if key is not None:
                    self._replace(before.pop(sealed.provider), now, sealed.overlap_seconds)
                key = HeldKey(record, sealed)
            held[sealed.provider] = key
        for key in before.values():
            self._replace(key, now, 0)
        self._sessions[record.session_id] = held
        return self.sweep(now)

    def _replace(self, key: HeldKey, now: float, overlap_seconds: int) -> None:
        self._replaced = [
            (now if each.is_in_place_of(key) else until, each) for until, each in self._replaced
        ]
        self._replaced.append((now + overlap_seconds, key))

    def sweep(self, now: float) -> int:
        """Destroy the replaced keys whose overlap is over; return how many."""
        over = [key for until, key in self._replaced if until <= now]
        if over:
            self._replaced = [(until, key) for until, key in self._replaced if until > now]
            for key in over:
                key.destroy()
        return len(over)

    def destroy_replaced(self, fingerprint: str) -> int:
        """Destroy the keys of this name that live on in an overlap; return how many."""
        hit = [key for _, key in self._replaced if key.fingerprint == fingerprint]
        for key in hit:
            key.destroy()
        self._replaced = [each for each in self._replaced if not each[1].is_destroyed]
        return len(hit)

    def drop(self, session_id: str) -> bool:
        """Overwrite and forget a session's keys; return whether there were any."""
        session = self._sessions.pop(session_id, None)
        if session is None:
            return False
        for key in session.values():
            key.destroy()
        replaced = [key for _, key in self._replaced if key.session_id == session_id]
        for key in replaced:
            key.destroy()
        self._replaced = [each for each in self._replaced if not each[1].is_destroyed]
        return True

    def complete(self, record: SessionRecord) -> SessionRecord:
        """Return the record with its wrapped keys, which nobody else here holds.

        Raises:
            UnknownSession: The session is not, or no longer, held here.
        """
        keys = self._sessions.get(record.session_id)
        if keys is None:
            raise UnknownSession
        held = (replace(e, sealed=bytes(keys[e.provider].wrapped)) for e in record.credentials)
        return replace(record, credentials=tuple(held))

    def find(self, session_id: str, provider: str, origin: str) -> HeldKey:
        """Return the session's key for this provider at this origin.

        Raises:
            UnknownSession: The session is not, or no longer, held here.
            NoCredential: It holds no such key.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession
        key = session.get(provider)
        if key is None or key.origin != origin:
            raise NoCredential
        return key

    def compose_head(
        self, key: HeldKey, session_secret: Buffer, before: bytes, after: bytes
    ) -> Slot:
        """Return a slot whose view is `before`, the credential, `after`; the caller releases it.

        Raises:
            UnknownSession: The key was destroyed: its session closed, or another key replaced it.
            UnsealFailed: The secret is not the session's.
            RegionExhausted: Every slot is in use.
        """
        slot = self._region.lease()
        try:
            slot.use(self._compose(slot.whole, key, session_secret, before, after))
        except BaseException:
            slot.use(len(slot.whole))  # whatever was written, wipe all of it
            slot.release()
            raise
        return slot

    def _compose(
        self,
        memory: memoryview,
        key: HeldKey,
        session_secret: Buffer,
        before: bytes,
        after: bytes,
    ) -> int:
        # From the far end inwards lie, for this moment, the derived key and the sealed credential:
        # not even ciphertext that a token could open ever touches ordinary memory.
        start, size = len(before), key.size + OVERHEAD_BYTES
        scratch = memory[len(memory) - KEY_BYTES - size :]
        sealed, sealing_key = scratch[:size], scratch[size:]
        room = len(memory) - len(scratch) - start - len(after)
        if room < size:
            raise UnsealFailed
        try:
            self._wrapping.unwrap_into(key.wrapped, sealed)
            derive_key_into(session_secret, key.session_id, sealing_key)
            length = unseal_into(
                sealing_key, sealed, key.associated_data, memory[start : start + room]
            )
        finally:
            scratch[:] = bytes(len(scratch))
        memory[:start] = before
        end = start + length
        memory[end : end + len(after)] = after
        return end + len(after)
