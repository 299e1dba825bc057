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


class CallDenied(Event, frozen=True, kw_only=True, tag="call.denied"):
    """A call was refused; fields that were not known yet are empty. `limit` is the one it met."""

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
    """The first event of every log: the key that signs it."""

    vkey: str


class LogSealed(Event, frozen=True, kw_only=True, tag="log.sealed"):
    """The last event of a log that was closed in good order.

    `checkpoints` is how many were written before the one that seals this event.
    """

    checkpoints: int
