"""Issuers' keys from a real server: fetched once, not too often, and from nowhere else."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import pytest
import pytest_asyncio
import trustme
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.identity import jwks as module
from gateway.identity.jwks import (
    COOLDOWN_SECONDS,
    REFRESH_SECONDS,
    STALE_SECONDS,
    JwksCache,
    JwksUnavailable,
)
from gateway.identity.tokens import MAX_JWKS_BYTES, JwksSource

OLD, NEW = (json.dumps({"keys": [], "at": at}).encode() for at in ("old", "new"))
NAME = "urn:issuer"


class SetClock:
    """A clock that stands still until it is told the time."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        """Return the time."""
        return self.at

    monotonic = now


class Server:
    """An issuer's web server: it counts requests and answers by a script."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.routes: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {}
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._server = TestServer(app)

    async def __aenter__(self) -> Self:
        """Listen on loopback."""
        await self._server.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self._server.close()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.path)
        return await self.routes[request.path](request)

    def url(self, path: str = "/keys") -> str:
        """Return the address of a path."""
        return str(self._server.make_url(path))

    def answer(self, body: bytes, path: str = "/keys", **options: Any) -> None:
        """Answer so from now on."""

        async def reply(_: web.Request) -> web.Response:
            return web.Response(body=body, **options)

        self.routes[path] = reply

    def discovery(self, path: str = "", **members: Any) -> None:
        """Serve a discovery document."""
        document = {"issuer": self.url(path).rstrip("/"), "jwks_uri": self.url(), **members}
        self.answer(json.dumps(document).encode(), path + "/.well-known/openid-configuration")


class Heard:
    """A cache, its clock, and all that it said."""

    def __init__(self, *sources: JwksSource) -> None:
        self.clock = SetClock()
        self.said: list[tuple[str, bytes | None]] = []
        self.cache = JwksCache(sources, self.clock, lambda *said: self.said.append(said))

    @property
    def last(self) -> bytes | None:
        """Return the keys it said last."""
        return self.said[-1][1]

    async def later(self, seconds: float) -> None:
        """Let time pass, and the sweep with it."""
        self.clock.at += seconds
        await self.cache.refresh_due()


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    """A web server that has the old keys."""
    async with Server() as listening:
        listening.answer(OLD)
        yield listening


Begin = Callable[..., Awaitable[Heard]]


@pytest_asyncio.fixture
async def begin() -> AsyncIterator[Begin]:
    """Start caches that are closed when the test ends."""
    begun: list[Heard] = []

    async def start(*sources: JwksSource) -> Heard:
        heard = Heard(*sources)
        begun.append(heard)
        await heard.cache.start()
        return heard

    yield start
    for heard in begun:
        await heard.cache.close()


def at(server: Server, path: str = "/keys") -> JwksSource:
    """Return the source of an issuer whose keys are on the server."""
    return JwksSource(issuer=NAME, url=server.url(path), plain_http=True)


def discovered(server: Server, path: str = "") -> JwksSource:
    """Return the source of an issuer that is its discovery document's."""
    return JwksSource(issuer=server.url(path).rstrip("/"), plain_http=True)


# --- how often ---


async def test_keys_are_there_from_the_start(server: Server, begin: Begin) -> None:
    """Every issuer is asked once before anything is served, and its keys are told."""
    heard = await begin(at(server))
    assert heard.said == [(NAME, OLD)]
    assert server.requests == ["/keys"]


async def test_many_waiters_share_one_fetch(server: Server, begin: Begin) -> None:
    """Fifty who need keys at once cause one request, and all wait for its answer."""
    heard = await begin(at(server))
    may_answer, has_come = asyncio.Event(), asyncio.Event()

    async def held(_: web.Request) -> web.Response:
        has_come.set()
        await may_answer.wait()
        return web.Response(body=NEW)

    server.routes["/keys"] = held
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(heard.cache.need(NAME)) for _ in range(50)]
        await has_come.wait()
        assert not any(task.done() for task in waiting)
        assert heard.last == OLD
        may_answer.set()
    assert all(task.result() for task in waiting)
    assert len(server.requests) == 2
    assert [said for _, said in heard.said[1:]] == [NEW] * 50


