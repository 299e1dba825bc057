"""The policy tutorial works: its files load, its commands run, and they print what it says they do."""

import asyncio
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli import main
from policies.known import Known
from policies.rules import load_policy_set
from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider
from tests.simulators.wire import exchange, parse, request

PAGE = (Path(__file__).resolve().parents[2] / "docs/policy-tutorial.md").read_text()
_BLOCK = re.compile(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: str) -> list[tuple[str, str, str]]:
    """Return kind, file name and text of each block of code on a page."""
    return [(found[1], found[2], found[3]) for found in _BLOCK.finditer(page)]


def test_the_rules_of_the_readme_are_rules() -> None:
    """What the first page shows of the language compiles."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    shown = [text for kind, _, text in _blocks(readme) if kind == "yaml" and "rules:" in text]
    assert shown
    for text in shown:
        assert load_policy_set([("README", text)], Known.of(["openai"])).rules


async def test_the_tutorial_works(
    provider: Provider,
    start_gateway: Callable[..., Gateway],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the denied call on, every step does what the page says, in its order."""
    blocks = _blocks(PAGE)
    first = next(text for _, name, text in blocks if name)
    gateway = await asyncio.to_thread(
        start_gateway,
        {"openai": {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}},
        policy=first,
    )
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY}, roles=["engineer"])
    refused = parse(await exchange(gateway.proxy, request(session["token"])))
    assert refused.status == 403
    (call,) = refused.values(b"x-veklom-call")
    gateway.stop()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policies").mkdir()
    (tmp_path / "audit").symlink_to(gateway.folder / "audit")
    for _, name, text in blocks:
        if name == "question.yaml":
            (tmp_path / name).write_text(text)  # the page shows it after the command that reads it
    output = ""
    commands = 0
    for kind, name, text in blocks:
        if name:
            (tmp_path / name).write_text(text)
        elif kind == "sh":
            output = ""
            for line in text.replace("$CALL", call.decode()).splitlines():
                program, *arguments = shlex.split(line)
                result = CliRunner().invoke(main, arguments)
                assert (program, result.exit_code) == ("veklom", 0), result.output
                output += result.output
                commands += 1
        else:
            assert text in output
    assert commands == 7
