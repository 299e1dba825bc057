"""Fixtures that every test may use."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog
from hypothesis import HealthCheck, settings

from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider

# Time proves nothing on a machine that others load, too.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--long`: the crash suite runs thousands of times."""
    parser.addoption("--long", action="store_true", help="run the crash suite thousands of times")


KEY = "sk-planted-5f1d7c0e9b8a4f6d-key-of-the-customer"


@pytest.fixture(autouse=True)
def forgotten_logs() -> Iterator[None]:
    """Set up logs for one test only: the next one has another standard error."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest_asyncio.fixture
async def provider() -> AsyncIterator[Provider]:
    """A provider double that records raw requests."""
    async with Provider() as listening:
        yield listening


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Start gateways that stop, and whose logs must verify, when the test ends."""
    running: list[Gateway] = []
    numbers = itertools.count()

    def start(providers: Mapping[str, Mapping[str, Any]], **options: Any) -> Gateway:
        gateway = Gateway(tmp_path / f"gateway-{next(numbers)}", providers, **options)
        gateway.__enter__()
        running.append(gateway)
        return gateway

    yield start
    for gateway in running:
        gateway.__exit__()


@pytest_asyncio.fixture
async def gateway(provider: Provider, start_gateway: Callable[..., Gateway]) -> Gateway:
    """A gateway in front of the provider double, as `openai`, `anthropic` and `gemini`."""
    root = f"http://127.0.0.1:{provider.port}"
    providers = {
        "openai": {"base_url": f"{root}/v1", "plain_http": True},
        "anthropic": {"base_url": root, "plain_http": True},
        "gemini": {"base_url": root, "plain_http": True},
    }
    return await asyncio.to_thread(start_gateway, providers)


@pytest_asyncio.fixture
async def token(gateway: Gateway) -> str:
    """The token of a session that holds a key for every provider."""
    keys = dict.fromkeys(("openai", "anthropic", "gemini"), KEY)
    session = await asyncio.to_thread(gateway.open_session, keys)
    return str(session["token"])