async def test_a_waiter_that_leaves_stops_nobody_else(server: Server, begin: Begin) -> None:
    """The fetch goes on for those who still wait when the one who began it is cancelled."""
    heard = await begin(at(server))
    may_answer, has_come = asyncio.Event(), asyncio.Event()

    async def held(_: web.Request) -> web.Response:
        has_come.set()
        await may_answer.wait()
        return web.Response(body=NEW)

    server.routes["/keys"] = held
    loop = asyncio.get_running_loop()
    first = loop.create_task(heard.cache.need(NAME))
    await has_come.wait()
    second = loop.create_task(heard.cache.need(NAME))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert first.cancelled()
    may_answer.set()
    assert await second
    assert heard.last == NEW
    assert len(server.requests) == 2


async def test_a_refresh_by_age_joins_the_fetch_under_way(server: Server, begin: Begin) -> None:
    """There is one fetch at a time, whatever it is for."""
    heard = await begin(at(server))
    may_answer, has_come = asyncio.Event(), asyncio.Event()

    async def held(_: web.Request) -> web.Response:
        has_come.set()
        await may_answer.wait()
        return web.Response(body=NEW)

    server.routes["/keys"] = held
    async with asyncio.TaskGroup() as group:
        needed = group.create_task(heard.cache.need(NAME))
        await has_come.wait()
        group.create_task(heard.later(REFRESH_SECONDS + 1))
        may_answer.set()
    assert needed.result()
    assert len(server.requests) == 2


async def test_unknown_keys_cause_one_fetch_in_a_while(server: Server, begin: Begin) -> None:
    """Tokens with invented key ids cannot make the gateway flood the issuer."""
    heard = await begin(at(server))
    for _ in range(20):
        assert await heard.cache.need(NAME)
    assert len(server.requests) == 2
    heard.clock.at += COOLDOWN_SECONDS - 0.1
    await heard.cache.need(NAME)
    assert len(server.requests) == 2
    heard.clock.at += 0.1
    await heard.cache.need(NAME)
    assert len(server.requests) == 3
    assert {said for _, said in heard.said} == {OLD}


async def test_a_key_published_right_after_the_start_is_found(server: Server, begin: Begin) -> None:
    """The first unknown key id is looked up at once, however fresh the keys are."""
    heard = await begin(at(server))
    server.answer(NEW)
    assert await heard.cache.need(NAME)
    assert heard.last == NEW
    server.answer(OLD)
    await heard.later(REFRESH_SECONDS + 1)
    server.answer(NEW)
    assert await heard.cache.need(NAME)
    assert heard.last == NEW


async def test_an_issuer_without_keys_is_asked_again_soon(server: Server, begin: Begin) -> None:
    """While there are none at all, a second is long enough to wait."""
    server.answer(b"", status=500)
    heard = await begin(at(server))
    assert heard.said == []
    assert not await heard.cache.need(NAME)
    assert not await heard.cache.need(NAME)
    assert len(server.requests) == 2
    assert heard.said == []
    server.answer(OLD)
    heard.clock.at += 1.0
    assert await heard.cache.need(NAME)
    assert heard.last == OLD


async def test_an_issuer_that_was_late_is_found_unasked(server: Server, begin: Begin) -> None:
    """One that was silent at the start is tried again every second, before any token needs it."""
    server.answer(b"", status=503)
    heard = await begin(at(server))
    server.answer(OLD)
    await heard.later(0.9)
    assert heard.said == []
    await heard.later(0.1)
    assert heard.said == [(NAME, OLD)]


async def test_keys_are_refreshed_by_age(server: Server, begin: Begin) -> None:
    """A rotation arrives without any token that asks for it, and not before its time."""
    heard = await begin(at(server))
    server.answer(NEW)
    await heard.later(REFRESH_SECONDS)
    assert heard.said == [(NAME, OLD)]
    await heard.later(0.1)
    assert heard.said == [(NAME, OLD), (NAME, NEW)]
    await heard.later(1)
    assert len(server.requests) == 2


