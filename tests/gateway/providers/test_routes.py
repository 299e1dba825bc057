"""The route tables against the official SDKs' own sources, and the door's refusals."""

import ast
import importlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import cast

import pytest

from gateway.errors import Refused
from gateway.problems import problem_from, render
from gateway.providers.catalogue import CATALOGUE
from gateway.providers.dialect import BodyKind
from gateway.providers.provider import Provider
from gateway.providers.routes import Route, RouteTable, TargetRefused
from policies.request import Operation

_CALLS = {
    "_get": "GET", "_post": "POST", "_put": "PUT", "_patch": "PATCH", "_delete": "DELETE",
    "_get_api_list": "GET",
}  # fmt: skip
_GOOGLE_CALLS = {"request", "async_request", "request_streamed", "async_request_streamed"}

OPENAI_EXCLUDED = {
    "/organization": "administers the provider's account; never with a caller's key",
    "/projects": "administers the provider's account; never with a caller's key",
    "/agents": "agents that run at the provider call models that no rule sees",
    "/vaults": "credentials of those agents",
    "/skills": "code for those agents",
    "/assistants": "runs at the provider call models that no rule sees",
    "/threads": "runs at the provider call models that no rule sees",
    "/chatkit": "mints client secrets, with which a browser goes past the gateway",
    "/realtime": "WebSockets, and client secrets that go past the gateway",
    "/live": "WebSockets, and client secrets that go past the gateway",
    "/evals": "runs at the provider call models that no rule sees",
    "/fine_tuning": "trains models; not an operation that rules know yet",
    "/conversations": "not an operation that rules know yet",
    "/vector_stores": "not an operation that rules know yet",
    "/containers": "not an operation that rules know yet",
    "/videos": "not an operation that rules know yet",
    "/moderations": "not an operation that rules know yet",
    "/decisions": "not an operation that rules know yet",
    "/content_provenance_checks": "not an operation that rules know yet",
    "/safety": "administers the provider's account",
    "/webhook_endpoints": "has the provider call others; administers the account",
    "/webhook_event_types": "has the provider call others; administers the account",
    "/completions": "the predecessor of Chat Completions, on its way out",
}
ANTHROPIC_EXCLUDED = {
    "/v1/organizations": "administers the provider's account; never with a caller's key",
    "/v1/user_profiles": "administers the provider's account",
    "/v1/sessions": "agents that run at the provider call models that no rule sees",
    "/v1/agents": "agents that run at the provider call models that no rule sees",
    "/v1/environments": "agents that run at the provider call models that no rule sees",
    "/v1/deployments": "agents that run at the provider call models that no rule sees",
    "/v1/deployment_runs": "agents that run at the provider call models that no rule sees",
    "/v1/dreams": "agents that run at the provider call models that no rule sees",
    "/v1/memory_stores": "what those agents remember",
    "/v1/vaults": "credentials of those agents",
    "/v1/tunnels": "ways for those agents into private networks",
    "/v1/skills": "code for those agents",
    "/v1/files": "not an operation of this dialect that rules know yet",
}
GEMINI_EXCLUDED = {
    "predict": "Imagen, being replaced by generateContent; not an operation that rules know yet",
    "predictLongRunning": "video; not an operation that rules know yet",
    "computeTokens": "Vertex AI only",
}
GEMINI_EXCLUDED_METHODS = {"PATCH": "changes tuned models", "DELETE": "deletes tuned models"}


@cache
def _table() -> RouteTable:
    return RouteTable(
        Provider.from_url(
            name, entry.dialect, entry.base_url or "http://127.0.0.1:1/v1",
            request_stream_usage=True,
        )
        for name, entry in CATALOGUE.items()
    )  # fmt: skip


def _find(target: bytes, method: bytes = b"GET") -> Route:
    return _table().find(method, target)


def _sources(package: str, part: str) -> Iterator[ast.AST]:
    root = Path(str(importlib.import_module(package).__file__)).parent / part
    files = root.rglob("*.py") if root.is_dir() else [root]
    for file in sorted(files):
        yield ast.parse(file.read_text())


def _stainless_operations(package: str) -> set[tuple[str, str]]:
    """Return method and path template of every request in an SDK's resource modules."""
    found = set()
    for tree in _sources(package, "resources"):
        for node in ast.walk(tree):
            if not (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in _CALLS
                and node.args
            ):
                continue
            path = node.args[0]
            if isinstance(path, ast.Call):  # path_template("/files/{file_id}", file_id=…)
                path = path.args[0]
            method = _CALLS[node.func.attr]
            for keyword in node.keywords:
                if keyword.arg == "method":
                    method = str(cast("ast.Constant", keyword.value).value).upper()
            template = str(path.value) if isinstance(path, ast.Constant) else ast.unparse(path)
            found.add((method, template))
    return found


def _google_operations() -> set[tuple[str, str]]:
    """Return method and path template of every request in google-genai's `models`."""
    found = set()
    for tree in _sources("google.genai", "models.py"):
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            paths = [
                str(node.value.value)
                for node in ast.walk(function)
                if isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == "path"
            ]
            methods = [
                str(cast("ast.Constant", node.args[0]).value).upper()
                for node in ast.walk(function)
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in _GOOGLE_CALLS
                and len(node.args) >= 2
            ]
            found |= {(method, path) for method in methods for path in paths}
    return found


