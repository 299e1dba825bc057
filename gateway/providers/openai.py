"""OpenAI's dialect, and that of the many providers that speak it. No I/O."""

import re
from typing import TYPE_CHECKING

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

_ID = rb"[^/]{1,256}"
# Ids of open models hold slashes: `meta-llama/Llama-4`.
_MODEL_ID = rb"[^/]{1,256}(?:/[^/]{1,256}){0,3}"
_Row = tuple[bytes, bytes, Operation, BodyKind]
_ROWS: tuple[_Row, ...] = (
    (b"POST", rb"/chat/completions", Operation.CHAT, BodyKind.JSON),
    (b"GET", rb"/chat/completions", Operation.CHAT, BodyKind.NONE),
    (b"GET", rb"/chat/completions/" + _ID, Operation.CHAT, BodyKind.NONE),
    (b"POST", rb"/chat/completions/" + _ID, Operation.CHAT, BodyKind.JSON),
    (b"GET", rb"/chat/completions/" + _ID + rb"/messages", Operation.CHAT, BodyKind.NONE),
    (b"DELETE", rb"/chat/completions/" + _ID, Operation.CHAT, BodyKind.NONE),
    (b"POST", rb"/responses", Operation.RESPONSES, BodyKind.JSON),
    (b"POST", rb"/responses/input_tokens", Operation.COUNT_TOKENS, BodyKind.JSON),
    (b"POST", rb"/responses/compact", Operation.RESPONSES, BodyKind.JSON),
    (b"GET", rb"/responses/" + _ID, Operation.RESPONSES, BodyKind.NONE),
    (b"DELETE", rb"/responses/" + _ID, Operation.RESPONSES, BodyKind.NONE),
    (b"POST", rb"/responses/" + _ID + rb"/cancel", Operation.RESPONSES, BodyKind.ACTION),
    (b"GET", rb"/responses/" + _ID + rb"/input_items", Operation.RESPONSES, BodyKind.NONE),
    (b"POST", rb"/embeddings", Operation.EMBEDDINGS, BodyKind.JSON),
    (b"POST", rb"/images/generations", Operation.IMAGES, BodyKind.JSON),
    (b"POST", rb"/images/edits", Operation.IMAGES, BodyKind.MULTIPART),
    (b"POST", rb"/images/variations", Operation.IMAGES, BodyKind.MULTIPART),
    (b"POST", rb"/audio/speech", Operation.AUDIO, BodyKind.JSON),
    (b"POST", rb"/audio/transcriptions", Operation.AUDIO, BodyKind.MULTIPART),
    (b"POST", rb"/audio/translations", Operation.AUDIO, BodyKind.MULTIPART),
    (b"POST", rb"/audio/voices", Operation.AUDIO, BodyKind.MULTIPART),
    (b"DELETE", rb"/audio/voices/" + _ID, Operation.AUDIO, BodyKind.NONE),
    (b"GET", rb"/audio/voice_consents", Operation.AUDIO, BodyKind.NONE),
    (b"POST", rb"/audio/voice_consents", Operation.AUDIO, BodyKind.UPLOAD),
    (b"GET", rb"/audio/voice_consents/" + _ID, Operation.AUDIO, BodyKind.NONE),
    (b"POST", rb"/audio/voice_consents/" + _ID, Operation.AUDIO, BodyKind.JSON),
    (b"DELETE", rb"/audio/voice_consents/" + _ID, Operation.AUDIO, BodyKind.NONE),
    (b"GET", rb"/files", Operation.FILES, BodyKind.NONE),
    (b"POST", rb"/files", Operation.FILES, BodyKind.UPLOAD),
    (b"GET", rb"/files/" + _ID, Operation.FILES, BodyKind.NONE),
    (b"DELETE", rb"/files/" + _ID, Operation.FILES, BodyKind.NONE),
    (b"GET", rb"/files/" + _ID + rb"/content", Operation.FILES, BodyKind.NONE),
    (b"POST", rb"/uploads", Operation.FILES, BodyKind.JSON),
    (b"POST", rb"/uploads/" + _ID + rb"/parts", Operation.FILES, BodyKind.UPLOAD),
    (b"POST", rb"/uploads/" + _ID + rb"/complete", Operation.FILES, BodyKind.JSON),
    (b"POST", rb"/uploads/" + _ID + rb"/cancel", Operation.FILES, BodyKind.ACTION),
    (b"GET", rb"/batches", Operation.BATCHES, BodyKind.NONE),
    (b"POST", rb"/batches", Operation.BATCHES, BodyKind.JSON),
    (b"GET", rb"/batches/" + _ID, Operation.BATCHES, BodyKind.NONE),
    (b"POST", rb"/batches/" + _ID + rb"/cancel", Operation.BATCHES, BodyKind.ACTION),
    (b"GET", rb"/models", Operation.MODELS, BodyKind.NONE),
    (b"GET", rb"/models/" + _MODEL_ID, Operation.MODELS, BodyKind.NONE),
    (b"DELETE", rb"/models/" + _MODEL_ID, Operation.MODELS, BodyKind.NONE),
)
ROUTES = tuple(
    (method, re.compile(path), operation, body) for method, path, operation, body in _ROWS
)
CAPS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""What caps the output tokens of a call; the largest counts."""

_GOVERNED = Governed(
    "model", "models", "stream", "stream_options", "max_tokens", "max_completion_tokens",
    "max_output_tokens", "tools", "functions", "provider", "preset", "store", "prompt",
    "web_search_options",
    beside="messages input temperature tool_choice",
)  # fmt: skip
_TOOL = Governed("type", "name", "function", "custom", "server_label")
_GENERATING = frozenset({rb"/chat/completions", rb"/responses"})
_RUN_BY_CALLER = frozenset(
    {"function", "custom", "local_shell", "apply_patch", "computer_use_preview"}
)
_FUNCTION = Governed("name", beside="description parameters strict")
_NARROWS = ("data_collection", "zdr", "require_parameters", "max_price")
"""Of OpenRouter's `provider` object, what only narrows the hosts that may answer."""
_ROUTING = Governed(*_NARROWS)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class OpenAI:
    """The dialect of Chat Completions, Responses and their neighbours."""

    name = "openai"
    default_auth = (b"authorization", b"Bearer ")
    request_id_header = b"x-request-id"
    headers = frozenset(
        {
            b"openai-organization", b"openai-project", b"openai-beta", b"x-client-request-id",
            b"originator", b"session-id", b"thread-id", b"http-referer", b"x-title",
            b"openai-conversation-id",
        }
    )  # fmt: skip

    def match(self, method: bytes, path: bytes, base_path: bytes) -> Matched | None:
        """Match below any of the prefixes that SDKs are configured with."""
        for prefix in (b"/v1", base_path, b""):
            if not path.startswith(prefix + b"/"):
                continue
            rest = path[len(prefix) :]
            for row_method, pattern, operation, body in ROUTES:
                if row_method == method and pattern.fullmatch(rest):
                    return Matched(
                        operation=operation,
                        body=body,
                        path=base_path + rest,
                        generates=method == b"POST" and rest in _GENERATING,
                    )
        return None

    def read_call(self, route: "Route", body: bytes | None, body_bytes: int) -> ModelCall:
        """Read model, stream, token cap and tools, among them those that were called functions."""
        provider, operation = route.provider.name, route.operation
        if not body:
            if route.body is BodyKind.JSON:
                raise invalid("The body is empty.")
            return ModelCall(provider=provider, operation=operation, body_bytes=body_bytes)
        fields = JsonObject(body, _GOVERNED)
        _refuse_rerouting(fields)
        tools = tools_of(fields)
        hidden = [name for field, name in _HIDDEN_TOOLS.items() if fields.raw(field)]
        return ModelCall(
            provider=provider,
            operation=operation,
            model=fields.model(),
            stream=fields.flag("stream"),
            max_tokens=fields.whole(*CAPS),
            tools=names(
                [name for tool in tools for name in tool_names(tool)]
                + [function.text("name") for function in functions_of(fields)]
                + hidden
            ),
            server_tools=names(
                [name for tool in tools if _is_server_tool(tool) for name in tool_names(tool)]
                + hidden
            ),
            parameters=tuple(fields),
            generates=route.generates,
            store=_keeps(route, fields),
            body_bytes=body_bytes,
        )

    def renamed(self, target: bytes, model: str) -> bytes:  # noqa: ARG002 - no model stands in a path
        """Return the target as it is: the model stands in the body."""
        return target

    def usage_reader(self, _route: "Route", _call: ModelCall, _content_type: bytes) -> UsageReader:
        """Return a reader of `usage`, wherever it stands last."""
        return _UsageReader()

    def render_error(self, refusal: Refusal) -> bytes:
        """Return `{"error": {message, type, param, code}}`."""
        return to_json(
            {
                "error": {
                    "message": refusal.sentence(),
                    "type": _TYPES.get(refusal.status, "invalid_request_error"),
                    "param": None,
                    "code": refusal.code,
                    "rules": refusal.rules,
                    "decision_id": refusal.request_id,
                }
            }
        )

    def stream_error(self, code: str, message: str) -> bytes:
        """Return a data event with an error, which chat and responses streams both raise on."""
        error = {"message": message, "type": "gateway_error", "code": code, "param": None}
        return b"data: " + to_json({"error": error}) + b"\n\n"


