"""Gemini's dialect: the model and the operation stand in the path. No I/O."""

import re
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_to_bytes

import msgspec

from gateway.errors import Refused
from gateway.providers.bodies import Governed, JsonObject, invalid, names
from gateway.providers.dialect import (
    BodyKind,
    BothEnds,
    Matched,
    Refusal,
    Usage,
    UsageReader,
    count,
    to_json,
)
from policies.request import ModelCall, Operation

if TYPE_CHECKING:
    from gateway.providers.routes import Route

_PATH = re.compile(rb"(/v1(?:beta|alpha)?)?/models(?:/([^/:]{1,256})(?::([A-Za-z]+))?)?")
DEFAULT_VERSION = b"/v1beta"
METHODS = {
    b"generateContent": (Operation.GENERATE_CONTENT, False),
    b"streamGenerateContent": (Operation.GENERATE_CONTENT, True),
    b"embedContent": (Operation.EMBEDDINGS, False),
    b"batchEmbedContents": (Operation.EMBEDDINGS, False),
    b"countTokens": (Operation.COUNT_TOKENS, False),
}
# Protobuf's JSON takes either spelling of a name.
_CONFIG = ("generationConfig", "generation_config")
_LIMIT = ("maxOutputTokens", "max_output_tokens")
_DECLARATIONS = ("functionDeclarations", "function_declarations")
_CACHE = ("cachedContent", "cached_content")
_INNER = ("generateContentRequest", "generate_content_request")
_BODY_GOVERNED = Governed(*_CONFIG, *_CACHE, *_INNER, "tools", "model", "requests")
MAX_REQUESTS = 1000
"""In one batch of embeddings; the API takes 100."""
_CONFIG_GOVERNED = Governed(*_LIMIT)
_TOOL_GOVERNED = Governed(*_DECLARATIONS)
CONTENT = Governed("parts", beside="role")
_FUNCTION_GOVERNED = Governed("name")
_UNDERSCORED = re.compile(r"_([a-z])")
_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class Gemini:
    """The dialect of generateContent."""

    name = "gemini"
    default_auth = (b"x-goog-api-key", b"")
    request_id_header = b"x-request-id"
    headers = frozenset({b"x-goog-api-client", b"x-goog-request-params", b"x-server-timeout"})

    def match(self, method: bytes, path: bytes, base_path: bytes) -> Matched | None:
        """Match with or without a version; without one, `v1beta` goes upstream."""
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        version, segment, verb = match.groups()
        upstream = base_path + (path if version else DEFAULT_VERSION + path)
        if verb is None:
            if method != b"GET":
                return None
            return Matched(operation=Operation.MODELS, body=BodyKind.NONE, path=upstream)
        known = METHODS.get(verb)
        if known is None or method != b"POST":
            return None
        return Matched(
            operation=known[0],
            body=BodyKind.JSON,
            path=upstream,
            model=_model_name(segment),
            stream=known[1],
            generates=known[0] is Operation.GENERATE_CONTENT,
        )

    def renamed(self, target: bytes, model: str) -> bytes:
        """Return an upstream target with another model in its path."""
        path, mark, query = target.partition(b"?")
        before, _, verb = path.rpartition(b":")
        start = before.rindex(b"/models/") + len(b"/models/")
        return before[:start] + quote(model, safe="").encode() + b":" + verb + mark + query

    def read_call(self, route: "Route", body: bytes | None, body_bytes: int) -> ModelCall:
        """Read the token cap and the tools; the model is the path's."""
        blank = ModelCall(
            provider=route.provider.name,
            operation=route.operation,
            model=route.model,
            stream=route.stream,
            body_bytes=body_bytes,
        )
        if not body:
            if route.body is BodyKind.JSON:
                raise invalid("The body is empty.")
            return blank
        fields = read_fields(body)
        tools = [*tools_of(fields)]
        inner = fields.inner(spelling(fields, _INNER), _BODY_GOVERNED)
        if inner is not None:  # what countTokens counts
            tools += tools_of(inner)
        for each in (fields, inner, *fields.items("requests", _BODY_GOVERNED, MAX_REQUESTS)):
            if each is not None and each.model().removeprefix("models/") not in {"", route.model}:
                raise invalid("The body names another model than the path.")
        declared = {name for tool in tools for name in _declared_names(tool)}
        found = names(name for tool in tools for name in tool_names(tool))
        # What was cached may hold tools, and instructions, that this body does not show.
        hidden = [_CACHE[0]] if fields.raw(spelling(fields, _CACHE)) else []
        return msgspec.structs.replace(
            blank,
            max_tokens=_cap(fields),
            tools=(*found, *hidden),
            server_tools=(*(name for name in found if name not in declared), *hidden),
            parameters=tuple(fields),
            generates=route.generates,
        )

    def usage_reader(self, _route: "Route", _call: ModelCall, _content_type: bytes) -> UsageReader:
        """Return a reader of the last `usageMetadata`."""
        return _UsageReader()

    def render_error(self, refusal: Refusal) -> bytes:
        """Return `{"error": {code, message, status, details}}`."""
        info = {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": refusal.code.upper(),
            "domain": "veklom",
            "metadata": {"rules": ",".join(refusal.rules), "decision_id": refusal.request_id},
        }
        status = _STATUS.get(refusal.status, "INTERNAL" if refusal.status >= 500 else "ABORTED")
        error = {
            "code": refusal.status,
            "message": refusal.sentence(),
            "status": status,
            "details": [info],
        }
        return to_json({"error": error})

    def stream_error(self, code: str, message: str) -> bytes:
        """Return a data event with an error."""
        error = {"code": 503, "message": f"{message} [{code}]", "status": "UNAVAILABLE"}
        return b"data: " + to_json({"error": error}) + b"\r\n\r\n"