def _filled(template: str) -> bytes:
    return re.sub(r"\{[^}]+\}", "some-id_1", template).encode()


def _excluded(template: str, excluded: dict[str, str]) -> list[str]:
    return [each for each in excluded if re.match(re.escape(each) + r"(?:[/?]|$)", template)]


def test_every_operation_of_the_openai_sdk_has_a_route_or_a_reason() -> None:
    """Each request that the installed SDK can make is routed, or excluded for a stated reason."""
    operations = _stainless_operations("openai")
    assert len(operations) > 100
    unused = set(OPENAI_EXCLUDED)
    for method, template in operations:
        reasons = _excluded(template, OPENAI_EXCLUDED)
        unused -= set(reasons)
        if reasons:
            with pytest.raises(TargetRefused):
                _find(b"/openai/v1" + _filled(template), method.encode())
            continue
        route = _find(b"/openai/v1" + _filled(template), method.encode())
        assert route.upstream_target == b"/v1" + _filled(template)
        assert (route.body is BodyKind.NONE) == (method in {"GET", "DELETE"}), template
    assert not unused


def test_every_operation_of_the_anthropic_sdk_has_a_route_or_a_reason() -> None:
    """Each request that the installed SDK can make is routed, or excluded for a stated reason."""
    operations = _stainless_operations("anthropic")
    # The one path that is no literal: the SDK follows the address in the provider's own answer.
    operations.remove(("GET", "batch.results_url"))
    operations.add(("GET", "/v1/messages/batches/{message_batch_id}/results"))
    unused = set(ANTHROPIC_EXCLUDED)
    for method, template in operations:
        reasons = _excluded(template, ANTHROPIC_EXCLUDED)
        unused -= set(reasons)
        if reasons:
            with pytest.raises(TargetRefused):
                _find(b"/anthropic" + _filled(template), method.encode())
            continue
        route = _find(b"/anthropic" + _filled(template), method.encode())
        assert route.upstream_target == _filled(template)
    assert not unused


def test_every_operation_of_the_google_sdk_has_a_route_or_a_reason() -> None:
    """Each request of google-genai's `models` is routed, or excluded for a stated reason."""
    operations = _google_operations()
    unused = {*GEMINI_EXCLUDED, *GEMINI_EXCLUDED_METHODS}
    known = set()
    for method, template in operations:
        verb = template.partition(":")[2].partition("?")[0]
        path = template.replace("{models_url}", "models").replace("{model}", "models/g")
        target = b"/gemini/v1beta/" + _filled(path.replace("{name}", "models/g"))
        if method in GEMINI_EXCLUDED_METHODS or verb in GEMINI_EXCLUDED:
            unused -= {method, verb}
            with pytest.raises(TargetRefused):
                _find(target, method.encode())
            continue
        route = _find(target, method.encode())
        assert route.upstream_target == target.removeprefix(b"/gemini")
        known.add(verb)
    assert not unused
    assert known == {
        "", "generateContent", "streamGenerateContent", "batchEmbedContents", "countTokens"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "method", "operation", "body"),
    [
        (b"/openai/v1/chat/completions/c", b"POST", Operation.CHAT, BodyKind.JSON),
        (b"/openai/v1/models/ft:gpt:acme", b"DELETE", Operation.MODELS, BodyKind.NONE),
        (b"/openai/v1/audio/voices", b"POST", Operation.AUDIO, BodyKind.MULTIPART),
        (b"/openai/v1/audio/voices/v", b"DELETE", Operation.AUDIO, BodyKind.NONE),
        (b"/openai/v1/audio/voice_consents", b"POST", Operation.AUDIO, BodyKind.UPLOAD),
        (b"/openai/v1/audio/voice_consents/c", b"POST", Operation.AUDIO, BodyKind.JSON),
        (b"/openai/v1/uploads", b"POST", Operation.FILES, BodyKind.JSON),
        (b"/openai/v1/uploads/u/parts", b"POST", Operation.FILES, BodyKind.UPLOAD),
        (b"/openai/v1/uploads/u/complete", b"POST", Operation.FILES, BodyKind.JSON),
        (b"/openai/v1/uploads/u/cancel", b"POST", Operation.FILES, BodyKind.ACTION),
        (b"/together/v1/models/meta-llama/Llama-4", b"GET", Operation.MODELS, BodyKind.NONE),
    ],
)
def test_a_route_knows_its_operation_and_its_body(
    target: bytes, method: bytes, operation: Operation, body: BodyKind
) -> None:
    """What an operation is called in rules, and how its body is read, follow from the path."""
    route = _find(target, method)
    assert (route.operation, route.body) == (operation, body)


