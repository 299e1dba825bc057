"""A deployment: one reading of the configuration and the policies, and what a reload may change.

A reload makes another deployment, whole and checked, or none. What the supervisor itself holds for
its lifetime (sockets, the name that keys and logs are bound to, the folders, the number of workers)
stays as it was, and so does the store of the sessions that go on: a change of either is named in the
log and waits for a restart.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from gateway.bundles import Bundle
from gateway.config import Config
from gateway.setup import Checked, load_checked

NEEDS_RESTART: Final = ("name", "state_dir", "workers", "listeners", "audit", "store")
"""The fields of the configuration that a reload leaves alone."""


class Deployment(msgspec.Struct, kw_only=True, eq=False):
    """What processes are started from; every process of one deployment compiles the same bytes.

    Its `bundle` alone may be replaced while its processes run: they are told.
    """

    config: Config
    config_path: Path
    config_digest: str
    bundle: Bundle


def read_deployment(checked: Checked, path: Path) -> Deployment:
    """Return the deployment of a configuration that was read from `path` and checked."""
    return Deployment(
        config=checked.config,
        config_path=path,
        config_digest="sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(),
        bundle=checked.bundle,
    )


def reload_deployment(running: Deployment) -> tuple[Deployment, tuple[str, ...]]:
    """Return what lies there now, and the names of changed fields that need a restart.

    Raises:
        ConfigurationError: It cannot be served; all faults are in it.
    """
    checked = load_checked(running.config_path)
    fresh = checked.config
    held = {name: getattr(running.config, name) for name in NEEDS_RESTART}
    changed = tuple(name for name in NEEDS_RESTART if getattr(fresh, name) != held[name])
    config = msgspec.structs.replace(fresh, **held)
    return read_deployment(replace(checked, config=config), running.config_path), changed
