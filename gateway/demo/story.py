"""What `veklom demo` shows: one call that passes, one that does not, and the evidence of both."""

import asyncio
import json
import secrets
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from gateway.demo.simulator import Simulator

_POLICY = """\
rules:
  - id: small-models
    effect: allow
    match: {tenant: acme, provider: openai, model: "*-mini"}
"""

START_SECONDS = 20.0
"""How long the gateway may take to say that it has started."""


def run() -> int:
    """Tell the story; return 0 if every part of it came true."""
    try:
        import openai as _  # noqa: F401, PLC0415 - an extra, and only the demo needs it
    except ImportError:
        click.echo("The demo calls through the official SDK: pip install 'veklom-gateway[demo]'")
        return 1
    with tempfile.TemporaryDirectory(prefix="veklom-demo-") as folder:
        return asyncio.run(_tell(Path(folder)))


async def _tell(folder: Path) -> int:
    key = f"sk-demo-{secrets.token_hex(16)}"
    simulator = Simulator(key)
    config = _write_config(folder, await simulator.start())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--dev", "--config", str(config),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        where = await _started(process)
        click.echo("1. A gateway runs: a supervisor, a control process and one worker.")
        click.echo(f"   applications {where['proxy']}   sessions {where['sessions']}")
        ok = await _calls(where, key, simulator)
    finally:
        process.send_signal(signal.SIGTERM)
        await process.communicate()
        await simulator.stop()
    return 0 if await asyncio.to_thread(_evidence, folder / "audit", key) and ok else 1


def _write_config(folder: Path, upstream: str) -> Path:
    (folder / "policies").mkdir()
    (folder / "policies" / "demo.yaml").write_text(_POLICY)
    listen = {"address": "127.0.0.1:0"}
    config = {
        "name": "demo",
        "state_dir": "state",
        "listeners": {"proxy": listen, "sessions": listen, "admin": listen},
        "providers": {"openai": {"base_url": upstream, "plain_http": True}},
        "policies": {"path": "policies"},
        "audit": {"directory": "audit"},
        "limits": {"connections": 64, "upstream_connections": 64},  # runs wherever it is shown
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML 1.2
    return path


async def _started(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stderr is not None  # noqa: S101 - asked for above
    async with asyncio.timeout(START_SECONDS):
        while line := await process.stderr.readline():
            event = json.loads(line)
            if event.get("event") == "gateway.started":
                return dict(event)
    raise click.ClickException("the gateway did not start")


async def _post(url: str, body: Mapping[str, object], token: str = "") -> dict[str, Any]:
    import aiohttp  # noqa: PLC0415 - only the demo speaks HTTP as a client here

    headers = {"authorization": f"Bearer {token}"} if token else {}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=body, headers=headers) as response,
    ):
        return dict(await response.json())


async def _calls(where: Mapping[str, str], key: str, simulator: Simulator) -> bool:
    import openai  # noqa: PLC0415 - an extra

    asked = {"subject": "alice", "tenant": "acme", "roles": ["engineer"]}
    identity = str((await _post(f"{where['sessions']}/dev/token", asked))["token"])
    click.echo("2. alice of acme has an identity token; a development issuer stands in for yours.")
    session = await _post(f"{where['sessions']}/v1/sessions", {"keys": {"openai": key}}, identity)
    base_url = session["providers"]["openai"]["base_url"]
    click.echo(
        "3. She opens a session with her provider key. The gateway seals it and keeps no way"
    )
    click.echo("   to open it: the other half is in the session token that she gets.")
    client = openai.AsyncOpenAI(base_url=base_url, api_key=session["token"], max_retries=0)
    click.echo(f"4. Her program changes its base URL to {base_url}")
    click.echo("   and streams a call through the official openai SDK:")
    message: Any = [{"role": "user", "content": "What is a governed call?"}]
    stream: Any = await client.chat.completions.create(
        model="gpt-5-mini", messages=message, stream=True
    )
    text = ""
    async for part in stream:
        text += part.choices[0].delta.content or "" if part.choices else ""
    click.echo(f"   > {text}")
    others = ", ".join(sorted(simulator.foreign)) or "no other credential"
    click.echo(f"   The provider got her own key {simulator.accepted} time, and {others}.")
    denied = False
    try:
        await client.chat.completions.create(model="gpt-5", messages=message)
    except openai.PermissionDeniedError as error:
        denied = True
        click.echo("5. A model that the policy does not name is refused; her SDK raises")
        click.echo(f"   PermissionDeniedError: {error.message[:84]}…")
    await client.close()
    return denied and simulator.accepted == 1 and not simulator.foreign and bool(text)


def _evidence(audit: Path, key: str) -> bool:
    from gateway.audit.verify import ExitCode, verify_path  # noqa: PLC0415 - told last

    report = verify_path(audit)
    clean = not any(
        key.encode() in file.read_bytes() for file in audit.rglob("*") if file.is_file()
    )
    started, denied = (
        sum(getattr(log, name) for log in report.logs) for name in ("started", "denied")
    )
    events = sum(log.events for log in report.logs)
    click.echo(f"6. The audit log holds {events} events: {started} call allowed, {denied} denied.")
    click.echo(f"   veklom audit verify: {report.exit_code.name}, signed by {report.key[:28]}…")
    click.echo(f"   The key is in none of its files: {'true' if clean else 'FALSE'}.")
    return report.exit_code is ExitCode.VERIFIED and clean
