"""What a call waits for before it goes on. No I/O."""

from enum import StrEnum


class Durability(StrEnum):
    """How safely a record of a call must be kept before the call goes on.

    STRICT: the start is on the disk before the provider hears of the call, the end before the caller
    gets the bytes that complete the answer. BOUNDED: both are queued, so many at most; a power cut
    loses what was queued, a log that cannot be written refuses calls. ASYNC: calls pass also while
    nothing can be recorded; what was lost is counted and said in the log once it can be.
    Sessions and everything that operators do are recorded strictly in every mode.
    """

    STRICT = "strict"
    BOUNDED = "bounded"
    ASYNC = "async"
