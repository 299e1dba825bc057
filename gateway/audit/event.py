"""What is written down: one struct for each kind of event, in the order of its fields.

The journal adds the envelope (`v`, `ts`, `origin`, `seq`, `salt`). Values are text, whole numbers,
booleans and lists: nothing whose spelling could differ between two readers. Never a key, a token,
a header or content: credentials appear as keyed fingerprints. No I/O.
"""

from typing import Final

import msgspec

VERSION: Final = 1
"""Of the envelope and of every event; a change of meaning makes it 2."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Any event; each kind names itself in `type`."""

    @property
    def is_anonymous(self) -> bool:
        """Whether it is about a caller whom nobody could identify."""
        return False

    @property
    def is_reserved(self) -> bool:
        """Whether it must still be said when nothing new may begin: room for it is kept."""
        return False


Facts = dict[str, str | int | bool | list[str]]
"""What rules were asked about, as `policies.facts` writes it down: enough to decide again."""


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the provider counted them (`source` is `provider`), or about how many they were where
    it did not say (`estimate`); `none` where there is nothing to count.

    `input` includes cached tokens and `output` reasoning ones, as OpenTelemetry has it.
    `cost_micro_usd` is their list price in millionths of a dollar, 0 where the policy names none.
    """  # noqa: D205 - one sentence about a closed set

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0
    source: str = "none"
    model: str = ""
    cost_micro_usd: int = 0


class CredentialRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One deposited credential, by fingerprint."""

    provider: str
    fingerprint: str


class CallStart(Event, frozen=True, kw_only=True, tag="call.start"):
    """A call was allowed; durable before the provider hears of it.

    `limits` are those that did not simply count it: `name:shadow` would have refused it, and
    `name:local` and `name:allow` could not be asked of their store.

    `facts` are what was asked, `model` and `max_tokens` what is sent, `changes` say by which rule
    the two differ. `would` is what rules in shadow would have decided, where that is something else.
    """

    call: str
    tenant: str
    issuer: str
    subject: str
    session: str
    provider: str
    operation: str
    dialect: str
    model: str
    stream: bool
    max_tokens: int
    request_bytes: int
    client_address: str
    rules: tuple[str, ...]
    policy: str
    credential: str
    upstream: str
    limits: tuple[str, ...] = ()
    facts: Facts = {}
    changes: tuple[str, ...] = ()
    would: str = ""
    would_rules: tuple[str, ...] = ()
    would_reasons: tuple[str, ...] = ()
    decided_us: int = 0


class CallEnd(Event, frozen=True, kw_only=True, tag="call.end"):
    """How an allowed call ended. `outcome` is one of complete, client_abort, upstream_error,
    upstream_abort, timeout, session_closed, key_replaced, killed, gateway_error, shutdown; `status`
    is what the caller saw, 0 for nothing; `code` says why where the gateway answered instead of the
    provider; durations are microseconds.
    """  # noqa: D205 - one sentence about a closed set

    call: str
    tenant: str
    outcome: str
    fault: str
    code: str
    status: int
    upstream_status: int
    request_bytes: int
    response_bytes: int
    usage: UsageRecord
    first_byte_us: int
    total_us: int

    @property
    def is_reserved(self) -> bool:
        """A call that began must be said to have ended."""
        return True


class CallUnclosed(Event, frozen=True, kw_only=True, tag="call.unclosed"):
    """A call began whose end nobody recorded: the process that carried it died. `log` and `start` are
    where its `call.start` is. What its provider and caller saw is not known.
    """  # noqa: D205 - one sentence about a death

    call: str
    tenant: str
    log: str
    start: int


class CallDenied(Event, frozen=True, kw_only=True, tag="call.denied"):
    """A call was refused; fields that were not known yet are empty, `facts` before the decision.

    `limit` is the one it met.
    """

    call: str
    tenant: str
    issuer: str
    subject: str
    session: str
    provider: str
    operation: str
    model: str
    code: str
    status: int
    rules: tuple[str, ...]
    policy: str
    client_address: str
    reasons: tuple[str, ...]
    limit: str = ""
    facts: Facts = {}
    would: str = ""
    would_rules: tuple[str, ...] = ()
    would_reasons: tuple[str, ...] = ()
    decided_us: int = 0

    @property
    def is_anonymous(self) -> bool:
        """Whether neither a token nor a session said who called."""
        return not self.subject


