"""Programs that none of us wrote accept our logs, and refuse them when they were changed.

Each is skipped where it is not installed; `make test` installs the Debian ones.
"""

import asyncio
import base64
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gateway.audit.export import write_tiles
from gateway.audit.files import LogFiles
from gateway.audit.trust import Policy
from tests.gateway.audit.conftest import appended, open_log, started

HERE = Path(__file__).parent
EVENTS = 700
GO = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": ""}


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program."""
    words = list(map(str, command))
    env = {**os.environ, **environment}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=env)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed log of some hundred events."""
    folder = tmp_path_factory.mktemp("interop") / "log"

    async def write() -> None:
        journal = open_log(folder)
        await asyncio.gather(*(appended(journal, started(str(n))) for n in range(EVENTS)))
        journal.close()

    asyncio.run(write())
    return folder


@pytest.fixture(scope="module")
def log_vkey(log: Path) -> str:
    """The key that signs the log's checkpoints."""
    text = (log / "delegation").read_text().partition("\n\n")[0] + "\n"
    return Policy.from_text(text).logs[0].verifier.vkey


@pytest.fixture(scope="module")
def go_verify(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verifier made of the Go team's packages."""
    if shutil.which("go") is None or not Path(GO["GOPATH"], "src/golang.org/x/mod").exists():
        pytest.skip("needs Debian's golang-go and golang-golang-x-mod-dev")
    folder = tmp_path_factory.mktemp("go")
    cache = {"GOCACHE": str(folder / "cache"), "HOME": str(folder)}
    built = run("go", "build", "-o", folder / "verify", HERE / "verify.go", **GO, **cache)
    assert built.returncode == 0, built.stderr
    return folder / "verify"


@pytest.mark.timeout(300)
def test_go_accepts_tiles_and_refuses_changed_ones(
    log: Path, log_vkey: str, go_verify: Path, tmp_path: Path
) -> None:
    """The Go team's tlog proves an event and every growth from our tiles, and nothing from changed ones."""
    tiles = tmp_path / "tiles"
    write_tiles(log, tiles)
    index, line = next(LogFiles(log).lines(300))
    leaf = tmp_path / "leaf"
    leaf.write_bytes(line)
    accepted = run(go_verify, tiles, log_vkey, index, leaf)
    assert accepted.returncode == 0, accepted.stderr
    assert accepted.stdout == f"verified {EVENTS + 2}\n"
    leaf.write_bytes(line + b" ")
    assert run(go_verify, tiles, log_vkey, index, leaf).returncode == 1
    leaf.write_bytes(line)
    tile = tiles / "tile/0/001"
    tile.write_bytes(bytes(32) + tile.read_bytes()[32:])
    assert run(go_verify, tiles, log_vkey, index, leaf).returncode == 1
    checkpoint = tiles / "checkpoint"
    checkpoint.write_text(checkpoint.read_text().replace(f"\n{EVENTS + 2}\n", f"\n{EVENTS + 1}\n"))
    assert run(go_verify, tiles, log_vkey, index, leaf).returncode == 1


def test_openssl_accepts_a_checkpoint_and_refuses_a_changed_one(
    log: Path, log_vkey: str, tmp_path: Path
) -> None:
    """`openssl pkeyutl` verifies the three lines of a checkpoint under the log's key."""
    raw = base64.b64decode(log_vkey.split("+", 2)[2])[1:]
    pem = Ed25519PublicKey.from_public_bytes(raw).public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    text, _, signatures = (log / "checkpoint").read_text().partition("\n\n")
    signature = base64.b64decode(signatures.split("\n")[0].split(" ")[2])[-64:]
    (tmp_path / "key").write_bytes(pem)
    (tmp_path / "signature").write_bytes(signature)
    for said, code in ((text + "\n", 0), (text.replace("test/", "tset/") + "\n", 1)):
        (tmp_path / "text").write_text(said)
        done = run(
            "openssl", "pkeyutl", "-verify", "-pubin", "-inkey", tmp_path / "key", "-rawin", "-in",
            tmp_path / "text", "-sigfile", tmp_path / "signature",
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr


def test_metamorphic_log_accepts_a_checkpoint_and_refuses_a_changed_one(
    log: Path, log_vkey: str
) -> None:
    """A verifier in Rust by others opens our notes, and no changed one."""
    metamorphic = pytest.importorskip("metamorphic_log")
    note = (log / "checkpoint").read_text()
    metamorphic.checkpoint_verify(note, [log_vkey])
    with pytest.raises(Exception):  # noqa: B017, PT011 - theirs
        metamorphic.checkpoint_verify(note.replace("test/", "tset/", 1), [log_vkey])