@pytest.mark.parametrize(
    ("target", "upstream"),
    [
        (b"/openai/v1/responses/a%3Ab%2Fc", b"/v1/responses/a%3Ab%2Fc"),
        (b"/openai/v1/files/%e4%BD%a0?x=%2e%2E&y=a+b", b"/v1/files/%e4%BD%a0?x=%2e%2E&y=a+b"),
        (b"/anthropic/v1/models/a%3Ab%2Fc", b"/v1/models/a%3Ab%2Fc"),
        (b"/gemini/v1beta/models/a%3Ab", b"/v1beta/models/a%3Ab"),
        (b"/groq/v1/models/a%3Ab%2Fc", b"/openai/v1/models/a%3Ab%2Fc"),
    ],
)
def test_path_bytes_are_sacred(target: bytes, upstream: bytes) -> None:
    """What an SDK has encoded goes upstream as it came, in upper and lower case alike."""
    assert _find(target).upstream_target == upstream


@pytest.mark.parametrize(
    ("target", "upstream"),
    [
        (b"/anthropic/v1/models", b"/v1/models"),
        (b"/anthropic/v1/v1/models", b"/v1/models"),
        (b"/anthropic/models", b"/v1/models"),
        (b"/openai/v1/models", b"/v1/models"),
        (b"/openai/models", b"/v1/models"),
        (b"/groq/openai/v1/models", b"/openai/v1/models"),
        (b"/groq/v1/models", b"/openai/v1/models"),
        (b"/gemini/v1/models", b"/v1/models"),
        (b"/gemini/v1beta/models", b"/v1beta/models"),
        (b"/gemini/models", b"/v1beta/models"),
    ],
)
def test_every_customary_prefix_leads_to_one_path(target: bytes, upstream: bytes) -> None:
    """Base URLs with and without the version name the same operation upstream."""
    assert _find(target).upstream_target == upstream


@pytest.mark.parametrize(
    "target",
    [
        b"/openai/v1/../models", b"/openai/v1/%2e%2e/models", b"/openai/v1/./models",
        b"/openai/v1/files/a%2f..%2fb", b"/openai/v1/files/..;/b", b"/openai//v1/models",
        b"/openai/v1/files/a\\b", b"/openai/v1/files/a%5Cb", b"/openai/v1/files/a%0d%0ab",
        b"/openai/v1/files/a%zz", b"/openai/v1/models#x", b"/openai/v1/files/a b",
        b"/openai/v1/files/\xc3\xa4", b"http://api.openai.com/v1/models", b"*", b"openai:443",
        b"/openai/v1/models?" + b"x" * 8192,
    ],
)  # fmt: skip
def test_targets_that_two_servers_could_read_differently_are_refused(target: bytes) -> None:
    """Dot segments, doubled and turned slashes, bad escapes, absolute form: 400, for no provider."""
    with pytest.raises(Refused) as refused:
        _find(target)
    assert problem_from(refused.value).status == 400


@pytest.mark.parametrize(
    ("target", "method", "status"),
    [
        (b"/openai/v1/fine_tuning/jobs", b"GET", 404),
        (b"/openai/v1/embeddings", b"GET", 405),
        (b"/openai/v1/models", b"PUT", 405),
        (b"/openai/v2/models", b"GET", 404),
        (b"/openai/v1/v1/models", b"GET", 404),
        (b"/openai", b"GET", 404),
        (b"/anthropic/v1/complete", b"POST", 404),
        (b"/anthropic/v1/v1/v1/models", b"GET", 404),
        (b"/anthropic/v1/messages", b"GET", 405),
        (b"/gemini/v1beta/models/g:predict", b"POST", 404),
        (b"/gemini/v1beta/models/g:generateContent", b"GET", 405),
        (b"/gemini/v1beta/tunedModels", b"GET", 404),
        (b"/", b"GET", 404),
        (b"/nobody/v1/models", b"GET", 404),
    ],
)
def test_what_is_unknown_is_said_in_the_shape_of_its_dialect(
    target: bytes, method: bytes, status: int
) -> None:
    """404 and 405 have the provider's own error shape, and problem+json where it is nobody's."""
    with pytest.raises(TargetRefused) as unknown:
        _find(target, method)
    problem = problem_from(unknown.value)
    assert problem.status == status
    dialect = unknown.value.dialect
    head, _, body = render(problem, dialect, [], keep_alive=True).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    answer = json.loads(body)
    owner = target.split(b"/")[1]
    if owner == b"openai":
        assert dialect is not None
        assert dialect.name == "openai"
        assert set(answer["error"]) >= {"message", "type", "param", "code"}
    elif owner == b"anthropic":
        assert answer["type"] == "error"
        assert set(answer["error"]) >= {"type", "message"}
    elif owner == b"gemini":
        assert answer["error"]["code"] == status
        assert set(answer["error"]) >= {"message", "status"}
    else:
        assert dialect is None
        assert b"content-type: application/problem+json" in head
        assert (answer["status"], answer["type"]) == (status, f"urn:veklom:problem:{problem.code}")


def test_a_head_request_is_routed_as_a_get() -> None:
    """Whoever may read a thing may ask about it; nothing else answers HEAD."""
    assert _find(b"/openai/v1/models", b"HEAD").operation is Operation.MODELS
    with pytest.raises(TargetRefused):
        _find(b"/openai/v1/embeddings", b"HEAD")
