"""The audit log of a whole gateway: killed, robbed, slow, and asked for receipts."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.audit.verify import ExitCode, verify_path
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
