"""The question put to the judge: who asks, for what, in which circumstances.

Every fact is total: it always has a value, and its default is the value that no rule mistakes for
permission. The types are `msgspec` structs because one of each is made for every call. No I/O.
"""

from enum import StrEnum

import msgspec


class Operation(StrEnum):
    """What a call asks a provider to do, whatever the dialect it is asked in."""

    CHAT = "chat"
    RESPONSES = "responses"
    MESSAGES = "messages"
    GENERATE_CONTENT = "generate_content"
    EMBEDDINGS = "embeddings"
    IMAGES = "images"
    AUDIO = "audio"
    FILES = "files"
    BATCHES = "batches"
    MODELS = "models"
    COUNT_TOKENS = "count_tokens"


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """The caller, as a configured issuer vouches for it.

    `authenticated_at` (seconds since the epoch) is when a person last proved who they are; 0 where
    the issuer does not say.
    """

    issuer: str
    subject: str
    tenant: str
    client_id: str = ""
    roles: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    acr: str = ""
    amr: frozenset[str] = frozenset()
    authenticated_at: int = 0


class ModelCall(msgspec.Struct, frozen=True, kw_only=True):
    """What the call asks for, read from its path and body.

    `max_tokens` is -1 where the caller set none; `body_bytes` is -1 where the length is not known
    before the body has been streamed. `is_parsed` is false where the operation has a body that
    could not be read as its dialect says.
    """

    provider: str
    operation: Operation
    model: str = ""
    stream: bool = False
    max_tokens: int = -1
    tools: tuple[str, ...] = ()
    body_bytes: int = 0
    is_parsed: bool = True


class AccessRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One question: this principal, this call, from this address in this session."""

    principal: Principal
    call: ModelCall
    client_address: str = ""
    session_id: str = ""
