"""Everything wrong with a deployment is found in one look, and before anything is started."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)

from gateway.cli import main

EVERY_KIND = """\
workers: 0
state_dir: state
listeners:
  proxy: {address: "127.0.0.1:0", certificate: absent.pem}
  sessions: {address: "127.0.0.1:0", certificate: ours.pem, private_key: theirs.pem}
  admin: {address: "127.0.0.1:0", certificate: ours.pem, private_key: locked.pem}
issuers:
  - {issuer: "https://a", audiences: v, jwks_file: absent.json}
  - {issuer: "https://b", audiences: v, jwks_file: broken.json}
  - {issuer: "https://c", audiences: v, jwks_file: folder}
providers:
  openai: {ca_file: absent-ca.pem}
  gemini: {ca_file: broken.json}
policies: {path: policies}
audit: {directory: broken.json}
store: {backend: redis, url: "rediss://h:1", username: u, password_file: empty, ca_file: absent-ca.pem}
"""

FAULTS = [
    ("config.yaml:1:10", "workers must be between"),
    ("config.yaml:2:12", "audit.key may be read by others"),
    ("config.yaml:4:48", "listeners.proxy.certificate names"),
    ("config.yaml:5:74", "listeners.sessions.private_key names"),
    ("config.yaml:6:71", "listeners.admin.private_key names"),
    ("config.yaml:8:52", "issuers[0].jwks_file names"),
    ("config.yaml:9:52", "not a JWK set"),
    ("config.yaml:10:52", "is a directory"),
    ("config.yaml:12:21", "providers.openai.ca_file names"),
    ("config.yaml:13:21", "no certificate or crl found"),
    ("config.yaml:14:18", "binary.yaml: cannot be read: it is not UTF-8"),
    ("config.yaml:15:20", "which is not a folder"),
    ("config.yaml:16:74", "which cannot be used: it does not hold 1 to 4096 bytes"),
    ("config.yaml:16:90", "store.ca_file names"),
    ("policies/rules.yaml:2:20", "did you mean 'effect'"),
    ("policies/rules.yaml:3:8", "unknown key 'rulse'"),
]


@pytest.fixture
def broken_deployment(tmp_path: Path) -> Path:
    """A folder in which one of everything is wrong; return its configuration."""
    one, other = (trustme.CA().issue_cert("127.0.0.1") for _ in range(2))
    one.private_key_and_cert_chain_pem.write_to_path(tmp_path / "ours.pem")
    other.private_key_pem.write_to_path(tmp_path / "theirs.pem")
    locked = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"passphrase")
    )
    (tmp_path / "locked.pem").write_bytes(locked)
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "empty").write_text("\n")
    for folder in ("folder", "state", "policies"):
        (tmp_path / folder).mkdir()
    (tmp_path / "state" / "audit.key").write_bytes(bytes(32))
    (tmp_path / "state" / "audit.key").chmod(0o644)
    (tmp_path / "policies" / "binary.yaml").write_bytes(b"\xff")
    (tmp_path / "policies" / "rules.yaml").write_text(
        'rules:\n  - {id: a, efect: allow, match: {tenant: "*"}}\nrulse: []\n'
    )
    path = tmp_path / "config.yaml"
    path.write_text(EVERY_KIND)
    return path


@pytest.mark.parametrize("command", ["check", "serve"])
def test_faults_of_every_kind_are_shown_at_once(broken_deployment: Path, command: str) -> None:
    """One run names every fault of the configuration and of each file, with file:line:column."""
    result = CliRunner().invoke(main, [command, "--config", str(broken_deployment)])
    assert result.exit_code == 1
    folder = broken_deployment.parent
    shown = [line.removeprefix(f"{folder}/") for line in result.stderr.splitlines()]
    for place, words in FAULTS:
        assert any(each.startswith(f"{place}: ") and words in each for each in shown), (
            place,
            shown,
        )
    assert all(re.match(r"[\w./-]+:\d+:\d+: ", line) for line in shown), shown
    assert not (folder / "audit").exists()
    assert [each.name for each in (folder / "state").iterdir()] == ["audit.key"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody listens on, ready to share it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["proxy", "sessions", "admin"])
def test_a_port_in_use_is_one_clear_line(
    tmp_path: Path, taken_port: int, name: str, workers: int
) -> None:
    """A gateway whose port is taken ends with 1 and says so, and never shares the port."""
    listeners = {each: {"address": "127.0.0.1:0"} for each in ("proxy", "sessions", "admin")}
    listeners[name] = {"address": f"127.0.0.1:{taken_port}"}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"workers": workers, "listeners": listeners}))
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "serve", "--config", str(path)],
        capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode == 1
    said = f"cannot listen on 127.0.0.1:{taken_port}: address already in use"
    assert done.stderr.splitlines()[-1] == said
    assert "Traceback" not in done.stderr


def test_a_check_advises_about_policies(tmp_path: Path) -> None:
    """Rules that can do nothing are no fault; a check of the deployment names them all the same."""
    (tmp_path / "p.yaml").write_text(
        "rules:\n"
        "  - {id: a, effect: allow, match: {tenant: acme}}\n"
        "  - {id: d, effect: deny, match: {tenant: '*'}}\n"
    )
    path = tmp_path / "config.yaml"
    path.write_text("providers: {openai: {}}\npolicies: {path: p.yaml}\n")
    result = CliRunner().invoke(main, ["check", "--config", str(path)])
    assert result.exit_code == 0
    assert "p.yaml:2:5: warning: allow 'a' can never allow: deny 'd' refuses" in result.output
