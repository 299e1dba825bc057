"""Opening and closing sessions from a command line.

What goes wrong is told in one sentence that holds neither key nor token.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Final

import msgspec

TIMEOUT_SECONDS: Final = 30.0
MAX_ANSWER_BYTES: Final = 1024 * 1024


class ClientError(Exception):
    """The gateway, or whoever should have known the caller, did not do as asked."""


class ProviderAccess(msgspec.Struct, frozen=True):
    """Where a session's calls to one provider go."""

    base_url: str
    fingerprint: str


class OpenSession(msgspec.Struct, frozen=True):
    """An open session. Never printed: it holds its token."""

    session_id: str
    token: str
    expires_at: int
    providers: dict[str, ProviderAccess]

    def __repr__(self) -> str:
        """Return nothing of the token."""
        return f"OpenSession({self.session_id})"


class SessionClient:
    """One caller of the sessions listener."""

    def __init__(self, url: str, identity: str) -> None:
        self._url = url.rstrip("/")
        self._identity = identity
        if not self._url.startswith(("http://", "https://")):
            raise ClientError(f"{url} is no http or https URL")

    def __repr__(self) -> str:
        """Return where it asks, and nothing of who."""
        return f"SessionClient({self._url})"

    def open(self, keys: Mapping[str, str], *, label: str, ttl_seconds: int | None) -> OpenSession:
        """Deposit keys, by provider, and return the session.

        Raises:
            ClientError: There is none.
        """
        body: dict[str, object] = {"keys": dict(keys), "label": label}
        if ttl_seconds is not None:
            body["ttl_seconds"] = ttl_seconds
        answer = ask("POST", f"{self._url}/v1/sessions", self._identity, body)
        try:
            return msgspec.convert(answer, OpenSession)
        except msgspec.ValidationError:
            raise ClientError(f"{self._url} does not answer as a gateway does") from None

    def close(self, session_id: str) -> dict[str, Any]:
        """Close the session and return what the gateway says of it.

        Raises:
            ClientError: It could not be told.
        """
        return ask("DELETE", f"{self._url}/v1/sessions/{session_id}", self._identity)


def development_identity(url: str, subject: str, tenant: str) -> str:
    """Return an identity of a gateway that runs with --dev.

    Raises:
        ClientError: It does not, or is not there.
    """
    body = {"subject": subject, "tenant": tenant}
    return str(ask("POST", f"{url.rstrip('/')}/dev/token", "", body)["token"])


def ask(method: str, url: str, identity: str, body: object = None) -> dict[str, Any]:
    """Return the JSON that a route of the control plane answers with.

    Raises:
        ClientError: It refuses, or is not there.
    """
    headers = {"content-type": "application/json"}
    if identity:
        headers["authorization"] = f"Bearer {identity}"
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, headers, method=method)  # noqa: S310 - checked by SessionClient
    try:
        with _opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            answer = json.loads(response.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            raise ClientError(_refusal(error)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ClientError(f"no answer from {url}: {reason}") from None
    if not isinstance(answer, dict):
        raise ClientError(f"{url} does not answer as a gateway does")
    return answer


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key goes where it was sent, or nowhere."""

    def redirect_request(self, *_args: object, **_kwargs: object) -> None:
        """Follow none."""


# No proxy of the environment either: what is sent here holds keys.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        problem = json.loads(error.read(MAX_ANSWER_BYTES))
        return f"the gateway refuses: {problem['detail']} ({problem['code']})"
    except (ValueError, KeyError, TypeError):
        return f"the gateway answers {error.code}"