def _model_name(segment: bytes) -> str:
    """Return the model that the provider will read from this path segment."""
    name = unquote_to_bytes(segment)
    if b"/" in name or b"%" in name or not name.isascii():
        raise Refused("invalid_target", "The model's name is not accepted.")
    return name.decode()


def read_fields(body: bytes) -> JsonObject:
    """Return a body's fields, as they are read for rules."""
    return JsonObject(body, _BODY_GOVERNED)


def config_of(fields: JsonObject) -> tuple[str, JsonObject | None]:
    """Return the name of the configuration's field, and the configuration."""
    name = spelling(fields, _CONFIG)
    return name, fields.inner(name, _CONFIG_GOVERNED)


def cap_field(config: JsonObject) -> str:
    """Return the name of the field that caps output tokens."""
    return spelling(config, _LIMIT)


def _cap(fields: JsonObject) -> int:
    _, config = config_of(fields)
    return config.whole(cap_field(config)) if config else -1


def tools_of(fields: JsonObject) -> list[JsonObject]:
    """Return the tools of a call."""
    return fields.items("tools", _TOOL_GOVERNED)


def declarations_of(tool: JsonObject) -> tuple[str, list[JsonObject]]:
    """Return the name of the field that declares functions, and these."""
    name = spelling(tool, _DECLARATIONS)
    return name, tool.items(name, _FUNCTION_GOVERNED)


def spelling(fields: JsonObject, spellings: tuple[str, str]) -> str:
    """Return the spelling that is there; both at once are refused."""
    first, second = spellings
    if first in fields and second in fields:
        raise invalid(f"The field {first!r} stands twice, in two spellings.")
    return second if second in fields else first


def tool_names(tool: JsonObject) -> list[str]:
    """Return the functions that a tool declares; a server tool is named by its key: googleSearch."""
    return _declared_names(tool) + [
        server_tool_name(key) for key in tool if key not in _DECLARATIONS
    ]


def _declared_names(tool: JsonObject) -> list[str]:
    return [each.text("name") for each in declarations_of(tool)[1]]


def server_tool_name(key: str) -> str:
    """Return what rules know a server tool by: its key, in the API's own spelling."""
    return _UNDERSCORED.sub(lambda at: at[1].upper(), key)


class _UsageReader(BothEnds):
    def usage(self) -> Usage:
        found = self.last(b"usageMetadata")
        if not found:
            return Usage(model=self.model())
        reasoning = count(found, "thoughtsTokenCount")
        return Usage(
            input=count(found, "promptTokenCount") + count(found, "toolUsePromptTokenCount"),
            output=count(found, "candidatesTokenCount") + reasoning,
            cache_read=count(found, "cachedContentTokenCount"),
            reasoning=reasoning,
            source="provider",
            model=self.model(),
        )
