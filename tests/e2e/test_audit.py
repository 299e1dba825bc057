"""The audit log of a whole gateway: killed, robbed, slow, and asked for receipts."""

import asyncio
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from gateway.audit.verify import ExitCode, verify_path
from keys.signing import Verifier
from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import exchange, parse, request


def vkey(gateway: Gateway) -> str:
    """Return the key that an auditor has pinned."""
    return (gateway.folder / "audit/vkey").read_text()


def providers_at(provider: Provider) -> dict[str, dict[str, object]]:
    """Return the double as the one provider of a gateway."""
    return {"openai": {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}}


async def test_a_receipt_names_where_the_call_is_on_record(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """Every answer about a call, allowed or denied by a limit, names the log and index of its record."""
    answer = parse(await exchange(gateway.proxy, request(token)))
    position = answer.values(b"x-veklom-receipt")[0].decode()
    await asyncio.to_thread(gateway.stop)
    origin, _, index = position.partition("#")
    (start,) = gateway.events("call.start")
    assert (start["origin"], start["seq"]) == (origin, int(index))
    assert start["call"] == answer.values(b"x-veklom-call")[0].decode()


async def test_a_power_cut_leaves_calls_unclosed_and_a_log_that_verifies(
    tmp_path: Path, provider: Provider
) -> None:
    """After everything was killed the next start finds the dead logs, and nothing is missing of them."""
    begun = asyncio.Event()

    async def endless(it: Exchange) -> None:
        await it.begin_stream()
        await it.chunk(b'data: {"choices":[]}\n\n')
        begun.set()
        await it.wait_until_left()

    provider.script = endless
    providers = providers_at(provider)
    folder = tmp_path / "gateway"

    def run() -> Gateway:
        gateway = Gateway(folder, providers)
        shutil.rmtree(folder / "policies", ignore_errors=True)
        return gateway.__enter__()

    gateway = await asyncio.to_thread(run)
    token = (await asyncio.to_thread(gateway.open_session, {"openai": KEY}))["token"]
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    writer.write(request(token, b'{"model":"m","stream":true}', closes=False))
    await reader.readuntil(b"data: ")
    await begun.wait()
    await asyncio.to_thread(gateway.kill)
    writer.close()
    assert verify_path(folder / "audit", vkey(gateway)).exit_code is not ExitCode.TAMPERED
    gateway = await asyncio.to_thread(run)
    await asyncio.to_thread(gateway.wait_for_log, "audit.recovered", 2)
    await asyncio.to_thread(gateway.stop)
    (start,), (unclosed,) = gateway.events("call.start"), gateway.events("call.unclosed")
    assert (unclosed["call"], unclosed["log"], unclosed["start"]) == (
        start["call"], start["origin"], start["seq"],
    )  # fmt: skip
    report = verify_path(folder / "audit", vkey(gateway))
    assert report.exit_code is ExitCode.VERIFIED, "\n".join(report.to_lines())
    killed = [log for log in report.logs if not log.is_sealed and log.path != "anchor"]
    assert len(killed) == 2
    # What was found of the dead is signed: taking even one event of the tail away is seen.
    segment = next((folder / "audit" / killed[0].path / "seg").iterdir())
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(lines[:-1]))
    assert verify_path(folder / "audit", vkey(gateway)).exit_code is ExitCode.TAMPERED


