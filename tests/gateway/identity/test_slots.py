"""Slots: a token is found wherever an SDK puts it; contradictions and raw keys are refused."""

import base64
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Refused
from gateway.identity.slots import (
    CREDENTIAL_SLOTS,
    MAX_TOKEN_BYTES,
    SESSION_TOKEN_PREFIX,
    find_credentials,
    query_has_credential,
)
from gateway.providers.headers import forwardable
from gateway.providers.provider import DIALECTS

SESSION = SESSION_TOKEN_PREFIX + b"eyJzaWQiOiJhIn0.c2ln"
OTHER_SESSION = SESSION + b"X"
IDENTITY = b"eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJhIn0.c2ln"
OTHER_IDENTITY = IDENTITY + b"X"
RAW_KEYS = (b"sk-proj-abc", b"sk-ant-api03-abc", b"AIzaSyAbc", b"gsk_abc", b"")

Headers = Sequence[tuple[bytes, bytes]]


def refusal(headers: Headers) -> Refused:
    """Return why the fields are refused."""
    with pytest.raises(Refused) as caught:
        find_credentials(headers)
    return caught.value


# one row for every slot that an installed SDK or agent was seen to use
SDK_SLOTS = [
    pytest.param(b"authorization", b"Bearer ", id="openai-anthropic-mistral-cohere"),
    pytest.param(b"x-api-key", b"", id="anthropic-js-claude-code"),
    pytest.param(b"api-key", b"", id="azure-openai"),
    pytest.param(b"x-goog-api-key", b"", id="google-genai"),
    pytest.param(b"x-veklom-session", b"", id="own-session"),
    pytest.param(b"x-veklom-authorization", b"Bearer ", id="own-authorization"),
    pytest.param(b"authorization", b"bEARER  ", id="scheme-in-any-case"),
    pytest.param(b"x-api-key", b"Bearer ", id="bearer-in-a-bare-slot"),
    pytest.param(b"x-goog-api-key", b" \t", id="white-space-before"),
]


@pytest.mark.parametrize(("name", "before"), SDK_SLOTS)
def test_every_slot_takes_either_token(name: bytes, before: bytes) -> None:
    """A session token and an issuer's token are found in every slot, and told apart."""
    found = find_credentials([(b"accept", b"*/*"), (name, before + SESSION + b" ")])
    assert (found.session_token, found.identity_token) == (SESSION, None)
    found = find_credentials([(name, before + IDENTITY), (b"host", b"x")])
    assert (found.session_token, found.identity_token) == (None, IDENTITY)


@pytest.mark.parametrize("order", [1, -1])
def test_a_session_may_stand_beside_an_identity(order: int) -> None:
    """One token of each kind is what a caller behind an identity provider sends."""
    fields = [(b"authorization", b"Bearer " + IDENTITY), (b"x-veklom-session", SESSION)]
    found = find_credentials(fields[::order])
    assert (found.session_token, found.identity_token) == (SESSION, IDENTITY)


@pytest.mark.parametrize("token", [SESSION, IDENTITY], ids=["session", "identity"])
def test_the_same_token_twice_is_one(token: bytes) -> None:
    """Claude Code's apiKeyHelper puts one value in two slots."""
    found = find_credentials([(b"x-api-key", token), (b"authorization", b"Bearer " + token)])
    assert token in {found.session_token, found.identity_token}


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-api-key", SESSION), (b"x-veklom-session", OTHER_SESSION)],
        [(b"x-api-key", SESSION), (b"x-api-key", OTHER_SESSION)],
        [(b"authorization", b"Bearer " + IDENTITY), (b"api-key", OTHER_IDENTITY)],
        [(b"authorization", b"Bearer " + IDENTITY)] * 2
        + [(b"authorization", b"Bearer " + OTHER_IDENTITY)],
        [(b"x-api-key", SESSION), (b"api-key", IDENTITY), (b"x-goog-api-key", OTHER_IDENTITY)],
    ],
)
def test_two_different_tokens_of_a_kind_are_refused(headers: Headers) -> None:
    """Nobody chooses between contradictory credentials, whatever their order."""
    assert refusal(headers).code == "ambiguous_credentials"
    assert refusal(headers[::-1]).code == "ambiguous_credentials"


@pytest.mark.parametrize("key", RAW_KEYS)
@pytest.mark.parametrize(("name", "before"), SDK_SLOTS)
def test_a_raw_provider_key_is_refused(name: bytes, before: bytes, key: bytes) -> None:
    """A key in a slot is refused, also beside a good token, and the refusal does not repeat it."""
    for beside in ([], [(b"x-veklom-session", SESSION)]):
        refused = refusal([*beside, (name, before + key)])
        assert refused.code == "credential_not_accepted"
        assert not key or key.decode() not in str(refused)


@pytest.mark.parametrize(
    "value",
    [
        b"Basic dXNlcjpwYXNz",
        b"AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/bedrock/aws4_request",
        b"Bearer",
        b"Bearer\t" + SESSION,
        SESSION,
        b"",
    ],
)
@pytest.mark.parametrize("name", [b"authorization", b"x-veklom-authorization"])
def test_authorization_is_bearer_or_refused(name: bytes, value: bytes) -> None:
    """Another scheme, or none, is refused even when a good token stands beside it."""
    headers = [(b"x-api-key", SESSION), (name, value)]
    assert refusal(headers).code == "credential_not_accepted"


