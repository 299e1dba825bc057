"""Anthropic's dialect. No I/O."""

import re
from typing import TYPE_CHECKING, Final

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
_BATCHES = rb"/messages/batches"
_ROWS: tuple[tuple[bytes, bytes, Operation, BodyKind], ...] = (
    (b"POST", rb"/messages", Operation.MESSAGES, BodyKind.JSON),
    (b"POST", rb"/messages/count_tokens", Operation.COUNT_TOKENS, BodyKind.JSON),
    (b"POST", _BATCHES, Operation.BATCHES, BodyKind.JSON),
    (b"GET", _BATCHES, Operation.BATCHES, BodyKind.NONE),
    (b"GET", _BATCHES + rb"/" + _ID, Operation.BATCHES, BodyKind.NONE),
    (b"DELETE", _BATCHES + rb"/" + _ID, Operation.BATCHES, BodyKind.NONE),
    (b"POST", _BATCHES + rb"/" + _ID + rb"/cancel", Operation.BATCHES, BodyKind.ACTION),
    (b"GET", _BATCHES + rb"/" + _ID + rb"/results", Operation.BATCHES, BodyKind.NONE),
    (b"GET", rb"/models", Operation.MODELS, BodyKind.NONE),
    (b"GET", rb"/models/" + _ID, Operation.MODELS, BodyKind.NONE),
)
ROUTES = tuple(
    (method, re.compile(path), operation, body) for method, path, operation, body in _ROWS
)
# Some clients are told the base URL with `/v1`, others without, and some add it themselves.
_PREFIX = re.compile(rb"(?:/v1){0,2}(?=/)")
_GOVERNED = Governed(
    "model", "stream", "max_tokens", "tools", "requests", "mcp_servers", beside="messages system"
)
_REQUEST = Governed("params", beside="custom_id")
_TOOL = Governed("name", "type", "mcp_server_name", beside="description input_schema cache_control")
_SERVER = Governed("name", beside="type url authorization_token tool_configuration")
_RUN_BY_CALLER = ("custom", "bash_", "text_editor_", "computer_", "memory_")
MAX_REQUESTS: Final = 10_000
"""In one batch; each is read, while the worker's other calls wait."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Anthropic:
    """The dialect of Messages."""

    name = "anthropic"
    default_auth = (b"x-api-key", b"")
    request_id_header = b"request-id"
    headers = frozenset(
        {
            b"anthropic-version", b"anthropic-beta", b"anthropic-dangerous-direct-browser-access",
            b"anthropic-workspace-id", b"anthropic-user-profile-id", b"x-app",
        }
    )  # fmt: skip

    def match(self, method: bytes, path: bytes, base_path: bytes) -> Matched | None:
        """Match with no, one or two `/v1`; exactly one goes upstream."""
        prefix = _PREFIX.match(path)
        rest = path[prefix.end() :] if prefix else path
        for row_method, pattern, operation, body in ROUTES:
            if row_method == method and pattern.fullmatch(rest):
                return Matched(
                    operation=operation,
                    body=body,
                    path=base_path + b"/v1" + rest,
                    generates=operation is Operation.MESSAGES,
                )
        return None

    def read_call(self, route: "Route", body: bytes | None, body_bytes: int) -> ModelCall:
        """Read model, stream, token cap and tools; of a batch, what covers all its requests."""
        provider, operation = route.provider.name, route.operation
        if not body:
            if route.body is BodyKind.JSON:
                raise invalid("The body is empty.")
            return ModelCall(provider=provider, operation=operation, body_bytes=body_bytes)
        fields = JsonObject(body, _GOVERNED)
        if route.operation is Operation.BATCHES:
            model, max_tokens, tools, server_tools = _read_batch(fields)
            return ModelCall(
                provider=provider,
                operation=operation,
                model=model,
                max_tokens=max_tokens,
                tools=tools,
                server_tools=server_tools,
                parameters=tuple(fields),
                body_bytes=body_bytes,
            )
        return ModelCall(
            provider=provider,
            operation=operation,
            model=fields.model(),
            stream=fields.flag("stream"),
            max_tokens=fields.whole("max_tokens"),
            tools=names(_tool_names(fields)),
            server_tools=names(_server_tool_names(fields)),
            parameters=tuple(fields),
            generates=route.generates,
            body_bytes=body_bytes,
        )

    def renamed(self, target: bytes, model: str) -> bytes:  # noqa: ARG002 - no model stands in a path
        """Return the target as it is: the model stands in the body."""
        return target

    def usage_reader(self, _route: "Route", _call: ModelCall, _content_type: bytes) -> UsageReader:
        """Return a reader of the first and the last `usage`."""
        return _UsageReader()

    def render_error(self, refusal: Refusal) -> bytes:
        """Return `{"type": "error", "error": {type, message}, "request_id"}`."""
        error = {
            "type": _TYPES.get(refusal.status, "api_error"),
            "message": refusal.sentence(),
            "details": {
                "error_code": refusal.code,
                "rules": refusal.rules,
                "decision_id": refusal.request_id,
            },
        }
        return to_json({"type": "error", "error": error, "request_id": refusal.request_id})

    def stream_error(self, code: str, message: str) -> bytes:
        """Return an `error` event."""
        error = {"type": "api_error", "message": f"{message} [{code}]"}
        return b"event: error\ndata: " + to_json({"type": "error", "error": error}) + b"\n\n"


def _read_batch(fields: JsonObject) -> tuple[str, int, tuple[str, ...], tuple[str, ...]]:
    """Return the one model of a batch, its largest token cap, and the tools of every request."""
    models: set[str] = set()
    max_tokens = -1
    tools: dict[str, None] = {}
    server_tools: dict[str, None] = {}
    for request in fields.items("requests", _REQUEST, MAX_REQUESTS):
        params = request.inner("params", _GOVERNED)
        model = params.model() if params else ""
        if params is None or not model:
            raise invalid("A request of the batch names no model.")
        models.add(model)
        max_tokens = max(max_tokens, params.whole("max_tokens"))
        tools.update(dict.fromkeys(_tool_names(params)))
        server_tools.update(dict.fromkeys(_server_tool_names(params)))
    if not models:
        raise invalid("The batch holds no request.")
    if len(models) > 1:
        raise invalid("The batch names several models; send one batch for each.")
    return models.pop(), max_tokens, names(tools), names(server_tools)


def read_fields(body: bytes) -> JsonObject:
    """Return a body's fields, as they are read for rules."""
    return JsonObject(body, _GOVERNED)