class LimitWarned(Event, frozen=True, kw_only=True, tag="limit.warned"):
    """A budget is spent to so many percent: recorded once for each window, by whoever crossed it.

    `counted_for` are the parts of the limit's key and the window; `unit` is tokens or micro-usd.
    """

    limit: str
    counted_for: tuple[str, ...]
    percent: int
    spent: int
    maximum: int
    unit: str


class LimitsStoreChanged(Event, frozen=True, kw_only=True, tag="limits.store"):
    """The store that counts a worker's limits went away, for the reason given, or came back.

    Meanwhile each limit does what it declares; the calls themselves say which.
    """

    is_there: bool
    reason: str


class SessionOpened(Event, frozen=True, kw_only=True, tag="session.opened"):
    """A caller deposited credentials; `deposit` says how they came: `plain` or `hpke`."""

    session: str
    tenant: str
    issuer: str
    subject: str
    credentials: tuple[CredentialRecord, ...]
    deposit: str
    expires_at: int
    client_address: str


class SessionRenewed(Event, frozen=True, kw_only=True, tag="session.renewed"):
    """A session lives longer, under a new generation."""

    session: str
    tenant: str
    issuer: str
    subject: str
    generation: int
    expires_at: int


class SessionRotated(Event, frozen=True, kw_only=True, tag="session.rotated"):
    """Keys of a session were replaced; calls under way with the old ones end with the overlap.

    `credentials` are the new ones, `replaced` the fingerprints of the old.
    """

    session: str
    tenant: str
    issuer: str
    subject: str
    credentials: tuple[CredentialRecord, ...]
    replaced: tuple[str, ...]
    deposit: str
    overlap_seconds: int
    client_address: str


class SessionClosed(Event, frozen=True, kw_only=True, tag="session.closed"):
    """A session's credentials were destroyed: closed, expired, idle, shutdown, not_served (a worker
    did not take it), not_opened (its opening was never confirmed), killed or half_open (a control
    process died while it was opened or closed). In a fleet `cut_calls` counts this replica's.
    """  # noqa: D205 - one sentence about a closed set

    session: str
    tenant: str
    issuer: str
    subject: str
    reason: str
    cut_calls: int

    @property
    def is_reserved(self) -> bool:
        """Keys that are gone must be said to be gone."""
        return True


class SessionsAdopted(Event, frozen=True, kw_only=True, tag="sessions.adopted"):
    """A control process went on with the sessions of the one before it."""

    sessions: int


class StoreConnected(Event, frozen=True, kw_only=True, tag="store.connected"):
    """Sessions can be reached in the shared store at `address`.

    `persistence` is `off`, `unknown`, or the store's settings that write to disk, and `reason` why
    the operator allows that. `has_forgotten` says that the store began anew since it was last
    reached: `gone` sessions that this gateway served are no more.
    """

    address: str
    persistence: str
    reason: str
    has_forgotten: bool
    gone: int


class StoreLost(Event, frozen=True, kw_only=True, tag="store.lost"):
    """The shared store cannot be reached, or used: no session is served until it is again."""

    address: str
    reason: str


class SessionRefused(Event, frozen=True, kw_only=True, tag="session.refused"):
    """A session was not opened or renewed."""

    tenant: str
    issuer: str
    subject: str
    code: str
    client_address: str

    @property
    def is_anonymous(self) -> bool:
        """Whether no token said who asked."""
        return not self.subject


class KillPlaced(Event, frozen=True, kw_only=True, tag="kill.placed"):
    """An operator stopped something, and with it so many sessions and live calls.

    `scope` is session, subject, tenant, fingerprint, provider or all; `value` and `issuer` say what
    of it; `by` is the operator's subject, `by_issuer` who vouched for it.
    """

    kill: str
    scope: str
    value: str
    issuer: str
    reason: str
    by: str
    by_issuer: str
    closed_sessions: int
    cut_calls: int
    client_address: str


class KillLifted(Event, frozen=True, kw_only=True, tag="kill.lifted"):
    """An operator let go on what a kill had stopped; `reason` is why it was lifted."""

    kill: str
    scope: str
    value: str
    reason: str
    by: str
    by_issuer: str
    client_address: str


class KillsStanding(Event, frozen=True, kw_only=True, tag="kills.standing"):
    """The kills that a control process found when it began, by their ids."""

    kills: tuple[str, ...]


