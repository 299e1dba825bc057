"""`make demo`: what a person who tries the product sees first."""

import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from gateway.demo.simulator import Simulator
from gateway.identity.slots import CREDENTIAL_SLOTS
from tests.simulators.wire import exchange, parse

pytestmark = pytest.mark.timeout(120)


def test_the_demo_tells_the_whole_story(tmp_path: Path) -> None:
    """About twenty lines: a call that passes, one that does not, a verified log; and no key in them."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "demo"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) <= 22
    for words in (
        "her own key 1 time, and no other credential",
        "PermissionDeniedError",
        "1 call allowed, 1 denied",
        "VERIFIED",
        "in none of its files: true",
    ):
        assert words in done.stdout, words
    assert "sk-" not in done.stdout + done.stderr
    assert not re.search(r"eyJ[\w-]{10}", done.stdout + done.stderr), "a token"
    assert not list(tmp_path.iterdir()), "the demo leaves nothing behind"


def test_make_demo_is_the_demo() -> None:
    """The README's command sets the environment up and runs `veklom demo`, with nothing between."""
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    assert "\ndemo: $(VENV)/demo.ok\n\t$(BIN)/veklom demo\n" in makefile


@pytest.fixture
async def simulator() -> AsyncIterator[tuple[Simulator, int]]:
    """The demo's provider, and its port."""
    running = Simulator("sk-right")
    port = urlsplit(await running.start()).port
    assert port
    yield running, port
    await running.stop()


SEEN = [
    *[
        (f"{slot.decode()}: x\r\n", "", slot.decode())
        for slot in CREDENTIAL_SLOTS - {b"authorization"}
    ],
    ("X-Veklom-Anything: x\r\n", "", "x-veklom-anything"),
    ("Authorization: Bearer sk-right\r\n", "", "authorization"),
    ("", "?key=x", "key"),
    ("", "", ""),
]


@pytest.mark.parametrize(("field", "query", "seen"), sorted(SEEN))
async def test_the_demos_provider_sees_every_credential(
    simulator: tuple[Simulator, int], field: str, query: str, seen: str
) -> None:
    """It would tell if a credential came anywhere but once in its own place."""
    provider, port = simulator
    raw = (
        f"POST /v1/chat/completions{query} HTTP/1.1\r\nHost: p\r\nConnection: close\r\n"
        f"Authorization: Bearer sk-right\r\n{field}Content-Length: 13\r\n\r\n"
        '{"model":"m"}'
    )
    assert parse(await exchange(port, raw.encode())).status == 200
    assert (provider.accepted, provider.foreign) == (1, {seen} - {""})
