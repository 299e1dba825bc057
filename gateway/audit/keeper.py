"""The keeper of a deployment's logs: finds the dead, names the living, and shows them to witnesses.

Once a second, in the control process:
- logs whose process died are read to their end, and what was found is recorded (`recovery`);
- checkpoints of all logs are named in the anchor: a new log and the end of one at once, growth once a
  minute (`anchor`);
- the anchor is shown to the witnesses of the policy, and what a quorum cosigned is kept;
- events that are older than they may be are erased (`erase`).
Two control processes may live for a moment; every step is under a lock that only one of them holds.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from shutil import rmtree
from typing import Final

from gateway.audit.anchor import WITNESSED, Anchor
from gateway.audit.checkpoint import Checkpoint, MalformedCheckpoint
from gateway.audit.erase import prune
from gateway.audit.event import AnchorChecked, Event, LogAnchored
from gateway.audit.files import Damaged
from gateway.audit.journal import AuditUnavailable
from gateway.audit.recovery import (
    RECOVERED,
    is_empty_ruin,
    is_final,
    locked,
    logs_by_process,
    recover,
)
from gateway.audit.trust import Policy
from gateway.audit.witness_client import WitnessClient
from gateway.clock import Clock
from gateway.telemetry.logs import get_log
from keys.signing import BadSignature, CosignatureVerifier, Signer, Verifier

ROUND_SECONDS: Final = 1.0
ANCHOR_SECONDS: Final = 60.0
"""How much of a log's growth may be unnamed, and the anchor unseen by witnesses, in seconds."""

RETRY_SECONDS: Final = 10.0
"""How soon witnesses are asked again that were no quorum."""

PRUNE_SECONDS: Final = 600.0

Record = Callable[[Event], Awaitable[None]]

log = get_log()


