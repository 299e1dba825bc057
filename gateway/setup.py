"""What must be in order before anything starts: the configuration and every file that it names.

One look finds every fault, whatever its kind, each with file:line:column; `veklom check` prints
them, and `veklom serve` starts nothing while there is one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gateway.audit.durability import Durability
from gateway.audit.keyfile import UnsafeKeyFile, load_or_create_seed
from gateway.audit.trust import Policy
from gateway.bundles import Bundle, BundleRefused, read_bundle
from gateway.config import (
    Config,
    ConfigurationError,
    Draft,
    Listener,
    known_to,
    read_draft,
    why,
)
from gateway.descriptors import descriptors_fault
from gateway.identity.tokens import KeySet
from gateway.passwords import read_password
from gateway.store.connection import check_tls_files
from gateway.tls import client_context, server_context
from policies.analysis import findings
from policies.document import Fault
from policies.quota import Budget
from policies.rules import PolicySet


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A configuration without faults, and the policy set that it names."""

    config: Config
    bundle: Bundle
    policy_set: PolicySet


def load_checked(path: Path) -> Checked:
    """Return what the file at `path` describes.

    Raises:
        ConfigurationError: It cannot be served; all faults of all files are in it.
    """
    draft = read_draft(path)
    faults = [*draft.faults, *_file_faults(draft)]
    try:
        bundle, policy_set = read_bundle(draft.config.policies, known_to(draft.config))
    except BundleRefused as error:
        faults += [draft.fault("policies.path", f"names {sentence}") for sentence in error.unread]
        raise ConfigurationError((*map(str, sorted(set(faults))), *error.others)) from None
    if faults:
        raise ConfigurationError(tuple(map(str, sorted(set(faults)))))
    return Checked(config=draft.config, bundle=bundle, policy_set=policy_set)


def check_deployment(path: Path) -> list[str]:
    """Return what a deployment consists of, warnings included.

    Raises:
        ConfigurationError: It cannot be served; all faults are in it.
    """
    checked = load_checked(path)
    config, policy_set = checked.config, checked.policy_set
    lines = [
        f"configuration {path}: {len(config.providers)} providers, {len(config.issuers)} issuers, "
        f"{config.workers} workers",
        f"policy {policy_set.digest}: {len(policy_set.rules)} rules, {len(policy_set.limits)} limits",
    ]
    lines += map(str, findings(policy_set))
    lines.append(f"audit {config.audit.directory}: durability {config.audit.durability}")
    if config.audit.durability != Durability.STRICT:
        lines.append("warning: calls do not wait for their records; a crash may lose some")
    if not config.audit.witnesses:
        lines.append(
            "warning: no witness sees the anchor log; who holds its key can cut all logs back"
        )
    if not config.issuers:
        lines.append("warning: no issuer is configured; only `serve --dev` can open sessions")
    if not config.providers:
        lines.append("warning: no provider is configured; every call will be answered with 404")
    if config.workers > 1 and policy_set.limits and not config.store.is_shared:
        lines.append(
            f"warning: limits are counted by each of {config.workers} workers on its own: a caller "
            f"may reach up to {config.workers} times what is written"
        )
    lines += [
        f"warning: the budget {limit.name!r} is forgotten whenever its worker is replaced; with "
        "store.backend: redis it lasts"
        for limit in policy_set.limits
        if isinstance(limit.measure, Budget) and not config.store.is_shared
    ]
    return lines


def _file_faults(draft: Draft) -> Iterator[Fault]:
    """Yield what is wrong with the files that a configuration names, policies apart."""
    config = draft.config
    for name in ("proxy", "sessions", "admin"):
        yield from _certificate_faults(draft, name, getattr(config.listeners, name))
    for name, provider in config.providers.items():
        try:
            if provider.ca_file:
                client_context(provider.ca_file)
        except OSError as error:
            yield draft.fault(f"providers.{name}.ca_file", _cannot(provider.ca_file, error))
    for number, source in enumerate(config.jwks):
        try:
            if source.file:
                KeySet.from_json(Path(source.file).read_bytes())
        except (OSError, ValueError) as error:
            yield draft.fault(f"issuers[{number}].jwks_file", _cannot(source.file, error))
    if witnesses := config.audit.witnesses:
        try:
            Policy.from_text(Path(witnesses).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield draft.fault("audit.witnesses", _cannot(witnesses, error))
    yield from _store_faults(draft)
    if fault := descriptors_fault(config.limits):
        yield draft.fault("limits.connections", fault)
    yield from _folder_faults(draft)


def _certificate_faults(draft: Draft, name: str, listener: Listener) -> Iterator[Fault]:
    unread = False
    for field, file in (
        ("certificate", listener.certificate),
        ("private_key", listener.private_key),
    ):
        try:
            if file:
                Path(file).read_bytes()
        except OSError as error:
            unread = True
            yield draft.fault(f"listeners.{name}.{field}", _cannot(file, error))
    try:
        if not unread:
            server_context(listener)
    except OSError as error:
        field = "private_key" if listener.private_key else "certificate"
        yield draft.fault(f"listeners.{name}.{field}", _cannot(getattr(listener, field), error))


def _store_faults(draft: Draft) -> Iterator[Fault]:
    store = draft.config.store
    try:
        if store.password_file:
            read_password(store.password_file)
    except (OSError, ValueError) as error:
        yield draft.fault("store.password_file", _cannot(store.password_file, error))
    unread = False
    for field in ("ca_file", "certificate", "private_key"):
        file = getattr(store, field)
        try:
            if file:
                Path(file).read_bytes()
        except OSError as error:
            unread = True
            yield draft.fault(f"store.{field}", _cannot(file, error))
    try:
        if not unread:
            check_tls_files(store)
    except OSError as error:
        field = "certificate" if store.certificate else "ca_file"
        yield draft.fault(f"store.{field}", _cannot(getattr(store, field), error))


def _folder_faults(draft: Draft) -> Iterator[Fault]:
    config = draft.config
    for field, folder in (
        ("state_dir", Path(config.state_dir)),
        ("audit.directory", Path(config.audit.directory)),
    ):
        if folder.exists() and not folder.is_dir():
            yield draft.fault(field, f"names {folder}, which is not a folder")
    for file in ("audit.key", "fingerprint.key"):
        path = Path(config.state_dir) / file
        try:
            if path.exists():  # a check makes nothing; the first start does
                load_or_create_seed(path)
        except UnsafeKeyFile as error:
            yield draft.fault("state_dir", f"holds {error}")
        except OSError as error:
            yield draft.fault("state_dir", f"holds {path}, which cannot be used: {why(error)}")


def _cannot(file: str, error: Exception) -> str:
    return f"names {file}, which cannot be used: {why(error)}"
