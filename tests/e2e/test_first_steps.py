"""The first steps of an operator and of an application, taken as the README has them."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli import main
from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import exchange, parse

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "created": 0,
    "model": "gpt-5-mini",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "One that is on record."},
        }
    ],
}


def block(language: str, words: str) -> str:
    """Return the README's block in a language that holds some words."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = (each for each in blocks if words in each)
    return str(found)


def at(gateway: Gateway, text: str) -> str:
    """Return the README's text with this gateway's addresses, program and key for its own."""
    return (
        text.replace("127.0.0.1:8080", f"127.0.0.1:{gateway.proxy}")
        .replace("127.0.0.1:8081", f"127.0.0.1:{gateway.sessions}")
        .replace("127.0.0.1:8082", f"127.0.0.1:{gateway.admin}")
        .replace("veklom token dev", f"veklom token dev --sessions {sessions_url(gateway)}")
        .replace(".venv/bin/veklom", f"{sys.executable} -m gateway")
        .replace("sk-...", KEY)
    )


def sessions_url(gateway: Gateway) -> str:
    """Return where sessions are opened."""
    return f"http://127.0.0.1:{gateway.sessions}"


async def shell(script: str, **environment: str) -> str:
    """Run a script as a person would type it; return what it prints."""
    done = await asyncio.to_thread(
        subprocess.run,
        ["sh", "-ec", script],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


async def test_the_readmes_session_and_call(gateway: Gateway, provider: Provider) -> None:
    """Its curl opens a session with a development identity, and its Python calls with the token."""
    session = json.loads(
        await shell(at(gateway, block("sh", "token dev --subject alice --tenant acme)")))
    )

    async def answer(it: Exchange) -> None:
        await it.reply(json.dumps(COMPLETION).encode())

    provider.script = answer
    program = f"import os\nsession_token = os.environ['TOKEN']\n{block('python', 'openai.OpenAI')}"
    program += "print(answer.choices[0].message.content)"
    call = f'{sys.executable} -c "$PROGRAM"'
    told = await shell(call, PROGRAM=at(gateway, program), TOKEN=session["token"])
    assert told == "One that is on record.\n"
    (received,) = provider.received
    assert received.values(b"authorization") == [b"Bearer " + KEY.encode()]


async def test_the_readmes_rotation_and_kill(gateway: Gateway) -> None:
    """Its curl replaces the session's key; its others stop a tenant, list that, and lift it."""
    identity = await asyncio.to_thread(gateway.identity)
    session = await asyncio.to_thread(
        gateway.post, "/v1/sessions", {"keys": {"openai": KEY}}, identity
    )
    rotated = await shell(
        at(gateway, block("sh", "/rotate")),
        SESSION_ID=session["session_id"], IDENTITY=identity, SESSION_TOKEN=session["token"],
    )  # fmt: skip
    assert json.loads(rotated)["session_id"] == session["session_id"]
    script = at(gateway, block("sh", "/admin/v1/kill"))
    begin, _, lift = script.partition("curl -s -X DELETE")
    placed, listed = map(
        json.loads, (await shell(begin.replace("\ncurl", "\necho; curl"))).split("\n")[1:]
    )
    assert listed["kills"] == [{name: placed[name] for name in listed["kills"][0]}]
    assert placed["closed_sessions"] == 1
    operator = begin.partition("\n")[0] + "\n"
    lifted = json.loads(
        await shell(operator + "curl -s -X DELETE" + lift, KILL_ID=placed["kill_id"])
    )
    assert lifted["kill_id"] == placed["kill_id"]


async def test_the_readmes_operation(gateway: Gateway) -> None:
    """Its `check` passes on what is shipped, its `token dev` prints a token, its log verifies."""
    lines = block("sh", "veklom serve").splitlines()
    program = f"{sys.executable} -m gateway"
    said = {}
    for line in lines:
        command = line.partition("#")[0].strip().replace(".venv/bin/veklom", program)
        if " token dev " in command:
            said["token"] = await shell(f"{command} --sessions {sessions_url(gateway)}")
        elif " check " in command:
            said["check"] = await shell(command)
    await asyncio.to_thread(gateway.stop)
    (verify,) = (line for line in lines if " audit verify " in line)
    verify = verify.replace(".venv/bin/veklom", program)
    said["verify"] = await shell(f"cd {gateway.folder}; PYTHONPATH={ROOT} {verify}")
    assert re.fullmatch(r"eyJ[\w-]+\.[\w-]+\.[\w-]+\n", said["token"])
    assert "policy sha256:" in said["check"]
    assert "verified" in said["verify"].lower()


async def test_a_development_token_says_what_was_asked(gateway: Gateway) -> None:
    """`veklom token dev` names subject, tenant and roles, and the session it opens is that caller's."""
    command = f"{sys.executable} -m gateway token dev --sessions {sessions_url(gateway)}"
    identity = (await shell(f"{command} --subject carol --tenant acme --role admin")).strip()
    await asyncio.to_thread(gateway.post, "/v1/sessions", {"keys": {"openai": KEY}}, identity)
    (opened,) = gateway.events("session.opened")
    assert (opened["subject"], opened["tenant"]) == ("carol", "acme")


@pytest.mark.parametrize("command", ["check", "serve"])
def test_the_environment_names_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """`VEKLOM_CONFIG` is used where no --config is given, and config.yaml here where neither is."""
    elsewhere, here, named = (tmp_path / name for name in ("other.yaml", "config.yaml", "n.yaml"))
    for path in (elsewhere, here, named):
        path.write_text("workers: 0\n")
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str, environment: Mapping[str, str | None]) -> str:
        result = CliRunner().invoke(main, [command, *arguments], env=environment)
        assert result.exit_code == 1
        return result.stderr.partition(":")[0]

    variable = {"VEKLOM_CONFIG": str(elsewhere)}
    assert said(environment=variable) == str(elsewhere)
    assert said("--config", str(named), environment=variable) == str(named)
    assert said(environment={"VEKLOM_CONFIG": None}) == "config.yaml"


async def test_what_is_fixed_is_said_without_a_token(gateway: Gateway) -> None:
    """Both ports say that they live; the proxy port says where sessions are opened, and no more."""

    async def ask(port: int, path: bytes) -> tuple[int, bytes]:
        raw = b"GET %b HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n" % path
        seen = parse(await exchange(port, raw))
        return seen.status, seen.body

    assert await ask(gateway.proxy, b"/livez") == (200, b"ok\n")
    assert await ask(gateway.admin, b"/livez") == (200, b"ok\n")
    status, body = await ask(gateway.proxy, b"/.well-known/veklom")
    assert status == 200
    assert json.loads(body) == {"sessions": f"{sessions_url(gateway)}/v1/sessions"}
    for path in (b"/readyz", b"/metrics", b"/v1/sessions"):
        assert (await ask(gateway.proxy, path))[0] == 404
