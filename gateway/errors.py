"""The root of what can go wrong in the gateway, and whose fault it is.

    GatewayError
    ├── ConfigurationError   (gateway.config)
    ├── Refused              the call is refused; carries everything a problem needs
    └── AuditUnavailable     (gateway.audit) a record could not be made durable

A `code` is stable: the same string stands in the audit record, the metric label and the body that
the caller reads.
"""

from enum import StrEnum


class Fault(StrEnum):
    """Whose fault it is."""

    DOWNSTREAM = "downstream"
    GATEWAY = "gateway"
    UPSTREAM = "upstream"


class GatewayError(Exception):
    """Something that the gateway itself recognised as wrong."""

    code = "internal"
    fault = Fault.GATEWAY


class Refused(GatewayError):
    """The call is refused for the reason `code`; `gateway.problems` turns it into an answer.

    `message` may be shown to the caller: it never holds a credential, a header value or a body.
    `retry_after_seconds` is None where waiting will not help; `challenge` is a `WWW-Authenticate` other
    than the usual one.
    """

    def __init__(  # noqa: PLR0913 - everything that a problem needs
        self,
        code: str,
        message: str,
        *,
        retry_after_seconds: float | None = None,
        rules: tuple[str, ...] = (),
        limit: str = "",
        challenge: str = "",
    ) -> None:
        """Name the reason and what the caller may read about it."""
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.rules = rules
        self.limit = limit
        self.challenge = challenge