async def test_a_log_that_is_taken_away_is_missed(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """Every log of a gateway is named by its anchor: none can be removed or cut back unseen."""
    assert parse(await exchange(gateway.proxy, request(token))).status == 200
    await asyncio.to_thread(gateway.stop)
    audit = gateway.folder / "audit"
    whole = verify_path(audit, vkey(gateway))
    assert whole.exit_code is ExitCode.VERIFIED, "\n".join(whole.to_lines())
    logs = [path for path in audit.iterdir() if path.is_dir() and path.name != "anchor"]
    assert len(logs) == 2
    for log in logs:
        away = gateway.folder / "away"
        log.rename(away)
        report = verify_path(audit, vkey(gateway))
        assert report.exit_code is ExitCode.TAMPERED
        (finding,) = report.findings
        assert "is missing" in finding
        assert report.evidence
        away.rename(log)


@pytest.mark.parametrize("harm", ["remove", "replace"])
async def test_a_log_that_is_robbed_is_followed_by_another(
    tmp_path: Path, provider: Provider, harm: str
) -> None:
    """A removed or replaced file ends a log; calls are refused until another says what was lost."""
    providers = providers_at(provider)
    gateway = Gateway(tmp_path / "gateway", providers, verifies_log=False)
    await asyncio.to_thread(gateway.__enter__)
    try:
        token = (await asyncio.to_thread(gateway.open_session, {"openai": KEY}))["token"]
        (segment,) = (tmp_path / "gateway/audit").glob("*-worker-0.1/seg/*")
        if harm == "remove":
            segment.unlink()
        else:
            segment.rename(segment.with_suffix(".away"))
            segment.write_bytes(b"")
        await asyncio.to_thread(gateway.wait_for_log, "audit.renewed")
        assert parse(await exchange(gateway.proxy, request(token))).status == 200
    finally:
        await asyncio.to_thread(gateway.stop)
    (gap,) = gateway.events("log.gap")
    assert gap["log"].endswith("worker-0.1")
    assert gap["origin"] == gap["log"] + ".2"
    (end,) = gateway.events("call.end")
    assert end["origin"] == gap["origin"]
    assert verify_path(tmp_path / "gateway/audit", vkey(gateway)).exit_code is ExitCode.TAMPERED


def audit(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `veklom audit`."""
    command = [sys.executable, "-m", "gateway", "audit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def ask(gateway: Gateway, path: str, identity: str) -> tuple[int, str]:
    """GET from the sessions listener; return status and body, once the answer is not "ask again"."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{gateway.sessions}{path}",
        headers={"authorization": f"Bearer {identity}"},
    )
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code != 503:
                return error.code, error.read().decode()
            time.sleep(0.1)  # polling for the next checkpoint, at most a second away


async def test_a_caller_gets_a_proof_of_its_own_call(
    gateway: Gateway, token: str, tmp_path: Path
) -> None:
    """The owner's receipt verifies under the pinned key alone; nobody else gets one."""
    answer = parse(await exchange(gateway.proxy, request(token)))
    call = answer.values(b"x-veklom-call")[0].decode()
    alice = await asyncio.to_thread(gateway.identity)
    status, proof = await asyncio.to_thread(ask, gateway, f"/v1/receipts/{call}", alice)
    assert status == 200, proof
    file = tmp_path / "call.tlog-proof"
    file.write_text(proof)
    checked = await asyncio.to_thread(
        audit, "receipt", file, "--key", gateway.folder / "audit/vkey"
    )
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["type"] == "call.end"
    file.write_text(proof.replace("index ", "index 1"))
    changed = await asyncio.to_thread(
        audit, "receipt", file, "--key", gateway.folder / "audit/vkey"
    )
    assert changed.returncode == 1
    bob = await asyncio.to_thread(gateway.identity, "bob")
    for other, path in ((bob, call), (alice, "0" * 32), (alice, "..")):
        status, _ = await asyncio.to_thread(ask, gateway, f"/v1/receipts/{path}", other)
        assert status == 404


async def test_closing_a_session_gives_a_signed_receipt(gateway: Gateway) -> None:
    """Who closes a session gets a note of it under the deployment's key."""
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    identity = await asyncio.to_thread(gateway.identity)

    def close() -> dict[str, Any]:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{gateway.sessions}/v1/sessions/{session['session_id']}",
            headers={"authorization": f"Bearer {identity}"}, method="DELETE",
        )  # fmt: skip
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return dict(json.load(answer))

    closed = await asyncio.to_thread(close)
    text = Verifier.from_vkey(vkey(gateway)).open_note(closed["receipt"])
    context, _, said = text.partition("\n")
    assert context == "veklom.session.v1 test"
    assert json.loads(said)["session_id"] == session["session_id"]
    assert KEY not in text


