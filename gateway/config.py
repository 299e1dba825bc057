"""The configuration: one frozen object, read from one YAML file. The one reader of the environment.

Every field says what it means, its unit, its default and what follows from it; the shipped
`config.yaml` names every one. What is absent takes its default, what is unknown is refused, and all
faults are reported together, each with file:line:column. The environment may only say where things
lie (`VEKLOM_CONFIG`, `VEKLOM_STATE_DIR`, `VEKLOM_AUDIT_DIR`), never what they are.
"""

import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from ssl import SSLError
from urllib.parse import urlsplit

import msgspec

from gateway.audit.durability import Durability
from gateway.errors import GatewayError
from gateway.hardening import Protection
from gateway.identity.tokens import ALGORITHMS, Issuer, JwksSource
from gateway.providers.catalogue import CATALOGUE
from gateway.providers.provider import DIALECTS, Provider
from keys.signing import Verifier, is_key_name
from policies.document import DocumentError, Fault, Section, read_document
from policies.known import Known
from policies.request import ProviderFacts
from policies.roles import ROLES, SECOND_FACTORS, Grant, StepUp

BUNDLE = Path(__file__).resolve().parent.parent / "policies" / "bundle"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")


class ConfigurationError(GatewayError):
    """The configuration, or a policy, cannot be used; `faults` are ready to print."""

    code = "invalid_configuration"

    def __init__(self, faults: tuple[str, ...]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class Listener(msgspec.Struct, frozen=True, kw_only=True):
    """Where one listener is reached, and how it is secured."""

    host: str
    port: int
    certificate: str = ""
    private_key: str = ""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return ip_address(self.host).is_loopback


class Listeners(msgspec.Struct, frozen=True, kw_only=True):
    """Applications' calls, opening of sessions, and operators."""

    proxy: Listener
    sessions: Listener
    admin: Listener


class Sessions(msgspec.Struct, frozen=True, kw_only=True):
    """How long sessions live (seconds) and how many there may be."""

    default_ttl: float
    max_ttl: float
    idle: float
    overlap: float
    per_subject: int
    total: int


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much anything may take: sizes in bytes, the rest counts."""

    head: int
    headers: int
    buffered_body: int
    buffered_total: int
    streamed_body: int
    connections: int
    upstream_connections: int


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long anything may take, in seconds."""

    head: float
    body: float
    downstream_idle: float
    connect: float
    first_byte: float
    idle: float
    total: float
    upstream_idle: float
    drain: float


class Policies(msgspec.Struct, frozen=True, kw_only=True):
    """Where the policy files lie, who has to sign them, and what is tried beside them.

    `watch` is how often they are looked at, in seconds; 0 for never.
    """

    path: str
    signed_by: str = ""
    watch: float = 2.0
    shadow: str = ""


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """Where the audit logs are written, and what a call waits for.

    `durability` is `strict`, `bounded` or `async` (`gateway.audit.recorder`); `wait` is how long, in
    seconds, a call waits for a record; `keep` is for how many seconds events are kept, 0 for ever;
    `witnesses` is a C2SP tlog-policy file.
    """

    directory: str
    replica: str = ""
    durability: str = "strict"
    wait: float = 2.0
    keep: float = 0.0
    witnesses: str = ""


class Custody(msgspec.Struct, frozen=True, kw_only=True):
    """Which protections of memory must hold for the gateway to serve; None: the usual ones."""

    require: tuple[str, ...] | None = None

    def required(self, *, is_dev: bool) -> tuple[str, ...]:
        """Return the protections whose absence is fatal."""
        if self.require is not None:
            return self.require
        return () if is_dev else _USUALLY_REQUIRED


_USUALLY_REQUIRED = (Protection.NO_SWAP, Protection.NO_KEY_LOG, Protection.NO_DEBUG)


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """Where sessions are kept and limits counted: in `memory`, or in a `redis` that replicas share.

    `staleness`, `timeout` and `limits_timeout` in seconds. `url` names no credentials; `host`, `port`,
    `database` and `is_tls` are what it says.
    """

    backend: str
    url: str = ""
    host: str = ""
    port: int = 0
    database: int = 0
    is_tls: bool = True
    username: str = ""
    password_file: str = ""
    ca_file: str = ""
    certificate: str = ""
    private_key: str = ""
    namespace: str
    staleness: float
    timeout: float
    connections: int
    limits_timeout: float
    replicas: int
    allow_persistent_store: str = ""

    @property
    def is_shared(self) -> bool:
        """Whether replicas share it."""
        return self.backend == "redis"


class Admin(msgspec.Struct, frozen=True, kw_only=True):
    """Who may operate the gateway, and what counts as a fresh proof that it is they."""

    grants: tuple[Grant, ...]
    step_up: StepUp


class Logs(msgspec.Struct, frozen=True, kw_only=True):
    """How the operational log is written: `json` or `console`, from this level up."""

    format: str
    level: str


class ProviderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One provider as configured; `gateway.providers.provider` makes it a `Provider`."""

    dialect: str
    base_url: str
    ca_file: str = ""
    request_stream_usage: bool = True
    private_addresses: bool = False
    facts: ProviderFacts = ProviderFacts()


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A whole deployment."""

    name: str
    state_dir: str
    workers: int
    listeners: Listeners
    issuers: tuple[Issuer, ...]
    admin: Admin
    jwks: tuple[JwksSource, ...]
    providers: dict[str, ProviderConfig]
    policies: Policies
    audit: Audit
    custody: Custody
    store: Store
    sessions: Sessions
    limits: Limits
    timeouts: Timeouts
    logs: Logs

    @property
    def origin(self) -> str:
        """Return the name of this gateway's anchor log and deployment key."""
        return f"{self.name}/{self.audit.replica}" if self.audit.replica else self.name


_PASSED_ON = re.compile(
    r"PATH|LANG|LC_\w+|TZ|HOME|TMPDIR|NO_COLOR|PYTHON(?:PATH|HOME|UNBUFFERED|DONTWRITEBYTECODE)"
    r"|VIRTUAL_ENV|LD_LIBRARY_PATH|SSL_CERT_(?:FILE|DIR)"
)


def child_environment() -> dict[str, str]:
    """Return the variables that a child process needs: not the operator's keys, whatever else is set."""
    return {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}


def default_config_path() -> Path:
    """Return the configuration file to use where none is named."""
    return Path(os.environ.get("VEKLOM_CONFIG", "config.yaml"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A configuration as written, however wrong: so that the files it names are looked at too.

    `places` holds line and column of every path that is written in it, by the field's full name.
    """

    path: str
    config: Config
    faults: tuple[Fault, ...]
    places: Mapping[str, tuple[int, int]]

    def fault(self, field: str, message: str) -> Fault:
        """Return a fault of what a field names, at the field; of a default, at the file's start."""
        line, column = self.places.get(field, (1, 1))
        return Fault(self.path, line, column, f"{field} {message}")


class _Paths:
    """Makes the paths of a file absolute, and keeps where in it each is written."""

    def __init__(self, path: str) -> None:
        self._base = Path(path).resolve().parent
        self.places: dict[str, tuple[int, int]] = {}

    def read(self, section: Section, key: str, default: str = "") -> str:
        """Return the absolute path at `key`; nothing stays nothing."""
        text, value = section.string(key, default), section.value(key)
        if value is not None:
            self.places[f"{section.name}.{key}".lstrip(".")] = value.line, value.column
        return str(self._base / text) if text else ""


def read_draft(path: Path) -> Draft:
    """Return what the file at `path` says.

    Raises:
        ConfigurationError: It cannot be read, or is no document at all.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError((f"{path}:1:1: cannot be read: {why(error)}",)) from None
    try:
        return draft_config(text, str(path), dict(os.environ))
    except DocumentError as error:
        raise ConfigurationError(tuple(map(str, error.faults))) from None


def parse_config(text: str, path: str, environment: Mapping[str, str]) -> Config:
    """Return the configuration in `text`, as `draft_config` does.

    Raises:
        DocumentError: It is wrong; all faults are in it.
    """
    draft = draft_config(text, path, environment)
    if draft.faults:
        raise DocumentError(draft.faults)
    return draft.config


def draft_config(text: str, path: str, environment: Mapping[str, str]) -> Draft:
    """Return what `text` says; `path` is for messages and to resolve relative paths.

    Raises:
        DocumentError: It is no document at all.
    """
    faults: list[Fault] = []
    top = Section(read_document(text, path), path, faults)
    paths = _Paths(path)
    name = top.string("name", "veklom")
    if not is_key_name(name):
        top.fault("name", "must not hold spaces or '+'")
    issuers, sources = _issuers(top, paths)
    policies = top.section("policies")
    audit = top.section("audit")
    state_dir = paths.read(top, "state_dir", "state")
    directory = paths.read(audit, "directory", "audit")
    config = Config(
        name=name,
        state_dir=environment.get("VEKLOM_STATE_DIR") or state_dir,
        workers=top.integer("workers", 1, low=1, high=256),
        listeners=_listeners(top.section("listeners"), paths),
        issuers=issuers,
        admin=_admin(top.section("admin"), {issuer.issuer for issuer in issuers}),
        jwks=sources,
        providers=_providers(top.section("providers"), paths),
        policies=_policies(policies, paths),
        audit=_audit(audit, environment.get("VEKLOM_AUDIT_DIR") or directory, paths),
        custody=_custody(top.section("custody")),
        store=_store(top.section("store"), paths),
        sessions=_sessions(top.section("sessions")),
        limits=_limits(top.section("limits")),
        timeouts=_timeouts(top.section("timeouts")),
        logs=_logs(top.section("logs")),
    )
    top.finish()
    return Draft(path=path, config=config, faults=tuple(faults), places=paths.places)


def _listeners(section: Section, paths: _Paths) -> Listeners:
    listeners = Listeners(
        proxy=_listener(section.section("proxy"), "127.0.0.1:8080", paths),
        sessions=_listener(section.section("sessions"), "127.0.0.1:8081", paths),
        admin=_listener(section.section("admin"), "127.0.0.1:8082", paths),
    )
    taken: dict[tuple[str, int], str] = {}
    for name in ("proxy", "sessions", "admin"):
        listener = getattr(listeners, name)
        first = taken.setdefault((listener.host, listener.port), name)
        if listener.port and first != name:
            section.fault(name, f"has the address of {first}")
    section.finish()
    return listeners


def _listener(section: Section, default: str, paths: _Paths) -> Listener:
    address = section.string("address", default)
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    certificate = paths.read(section, "certificate")
    private_key = paths.read(section, "private_key")
    plain_http = section.boolean("plain_http", default=False)
    try:
        loopback = ip_address(host).is_loopback
        if not port.isdigit() or int(port) > 65535:
            raise ValueError(port)
    except ValueError:
        section.fault("address", "must be an IP address and a port, such as 127.0.0.1:8080")
        host, port, loopback = "127.0.0.1", "0", True
    if not certificate and not loopback and not plain_http:
        section.fault("address", "is not loopback: give a certificate, or declare plain_http: true")
    if private_key and not certificate:
        section.fault("private_key", "needs a certificate")
    section.finish()
    return Listener(host=host, port=int(port), certificate=certificate, private_key=private_key)


def _issuers(top: Section, paths: _Paths) -> tuple[tuple[Issuer, ...], tuple[JwksSource, ...]]:
    issuers: dict[str, Issuer] = {}
    sources = []
    for section in top.sections("issuers"):
        issuer = section.string("issuer")
        url, file = section.string("jwks_url", ""), paths.read(section, "jwks_file")
        plain_http = section.boolean("plain_http", default=False)
        for key, value in (("issuer", issuer), ("jwks_url", url)):
            if value.startswith("http://") and not plain_http:
                section.fault(key, "is plain HTTP: use https, or declare plain_http: true")
        if url and file:
            section.fault("jwks_url", "and jwks_file cannot both be given")
        if not (url or file) and not issuer.startswith(("https://", "http://")):
            section.fault("issuer", "is no URL: give jwks_url or jwks_file")
        algorithms = section.strings("algorithms", ("RS256", "PS256", "ES256", "EdDSA"))
        for algorithm in algorithms:
            if algorithm not in ALGORITHMS:
                section.fault("algorithms", f"holds {algorithm!r}; one of {', '.join(ALGORITHMS)}")
        if issuer in issuers:
            section.fault("issuer", "is configured twice")
        if "audiences" not in section:
            section.fault("audiences", "is required: a token for somebody else must not pass")
        issuers[issuer] = Issuer(
            issuer=issuer,
            audiences=section.strings("audiences"),
            algorithms=algorithms,
            tenant=section.string("tenant", ""),
            tenant_claim=section.string("tenant_claim", "tenant"),
            tenants=section.strings("tenants"),
            roles=section.strings("roles", ("roles",)),
            leeway_seconds=int(section.duration("leeway", "30s")),
            max_lifetime_seconds=int(section.duration("max_lifetime", "24h")),
        )
        sources.append(JwksSource(issuer=issuer, url=url, file=file, plain_http=plain_http))
        section.finish()
    return tuple(issuers.values()), tuple(sources)


def _admin(section: Section, issuers: Container[str]) -> Admin:
    grants = []
    for inner in section.sections("grants"):
        issuer = inner.string("issuer")
        if issuer not in issuers:
            inner.fault("issuer", "is none of the configured issuers")
        grants.append(
            Grant(
                issuer=issuer,
                role=inner.string("role"),
                grants=inner.choice("grants", list(ROLES)),
            )
        )
        inner.finish()
    inner = section.section("step_up")
    step_up = StepUp(
        max_age_seconds=int(inner.duration("max_age", "15m")),
        amr=inner.strings("amr", SECOND_FACTORS),
        acr=inner.strings("acr"),
    )
    inner.finish()
    section.finish()
    return Admin(grants=tuple(grants), step_up=step_up)


def _providers(section: Section, paths: _Paths) -> dict[str, ProviderConfig]:
    providers = {}
    for name in section.keys():  # noqa: SIM118 - a section is no dict
        inner = section.section(name)
        if not _NAME.fullmatch(name):
            section.fault(name, "must be 1 to 32 of a-z, 0-9 and '-': it becomes a path")
        known = CATALOGUE.get(name)
        dialect = inner.choice("dialect", list(DIALECTS), known.dialect if known else None)
        base_url = inner.string("base_url", known.base_url if known else None)
        given = inner.value("base_url")
        if given is not None and given.data == "":
            inner.fault("base_url", "must not be empty")
        plain_http = inner.boolean("plain_http", default=False)
        if base_url.startswith("http://") and not plain_http:
            inner.fault("base_url", "is plain HTTP: use https, or declare plain_http: true")
        usage = inner.boolean("request_stream_usage", default=True)
        private_addresses = inner.boolean("private_addresses", default=False)
        ca_file = paths.read(inner, "ca_file")
        facts = ProviderFacts(
            dialect=dialect,
            region=inner.string("region", ""),
            baa=inner.boolean("baa", default=False),
            phi=inner.boolean("phi", default=False),
            zero_retention=inner.boolean("zero_retention", default=False),
            no_training=inner.boolean("no_training", default=False),
        )
        if facts.phi and not facts.baa:
            inner.fault("phi", "needs baa: true: without an agreement no PHI may be sent")
        if dialect in DIALECTS and base_url:
            try:
                Provider.from_url(name, dialect, base_url, request_stream_usage=usage)
            except ValueError as error:
                inner.fault("base_url", str(error))
        inner.finish()
        providers[name] = ProviderConfig(
            dialect=dialect,
            base_url=base_url,
            ca_file=ca_file,
            request_stream_usage=usage,
            private_addresses=private_addresses,
            facts=facts,
        )
    return providers


def _policies(section: Section, paths: _Paths) -> Policies:
    signed_by = section.string("signed_by", "")
    try:
        if signed_by:
            Verifier.from_vkey(signed_by)
    except ValueError as error:
        section.fault("signed_by", f"is no verification key: {error}")
    policies = Policies(
        path=paths.read(section, "path") or str(BUNDLE),
        signed_by=signed_by,
        watch=section.duration("watch", "2s"),
        shadow=paths.read(section, "shadow"),
    )
    section.finish()
    return policies


def _audit(section: Section, directory: str, paths: _Paths) -> Audit:
    audit = Audit(
        directory=directory,
        replica=section.string("replica", ""),
        durability=section.choice("durability", list(Durability), Durability.STRICT),
        wait=section.duration("wait", "2s"),
        keep=section.duration("keep", "0s"),
        witnesses=paths.read(section, "witnesses"),
    )
    if audit.replica and not is_key_name(audit.replica):
        section.fault("replica", "must not hold spaces or '+'")
    section.finish()
    return audit


def _custody(section: Section) -> Custody:
    require = section.strings("require") if "require" in section else None
    for name in require or ():
        if name not in list(Protection):
            section.fault("require", f"holds {name!r}; one of {', '.join(Protection)}")
    section.finish()
    return Custody(require=require)


def _store(section: Section, paths: _Paths) -> Store:
    backend = section.choice("backend", ["memory", "redis"], "memory")
    url = section.string("url", "")
    host, port, database, is_tls = _redis_address(section, url)
    if (backend == "redis") != bool(url):
        section.fault("url", "is what backend: redis needs, and nothing else does")
    plain_redis = section.boolean("plain_redis", default=False)
    if url and not is_tls and not _is_loopback(host) and not plain_redis:
        section.fault("url", "is plain: use rediss, or declare plain_redis: true")
    files = {key: paths.read(section, key) for key in ("ca_file", "certificate", "private_key")}
    if url and not is_tls and any(files.values()):
        section.fault("url", "is plain: certificates need rediss")
    if files["private_key"] and not files["certificate"]:
        section.fault("private_key", "needs a certificate")
    staleness, timeout = section.duration("staleness", "10s"), section.duration("timeout", "500ms")
    if not 1 <= staleness <= 60:
        section.fault("staleness", "must be between 1s and 60s")
    if not 0.01 <= timeout <= staleness / 2:
        section.fault("timeout", "must be between 10ms and half of staleness")
    limits_timeout = section.duration("limits_timeout", "100ms")
    if not 0.005 <= limits_timeout <= 5:
        section.fault("limits_timeout", "must be between 5ms and 5s")
    namespace = section.string("namespace", "veklom")
    if not _NAME.fullmatch(namespace):
        section.fault("namespace", "must be 1 to 32 of a-z, 0-9 and '-'")
    username, password_file = section.string("username", ""), paths.read(section, "password_file")
    if username and not password_file:
        section.fault("username", "needs a password_file")
    store = Store(
        backend=backend,
        url=url,
        host=host,
        port=port,
        database=database,
        is_tls=is_tls,
        username=username,
        password_file=password_file,
        **files,
        namespace=namespace,
        staleness=staleness,
        timeout=timeout,
        connections=section.integer("connections", 16, low=2, high=1024),
        limits_timeout=limits_timeout,
        replicas=section.integer("replicas", 1, low=1, high=1000),
        allow_persistent_store=section.string("allow_persistent_store", ""),
    )
    section.finish()
    return store


def _redis_address(section: Section, url: str) -> tuple[str, int, int, bool]:
    """Return host, port, database and whether TLS is spoken; no fault ever quotes the URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 6379
    except ValueError:
        section.fault("url", "must be rediss://host:port, with /number for a database")
        return "", 0, 0, True
    if "@" in url:
        section.fault("url", "holds credentials: name username, and a password_file")
    elif url and (
        parts.scheme not in {"rediss", "redis"}
        or not host
        or parts.query
        or parts.fragment
        or not re.fullmatch(r"/?[0-9]{0,5}", parts.path)
    ):
        section.fault("url", "must be rediss://host:port, with /number for a database")
    database = parts.path.strip("/")
    return host, port, int(database) if database.isdecimal() else 0, parts.scheme != "redis"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sessions(section: Section) -> Sessions:
    sessions = Sessions(
        default_ttl=section.duration("default_ttl", "8h"),
        max_ttl=section.duration("max_ttl", "24h"),
        idle=section.duration("idle", "30m"),
        overlap=section.duration("overlap", "10m"),
        per_subject=section.integer("per_subject", 16, low=1),
        total=section.integer("total", 100_000, low=1),
    )
    if sessions.default_ttl > sessions.max_ttl:
        section.fault("default_ttl", "must not exceed max_ttl")
    if sessions.overlap > 3600:
        section.fault("overlap", "must not exceed 1h")
    section.finish()
    return sessions


def _limits(section: Section) -> Limits:
    limits = Limits(
        head=section.size("head", "64KiB"),
        headers=section.integer("headers", 128, low=1),
        buffered_body=section.size("buffered_body", "64MiB"),
        buffered_total=section.size("buffered_total", "1GiB"),
        streamed_body=section.size("streamed_body", "0B"),
        connections=section.integer("connections", 4096, low=1),
        upstream_connections=section.integer("upstream_connections", 4096, low=1),
    )
    if limits.head > 64 * 1024:
        section.fault("head", "must not exceed 64KiB: it has to fit a secret slot")
    section.finish()
    return limits


def _timeouts(section: Section) -> Timeouts:
    timeouts = Timeouts(
        head=section.duration("head", "15s"),
        body=section.duration("body", "60s"),
        downstream_idle=section.duration("downstream_idle", "75s"),
        connect=section.duration("connect", "5s"),
        first_byte=section.duration("first_byte", "600s"),
        idle=section.duration("idle", "300s"),
        total=section.duration("total", "0s"),
        upstream_idle=section.duration("upstream_idle", "30s"),
        drain=section.duration("drain", "30s"),
    )
    section.finish()
    return timeouts


def _logs(section: Section) -> Logs:
    logs = Logs(
        format=section.choice("format", ["json", "console"], "json"),
        level=section.choice("level", ["debug", "info", "warning", "error"], "info"),
    )
    section.finish()
    return logs


def providers_from(config: Config) -> tuple[Provider, ...]:
    """Return the configured providers."""
    return tuple(
        Provider.from_url(
            name,
            each.dialect,
            each.base_url,
            request_stream_usage=each.request_stream_usage,
            ca_file=each.ca_file,
            private_addresses=each.private_addresses,
            facts=each.facts,
        )
        for name, each in config.providers.items()
    )


def known_to(config: Config) -> Known:
    """Return what a policy may name under this configuration."""
    tenants: set[str] | None = set()
    for issuer in config.issuers:
        named = {issuer.tenant} if issuer.tenant else set(issuer.tenants)
        if tenants is not None:
            # One issuer that may name any tenant is enough for every name to be possible.
            tenants = tenants | named if named else None
    return Known.of(
        {name: each.facts for name, each in config.providers.items()},
        tenants=tenants if config.issuers else None,
    )


def why(error: Exception) -> str:
    """Return why something failed, in words without a path: whoever asks has named it."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, SSLError):  # its text holds a line of OpenSSL's source
        return (error.reason or type(error).__name__).lower().replace("_", " ")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return str(error) or type(error).__name__
