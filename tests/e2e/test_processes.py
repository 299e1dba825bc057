"""Processes under failure: whatever is killed or reloaded, open sessions are served, closed ones not."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import KEY
from tests.simulators.gateway import ALLOW_ALL, Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import Response, exchange, parse, request

Start = Callable[..., Gateway]
STREAM = b'{"model":"m","stream":true}'
DENY_ALL = ALLOW_ALL + "  - {id: deny-all, effect: deny, match: {tenant: '*'}}\n"


async def begin(start: Start, provider: Provider, **options: Any) -> Gateway:
    """Start a gateway in front of the double; what its processes left is verified by the test."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    return await asyncio.to_thread(start, {"openai": upstream}, verifies_log=False, **options)


async def call(gateway: Gateway, token: str) -> Response:
    """Make one call on a connection of its own."""
    return parse(await exchange(gateway.proxy, request(token)))


async def ask(
    gateway: Gateway, method: str, path: str, identity: str, token: str = "", body: bytes = b""
) -> tuple[int, Any]:
    """Ask the sessions listener; return status and JSON, or 0 where nobody answers."""
    head = f"{method} {path} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {identity}\r\n"
    head += f"X-Veklom-Session: {token}\r\n" if token else ""
    raw = await exchange(
        gateway.sessions,
        f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body,
    )
    seen = parse(raw)
    return seen.status, json.loads(seen.body) if seen.body else None


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Return when something that another process brings about holds."""
    async with asyncio.timeout(20):
        while not await holds():  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.02)  # polling another process


class Streaming:
    """A provider's stream that goes on until the test lets it end."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def __call__(self, it: Exchange) -> None:
        """Answer streams so, and everything else at once."""
        if b"stream" not in it.request.body:
            await it.reply(b'{"ok":true}')
            return
        await it.begin_stream()
        await it.chunk(b'data: {"choices":[]}\n\n')
        await self.go_on.wait()
        await it.chunk(b"data: [DONE]\n\n")
        await it.chunk(b"")