_HIDDEN_TOOLS = {"web_search_options": "web_search", "prompt": "prompt"}
"""Fields that bring tools which `tools` does not show: a stored prompt may hold any."""


def read_fields(body: bytes) -> JsonObject:
    """Return a body's fields, as they are read for rules."""
    return JsonObject(body, _GOVERNED)


def tools_of(fields: JsonObject) -> list[JsonObject]:
    """Return the tools of a call."""
    return fields.items("tools", _TOOL)


def functions_of(fields: JsonObject) -> list[JsonObject]:
    """Return the functions of a call, as tools were once called."""
    return fields.items("functions", _FUNCTION)


def _keeps(route: "Route", fields: JsonObject) -> bool:
    """Return whether the provider keeps the answer; Responses does where nothing is said."""
    if route.operation is Operation.RESPONSES and route.generates and not fields.raw("store"):
        return True
    return fields.flag("store")


def _is_server_tool(tool: JsonObject) -> bool:
    return tool.text("type") not in _RUN_BY_CALLER


def tool_names(tool: JsonObject) -> list[str]:
    """Return all that a tool may be known by, for which of it counts is the provider's to say.

    A tool of the provider's own is named by its type: `web_search`; an MCP server by its label.
    """
    found = [tool.text("name")]
    for key in ("function", "custom"):
        inner = tool.inner(key, _FUNCTION)
        if inner is not None:
            found.append(inner.text("name"))
    kind = tool.text("type")
    if kind == "mcp":
        return [*found, f"mcp:{tool.text('server_label')}"]
    return found if kind in {"function", "custom"} else [*found, kind]