@pytest.mark.parametrize("headers", [[], [(b"cookie", SESSION)], [(b"x-other", IDENTITY)]])
def test_nothing_in_a_slot_is_no_credential(headers: Headers) -> None:
    """A token anywhere else is not looked for."""
    assert refusal(headers).code == "no_credentials"


@pytest.mark.parametrize("token", [SESSION, IDENTITY], ids=["session", "identity"])
def test_a_token_has_a_greatest_length(token: bytes) -> None:
    """A token of 8,192 bytes is read, one byte more is not."""
    longest = token.ljust(MAX_TOKEN_BYTES, b"A")
    assert longest in find_credentials([(b"x-api-key", longest)])
    assert refusal([(b"x-api-key", longest + b"A")]).code == "invalid_token"


def test_tokens_are_not_printed() -> None:
    """What was found shows nothing of itself."""
    found = find_credentials([(b"x-api-key", SESSION), (b"api-key", IDENTITY)])
    assert "eyJ" not in f"{found!r} {found}"


def test_the_prefix_is_the_header_it_says() -> None:
    """The constant first segment decodes to the session token's JOSE header."""
    header = json.loads(base64.urlsafe_b64decode(SESSION_TOKEN_PREFIX.rstrip(b".") + b"=="))
    assert header == {"alg": "EdDSA", "typ": "veklom-session+jwt"}


names = st.sampled_from(sorted(CREDENTIAL_SLOTS)).flatmap(
    lambda name: st.lists(st.booleans(), min_size=len(name), max_size=len(name)).map(
        lambda upper: bytes(
            byte - 32 if up and 97 <= byte <= 122 else byte
            for byte, up in zip(name, upper, strict=True)
        )
    )
)


@given(names, st.sampled_from(sorted(DIALECTS)))
def test_no_credential_slot_survives_in_any_case(name: bytes, dialect: str) -> None:
    """Whatever its spelling, a slot's field is never among those that a provider may see."""
    headers = [(b"accept", b"*/*"), (name, b"v"), (name.lower(), b"v")]
    kept = {kept.lower() for kept, _ in forwardable(DIALECTS[dialect], headers)}
    assert b"accept" in kept
    assert not kept & CREDENTIAL_SLOTS


junk = st.binary(max_size=40).filter(lambda value: b"eyJ" not in value)


@given(st.lists(st.tuples(st.sampled_from(sorted(CREDENTIAL_SLOTS)), junk)))
def test_junk_is_refused_and_nothing_else(headers: list[tuple[bytes, bytes]]) -> None:
    """Any bytes in any slots are a refusal with a code, never another error and never a token."""
    assert refusal(headers).code in {"no_credentials", "credential_not_accepted"}


def test_a_providers_own_slot_is_stripped_from_callers() -> None:
    """The field in which each dialect's key is injected is one that no caller can fill."""
    for dialect in DIALECTS.values():
        assert dialect.default_auth[0].lower() in CREDENTIAL_SLOTS


@pytest.mark.parametrize(
    "query",
    [
        b"key=AIza",
        b"alt=sse&key=AIza",
        b"alt=sse;key=AIza",
        b"KEY=1",
        b"api-key=1",
        b"api_key=1",
        b"apikey=1",
        b"apiKey=1",
        b"access_token=1",
        b"accessToken=1",
        b"access-token=1",
        b"oauth_token=1",
        b"token=1",
        b"$key=1",
        b"%24key=1",
        b"key=",
        b"a&key=1",
        b"%6bey=1",
        b"k%65y=1",
        b"ke%79=1",
        b"access%5Ftoken=1",
        b"a=1&%61%70%69%2d%6b%65%79=1",
    ],
)
def test_a_credential_in_the_query_is_seen(query: bytes) -> None:
    """Every spelling that a provider would read as a credential counts, escapes included."""
    assert query_has_credential(query)


@pytest.mark.parametrize(
    "query",
    [
        b"",
        b"alt=sse",
        b"pageToken=abc&page_token=abc",
        b"keys=1&monkey=1&key_id=1",
        b"include%5B%5D=usage&metadata%5Bkey%5D=x",
        b"q=key%3D1&after=a%26key%3D1",
        b"key",
        b"max_tokens=5",
        b"a=key=1",
        b"%zz=1&%=1",
    ],
)
def test_an_honest_query_passes(query: bytes) -> None:
    """Names that only resemble one, and values that mention one, are no credentials."""
    assert not query_has_credential(query)


@given(
    st.sampled_from(["key", "api_key", "api-key", "access_token"]),
    st.lists(st.sampled_from(["a=1", "include%5B%5D=b", "c"])),
    st.data(),
)
def test_no_escaping_hides_a_credential(name: str, others: list[str], data: st.DataObject) -> None:
    """Escaping any characters of the name, anywhere in a query, changes nothing."""
    spelt = "".join(
        f"%{ord(char):02{data.draw(st.sampled_from('xX'))}}" if data.draw(st.booleans()) else char
        for char in name
    )
    at = data.draw(st.integers(0, len(others)))
    query = "&".join([*others[:at], f"{spelt}=secret", *others[at:]])
    assert query_has_credential(query.encode())
    assert not query_has_credential("&".join(others).encode())
