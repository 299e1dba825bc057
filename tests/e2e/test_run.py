"""`veklom run`: a program calls with a session token where it had keys, and the session ends with it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider

ROOT = Path(__file__).resolve().parents[2]
CALL = """
import json, os, sys, urllib.request
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions", b'{"model":"m"}',
    {"content-type": "application/json", "authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
)
print(urllib.request.urlopen(request).status)
sys.exit(7)
"""
SLEEPER = """
import signal, sys, time
for number in (1, 10, 15):
    signal.signal(number, lambda number, _: sys.exit(40 + number))
print("ready")
time.sleep(60)
"""


def command(gateway: Gateway, *arguments: str, program: tuple[str, ...]) -> list[str]:
    """Return the command line of a run."""
    sessions = f"http://127.0.0.1:{gateway.sessions}"
    veklom = [sys.executable, "-m", "gateway", "run", "--sessions", sessions, *arguments]
    return [*veklom, "--", *program]


async def run(
    gateway: Gateway, *arguments: str, program: tuple[str, ...], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program wrapped, as a person would type it."""
    return await asyncio.to_thread(
        subprocess.run,
        command(gateway, *arguments, program=program),
        cwd=ROOT, env={**os.environ, "OPENAI_API_KEY": KEY, **environment},
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip


async def test_a_program_calls_without_a_key(
    gateway: Gateway, provider: Provider, tmp_path: Path
) -> None:
    """The provider gets the key, which the program never had; the session ends with its exit."""
    receipt = tmp_path / "receipt.json"
    done = await run(gateway, "--dev", "--json", str(receipt), program=(sys.executable, "-c", CALL))
    assert (done.returncode, done.stdout) == (7, "200\n"), done.stderr
    (received,) = provider.received
    assert received.values(b"authorization") == [b"Bearer " + KEY.encode()]
    said = json.loads(receipt.read_text())
    (closed,) = gateway.events("session.closed")
    assert (said["session_id"], closed["reason"]) == (closed["session"], "closed")
    assert said["session_id"] in done.stderr


async def test_no_key_is_in_the_programs_environment(gateway: Gateway) -> None:
    """Not under its name, nor under another; what else was set is as it was."""
    done = await run(
        gateway,
        "--dev",
        "--provider",
        "openai",
        program=("env",),
        COPY=f"key={KEY}",
        ANTHROPIC_AUTH_TOKEN="sk-ant-other",
        MINE="x y",
    )
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert KEY not in done.stdout
    assert "ANTHROPIC_AUTH_TOKEN" not in seen
    assert seen["MINE"] == "x y"
    assert seen["OPENAI_BASE_URL"] == gateway.url("openai") + "/v1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
async def test_signals_reach_the_program(gateway: Gateway, number: signal.Signals) -> None:
    """It is told, decides, and its session is closed after it."""
    program = (sys.executable, "-uc", SLEEPER)
    process = await asyncio.create_subprocess_exec(
        *command(gateway, "--dev", program=program),
        cwd=ROOT, env={**os.environ, "OPENAI_API_KEY": KEY}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert await asyncio.wait_for(process.wait(), 20) == 40 + number
    assert len(gateway.events("session.closed")) == 1


async def test_a_programs_death_by_signal_is_told_as_a_shell_tells_it(gateway: Gateway) -> None:
    """128 and the signal's number."""
    done = await run(gateway, "--dev", program=("sh", "-c", "kill -KILL $$"))
    assert done.returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "program", "environment", "status", "said"),
    [
        (("--dev",), ("no-such-program",), {}, 127, "closed"),
        (("--dev",), ("/",), {}, 126, "closed"),
        ((), ("env",), {}, 125, "say who you are"),
        (("--dev", "--token-command", "true"), ("env",), {}, 125, "say who you are"),
        (("--token-command", "false"), ("env",), {}, 125, "printed no token"),
        (("--token-command", "echo eyJ.x.y"), ("env",), {}, 125, "the gateway refuses"),
        (("--dev",), ("env",), {"OPENAI_API_KEY": ""}, 125, "no provider key is set"),
        (
            ("--dev", "--provider", "openai"),
            ("env",),
            {"OPENAI_API_KEY": ""},
            125,
            "no key for openai",
        ),
        (("--dev", "--provider", "mine"), ("env",), {}, 125, "--provider mine=KEY_VARIABLE"),
        (("--dev", "--provider", "mine=OPENAI_API_KEY,X"), ("env",), {}, 125, "unknown_provider"),
        (("--dev", "--ttl", "0"), ("env",), {}, 125, "ttl_seconds"),
    ],
)
async def test_what_goes_wrong_is_said(
    gateway: Gateway,
    arguments: tuple[str, ...],
    program: tuple[str, ...],
    environment: dict[str, Any],
    status: int,
    said: str,
) -> None:
    """In one sentence on standard error, without the key, and nothing is run without a session."""
    done = await run(gateway, *arguments, program=program, **environment)
    assert (done.returncode, said in done.stderr, done.stdout) == (status, True, ""), done.stderr
    assert KEY not in done.stderr
    assert done.stderr.count("\n") == 1
