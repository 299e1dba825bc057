"""A real OpenID provider that somebody else wrote as the issuer: its tokens open and use sessions."""

import asyncio
import base64
import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from tests.conftest import KEY
from tests.simulators.gateway import Gateway, free_port
from tests.simulators.node import NODE
from tests.simulators.provider import Provider

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).resolve().parents[2]
AUDIENCE = "urn:veklom:test"
ON_FILE = "urn:issuer:on-file"
ON_FILE_KEY = Ed25519PrivateKey.generate()
POLICY = """\
rules:
  - id: writers
    effect: allow
    match: {tenant: acme, roles: [writer]}
"""


class OpenIdProvider:
    """The npm package `oidc-provider`; it publishes a new key whenever it is told to."""

    def __init__(self) -> None:
        self.issuer = f"http://127.0.0.1:{free_port()}"
        script = ROOT / "tests/npm/issuer.mjs"
        self._process = subprocess.Popen(
            [str(NODE), str(script), self.issuer.rpartition(":")[2]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._wait()

    def _wait(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def rotate(self) -> None:
        """Sign with a new key from now on; the old one is no longer published."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self._wait()

    def token(self, client: str = "alice", resource: str = AUDIENCE) -> str:
        """Return the access token of a client (RFC 6749 4.4, RFC 8707, RFC 9068)."""
        form = {"grant_type": "client_credentials", "scope": "call", "resource": resource}
        basic = base64.b64encode(f"{client}:secret".encode()).decode()
        request = urllib.request.Request(
            f"{self.issuer}/token",
            urllib.parse.urlencode(form).encode(),
            {"authorization": f"Basic {basic}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["access_token"])

    def configuration(self) -> Mapping[str, Any]:
        """Return how a gateway trusts it."""
        return {
            "issuer": self.issuer,
            "audiences": AUDIENCE,
            "plain_http": True,
            "algorithms": ["ES256"],
            "tenant_claim": "org.tenant",
            "roles": ["org.roles"],
        }

    def stop(self) -> None:
        """Be gone."""
        self._process.terminate()
        self._process.wait(30)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def on_file(key: Ed25519PrivateKey = ON_FILE_KEY, **claims: Any) -> str:
    """Return a token of the issuer whose keys are in a file, valid for ten minutes."""
    now = int(time.time())
    good = {"iss": ON_FILE, "aud": AUDIENCE, "sub": "carol", "iat": now, "exp": now + 600}
    headers = {"kid": "on-file"}
    more = {"tenant": "acme", "roles": ["writer"], **claims}
    return jwt.encode({**good, **more}, key, algorithm="EdDSA", headers=headers)


class Door:
    """A gateway that trusts the issuers, and the provider behind it."""

    def __init__(self, gateway: Gateway, provider: Provider) -> None:
        self.gateway = gateway
        self.provider = provider

    async def open(self, identity: str) -> str:
        """Open a session as an identity; return its token."""
        body = {"keys": {"openai": KEY}}
        return str(
            (await asyncio.to_thread(self.gateway.post, "/v1/sessions", body, identity))["token"]
        )

    async def refusal(self, identity: str) -> tuple[int, str]:
        """Return the status and code with which no session is opened."""
        try:
            await self.open(identity)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, str(json.load(error)["code"])
        raise AssertionError("a session was opened")

    async def call(self, identity: str, session: str = "") -> tuple[int, str]:
        """Make a call with both tokens; return its status, and its code if it was refused."""
        fields = {"authorization": f"Bearer {identity}", "content-type": "application/json"}
        if session:
            fields["x-veklom-session"] = session
        url = self.gateway.url("openai/v1/chat/completions")
        request = urllib.request.Request(url, b'{"model":"m","messages":[]}', fields)
        return await asyncio.to_thread(_send, request)


def _send(request: urllib.request.Request) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, str(json.load(error)["error"]["code"])


@pytest.fixture(scope="module")
def issuers() -> Iterator[tuple[OpenIdProvider, OpenIdProvider]]:
    """Two OpenID providers; the second is one that a test may take away."""
    running = (OpenIdProvider(), OpenIdProvider())
    yield running
    for each in running:
        each.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_door(
    issuers: tuple[OpenIdProvider, OpenIdProvider], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Door]:
    """A gateway whose issuers are both OpenID providers, by discovery, and one with a file."""
    folder = tmp_path_factory.mktemp("identity")
    key = {**OKPAlgorithm.to_jwk(ON_FILE_KEY.public_key(), as_dict=True), "kid": "on-file"}
    file = folder / "keys.json"
    file.write_text(json.dumps({"keys": [key]}))
    third = {
        "issuer": ON_FILE,
        "audiences": [AUDIENCE],
        "jwks_file": str(file),
        "algorithms": ["EdDSA"],
        "tenants": ["acme"],
    }
    trusted = {"issuers": [*(each.configuration() for each in issuers), third]}
    async with Provider() as provider:
        root = f"http://127.0.0.1:{provider.port}/v1"
        providers = {"openai": {"base_url": root, "plain_http": True}}
        gateway = Gateway(folder / "gateway", providers, policy=POLICY, extra=trusted)
        await asyncio.to_thread(gateway.__enter__)
        yield Door(gateway, provider)
        await asyncio.to_thread(gateway.__exit__)


@pytest.fixture
def door(module_door: Door) -> Door:
    """The gateway, and a provider that has not yet received anything."""
    module_door.provider.received.clear()
    return module_door


@pytest.fixture
def issuer(issuers: tuple[OpenIdProvider, OpenIdProvider]) -> OpenIdProvider:
    """The OpenID provider that stays."""
    return issuers[0]


async def test_an_idps_token_opens_a_session_and_stands_beside_it(
    door: Door, issuer: OpenIdProvider
) -> None:
    """The provider gets the key alone; the record names whom the issuer vouched for."""
    alice, bob = issuer.token(), issuer.token("bob")
    session = await door.open(alice)
    assert await door.call(alice, session) == (200, "")
    (seen,) = door.provider.received
    assert seen.values(b"authorization") == [b"Bearer " + KEY.encode()]
    assert seen.values(b"x-veklom-session") == []
    assert await door.call(alice) == (401, "session_required")
    status, code = await door.call(bob, session)
    assert (status, code) == (403, "session_mismatch")
    status, code = await door.call(issuer.token(resource="urn:other"), session)
    assert (status, code) == (401, "wrong_audience")
    assert len(door.provider.received) == 1
    (start,) = door.gateway.events("call.start")[-1:]
    text = json.dumps(start)
    assert all(f'"{word}"' in text for word in (issuer.issuer, "alice", "acme"))


async def test_a_key_may_rotate_while_all_runs(door: Door, issuer: OpenIdProvider) -> None:
    """The new key's first token is accepted at once; the old key's stop being so."""
    old = issuer.token()
    session = await door.open(old)
    assert await door.call(old, session) == (200, "")
    issuer.rotate()
    new = issuer.token()
    assert await door.call(new, session) == (200, "")
    assert await door.call(old, session) == (401, "invalid_token")
    assert await door.refusal(old) == (401, "invalid_token")
    session = await door.open(new)
    assert await door.call(new, session) == (200, "")
    assert len(door.provider.received) == 3


async def test_an_issuers_absence_stops_only_what_needs_it(
    door: Door, issuers: tuple[OpenIdProvider, OpenIdProvider]
) -> None:
    """Unknown keys are undecided (503); known keys and other issuers serve on."""
    issuer = issuers[1]
    known = issuer.token()
    session = await door.open(known)
    assert await door.call(known, session) == (200, "")
    issuer.rotate()
    unknown = issuer.token()
    issuer.stop()
    assert await door.call(unknown, session) == (503, "identity_unavailable")
    assert await door.refusal(unknown) == (503, "identity_unavailable")
    assert await door.call(known, session) == (200, "")
    assert await door.call(known, await door.open(known)) == (200, "")
    carol = on_file()
    assert await door.call(carol, await door.open(carol)) == (200, "")
    assert len(door.provider.received) == 4


async def test_a_second_issuer_speaks_for_itself_alone(door: Door, issuer: OpenIdProvider) -> None:
    """Its tokens serve within its tenants; it cannot speak as the first, nor can a stranger at all."""
    carol = on_file()
    session = await door.open(carol)
    assert await door.call(carol, session) == (200, "")
    cases = {
        on_file(tenant="globex"): (403, "missing_tenant"),
        on_file(iss=issuer.issuer): (401, "invalid_token"),
        on_file(iss="https://nobody.example.com"): (401, "unknown_issuer"),
        on_file(key=Ed25519PrivateKey.generate()): (401, "invalid_token"),
        on_file(sub="dave", exp=int(time.time()) - 60): (401, "token_expired"),
    }
    for token, refusal in cases.items():
        assert await door.call(token, session) == refusal
        assert await door.refusal(token) == refusal
    reader = on_file(sub="erin", roles=["reader"])
    assert (await door.call(reader, await door.open(reader)))[0] == 403
    assert len(door.provider.received) == 1