def _refuse_rerouting(fields: JsonObject) -> None:
    """Refuse what makes a router (OpenRouter and its like) answer from elsewhere than was judged."""
    if "models" in fields:
        raise invalid("Lists of fallback models are not governed; name one model.")
    if "preset" in fields:
        raise invalid("A preset may name another model; name the model in the call.")
    routing = fields.inner("provider", _ROUTING)
    if routing is not None and not set(routing) <= set(_NARROWS):
        raise invalid("The field 'provider' may narrow the hosts that answer, not choose them.")


class _UsageReader(BothEnds):
    def usage(self) -> Usage:
        found = self.last(b"usage")
        if not found:
            return Usage(model=self.model())
        return Usage(
            input=count(found, "prompt_tokens") or count(found, "input_tokens"),
            output=count(found, "completion_tokens") or count(found, "output_tokens"),
            cache_read=count(found, "prompt_tokens_details", "cached_tokens")
            or count(found, "input_tokens_details", "cached_tokens"),
            cache_write=count(found, "prompt_tokens_details", "cache_write_tokens")
            or count(found, "input_tokens_details", "cache_write_tokens"),
            reasoning=count(found, "completion_tokens_details", "reasoning_tokens")
            or count(found, "output_tokens_details", "reasoning_tokens"),
            source="provider",
            model=self.model(),
        )
