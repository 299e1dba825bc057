"""The governed path over real sockets: what the provider gets, what the caller gets, what is written."""

import asyncio
import hashlib
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import exchange, parse, request


async def test_the_provider_gets_the_key_and_no_other_credential(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """Exactly one credential goes upstream, the session's; nothing of ours or of the caller's does."""
    extra = (
        b"content-type: application/json\r\nCookie: a=b\r\nX-Api-Key: %b\r\nX-Veklom-Session: %b\r\n"
        b"X-Forwarded-For: 1.2.3.4\r\nConnection: close, X-Stainless-Lang\r\nX-Stainless-Lang: python\r\n"
        b"X-Stainless-OS: Linux\r\nOpenAI-Organization: org\r\nTE: trailers\r\n"
    ) % (token.encode(), token.encode())
    answer = parse(await exchange(gateway.proxy, request(token, headers=extra, closes=False)))
    assert answer.status == 200
    (seen,) = provider.received
    names = {name.lower() for name, _ in seen.headers}
    assert names == {
        b"host", b"content-type", b"content-length", b"authorization", b"accept-encoding",
        b"x-stainless-os", b"openai-organization",
    }  # fmt: skip
    assert seen.values(b"authorization") == [b"Bearer " + KEY.encode()]


@pytest.mark.parametrize(
    ("path", "slot", "value"),
    [
        (b"/anthropic/v1/messages", b"x-api-key", KEY.encode()),
        (b"/anthropic/messages", b"x-api-key", KEY.encode()),
        (b"/gemini/v1beta/models/gemini-3:generateContent", b"x-goog-api-key", KEY.encode()),
    ],
)
async def test_each_dialect_has_its_own_credential_slot(
    gateway: Gateway, provider: Provider, token: str, path: bytes, slot: bytes, value: bytes
) -> None:
    """Anthropic and Gemini get the key where their API expects it, and the caller's Bearer is gone."""
    body = b'{"model":"gemini-3","max_tokens":5,"messages":[],"contents":[]}'
    assert parse(await exchange(gateway.proxy, request(token, body, path=path))).status == 200
    (seen,) = provider.received
    assert seen.values(slot) == [value]
    assert seen.values(b"authorization") == []


async def test_bodies_are_identical_both_ways(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """A thousand random bodies in random chunkings arrive bit for bit, in both directions."""
    replies: list[bytes] = []

    async def echo_something_else(it: Exchange) -> None:
        reply = secrets.token_bytes(secrets.randbelow(20_000))
        replies.append(reply)
        if secrets.randbelow(2):
            await it.reply(reply, content_type=b"application/octet-stream")
            return
        await it.begin_stream(b"application/octet-stream")
        while reply:
            size = 1 + secrets.randbelow(len(reply))
            await it.chunk(reply[:size])
            reply = reply[size:]
        await it.chunk(b"")

    provider.script = echo_something_else
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    sent: list[bytes] = []
    got: list[bytes] = []
    for _ in range(1000):
        text = secrets.token_hex(secrets.randbelow(5_000))
        body = json.dumps({"model": "gpt-5-mini", "x": text}).encode()
        sent.append(body)
        head = (
            b"POST /openai/v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer " + token.encode() + b"\r\n"
        )
        if secrets.randbelow(2):
            writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body))
            cut = secrets.randbelow(len(body))
            writer.write(body[:cut])
            await writer.drain()
            writer.write(body[cut:])
        else:
            writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n")
            rest = body
            while rest:
                size = 1 + secrets.randbelow(len(rest))
                writer.write(b"%x\r\n%b\r\n" % (size, rest[:size]))
                rest = rest[size:]
            writer.write(b"0\r\n\r\n")
        raw = await reader.readuntil(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in raw:
            whole = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                whole += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        else:
            length = int(raw.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            whole = await reader.readexactly(length)
        got.append(whole)
    writer.close()

    def digest(bodies: list[bytes]) -> str:
        return hashlib.sha256(b"\0".join(bodies)).hexdigest()

    assert digest([each.body for each in provider.received]) == digest(sent)
    assert digest(got) == digest(replies)


async def test_a_caller_that_leaves_cancels_upstream(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """When the caller hangs up in a stream, the provider's connection ends, and the record says why."""
    left = asyncio.Event()

    async def endless(it: Exchange) -> None:
        await it.begin_stream()
        await it.chunk(b'data: {"choices":[]}\n\n')
        await it.wait_until_left()
        left.set()

    provider.script = endless
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    writer.write(request(token, b'{"model":"m","stream":true}', closes=False))
    await reader.readuntil(b"data: ")
    writer.close()
    async with asyncio.timeout(2):
        await left.wait()
    await asyncio.to_thread(gateway.stop)
    (end,) = gateway.events("call.end")
    assert (end["outcome"], end["fault"]) == ("client_abort", "downstream")


@pytest.mark.parametrize("framing", ["chunked", "length"])
async def test_an_upstream_that_dies_breaks_the_answer_off(
    gateway: Gateway, provider: Provider, token: str, framing: str
) -> None:
    """A provider that dies in the middle never looks like a clean end, and the record says so."""

    async def die(it: Exchange) -> None:
        if framing == "chunked":
            await it.begin_stream()
            await it.chunk(b"data: 1\n\n")
        else:
            await it.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc")
        it.writer.close()

    provider.script = die
    answer = parse(await exchange(gateway.proxy, request(token)))
    assert not answer.is_whole
    await asyncio.to_thread(gateway.stop)
    (end,) = gateway.events("call.end")
    assert (end["outcome"], end["fault"]) == ("upstream_abort", "upstream")


async def test_an_upstream_that_says_nothing_is_a_bad_gateway(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """A provider that hangs up before its answer gives a 502 in the caller's dialect."""

    async def hang_up(it: Exchange) -> None:
        it.writer.close()

    provider.script = hang_up
    answer = parse(await exchange(gateway.proxy, request(token)))
    assert answer.status == 502
    assert json.loads(answer.body)["error"]["code"] == "upstream_unreachable"


async def test_a_redirect_is_never_followed_nor_shown(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """A redirect becomes a 502: neither we nor the caller's SDK carry a credential elsewhere."""

    async def redirect(it: Exchange) -> None:
        await it.send(
            b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:1/\r\n"
            b"content-length: 0\r\n\r\n"
        )

    provider.script = redirect
    answer = parse(await exchange(gateway.proxy, request(token)))
    assert answer.status == 502
    assert answer.values(b"location") == []


async def test_upstream_errors_pass_untouched(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """Status, headers and body of a provider's error are the caller's to see."""

    async def limited(it: Exchange) -> None:
        await it.send(
            b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nx-ratelimit-limit-requests: 5\r\n"
            b"Content-Length: 4\r\nSet-Cookie: a=b\r\n\r\nslow"
        )

    provider.script = limited
    answer = parse(await exchange(gateway.proxy, request(token)))
    assert (answer.status, answer.body) == (429, b"slow")
    assert answer.values(b"retry-after") == [b"7"]
    assert answer.values(b"set-cookie") == []


async def test_closing_a_session_cuts_its_live_calls(gateway: Gateway, provider: Provider) -> None:
    """DELETE ends the stream with the dialect's error, and the token opens nothing any more."""

    async def endless(it: Exchange) -> None:
        await it.begin_stream()
        await it.chunk(b'data: {"choices":[]}\n\n')
        await it.wait_until_left()

    provider.script = endless
    identity = await asyncio.to_thread(gateway.identity)
    session = await asyncio.to_thread(
        gateway.post, "/v1/sessions", {"keys": {"openai": KEY}}, identity
    )
    token = session["token"]
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    writer.write(request(token, b'{"model":"m","stream":true}', closes=False))
    await reader.readuntil(b"data: ")
    closed = await exchange(
        gateway.sessions,
        b"DELETE /v1/sessions/%b HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer %b\r\n"
        b"Connection: close\r\n\r\n" % (session["session_id"].encode(), identity.encode()),
    )
    assert json.loads(parse(closed).body)["cut_calls"] == 1
    rest = await reader.read(-1)
    assert b"session_closed" in rest
    assert not rest.endswith(b"0\r\n\r\n")
    writer.close()
    refused = parse(await exchange(gateway.proxy, request(token)))
    assert (refused.status, json.loads(refused.body)["error"]["code"]) == (401, "session_unknown")


async def test_usage_is_asked_for_and_taken_out_again(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """The extra usage event never reaches a caller that did not ask, and the tokens are recorded."""

    async def stream(it: Exchange) -> None:
        assert json.loads(it.request.body)["stream_options"] == {"include_usage": True}
        await it.begin_stream()
        await it.chunk(b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\n')
        await it.chunk(
            b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
        )
        await it.chunk(b"data: [DONE]\n\n")
        await it.chunk(b"")

    provider.script = stream
    answer = parse(await exchange(gateway.proxy, request(token, b'{"model":"m","stream":true}')))
    assert answer.body == b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\ndata: [DONE]\n\n'
    await asyncio.to_thread(gateway.stop)
    (end,) = gateway.events("call.end")
    assert (end["usage"]["input"], end["usage"]["output"]) == (3, 4)


async def test_large_uploads_stream_through(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """A multipart upload is passed on as it comes, and its model is judged."""
    audio = secrets.token_bytes(3_000_000)
    body = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        + audio
        + b"\r\n--b--\r\n"
    )
    raw = request(
        token,
        body,
        path=b"/openai/v1/audio/transcriptions",
        headers=b"content-type: multipart/form-data; boundary=b\r\nexpect: 100-continue\r\n",
    )
    answer = parse(await exchange(gateway.proxy, raw))
    assert answer.status == 200
    assert provider.received[0].body == body
    await asyncio.to_thread(gateway.stop)
    (start,) = gateway.events("call.start")
    assert start["model"] == "whisper-1"


FILE_FIRST = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n\r\n%b\r\n'
MODEL_NEXT = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n'
TRANSCRIPTIONS = b"/openai/v1/audio/transcriptions"
FORM = b"content-type: multipart/form-data; boundary=b\r\n"


async def test_an_upload_whose_file_comes_before_its_model(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """An upload is held until its model is known, in whatever pieces it comes, and then judged."""
    file = secrets.token_bytes(2**20)
    body = FILE_FIRST % file + MODEL_NEXT % b"whisper-1" + FILE_FIRST % file + b"--b--\r\n"
    raw = request(token, body, path=TRANSCRIPTIONS, headers=FORM)
    for size in (len(raw), 4096):
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
        answer = parse(await exchange(gateway.proxy, *pieces))
        assert answer.status == 200
    assert [each.body for each in provider.received] == [body, body]
    await asyncio.to_thread(gateway.stop)
    assert [start["model"] for start in gateway.events("call.start")] == ["whisper-1"] * 2


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"buffered_body": "64KiB"}, "body_too_large"),
        ({"buffered_total": "64KiB"}, "overloaded"),
    ],
)
async def test_what_is_held_for_a_model_is_limited(
    provider: Provider,
    start_gateway: Callable[..., Gateway],
    limits: dict[str, str],
    code: str,
) -> None:
    """Where the model does not come within the limits the refusal says so, and nothing is forwarded."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(start_gateway, {"openai": upstream}, extra={"limits": limits})
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    body = FILE_FIRST % (b"x" * 300_000) + MODEL_NEXT % b"whisper-1"
    raw = request(session["token"], body, path=TRANSCRIPTIONS, headers=FORM)
    answer = parse(await exchange(gateway.proxy, raw[:200_000]))
    error = json.loads(answer.body)["error"]
    assert error["code"] == code
    assert code == "overloaded" or "`model` before the file" in error["message"]
    assert provider.received == []


async def test_an_early_model_passes_a_small_limit(
    provider: Provider, start_gateway: Callable[..., Gateway]
) -> None:
    """What is held is what comes before the model, not the upload."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(
        start_gateway, {"openai": upstream}, extra={"limits": {"buffered_body": "64KiB"}}
    )
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    body = MODEL_NEXT % b"whisper-1" + FILE_FIRST % (b"x" * 2**20) + b"--b--\r\n"
    raw = request(session["token"], body, path=TRANSCRIPTIONS, headers=FORM)
    assert parse(await exchange(gateway.proxy, raw)).status == 200


async def test_two_content_types_are_refused(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """A request whose body two readers could take for two things goes nowhere."""
    twice = b"content-type: application/json\r\nContent-Type: text/plain\r\n"
    answer = parse(await exchange(gateway.proxy, request(token, headers=twice)))
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (400, "invalid_request")
    assert provider.received == []


@pytest.mark.parametrize(
    ("target", "place"),
    [
        (b"/gemini/v1beta/models/g%2Fo:generateContent", ("error", "status")),
        (b"/gemini/../openai/v1/models", ("error", "status")),
        (b"/anthropic/v1/./messages", ("error", "type")),
        (b"/openai/v1//models", ("error", "code")),
        (b"/open%61i/v1/../models", ("code",)),
        (b"/nobody/../openai/v1/models", ("code",)),
    ],
)
async def test_an_ambiguous_target_is_refused_in_its_dialect(
    gateway: Gateway, provider: Provider, token: str, target: bytes, place: tuple[str, ...]
) -> None:
    """Where the first segment names a provider exactly, its SDK can read why the target is refused."""
    answer = parse(await exchange(gateway.proxy, request(token, path=target)))
    found = json.loads(answer.body)
    for key in place:
        found = found[key]
    expected = {"status": "INVALID_ARGUMENT", "type": "invalid_request_error"}
    assert (answer.status, found) == (400, expected.get(place[-1], "invalid_target"))
    assert provider.received == []


async def test_two_models_in_one_upload_are_refused(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """A second model further down a stream breaks the call off before the body is whole."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nallowed\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"x" * 200_000 + b"\r\n"
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nforbidden\r\n--b--\r\n'
    )
    raw = request(
        token,
        body,
        path=b"/openai/v1/audio/transcriptions",
        headers=b"content-type: multipart/form-data; boundary=b\r\n",
    )
    answer = parse(await exchange(gateway.proxy, raw))
    assert answer.status == 400
    assert not any(each.is_complete for each in provider.received)


async def test_an_unwritable_log_refuses_every_call(
    provider: Provider, start_gateway: Callable[..., Gateway]
) -> None:
    """When the log's file is taken away nothing is forwarded: 503, and readiness is off."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(start_gateway, {"openai": upstream}, verifies_log=False)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    token = session["token"]
    assert parse(await exchange(gateway.proxy, request(token))).status == 200
    (segment,) = (gateway.folder / "audit").glob("*-worker-0.1/seg/*.jsonl")
    Path(segment).unlink()
    for _ in range(3):
        answer = parse(await exchange(gateway.proxy, request(token)))
        assert answer.status == 503
        assert json.loads(answer.body)["error"]["code"] == "audit_unavailable"
    assert len(provider.received) == 1


async def test_two_workers_serve_and_close_every_session(
    provider: Provider, start_gateway: Callable[..., Gateway]
) -> None:
    """With two workers any connection serves a session, and closing it ends it on both."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(start_gateway, {"openai": upstream}, workers=2)
    identity = await asyncio.to_thread(gateway.identity)
    session = await asyncio.to_thread(
        gateway.post, "/v1/sessions", {"keys": {"openai": KEY}}, identity
    )
    token = session["token"]
    answers = [parse(await exchange(gateway.proxy, request(token))) for _ in range(24)]
    assert {answer.status for answer in answers} == {200}
    await exchange(
        gateway.sessions,
        b"DELETE /v1/sessions/%b HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer %b\r\n"
        b"Connection: close\r\n\r\n" % (session["session_id"].encode(), identity.encode()),
    )
    answers = [parse(await exchange(gateway.proxy, request(token))) for _ in range(24)]
    assert {answer.status for answer in answers} == {401}


async def test_a_name_that_leads_inside_gets_nothing(
    provider: Provider, start_gateway: Callable[..., Gateway]
) -> None:
    """A name for a private address is not dialled unless declared; the refusal is on record."""
    providers: dict[str, dict[str, Any]] = {
        "inside": {"dialect": "openai", "base_url": f"http://127.1:{provider.port}/v1"},
        "declared": {
            "dialect": "openai",
            "base_url": f"http://127.1:{provider.port}/v1",
            "private_addresses": True,
        },
        "local": {"dialect": "openai", "base_url": f"http://localhost:{provider.port}/v1"},
    }
    for each in providers.values():
        each["plain_http"] = True
    gateway = await asyncio.to_thread(start_gateway, providers)
    session = await asyncio.to_thread(gateway.open_session, dict.fromkeys(providers, KEY))
    answers = {}
    for name in providers:
        path = f"/{name}/v1/chat/completions".encode()
        answers[name] = parse(await exchange(gateway.proxy, request(session["token"], path=path)))
    assert {name: answer.status for name, answer in answers.items()} == {
        "inside": 502,
        "declared": 200,
        "local": 200,
    }
    assert b"upstream_forbidden_address" in answers["inside"].body
    assert len(provider.received) == 2
    ends = gateway.events("call.end")
    assert [(end["code"], end["status"], end["outcome"]) for end in ends if end["code"]] == [
        ("upstream_forbidden_address", 502, "upstream_error")
    ]
