"""What a reload takes over, what it leaves, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.config import ConfigurationError
from gateway.deployment import Deployment, read_deployment, reload_deployment
from gateway.setup import load_checked
from tests.simulators.gateway import ALLOW_ALL


def write(folder: Path, policy: str = ALLOW_ALL, **fields: Any) -> Path:
    """Write a deployment; return its configuration file."""
    (folder / "policies").mkdir(exist_ok=True)
    (folder / "policies" / "test.yaml").write_text(policy)
    path = folder / "config.yaml"
    path.write_text(json.dumps({"policies": {"path": "policies"}, **fields}))
    return path


@pytest.fixture
def running(tmp_path: Path) -> Deployment:
    """Return a deployment that runs."""
    path = write(tmp_path)
    return read_deployment(load_checked(path), path)


def test_takes_over_what_changed(running: Deployment, tmp_path: Path) -> None:
    """Policies, providers and timeouts are the new ones, and the digest is the new file's."""
    write(tmp_path, ALLOW_ALL + "# new\n", timeouts={"drain": "7s"}, providers={"openai": {}})
    fresh, kept = reload_deployment(running)
    assert kept == ()
    assert fresh.config.timeouts.drain == 7
    assert list(fresh.config.providers) == ["openai"]
    assert fresh.bundle.policies[0].text.endswith("# new\n")
    assert fresh.config_digest != running.config_digest


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "other"),
        ("workers", 3),
        ("state_dir", "elsewhere"),
        ("listeners", {"admin": {"address": "127.0.0.1:9999"}}),
        ("audit", {"directory": "elsewhere"}),
        ("store", {"backend": "redis", "url": "redis://127.0.0.1:1"}),
    ],
)
def test_leaves_what_needs_a_restart(
    running: Deployment, tmp_path: Path, name: str, value: Any
) -> None:
    """Such a change is named, the old value stays, and everything else is taken over."""
    write(tmp_path, timeouts={"drain": "7s"}, **{name: value})
    fresh, kept = reload_deployment(running)
    assert kept == (name,)
    assert getattr(fresh.config, name) == getattr(running.config, name)
    assert fresh.config.timeouts.drain == 7


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("rules: [{id: x, effect: perhaps}]\n", {}),
        (ALLOW_ALL, {"unknown": 1}),
        (ALLOW_ALL, {"providers": {"openai": {"ca_file": "missing.pem"}}}),
    ],
    ids=["policy", "configuration", "file"],
)
def test_refuses_what_cannot_be_served(
    running: Deployment, tmp_path: Path, policy: str, fields: dict[str, Any]
) -> None:
    """A fault anywhere, and nothing is taken over."""
    write(tmp_path, policy, **fields)
    with pytest.raises(ConfigurationError):
        reload_deployment(running)
