"""The only place where a reason becomes an HTTP status and a body.

A code that is not in the table loses its detail on the wire: what we did not foresee, we do not show.
No I/O.
"""

import math
from collections.abc import Sequence
from typing import Final

import msgspec

from gateway.errors import Refused
from gateway.providers.dialect import Dialect, Refusal, to_json

Header = tuple[bytes, bytes]

STATUS: Final[dict[str, int]] = {
    "invalid_request": 400,
    "invalid_target": 400,
    "invalid_body": 400,
    "ambiguous_credentials": 400,
    "credential_in_url": 400,
    "no_credentials": 401,
    "credential_not_accepted": 401,
    "invalid_token": 401,
    "token_expired": 401,
    "unknown_issuer": 401,
    "wrong_audience": 401,
    "invalid_session_token": 401,
    "session_required": 401,
    "session_unknown": 401,
    "session_expired": 401,
    "step_up_required": 401,
    "missing_tenant": 403,
    "session_mismatch": 403,
    "no_key_for_provider": 403,
    "unseal_failed": 403,
    "policy_denied": 403,
    "policy_error": 403,
    "price_unknown": 403,
    "session_closed": 403,
    "permission_denied": 403,
    "killed": 403,
    "key_replaced": 403,
    "unknown_route": 404,
    "session_not_found": 404,
    "receipt_not_found": 404,
    "kill_not_found": 404,
    "unknown_provider": 400,
    "deposit_not_opened": 400,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "client_disconnected": 408,
    "unknown_kid": 409,
    "deposit_replayed": 409,
    "length_required": 411,
    "body_too_large": 413,
    "expectation_failed": 417,
    "websocket_not_supported": 426,
    "rate_limit_exceeded": 429,
    "concurrency_limit_exceeded": 429,
    "budget_exceeded": 429,
    "call_exceeds_limit": 429,
    "too_many_sessions": 429,
    "too_many_kills": 429,
    "head_too_large": 431,
    "internal": 500,
    "upstream_unreachable": 502,
    "upstream_invalid": 502,
    "upstream_redirected": 502,
    "upstream_forbidden_address": 502,
    "audit_unavailable": 503,
    "receipt_not_signed": 503,
    "control_unavailable": 503,
    "store_unavailable": 503,
    "identity_unavailable": 503,
    "limits_unavailable": 503,
    "overloaded": 503,
    "draining": 503,
    "upstream_timeout": 504,
    "http_version_not_supported": 505,
}
"""Every code that a caller may read, with its status."""

REASONS: Final[dict[int, str]] = {
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required",
    413: "Content Too Large", 417: "Expectation Failed", 426: "Upgrade Required",
    429: "Too Many Requests", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip

_RETRIED_BY_SDKS = frozenset({408, 409, 429, 500, 502, 503, 504})


PATIENCE_SECONDS: Final = 60.0
"""SDKs wait as told up to a minute; told more they try again at once, unless told not to."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong, for the wire."""

    status: int
    code: str
    detail: str
    decision_id: str = ""
    rules: tuple[str, ...] = ()
    limit: str = ""
    retry_after_seconds: float | None = None

    @property
    def title(self) -> str:
        """Return the status in words."""
        return REASONS[self.status]


def problem_from(refusal: Refused, *, decision_id: str = "") -> Problem:
    """Return the problem that a refusal is on the wire."""
    status = STATUS.get(refusal.code)
    if status is None:
        return Problem(
            status=500, code="internal", detail="Something went wrong.", decision_id=decision_id
        )
    return Problem(
        status=status,
        code=refusal.code,
        detail=refusal.message,
        decision_id=decision_id,
        rules=refusal.rules,
        limit=refusal.limit,
        retry_after_seconds=refusal.retry_after_seconds,
    )


def to_problem_json(problem: Problem) -> bytes:
    """Return the RFC 9457 body."""
    members: dict[str, object] = {
        "type": f"urn:veklom:problem:{problem.code}",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
    }
    if problem.decision_id:
        members["decision_id"] = problem.decision_id
    if problem.rules:
        members["rules"] = problem.rules
    if problem.limit:
        members["violated-policies"] = [problem.limit]
    return to_json(members)


def retry_headers(problem: Problem) -> list[Header]:
    """Return the fields that tell a caller's SDK whether and when to try again."""
    if problem.retry_after_seconds is not None:
        seconds = problem.retry_after_seconds
        fields = [
            (b"retry-after", b"%d" % max(1, math.ceil(seconds))),
            (b"retry-after-ms", b"%d" % max(1, math.ceil(seconds * 1000))),
        ]
        if seconds > PATIENCE_SECONDS:
            fields.append((b"x-should-retry", b"false"))
        return fields
    if problem.status in _RETRIED_BY_SDKS and problem.status not in {408, 502, 504}:
        return [(b"x-should-retry", b"false")]
    return []


def render(
    problem: Problem, dialect: Dialect | None, headers: Sequence[Header], *, keep_alive: bool
) -> bytes:
    """Return a whole HTTP/1.1 response, in the dialect's error shape where there is one."""
    if dialect is None:
        content_type, body = b"application/problem+json", to_problem_json(problem)
    else:
        content_type = b"application/json"
        body = dialect.render_error(
            Refusal(
                status=problem.status,
                code=problem.code,
                message=problem.detail,
                request_id=problem.decision_id,
                rules=problem.rules,
                limit=problem.limit,
            )
        )
    fields = [
        (b"content-type", content_type),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *retry_headers(problem),
        *headers,
    ]
    if dialect is not None and problem.decision_id:
        fields.append((dialect.request_id_header, problem.decision_id.encode()))
    if problem.limit:
        fields.append((b"x-veklom-limit", problem.limit.encode()))
    if problem.status == 401:
        fields.append((b"www-authenticate", b'Bearer realm="veklom"'))
    if problem.status == 426:
        fields.append((b"upgrade", b"HTTP/1.1"))
        fields.append((b"connection", b"upgrade" if keep_alive else b"upgrade, close"))
    elif not keep_alive:
        fields.append((b"connection", b"close"))
    head = [b"HTTP/1.1 %d %b" % (problem.status, problem.title.encode())]
    head += [b"%b: %b" % field for field in fields]
    return b"\r\n".join(head) + b"\r\n\r\n" + body
