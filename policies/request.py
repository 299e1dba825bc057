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
    before the body has been streamed. `server_tools` are those of `tools` that the provider runs
    itself. `is_parsed` is false where the operation has a body that could not be read as its
    dialect says.
    """

    provider: str
    operation: Operation
    model: str = ""
    stream: bool = False
    max_tokens: int = -1
    tools: tuple[str, ...] = ()
    server_tools: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    generates: bool = False
    store: bool = False
    body_bytes: int = 0
    is_parsed: bool = True


class ProviderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator vouches for about a provider; what is not said is not so."""

    dialect: str = ""
    region: str = ""
    baa: bool = False
    phi: bool = False
    zero_retention: bool = False
    no_training: bool = False


class AccessRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One question: this principal, this call, to this provider, in these circumstances.

    `now` is seconds since the epoch; `labels` and `purpose` are what the caller declares.
    """

    principal: Principal
    call: ModelCall
    provider: ProviderFacts = ProviderFacts()
    client_address: str = ""
    session_id: str = ""
    user_agent: str = ""
    labels: frozenset[str] = frozenset()
    purpose: str = ""
    now: float = 0.0