def tools_of(fields: JsonObject) -> list[JsonObject]:
    """Return the tools of a call."""
    return fields.items("tools", _TOOL)


def servers_of(fields: JsonObject) -> list[JsonObject]:
    """Return the MCP servers of a call."""
    return fields.items("mcp_servers", _SERVER)


def tool_name(tool: JsonObject) -> str:
    """Return the name of a tool, its type where it has none; a set of MCP tools is its server's."""
    if tool.text("type") == "mcp_toolset":
        return f"mcp:{tool.text('mcp_server_name')}"
    return tool.text("name") or tool.text("type")


def server_name(server: JsonObject) -> str:
    """Return what rules know an MCP server by."""
    return f"mcp:{server.text('name')}"


def _tool_names(params: JsonObject) -> list[str]:
    return [*map(tool_name, tools_of(params)), *map(server_name, servers_of(params))]


def _server_tool_names(params: JsonObject) -> list[str]:
    typed = [tool for tool in tools_of(params) if tool.text("type")]
    run_there = [tool for tool in typed if not tool.text("type").startswith(_RUN_BY_CALLER)]
    return [*map(tool_name, run_there), *map(server_name, servers_of(params))]


class _UsageReader(BothEnds):
    def usage(self) -> Usage:
        begun, ended = self.first(b"usage"), self.last(b"usage")
        if not begun and not ended:
            return Usage(model=self.model())

        def latest(key: str) -> int:
            return count(ended, key) or count(begun, key)

        read, written = latest("cache_read_input_tokens"), latest("cache_creation_input_tokens")
        return Usage(
            input=latest("input_tokens") + read + written,
            output=latest("output_tokens"),
            cache_read=read,
            cache_write=written,
            source="provider",
            model=self.model(),
        )