class Keeper:
    """Looks after the logs below one folder."""

    def __init__(  # noqa: PLR0913 - what the keeper is given once
        self,
        directory: Path,
        signer: Signer,
        clock: Clock,
        *,
        record: Record,
        policy: Policy | None = None,
        keep_seconds: float = 0.0,
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._record = record
        self._verifier = Verifier.from_vkey(signer.vkey)
        self._anchor = Anchor(directory, signer, clock)
        self._policy = policy
        self._witnesses = WitnessClient(
            policy.witnesses if policy else {},
            self._node,
        )
        self._keep_seconds = keep_seconds
        self._named_at: dict[str, float] = {}
        self._final: set[Path] = set()
        self._witness_at = 0.0
        self._without_quorum = ""
        self._prune_at = 0.0
        self._failure = ""

    def _node(self, level: int, index: int) -> bytes:
        return self._anchor.files.node(level, index)  # of the files as they are by then

    async def run(self) -> None:
        """Keep the logs until cancelled."""
        while True:
            await self.round()
            await asyncio.sleep(ROUND_SECONDS)

    def conclude(self) -> None:
        """Name the last words of the logs that ended with the gateway."""
        try:
            self.anchor()
        except (OSError, Damaged) as error:
            log.error("anchor.checked", reason=f"{type(error).__name__}: {error}")

    async def round(self) -> None:
        """Do once what is due."""
        failure = ""
        try:
            await self._recover()
            await asyncio.to_thread(self.anchor)
            failure = await asyncio.to_thread(self._witness)
            await asyncio.to_thread(self._prune)
        except BlockingIOError:
            return  # the control process before this one, or after it, is at it
        except AuditUnavailable:
            return
        except (OSError, Damaged, ValueError, BadSignature) as error:
            failure = f"{type(error).__name__}: {error}"
        if failure != self._failure:
            self._failure = failure
            (log.error if failure else log.info)("anchor.checked", reason=failure or "ok")
            try:
                await self._record(AnchorChecked(is_whole=not failure, reason=failure))
            except AuditUnavailable:
                pass

    async def _recover(self) -> None:
        for logs in await asyncio.to_thread(self._unfinished):
            with locked(logs) as is_dead:
                if not is_dead:
                    continue
                ruins = [each for each in logs if is_empty_ruin(each)]
                for ruin in ruins:
                    rmtree(ruin)
                left = [each for each in logs if each not in ruins]
                try:
                    events = await asyncio.to_thread(recover, left, self._verifier)
                except (BadSignature, Damaged, ValueError) as error:
                    # Another deployment's, or harmed: that is for the verifier to say.
                    log.error("audit.damaged", path=str(left[0]), error=type(error).__name__)
                    self._final.update(left)
                    continue
                for event in events:
                    await self._record(event)
                # A crash here: they are recovered again, and said to be as they are once more.
                for each in left:
                    (each / RECOVERED).touch()
                if events:
                    log.info("audit.recovered", path=str(left[0]), count=len(events))

    def _unfinished(self) -> list[list[Path]]:
        found = []
        for logs in logs_by_process(self._directory):
            if not self._final.issuperset(logs):
                if all(map(is_final, logs)):
                    continue
                found.append(logs)
        return found

    def anchor(self) -> None:
        """Name in the anchor what has to be named now.

        Raises:
            BlockingIOError: Another process is at it.
            Damaged, OSError: The anchor cannot be continued.
        """
        now = self._clock.monotonic()
        self._anchor.refresh()
        paths = [path for logs in logs_by_process(self._directory) for path in logs]
        live = [path for path in paths if path not in self._final]
        events = [event for path in live if (event := self._event_for(path, now))]
        if events:
            self._anchor.append(events)
            for event in events:
                self._anchor.sizes[event.log] = event.size
                self._named_at[event.log] = now

    def _event_for(self, path: Path, now: float) -> LogAnchored | None:
        is_last = is_final(path)
        try:
            note = (path / "checkpoint").read_text(encoding="utf-8")
            claim = Checkpoint.claimed_by(note)
        except (FileNotFoundError, UnicodeDecodeError, BadSignature, MalformedCheckpoint):
            return None  # nothing is signed yet, or the verifier will say what this is
        known = self._anchor.sizes.get(claim.origin, -1)
        if claim.size <= known:
            if is_last:
                self._final.add(path)
            return None
        is_due = now - self._named_at.get(claim.origin, -ANCHOR_SECONDS) >= ANCHOR_SECONDS
        if known < 0 or is_last or is_due:
            return LogAnchored(log=claim.origin, size=claim.size, note=note)
        return None

    def _witness(self) -> str:
        """Show the anchor to the witnesses; return why there is no quorum."""
        now = self._clock.monotonic()
        if self._policy is None or now < self._witness_at:
            return self._without_quorum
        self._witness_at = now + RETRY_SECONDS
        self._without_quorum = self._ask_witnesses(self._policy)
        if not self._without_quorum:
            self._witness_at = now + ANCHOR_SECONDS
        return self._without_quorum

    def _ask_witnesses(self, policy: Policy) -> str:
        note = (self._anchor.files.read("checkpoint") or b"").decode()
        if not note:
            return ""
        cosigned, refusals = self._witnesses.cosign(note)
        for name, reason in refusals.items():
            log.warning("witness.refused", path=name, reason=reason)
        if not policy.is_met_by(_cosigners(policy, cosigned)):
            return "no quorum: " + "; ".join(f"{name}: {why}" for name, why in refusals.items())
        temporary = self._anchor.files.directory / f"{WITNESSED}.new"
        temporary.write_text(cosigned, encoding="utf-8")
        temporary.replace(self._anchor.files.directory / WITNESSED)
        return ""

    def _prune(self) -> None:
        now = self._clock.monotonic()
        if not self._keep_seconds or now < self._prune_at:
            return
        self._prune_at = now + PRUNE_SECONDS
        for path in sorted(self._final):
            if path.is_dir():
                gone = prune(path, self._clock.now() - self._keep_seconds, self._anchor)
                if gone:
                    log.info("audit.pruned", path=str(path), count=gone)


def _cosigners(policy: Policy, note: str) -> list[str]:
    def has_signed(verifier: CosignatureVerifier) -> bool:
        try:
            verifier.time_of(note)
        except BadSignature:
            return False
        return True

    return [name for name, key in policy.witnesses.items() if has_signed(key.verifier)]