async def test_the_commands_read_what_was_recorded(
    gateway: Gateway, token: str, tmp_path: Path
) -> None:
    """Every reading command agrees about one call, from the folder and from the auditors' pack."""
    answer = parse(await exchange(gateway.proxy, request(token)))
    call = answer.values(b"x-veklom-call")[0].decode()
    position = answer.values(b"x-veklom-receipt")[0].decode()
    await asyncio.to_thread(gateway.stop)
    logs = gateway.folder / "audit"
    pack = tmp_path / "pack.tar.gz"
    assert (
        audit("export", logs, pack, "--include", gateway.folder / "policies/test.yaml").returncode
        == 0
    )
    for where in (logs, pack):
        verified = audit("verify", where, "--key", logs / "vkey", "--json")
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert json.loads(verified.stdout)["verdict"] == "verified"
        shown = [
            json.loads(line) for line in audit("show", where, "--call", call).stdout.splitlines()
        ]
        assert [each["type"] for each in shown] == ["call.start", "call.end"]
        proof = tmp_path / "proof"
        assert audit("prove", where, position, "--out", proof).returncode == 0
        assert audit("receipt", proof, "--key", logs / "vkey").returncode == 0
        assert json.loads(audit("stats", where, "--json").stdout)["outcomes"] == {"complete": 1}
        fingerprint = shown[0]["credential"]
        found = json.loads(
            audit("affected", where, "--key-fingerprint", fingerprint, "--format", "json").stdout
        )
        assert [row["call"] for row in found["calls"]] == [call]
        assert len(found["sessions"]) == 1
        none = audit("affected", where, "--from", "2100-01-01", "--format", "csv").stdout
        assert len(none.splitlines()) == 1
    for form in ("ocsf", "ecs", "cloudevents"):
        out = tmp_path / form
        assert audit("export", logs, out, "--format", form).returncode == 0
        assert len(out.read_text().splitlines()) > 5
    assert json.loads(audit("tail", logs, "-n", "1").stdout)["type"].startswith("log.")
    assert audit("verify", tmp_path / "missing").returncode == 3
    shutil.unpack_archive(pack, tmp_path / "unpacked", filter="data")
    script = ["sh", str(tmp_path / "unpacked/audit-pack/verify.sh")]
    checked = await asyncio.to_thread(
        subprocess.run, script, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count("signed") == 3


async def test_erasing_is_seen_unless_it_is_authorised(
    gateway: Gateway, token: str, tmp_path: Path
) -> None:
    """An event that the deployment key's word erases leaves a log that verifies; any other does not."""
    answer = parse(await exchange(gateway.proxy, request(token)))
    origin, _, index = answer.values(b"x-veklom-receipt")[0].decode().partition("#")
    await asyncio.to_thread(gateway.stop)
    logs = gateway.folder / "audit"
    (log,) = logs.glob(f"*-{origin.rpartition('/')[2]}")
    copy = tmp_path / "copy"
    shutil.copytree(logs, copy)
    said = audit(
        "redact", logs, log.name, "--event", index, "--reason", "asked for", "--state-dir",
        gateway.folder / "state",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    verified = audit("verify", logs, "--key", logs / "vkey")
    assert verified.returncode == 0, verified.stdout
    assert "erased      1 single" in verified.stdout
    assert "call.start" not in audit("show", logs).stdout
    # The same without the word for it.
    shutil.copytree(log, copy / log.name, dirs_exist_ok=True)
    refused = audit("verify", copy, "--key", logs / "vkey")
    assert refused.returncode == 1
    assert "UNAUTHORISED REMOVAL" in refused.stdout


HANGS = """\
import os, time
_real = os.fdatasync
def _hanging(fd):
    while os.path.exists({flag!r}):
        time.sleep(0.01)
    _real(fd)
os.fdatasync = _hanging
"""


@pytest.mark.parametrize(("durability", "status"), [("strict", 503), ("bounded", 200)])
async def test_a_disk_that_hangs(
    tmp_path: Path, provider: Provider, durability: str, status: int
) -> None:
    """While no record is durable, no byte of a strict call reaches the provider, and it is refused in time.

    A bounded call goes on. When the disk works again, so does everything, and the log verifies.
    """
    flag = tmp_path / "hangs"
    (tmp_path / "sitecustomize.py").write_text(HANGS.format(flag=str(flag)))
    gateway = Gateway(
        tmp_path / "gateway", providers_at(provider), environment={"PYTHONPATH": str(tmp_path)},
        extra={"audit": {
            "directory": str(tmp_path / "gateway/audit"), "durability": durability, "wait": "500ms",
        }},
    )  # fmt: skip
    await asyncio.to_thread(gateway.__enter__)
    try:
        token = (await asyncio.to_thread(gateway.open_session, {"openai": KEY}))["token"]
        flag.touch()
        assert parse(await exchange(gateway.proxy, request(token))).status == status
        assert len(provider.received) == (status == 200)
        flag.unlink()
        for _ in range(3):
            assert parse(await exchange(gateway.proxy, request(token))).status == 200
    finally:
        flag.unlink(missing_ok=True)
        await asyncio.to_thread(gateway.__exit__)
    (opened, *_) = gateway.events("log.opened")
    assert opened["durability"] == durability
    late = [each for each in gateway.events("call.end") if each["code"] == "audit_unavailable"]
    assert len(late) == (durability == "strict")