async def open_stream(
    gateway: Gateway, token: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Begin a streaming call and read its first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    writer.write(request(token, STREAM, closes=False))
    await reader.readuntil(b"data: ")
    return reader, writer


def report_of(gateway: Gateway) -> tuple[int, list[dict[str, Any]]]:
    """Return what `veklom audit verify` says of everything that was written."""
    command = [sys.executable, "-m", "gateway", "audit", "verify", "--json"]
    done = subprocess.run(
        [*command, str(gateway.folder / "audit")], capture_output=True, check=False
    )
    logs = json.loads(done.stdout)["logs"]
    # The anchor is nobody's own: it goes on from one start of the gateway to the next.
    return done.returncode, [log for log in logs if log["path"] != "anchor"]


def unsealed(logs: list[dict[str, Any]]) -> set[str]:
    """Return the roles and runs of the logs that were not sealed, none of them tampered with."""
    assert not any(log["findings"] for log in logs)
    return {log["path"].partition("-")[2] for log in logs if not log["is_sealed"]}


def counted(gateway: Gateway, series: str) -> float:
    """Return a figure of the metrics page."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", gateway.metrics(), re.MULTILINE)
    assert found, series
    return float(found[1])


async def test_a_killed_worker_loses_no_session(provider: Provider, start_gateway: Start) -> None:
    """Under load one of two workers is killed: its successor serves the tokens that were out."""
    gateway = await begin(start_gateway, provider, workers=2)
    sessions = [
        await asyncio.to_thread(gateway.open_session, {"openai": KEY}, subject=f"s{number}")
        for number in range(4)
    ]
    tokens = [str(session["token"]) for session in sessions]
    is_over = asyncio.Event()
    seen: list[int] = []

    async def load(token: str) -> None:
        while not is_over.is_set():
            seen.append((await call(gateway, token)).status)

    async with asyncio.TaskGroup() as group:
        for token in tokens:
            group.create_task(load(token))
        await until(lambda: asyncio.sleep(0, len(seen) > 50))
        before = await asyncio.to_thread(gateway.metrics)
        os.kill(gateway.pids("worker")[0], signal.SIGKILL)
        await asyncio.to_thread(gateway.wait_for_log, "workers.complete")
        so_far = len(seen)
        await until(lambda: asyncio.sleep(0, len(seen) > so_far + 50))
        is_over.set()
    # A call that died with its worker has no answer (0); every answer that there is, is good.
    assert set(seen) <= {0, 200}
    assert set(seen[so_far:]) == {200}
    assert (
        await asyncio.to_thread(counted, gateway, 'veklom_process_restarts_total{role="worker"}')
        == 1
    )
    count = r"^gen_ai_client_operation_duration_seconds_count.* (\S+)$"
    totals = [
        sum(map(float, re.findall(count, page, re.MULTILINE)))
        for page in (before, await asyncio.to_thread(gateway.metrics))
    ]
    assert totals[0] < totals[1]
    await asyncio.to_thread(gateway.wait_until_ready)
    assert await asyncio.to_thread(gateway.stop) == 0
    code, logs = await asyncio.to_thread(report_of, gateway)
    assert code in {0, 2}
    assert len(unsealed(logs)) == 1
    assert unsealed(logs) < {"worker-0.1", "worker-1.1"}


async def test_callers_wait_for_a_missing_worker(provider: Provider, start_gateway: Start) -> None:
    """While the only worker is being started again, readiness is off and calls wait for it."""
    gateway = await begin(start_gateway, provider)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    os.kill(gateway.pids("worker")[0], signal.SIGKILL)
    asking = b"GET /readyz HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n"

    async def is_not_ready() -> bool:
        return parse(await exchange(gateway.admin, asking)).status == 503

    await until(is_not_ready)
    assert (await call(gateway, session["token"])).status == 200
    await asyncio.to_thread(gateway.wait_until_ready)
    assert await asyncio.to_thread(gateway.stop) == 0


async def test_sessions_outlive_a_killed_control(provider: Provider, start_gateway: Start) -> None:
    """Calls go on without control; its successor lists, renews and closes what was open."""
    streaming = provider.script = Streaming()
    gateway = await begin(start_gateway, provider, workers=2)
    session = await asyncio.to_thread(
        gateway.post,
        "/v1/sessions",
        {"keys": {"openai": KEY}, "label": "mine"},
        await asyncio.to_thread(gateway.identity),
    )
    token, path = str(session["token"]), f"/v1/sessions/{session['session_id']}"
    reader, writer = await open_stream(gateway, token)
    os.kill(gateway.pids("control")[0], signal.SIGKILL)
    for _ in range(8):
        assert (await call(gateway, token)).status == 200
    # This waits in the backlog until the successor has taken over.
    identity = await asyncio.to_thread(gateway.identity)
    status, listed = await ask(gateway, "GET", "/v1/sessions", identity)
    assert status == 200
    assert [(each["session_id"], each["label"]) for each in listed["sessions"]] == [
        (session["session_id"], "mine")
    ]
    status, renewed = await ask(gateway, "POST", f"{path}/renew", identity, token)
    assert status == 200
    for _ in range(8):
        assert (await call(gateway, token)).status == 401
        assert (await call(gateway, renewed["token"])).status == 200
    status, closed = await ask(gateway, "DELETE", path, identity)
    assert (status, closed["cut_calls"]) == (200, 1)
    assert b"session_closed" in await reader.read()
    writer.close()
    for _ in range(8):
        assert (await call(gateway, renewed["token"])).status == 401
    assert (
        await asyncio.to_thread(counted, gateway, 'veklom_process_restarts_total{role="control"}')
        == 1
    )
    streaming.go_on.set()
    assert await asyncio.to_thread(gateway.stop) == 0
    assert [event["sessions"] for event in gateway.events("sessions.adopted")] == [1]
    _, logs = await asyncio.to_thread(report_of, gateway)
    assert unsealed(logs) == {"control.1"}


async def test_half_open_sessions_are_destroyed(provider: Provider, start_gateway: Start) -> None:
    """Control dies when one worker has closed a session and the other not: nobody serves it."""
    gateway = await begin(start_gateway, provider, workers=2)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    token, path = str(session["token"]), f"/v1/sessions/{session['session_id']}"
    stuck = gateway.pids("worker")[1]
    os.kill(stuck, signal.SIGSTOP)
    # So many large sessions fill the relay of the worker that does not read: it will hear of no
    # more than fits, and never of the closing.
    large = json.dumps({"keys": {"openai": "k" * 4096}}).encode()
    opening = []
    for number in range(60):
        identity = await asyncio.to_thread(gateway.identity, subject=f"s{number}")
        opening.append(ask(gateway, "POST", "/v1/sessions", identity, body=large))
    identity = await asyncio.to_thread(gateway.identity)
    asking = asyncio.gather(*opening)
    await until(lambda: asyncio.sleep(0, len(gateway.events("session.opened")) == 61))
    closing = asyncio.gather(ask(gateway, "DELETE", path, identity))

    async def is_half_closed() -> bool:
        try:
            async with asyncio.timeout(0.3):  # the stuck worker's connections are not answered
                return (await call(gateway, token)).status == 401
        except TimeoutError:
            return False

    await until(is_half_closed)
    os.kill(gateway.pids("control")[0], signal.SIGKILL)
    # Where the machine is slow, some have heard already that a worker does not answer.
    assert {status for status, _ in [*await asking, *await closing]} <= {0, 503}
    os.kill(stuck, signal.SIGCONT)
    identity = await asyncio.to_thread(gateway.identity)
    assert await ask(gateway, "GET", "/v1/sessions", identity) == (200, {"sessions": []})
    for _ in range(16):
        assert (await call(gateway, token)).status == 401
    reasons = [event["reason"] for event in gateway.events("session.closed")]
    assert "half_open" in reasons
    assert await asyncio.to_thread(gateway.stop) == 0
    assert "takeover.incomplete" not in gateway.log.read_text()
    (adopted,) = gateway.events("sessions.adopted")
    assert 0 < adopted["sessions"] < 61


async def test_control_and_a_worker_killed_together(
    provider: Provider, start_gateway: Start
) -> None:
    """One worker that lives is enough for every session to go on."""
    gateway = await begin(start_gateway, provider, workers=2)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    for pid in (gateway.pids("control")[0], gateway.pids("worker")[0]):
        os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(gateway.wait_for_log, "workers.complete")
    for _ in range(16):
        assert (await call(gateway, session["token"])).status == 200
    assert await asyncio.to_thread(gateway.stop) == 0


@pytest.mark.parametrize("state", ["serving", "draining"])
async def test_a_killed_supervisor_takes_all_with_it(
    provider: Provider, start_gateway: Start, state: str
) -> None:
    """Nobody goes on holding sessions when the parent is gone: not even a running stream stays."""
    provider.script = Streaming()
    gateway = await begin(start_gateway, provider, workers=2)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    reader, writer = await open_stream(gateway, session["token"])
    children = gateway.children()
    if state == "draining":
        gateway.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(gateway.wait_for_log, "gateway.stopping")
    gateway.process.kill()
    await asyncio.to_thread(gateway.process.wait, 10)
    assert b'"type":"gateway_error"' in await asyncio.wait_for(reader.read(), 5)
    writer.close()
    await until(lambda: asyncio.sleep(0, not any(Path(f"/proc/{p}").exists() for p in children)))
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", gateway.proxy)
    code, logs = await asyncio.to_thread(report_of, gateway)
    assert (code, unsealed(logs)) == (0, set())
    if state == "serving":
        stopped = {event["reason"] for event in gateway.events("process.stopped")}
        assert stopped == {"supervisor_lost"}


async def test_a_reload_refuses_nobody(provider: Provider, start_gateway: Start) -> None:
    """A new policy takes effect under load: no connection is refused, no stream breaks."""
    streaming = provider.script = Streaming()
    gateway = await begin(start_gateway, provider, workers=2)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    token = str(session["token"])
    identity = await asyncio.to_thread(gateway.identity)
    reader, writer = await open_stream(gateway, token)
    before = gateway.children()
    (gateway.folder / "policies" / "test.yaml").write_text(DENY_ALL)
    is_over = asyncio.Event()
    calls: list[int] = []
    asked: list[int] = []

    async def keep_calling() -> None:
        while not is_over.is_set():
            calls.append((await call(gateway, token)).status)

    async def keep_asking() -> None:
        while not is_over.is_set():
            asked.append((await ask(gateway, "GET", "/v1/sessions", identity))[0])

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(keep_calling())
        group.create_task(keep_asking())
        gateway.reload()
        await asyncio.to_thread(gateway.wait_for_log, "reload.done")
        is_over.set()
    assert set(calls) == {200, 403}
    # The development issuer's key is control's own: its successor does not know the identity.
    assert set(asked) <= {200, 401}
    assert (await call(gateway, token)).status == 403
    streaming.go_on.set()
    assert (await reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n")).endswith(b"0\r\n\r\n")
    writer.close()
    await until(lambda: asyncio.sleep(0, not set(gateway.children()) & set(before)))
    await asyncio.to_thread(gateway.wait_until_ready)
    identity = await asyncio.to_thread(gateway.identity)
    _, listed = await ask(gateway, "GET", "/v1/sessions", identity)
    assert [each["session_id"] for each in listed["sessions"]] == [session["session_id"]]
    assert await asyncio.to_thread(gateway.stop) == 0
    code, logs = await asyncio.to_thread(report_of, gateway)
    assert (code, unsealed(logs), len(logs)) == (0, set(), 6)
    assert [event["reason"] for event in gateway.events("session.closed")] == ["shutdown"]
    assert {event["outcome"] for event in gateway.events("call.end")} == {"complete"}


async def test_a_broken_policy_changes_nothing(provider: Provider, start_gateway: Start) -> None:
    """A reload that cannot be served is named in the log, and the processes stay as they are."""
    gateway = await begin(start_gateway, provider)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    before = gateway.children()
    policy = gateway.folder / "policies" / "test.yaml"
    policy.write_text("rules: [{id: x, effect: perhaps}]\n")
    gateway.reload()
    await asyncio.to_thread(gateway.wait_for_log, "reload.refused")
    assert "test.yaml:1:" in gateway.log.read_text()
    assert gateway.children() == before
    assert (await call(gateway, session["token"])).status == 200
    # What needs a restart is named, and the rest takes effect.
    policy.write_text(DENY_ALL)
    path = gateway.folder / "config.yaml"
    path.write_text(json.dumps({**json.loads(path.read_text()), "workers": 3, "name": "other"}))
    gateway.reload()
    await asyncio.to_thread(gateway.wait_for_log, "reload.done")
    assert '"fields": ["name", "workers"]' in gateway.log.read_text()
    assert (await call(gateway, session["token"])).status == 403
    assert await asyncio.to_thread(gateway.stop) == 0
    await asyncio.to_thread(gateway.verify_log)


async def test_every_worker_serves_and_forgets(provider: Provider, start_gateway: Start) -> None:
    """With four workers a session opened once is served by all, and closed on all."""
    gateway = await begin(start_gateway, provider, workers=4)
    identity = await asyncio.to_thread(gateway.identity)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    token, path = str(session["token"]), f"/v1/sessions/{session['session_id']}"

    async def all_have_served() -> bool:
        assert (await call(gateway, token)).status == 200
        return len({event["origin"] for event in gateway.events("call.start")}) == 4

    await until(all_have_served)
    assert (await ask(gateway, "DELETE", path, identity))[0] == 200

    async def all_have_refused() -> bool:
        assert (await call(gateway, token)).status == 401
        return len({event["origin"] for event in gateway.events("call.denied")}) == 4

    await until(all_have_refused)
    assert await asyncio.to_thread(gateway.stop) == 0
    await asyncio.to_thread(gateway.verify_log)


CHANGED_SINCE_THE_CHECK = (
    "-c",
    "import sys; from gateway import setup; setup._file_faults = lambda draft: (); "
    "from gateway.cli import main; sys.argv[0] = 'veklom'; main()",
)
"""A gateway that looked at its files before the test spoilt them."""


@pytest.mark.parametrize("fault", ["configuration", "time and again"])
async def test_what_cannot_start_is_given_up(
    provider: Provider, start_gateway: Start, tmp_path: Path, fault: str
) -> None:
    """A process that cannot be started, for its configuration or at the fifth try, ends all."""

    def spoil(gateway: Gateway) -> dict[str, Any]:
        if fault == "configuration":
            certificate = {"certificate": str(tmp_path / "missing.pem")}
            ports = {"proxy": gateway.proxy, "sessions": gateway.sessions, "admin": gateway.admin}
            listeners = {name: {"address": f"127.0.0.1:{port}"} for name, port in ports.items()}
            return {"listeners": {**listeners, "proxy": {**listeners["proxy"], **certificate}}}
        (gateway.folder / "state").mkdir()
        (gateway.folder / "state" / "fingerprint.key").write_text("no key")
        return {}

    with pytest.raises(AssertionError, match="did not start") as failed:
        await begin(start_gateway, provider, extra_from=spoil, program=CHANGED_SINCE_THE_CHECK)
    log = str(failed.value)
    assert '"exit_code": 78' in log if fault == "configuration" else log.count("process.died") == 5
    assert "gateway.given_up" in log
