"""What can go wrong with custody. No message ever holds key material.

    CustodyError
    ├── UnknownSession     no such session here: closed, expired, or never opened
    ├── NoCredential       the session holds no key for this provider and origin
    ├── UnsealFailed       the session secret is not this record's, or the record was altered
    ├── RegionExhausted    every slot is in use
    ├── UnknownDepositKey  a deposit is sealed to a key that is not, or no longer, ours
    ├── AlreadyOpened      a sealed deposit was opened before
    ├── DoesNotOpen        a deposit is sealed for somebody else, or was altered
    ├── TooManyOpened      no more opened deposits can be remembered
    └── Forged             what a shared store holds was not left there by a replica

A `code` is stable: audit records, metrics and problems carry it.
"""


class CustodyError(Exception):
    """A key cannot be used."""

    code = "custody_error"


class UnknownSession(CustodyError):
    """No such session here."""

    code = "session_unknown"


class NoCredential(CustodyError):
    """The session holds no key for this provider and origin."""

    code = "no_key_for_provider"


class UnsealFailed(CustodyError):
    """The secret does not open the record."""

    code = "unseal_failed"


class RegionExhausted(CustodyError):
    """Every slot is in use."""

    code = "overloaded"


class UnknownDepositKey(CustodyError):
    """A deposit is sealed to a key that is not, or no longer, ours."""

    code = "unknown_kid"


class AlreadyOpened(CustodyError):
    """A sealed deposit was opened before."""

    code = "deposit_replayed"


class DoesNotOpen(CustodyError):
    """A deposit is sealed for another deployment or caller, or was altered."""

    code = "deposit_not_opened"


class TooManyOpened(CustodyError):
    """No more opened deposits can be remembered."""

    code = "overloaded"


class Forged(CustodyError):
    """What a shared store holds was not left there by a replica of this deployment."""

    code = "forged"