class AdminRefused(Event, frozen=True, kw_only=True, tag="admin.refused"):
    """An administrative action was refused; `action` is the permission that it needs."""

    action: str
    issuer: str
    subject: str
    code: str
    client_address: str

    @property
    def is_anonymous(self) -> bool:
        """Whether no token said who asked."""
        return not self.subject


class CodeCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many refusals had one code."""

    code: str
    count: int


class RefusalsCounted(Event, frozen=True, kw_only=True, tag="refusals.counted"):
    """Refusals of callers whom nobody could identify, beyond what is recorded one by one.

    `period_us` is how long ago the first of them was, in microseconds; `total` is the sum of all
    codes. In a worker's log they are calls, in the control process's sessions not opened or renewed.
    """

    total: int
    codes: tuple[CodeCount, ...]
    period_us: int


class ConfigurationLoaded(Event, frozen=True, kw_only=True, tag="configuration.loaded"):
    """The configuration that this process serves from."""

    digest: str
    path: str


class PolicyLoaded(Event, frozen=True, kw_only=True, tag="policy.loaded"):
    """The policy set that this process decides by."""

    digest: str
    files: tuple[str, ...]


class PolicyRefused(Event, frozen=True, kw_only=True, tag="policy.refused"):
    """Changed policies could not be used, for the first of what is wrong; those in force stay."""

    faults: tuple[str, ...]


class ProcessStarted(Event, frozen=True, kw_only=True, tag="process.started"):
    """A process began: the `run`-th of its role since the gateway started."""

    role: str
    run: int
    version: str


class ProcessStopped(Event, frozen=True, kw_only=True, tag="process.stopped"):
    """A process ended in good order; `reason` is shutdown, replaced, or what went wrong."""

    role: str
    reason: str


class ProtectionsChecked(Event, frozen=True, kw_only=True, tag="custody.checked"):
    """What guards keys in this process's memory: what holds, and `name: why not` for the rest."""

    role: str
    held: tuple[str, ...]
    missing: tuple[str, ...]


class LogOpened(Event, frozen=True, kw_only=True, tag="log.opened"):
    """The first event of every log: the key that signs it, and the one that says when."""

    vkey: str
    clock: str
    durability: str

    @property
    def is_reserved(self) -> bool:
        """A log without its first event would be none."""
        return True


class LogSealed(Event, frozen=True, kw_only=True, tag="log.sealed"):
    """The last event of a log that was closed in good order.

    `checkpoints` is how many were written before the one that seals this event.
    """

    checkpoints: int


class LogGap(Event, frozen=True, kw_only=True, tag="log.gap"):
    """Events were lost: those of a log that failed, whose first `durable` events are on the disk, or
    of this one, where the mode `async` let calls pass that could not be recorded.
    """  # noqa: D205 - one sentence about a loss

    log: str
    durable: int
    lost: int
    reason: str

    @property
    def is_reserved(self) -> bool:
        """What was lost is owned up to on whatever disk is left."""
        return True


class LogRecovered(Event, frozen=True, kw_only=True, tag="log.recovered"):
    """A log whose writer died, as it was found: so many whole events, with this root (base64), and
    behind them `torn` bytes of a line that was never acknowledged.
    """  # noqa: D205 - one sentence about a death

    log: str
    size: int
    root: str
    torn: int


class LogAnchored(Event, frozen=True, kw_only=True, tag="log.anchored"):
    """A checkpoint of another log of this deployment, as its note stands, and who vouches for its key.

    Written to the deployment's anchor log, so that no log can be cut back or taken away unseen.
    """

    log: str
    size: int
    note: str


class AnchorChecked(Event, frozen=True, kw_only=True, tag="anchor.checked"):
    """Whether the anchor goes on, and a quorum of the configured witnesses sees it; recorded when that
    changes.
    """  # noqa: D205 - one sentence

    is_whole: bool
    reason: str


class LogRedacted(Event, frozen=True, kw_only=True, tag="log.redacted"):
    """Events of a log were erased: only their hashes are left. Written before they are."""

    log: str
    events: tuple[int, ...]
    reason: str


class LogPruned(Event, frozen=True, kw_only=True, tag="log.pruned"):
    """The first `size` events of a log were erased, with their hashes. Written before they are.

    `frontier` holds the roots (base64) of the complete subtrees over them, largest first: from there
    the rest of the log still verifies.
    """

    log: str
    size: int
    frontier: tuple[str, ...]
    reason: str
