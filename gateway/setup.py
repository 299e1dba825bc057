"""What `veklom check` looks at before anything is started."""

from pathlib import Path

from gateway.config import (
    Config,
    ConfigurationError,
    load_config,
    providers_from,
    read_policy_sources,
)
from gateway.descriptors import require_descriptors
from gateway.tls import client_context, server_context
from policies.document import DocumentError
from policies.rules import PolicySet, load_policy_set


def load_policies(config: Config) -> PolicySet:
    """Return the policy set of a configuration.

    Raises:
        ConfigurationError: A policy file cannot be read or is wrong; all faults are in it.
    """
    try:
        sources = read_policy_sources(config.policies.path)
        return load_policy_set(sources, frozenset(config.providers))
    except DocumentError as error:
        raise ConfigurationError(tuple(map(str, error.faults))) from None


def check_deployment(path: Path) -> list[str]:
    """Return what a deployment consists of, warnings included.

    Raises:
        ConfigurationError: It cannot be served; all faults are in it.
    """
    config = load_config(path)
    policy_set = load_policies(config)
    faults: list[str] = []
    try:
        require_descriptors(config)
    except ConfigurationError as error:
        faults += (f"{path}: {fault}" for fault in error.faults)
    for name, listener in zip(
        ("proxy", "sessions", "admin"),
        (config.listeners.proxy, config.listeners.sessions, config.listeners.admin),
        strict=True,
    ):
        try:
            server_context(listener)
        except OSError as error:
            faults.append(f"{path}: listeners.{name}.certificate: {error}")
    for provider in providers_from(config):
        try:
            client_context(provider.ca_file)
        except OSError as error:
            faults.append(f"{path}: providers.{provider.name}.ca_file: {error}")
    if faults:
        raise ConfigurationError(tuple(faults))
    lines = [
        f"configuration {path}: {len(config.providers)} providers, {len(config.issuers)} issuers, "
        f"{config.workers} workers",
        f"policy {policy_set.digest}: {len(policy_set.rules)} rules, {len(policy_set.limits)} limits",
    ]
    if not config.issuers:
        lines.append("warning: no issuer is configured; only `serve --dev` can open sessions")
    if not config.providers:
        lines.append("warning: no provider is configured; every call will be answered with 404")
    if config.workers > 1 and policy_set.limits:
        lines.append(
            f"warning: limits are counted by each of {config.workers} workers on its own: a caller "
            f"may reach up to {config.workers} times what is written"
        )
    return lines