# --- while the issuer is away ---


async def test_keys_outlive_their_issuers_absence(server: Server, begin: Begin) -> None:
    """Old keys stay while it does not answer; after a day they are taken back."""
    heard = await begin(at(server))
    server.answer(b"", status=503)
    await heard.later(STALE_SECONDS)
    assert heard.said == [(NAME, OLD)]
    await heard.later(COOLDOWN_SECONDS)
    assert heard.said == [(NAME, OLD), (NAME, None)]
    assert heard.cache.known() == []
    server.answer(NEW)
    await heard.later(COOLDOWN_SECONDS)
    assert heard.last == NEW


async def test_an_issuer_that_was_never_there_takes_nothing_back_too_soon(
    server: Server, begin: Begin
) -> None:
    """Workers may have young keys from an earlier control process, which are good for a day."""
    server.answer(b"", status=503)
    heard = await begin(at(server))
    await heard.later(STALE_SECONDS)
    assert not await heard.cache.need(NAME)
    assert heard.said == []
    await heard.later(1)
    assert heard.said == [(NAME, None)]


async def test_an_absent_issuer_is_not_asked_at_every_sweep(server: Server, begin: Begin) -> None:
    """Overdue keys are tried for again once in a while, and nothing is told in between."""
    heard = await begin(at(server))
    server.answer(b"", status=503)
    await heard.later(REFRESH_SECONDS + 1)
    for _ in range(int(COOLDOWN_SECONDS) - 1):
        await heard.later(1)
    assert len(server.requests) == 2
    await heard.later(1)
    assert len(server.requests) == 3
    assert heard.said == [(NAME, OLD)]


async def test_an_unknown_key_of_an_absent_issuer_is_undecided(
    server: Server, begin: Begin
) -> None:
    """Nobody can say whether the key is the issuer's; known keys are not taken back for that."""
    heard = await begin(at(server))
    server.answer(b"", status=503)
    assert not await heard.cache.need(NAME)
    assert not await heard.cache.need(NAME)
    assert heard.said == [(NAME, OLD)]
    server.answer(NEW)
    heard.clock.at += COOLDOWN_SECONDS
    assert await heard.cache.need(NAME)
    assert heard.last == NEW


async def test_an_issuer_that_nobody_configured_is_not_asked(server: Server, begin: Begin) -> None:
    """A name that comes from a token leads nowhere."""
    heard = await begin(at(server))
    assert not await heard.cache.need(server.url("/evil"))
    assert heard.said == [(NAME, OLD)]
    assert server.requests == ["/keys"]


async def test_one_issuers_absence_leaves_the_others(server: Server, begin: Begin) -> None:
    """Keys, cooldown and failures are each issuer's own."""
    server.answer(b"", path="/broken", status=500)
    broken = JwksSource(issuer="urn:broken", url=server.url("/broken"), plain_http=True)
    heard = await begin(broken, at(server))
    assert heard.said == [(NAME, OLD)]
    assert not await heard.cache.need("urn:broken")
    assert await heard.cache.need(NAME)


# --- what is refused ---

DEEP = b'{"keys":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
BAD = [
    pytest.param({"body": OLD, "status": 201}, id="another-success"),
    pytest.param({"body": OLD, "status": 404}, id="not-found"),
    pytest.param({"body": OLD, "status": 500}, id="error"),
    pytest.param({"body": OLD.ljust(MAX_JWKS_BYTES + 1)}, id="oversize"),
    pytest.param({"body": DEEP}, id="deep"),
    pytest.param({"body": b""}, id="empty"),
    pytest.param({"body": b"<html>"}, id="html"),
    pytest.param({"body": b"[]"}, id="list"),
    pytest.param({"body": b'{"keys":{}}'}, id="no-list"),
    pytest.param({"body": OLD, "headers": {"content-encoding": "gzip"}}, id="not-gzip"),
]


