"""Policies that change while calls are carried: taken whole or not at all, and no call fails for it."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import exchange, parse, request

Start = Callable[..., Gateway]

# Both files together are a policy; either one alone with the other's predecessor would allow "never".
ONE = """\
rules:
  - {id: models, effect: allow, match: {tenant: "*", model: [%s]}}
"""
TWO = """\
rules:
  - {id: not-never, effect: deny, match: {model: never}, message: "%s"}
"""
TEST = """\
fixtures: {call: {tenant: acme, provider: openai, model: always}}
tests:
  - {name: always, given: call, expect: allow}
  - {name: never, given: call, with: {model: never}, expect: deny}
"""


def put(folder: Path, name: str, text: str) -> None:
    """Write a file as an editor does: whole, or not at all."""
    (folder / "new").write_text(text)
    (folder / "new").rename(folder / name)


def policy(gateway: Gateway, generation: int, *, is_good: bool = True) -> None:
    """Write a generation of the policy: the model of its number is allowed; or a broken one."""
    folder = gateway.folder / "policies"
    models = f"always, m{generation}" if is_good else "always"
    put(folder, "test.yaml", ONE % models)
    put(folder, "two.yaml", TWO % generation if is_good else TWO.replace("deny", "alow"))


def body(model: str) -> bytes:
    """Return a chat call for a model."""
    return json.dumps({"model": model, "messages": []}).encode()


async def ask(gateway: Gateway, token: str, model: str) -> int:
    """Return the status of a call for a model."""
    return parse(await exchange(gateway.proxy, request(token, body(model)))).status


async def read_whole(port: int, call: bytes) -> bytes:
    """Return all of an answer, however long it takes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(call)
    whole = await reader.read(-1)
    writer.close()
    return whole


async def until(reached: Callable[[], Any]) -> None:
    """Return when something has come true; an operator would look as often."""
    async with asyncio.timeout(30):
        while not reached():  # noqa: ASYNC110 - it comes true in another process
            await asyncio.sleep(0.02)  # polling a process, not synchronising a test


@pytest.fixture
def gateway(provider: Provider, start_gateway: Start) -> Gateway:
    """A gateway that looks at its policies often."""
    return start_gateway(
        {"openai": {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}},
        policy=ONE % "always, m0",
        extra_from=lambda it: {"policies": {"path": str(it.folder / "policies"), "watch": "20ms"}},
    )


async def test_changes_take_effect_in_the_running_processes(
    gateway: Gateway, provider: Provider
) -> None:
    """A new policy decides the next call; a broken or failing one changes nothing, loudly."""
    token = gateway.open_session({"openai": KEY})["token"]
    processes = gateway.children()
    assert await ask(gateway, token, "m1") == 403
    (gateway.folder / "policies" / "more_test.yaml").write_text(TEST)
    policy(gateway, 1)
    await until(lambda: len(gateway.events("policy.loaded")) >= 3)  # control's first, then both
    assert await ask(gateway, token, "m1") == 200
    assert await ask(gateway, token, "never") == 403
    policy(gateway, 2, is_good=False)
    await asyncio.to_thread(gateway.wait_for_log, "policies.refused")
    assert await ask(gateway, token, "m1") == 200
    await until(lambda: "veklom_policies_refused 1.0" in gateway.metrics())
    put(gateway.folder / "policies", "two.yaml", "rules: []")
    put(gateway.folder / "policies", "test.yaml", ONE % "always, never")
    await asyncio.to_thread(gateway.wait_for_log, "policies.refused", 2)
    assert await ask(gateway, token, "never") == 403
    refused = gateway.events("policy.refused")
    assert "did you mean 'allow'" in json.dumps(refused[0]["faults"])
    assert "test 'never' failed: expected deny, got allow" in json.dumps(refused[-1]["faults"])
    policy(gateway, 3)
    await until(lambda: "veklom_policies_refused 0.0" in gateway.metrics())
    assert await ask(gateway, token, "m3") == 200
    assert gateway.children() == processes


async def test_who_is_started_later_decides_by_the_policies_of_now(gateway: Gateway) -> None:
    """A worker that dies is started again with what was put in force, not with what once was."""
    token = gateway.open_session({"openai": KEY})["token"]
    gateway.verifies_log = False  # a killed worker's last events are not signed
    policy(gateway, 1)
    await until(lambda: len(gateway.events("policy.loaded")) >= 3)
    (worker,) = gateway.pids("worker")
    os.kill(worker, 9)
    await until(lambda: gateway.pids("worker") not in ([], [worker]))
    await asyncio.to_thread(gateway.wait_until_ready)
    assert await ask(gateway, token, "m1") == 200


@pytest.mark.timeout(180)
async def test_two_hundred_reloads_under_load(gateway: Gateway, provider: Provider) -> None:
    """Good and bad ones, with streams that live through all of them: no call fails for a reload."""
    token = gateway.open_session({"openai": KEY})["token"]
    released = asyncio.Event()

    async def answer(it: Exchange) -> None:
        if b'"stream":true' not in it.request.body:
            await it.reply(b'{"choices":[]}')
            return
        await it.begin_stream(b"text/event-stream")
        await it.chunk(b"data: 1\n\n")
        await released.wait()
        await it.chunk(b"data: [DONE]\n\n")
        await it.chunk(b"")

    provider.script = answer
    streaming = (
        b'{"model":"m0","stream":true,"stream_options":{"include_usage":true},"messages":[]}'
    )
    streams = [
        asyncio.create_task(read_whole(gateway.proxy, request(token, streaming))) for _ in range(3)
    ]
    await until(lambda: len(provider.received) == 3)
    statuses: dict[str, set[int]] = {"always": set(), "never": set()}
    is_over = asyncio.Event()

    async def keep_calling(model: str) -> None:
        while not is_over.is_set():
            statuses[model].add(await ask(gateway, token, model))

    async with asyncio.TaskGroup() as group:
        for model in statuses:
            group.create_task(keep_calling(model))
        good = bad = 0
        for generation in range(1, 201):
            is_good = generation % 4 != 0
            policy(gateway, generation, is_good=is_good)
            good, bad = good + is_good, bad + (not is_good)
            event, count = ("policies.loaded", good) if is_good else ("policies.refused", bad)
            await asyncio.to_thread(gateway.wait_for_log, event, count)
        is_over.set()
    assert statuses == {"always": {200}, "never": {403}}
    released.set()
    for stream in streams:
        answered = parse(await stream)
        assert answered.status == 200
        assert answered.body.endswith(b"data: [DONE]\n\n")
    assert await ask(gateway, token, "m199") == 200
    assert await ask(gateway, token, "m200") == 403
