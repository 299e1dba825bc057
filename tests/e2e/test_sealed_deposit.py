"""The README's client seals a deposit to a real gateway, and whoever listens in front learns nothing."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature

from keys.signing import Signer
from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider
from tests.simulators.wire import exchange, parse, request

README = Path(__file__).resolve().parents[2] / "README.md"


def readme_client() -> str:
    """Return the example under its heading."""
    section = README.read_text().partition("## Seal a deposit")[2]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block[1]


def run_client(gateway: Gateway, **changed: str) -> dict[str, Any]:
    """Run the example; return the names it left."""
    names: dict[str, Any] = {
        "sessions_url": f"http://127.0.0.1:{gateway.sessions}",
        "deployment": "test",
        "vkey": (gateway.folder / "audit" / "vkey").read_text().strip(),
        "identity": gateway.identity(),
        "keys": {"openai": KEY},
        **changed,
    }
    exec(compile(readme_client(), str(README), "exec"), names)  # noqa: S102 - our own README
    return names


async def test_the_client_of_the_readme(gateway: Gateway, provider: Provider) -> None:
    """What it deposits works as a key, the record says that it was sealed, and no body held it."""
    names = await asyncio.to_thread(run_client, gateway)
    assert KEY.encode() not in names["request"].data
    answer = parse(await exchange(gateway.proxy, request(names["session_token"])))
    assert answer.status == 200
    assert provider.received[0].values(b"authorization") == [b"Bearer " + KEY.encode()]
    assert [event["deposit"] for event in gateway.events("session.opened")] == ["hpke"]


async def test_the_client_refuses_other_keys(gateway: Gateway) -> None:
    """Keys that the pinned key did not sign, or that are another deployment's, are not sealed to."""
    stranger = Signer("test", bytes(32)).vkey
    with pytest.raises(InvalidSignature):
        await asyncio.to_thread(run_client, gateway, vkey=stranger)
    with pytest.raises(SystemExit):
        await asyncio.to_thread(run_client, gateway, deployment="other")
    assert gateway.events("session.opened") == []