@pytest.mark.parametrize("answer", BAD)
async def test_a_bad_answer_changes_nothing(
    server: Server, begin: Begin, answer: dict[str, Any]
) -> None:
    """Anything but a whole, small key set counts as no answer, at the start and later."""
    good = await begin(at(server))
    server.answer(**answer)
    assert not await good.cache.need(NAME)
    assert good.said == [(NAME, OLD)]
    bad = await begin(at(server))
    assert bad.said == []


async def test_the_largest_key_set_is_read(server: Server, begin: Begin) -> None:
    """A set of exactly the limit is no bad answer."""
    largest = OLD.ljust(MAX_JWKS_BYTES)
    server.answer(largest)
    assert (await begin(at(server))).last == largest


async def test_a_body_is_not_read_beyond_the_limit(server: Server, begin: Begin) -> None:
    """A server that sends too much and then holds the connection is left at the limit."""
    never = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b" " * (MAX_JWKS_BYTES + 1))
        await never.wait()
        return response

    heard = await begin(at(server))
    server.routes["/keys"] = endless
    with pytest.raises(JwksUnavailable, match="too large"):
        await heard.cache._fetch(at(server))
    never.set()


async def test_an_answer_is_not_waited_for_without_end(
    server: Server, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes the request and says nothing is given up."""
    monkeypatch.setattr(module, "FETCH_SECONDS", 0.05)
    never = asyncio.Event()

    async def silent(_: web.Request) -> web.Response:
        await never.wait()
        return web.Response(body=OLD)

    server.routes["/keys"] = silent
    heard = await begin(at(server))
    never.set()
    assert server.requests == ["/keys"]
    assert heard.said == []


async def test_nobody_listens(begin: Begin) -> None:
    """A refused connection is an issuer that is away."""
    async with Server() as gone:
        source = at(gone)
    heard = await begin(source)
    assert not await heard.cache.need(NAME)
    assert heard.said == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", ["/keys", "/.well-known/openid-configuration"])
async def test_a_redirect_is_not_followed(
    server: Server, begin: Begin, status: int, path: str
) -> None:
    """Neither the keys nor the discovery document may come from where a redirect says."""
    server.discovery()
    server.routes["/elsewhere"] = server.routes[path]
    server.answer(b"", path, status=status, headers={"location": server.url("/elsewhere")})
    heard = await begin(discovered(server))
    assert heard.said == []
    assert "/elsewhere" not in server.requests


async def test_plain_http_is_refused_unless_declared(server: Server, begin: Begin) -> None:
    """Without the declaration nothing is even asked."""
    server.discovery()
    keys = JwksSource(issuer=NAME, url=server.url())
    heard = await begin(keys, JwksSource(issuer=server.url("").rstrip("/")))
    assert heard.said == []
    assert server.requests == []


@pytest.mark.parametrize("scheme", ["ftp://127.0.0.1/", "file:///etc/passwd", "//x", "keys", " "])
async def test_other_schemes_are_refused(server: Server, begin: Begin, scheme: str) -> None:
    """HTTP and HTTPS are all there is, also where a discovery document says otherwise."""
    server.discovery(jwks_uri=scheme)
    bare = JwksSource(issuer=NAME, url=scheme, plain_http=True)
    assert (await begin(discovered(server), bare)).said == []


async def test_an_unknown_certificate_is_refused(
    begin: Begin,
) -> None:
    """TLS without a known authority's certificate is no proof of anything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1", "localhost").configure_cert(context)
    seen = []

    async def keys(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.Response(body=OLD)

    app = web.Application()
    app.router.add_get("/keys", keys)
    tls = TestServer(app, scheme="https")
    await tls.start_server(ssl=context)
    try:
        heard = await begin(JwksSource(issuer=NAME, url=str(tls.make_url("/keys"))))
    finally:
        await tls.close()
    assert (heard.said, seen) == ([], [])


# --- discovery ---


@pytest.mark.parametrize("path", ["", "/realms/a"])
async def test_keys_are_discovered(server: Server, begin: Begin, path: str) -> None:
    """The issuer's own document says where its keys are (OIDC Discovery 4)."""
    server.discovery(path)
    heard = await begin(discovered(server, path))
    assert heard.said == [(server.url(path).rstrip("/"), OLD)]
    assert server.requests == [path + "/.well-known/openid-configuration", "/keys"]


async def test_an_issuer_may_end_in_a_slash(server: Server, begin: Begin) -> None:
    """The slash is part of its name and is not doubled in the document's address."""
    server.discovery(issuer=server.url("/"))
    heard = await begin(JwksSource(issuer=server.url("/"), plain_http=True))
    assert heard.said == [(server.url("/"), OLD)]


async def test_an_oversize_discovery_document_is_refused(server: Server, begin: Begin) -> None:
    """The document is held to the limit of a key set."""
    source = discovered(server)
    document = json.dumps({"issuer": source.issuer, "jwks_uri": server.url()}).encode()
    for size, told in ((MAX_JWKS_BYTES, [(source.issuer, OLD)]), (MAX_JWKS_BYTES + 1, [])):
        server.answer(document.ljust(size), "/.well-known/openid-configuration")
        assert (await begin(source)).said == told


@pytest.mark.parametrize(
    "change",
    [
        lambda name: {"issuer": name + "/"},
        lambda name: {"issuer": name.upper()},
        lambda _: {"issuer": "https://other.example.com"},
        lambda name: {"issuer": [name]},
        lambda _: {"issuer": None},
        lambda _: {"issuer": ""},
    ],
)
async def test_a_foreign_discovery_document_is_refused(
    server: Server, begin: Begin, change: Callable[[str], dict[str, Any]]
) -> None:
    """It must name the issuer byte for byte; the keys that it points to are not asked for."""
    source = discovered(server)
    server.discovery(**change(source.issuer))
    heard = await begin(source)
    assert heard.said == []
    assert "/keys" not in server.requests


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{}", b"[" * 50_000, b'"a"', b"\xff"])
async def test_a_broken_discovery_document_is_refused(
    server: Server, begin: Begin, body: bytes
) -> None:
    """What is no JSON object is no document."""
    server.answer(body, "/.well-known/openid-configuration")
    assert (await begin(discovered(server))).said == []


@pytest.mark.parametrize("uri", [None, "", 5, [], {}])
async def test_a_document_without_a_place_for_keys_is_refused(
    server: Server, begin: Begin, uri: Any
) -> None:
    """Where `jwks_uri` is no address there are no keys."""
    server.discovery(jwks_uri=uri)
    assert (await begin(discovered(server))).said == []


# --- files ---


async def test_a_file_is_read_and_read_again(tmp_path: Path, begin: Begin) -> None:
    """Keys from a file rotate as those of a server do, and no request is made for them."""
    path = tmp_path / "keys.json"
    path.write_bytes(OLD)
    heard = await begin(JwksSource(issuer=NAME, file=str(path)))
    assert heard.said == [(NAME, OLD)]
    path.write_bytes(NEW)
    assert await heard.cache.need(NAME)
    assert heard.last == NEW


async def test_a_missing_or_broken_file_is_an_issuer_that_is_away(
    tmp_path: Path, begin: Begin
) -> None:
    """The old keys stay until it is mended."""
    path = tmp_path / "keys.json"
    heard = await begin(JwksSource(issuer=NAME, file=str(path)))
    assert heard.said == []
    path.write_bytes(OLD)
    assert await heard.cache.need(NAME)
    for broken in (b"{", OLD.ljust(MAX_JWKS_BYTES + 1)):
        path.write_bytes(broken)
        heard.clock.at += COOLDOWN_SECONDS
        assert not await heard.cache.need(NAME)
    path.write_bytes(NEW)
    heard.clock.at += COOLDOWN_SECONDS
    assert await heard.cache.need(NAME)
    assert heard.last == NEW


async def test_nothing_is_fetched_before_the_start() -> None:
    """A cache that was never started has nothing to ask with, and says so."""
    heard = Heard(JwksSource(issuer=NAME, url="https://127.0.0.1:1/keys"))
    assert not await heard.cache.need(NAME)
    await heard.cache.close()
