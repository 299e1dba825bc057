"""What a policy obliges to, done to a call's body in its dialect: spliced in, never encoded anew.

Where the caller's body has no place for a change, or the change did not come out as the judge
assumed, the call is refused: what was judged is what is sent. No I/O.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.errors import Refused
from gateway.providers import anthropic, gemini, openai
from gateway.providers.bodies import JsonObject
from gateway.providers.dialect import to_json
from gateway.providers.splicing import ObjectEdit, keep_items, put_first
from policies.obligations import Obligations
from policies.request import ModelCall, Operation

if TYPE_CHECKING:
    from gateway.providers.routes import Route

_OWN_HOSTS: Final = (".openai.com", ".openai.azure.com")
"""Where chat caps tokens with `max_completion_tokens`; other speakers of the dialect know the old name."""


def rewrite(route: "Route", body: bytes, obligations: Obligations, judged: ModelCall) -> bytes:
    """Return the body with the obligations met; `route` is where it goes.

    Raises:
        Refused: It has no place for a change, or would be another call than the one judged.
    """
    dialect = route.provider.dialect
    changed = _REWRITERS[dialect.name](route, body, obligations)
    sent = dialect.read_call(route, changed, len(changed))
    is_as_judged = (
        (sent.model, sent.max_tokens, sent.store, sent.stream)
        == (judged.model, judged.max_tokens, judged.store, judged.stream)
        and set(sent.tools) <= set(judged.tools)
        and set(sent.parameters) <= {*judged.parameters, *_PLACES}
    )
    if not is_as_judged:
        raise _impossible("a rule's change cannot be made to it")
    return changed


_PLACES: Final = frozenset(
    {
        "max_completion_tokens", "max_tokens", "max_output_tokens", "generationConfig", "system",
        "instructions", "systemInstruction",
    }
)  # fmt: skip
"""Fields that an obligation may put in under its own name."""


def _impossible(why: str) -> Refused:
    return Refused("policy_denied", f"The policy must change this call, and {why}.")


def _begin(fields: JsonObject, obligations: Obligations) -> ObjectEdit:
    """Return an edit with what is the same in every dialect."""
    edit = ObjectEdit(fields)
    for name in obligations.strip:
        edit.remove(name)
    for name, value in obligations.set:
        edit.put(name, to_json(value))
    return edit


def _before(system: str, there: bytes) -> bytes:
    """Return a text with the system text before it, as JSON."""
    try:
        text = msgspec.json.decode(there, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _impossible("its own instructions cannot be read") from None
    return to_json(f"{system}\n\n{text}" if text else system)


def _is_list(data: bytes) -> bool:
    return data.startswith(b"[")


# --- OpenAI --------------------------------------------------------------------------------------


def _openai(route: "Route", body: bytes, obligations: Obligations) -> bytes:
    fields = openai.read_fields(body)
    edit = _begin(fields, obligations)
    if obligations.model:
        edit.put("model", to_json(obligations.model))
    if obligations.max_tokens >= 0:
        given = [name for name in openai.CAPS if fields.raw(name)]
        for name in given or [_openai_cap(route)]:
            if not given or fields.whole(name) > obligations.max_tokens:
                edit.put(name, b"%d" % obligations.max_tokens)
    if obligations.tools is not None:
        _openai_tools(fields, edit, obligations.tools)
    if obligations.system:
        _openai_system(route, fields, edit, obligations.system)
    return edit.result()


def _openai_cap(route: "Route") -> str:
    if route.operation is Operation.RESPONSES:
        return "max_output_tokens"
    return "max_completion_tokens" if route.provider.host.endswith(_OWN_HOSTS) else "max_tokens"


def _openai_tools(fields: JsonObject, edit: ObjectEdit, stay: frozenset[str]) -> None:
    def stays(tool: JsonObject) -> bool:
        return stay.issuperset(filter(None, openai.tool_names(tool)))

    gone = _filter(fields, edit, "tools", openai.tools_of(fields), stays)
    functions = openai.functions_of(fields)
    gone |= _filter(fields, edit, "functions", functions, lambda each: each.text("name") in stay)
    if "web_search" not in stay:
        edit.remove("web_search_options")
    if gone:
        _forget_choice(fields, edit, stay, ("tool_choice", "parallel_tool_calls", "function_call"))


def _openai_system(route: "Route", fields: JsonObject, edit: ObjectEdit, system: str) -> None:
    if route.operation is Operation.RESPONSES:
        there = fields.raw("instructions")
        edit.put("instructions", _before(system, there or b'""'))
        return
    messages = fields.raw("messages")
    if not _is_list(messages):
        raise _impossible("it has no messages")
    edit.put("messages", put_first(messages, to_json({"role": "system", "content": system})))


# --- Anthropic -----------------------------------------------------------------------------------


def _anthropic(_route: "Route", body: bytes, obligations: Obligations) -> bytes:
    fields = anthropic.read_fields(body)
    edit = _begin(fields, obligations)
    if obligations.model:
        edit.put("model", to_json(obligations.model))
    if obligations.max_tokens >= 0:
        edit.put("max_tokens", b"%d" % obligations.max_tokens)
    if (stay := obligations.tools) is not None:
        _anthropic_tools(fields, edit, stay)
    if obligations.system:
        there = fields.raw("system")
        if _is_list(there):
            block = to_json({"type": "text", "text": obligations.system})
            edit.put("system", put_first(there, block))
        else:
            edit.put("system", _before(obligations.system, there or b'""'))
    return edit.result()


def _anthropic_tools(fields: JsonObject, edit: ObjectEdit, stay: frozenset[str]) -> None:
    tools, servers = anthropic.tools_of(fields), anthropic.servers_of(fields)
    gone = _filter(fields, edit, "tools", tools, lambda each: anthropic.tool_name(each) in stay)
    _filter(fields, edit, "mcp_servers", servers, lambda each: anthropic.server_name(each) in stay)
    if gone:
        _forget_choice(fields, edit, stay, ("tool_choice",))


# --- Gemini --------------------------------------------------------------------------------------

_SYSTEM = ("systemInstruction", "system_instruction")


def _gemini(_route: "Route", body: bytes, obligations: Obligations) -> bytes:
    fields = gemini.read_fields(body)
    edit = _begin(fields, obligations)
    if obligations.model and "model" in fields:
        edit.put("model", to_json(f"models/{obligations.model}"))
    if obligations.max_tokens >= 0:
        name, config = gemini.config_of(fields)
        value = b"%d" % obligations.max_tokens
        if config is None:
            edit.put(name, b'{"maxOutputTokens":%b}' % value)
        else:
            inner = ObjectEdit(config)
            inner.put(gemini.cap_field(config), value)
            edit.put(name, inner.result())
    if obligations.tools is not None:
        _gemini_tools(fields, edit, obligations.tools)
    if obligations.system:
        name = gemini.spelling(fields, _SYSTEM)
        edit.put(name, _gemini_system(fields.raw(name), obligations.system))
    return edit.result()


def _gemini_tools(fields: JsonObject, edit: ObjectEdit, stay: frozenset[str]) -> None:
    """Take functions and server tools out of tools, each of which may hold several of both."""
    items = []
    for tool in gemini.tools_of(fields):
        declared, functions = gemini.declarations_of(tool)
        inner = ObjectEdit(tool)
        _filter(tool, inner, declared, functions, lambda each: each.text("name") in stay)
        for key in tool:
            if key != declared and gemini.server_tool_name(key) not in stay:
                inner.remove(key)
        items.append(inner.result())
    left = [item for item in items if json.loads(item)]
    if len(left) < len(items) and not left:
        edit.remove("tools")
        edit.remove("toolConfig")
        edit.remove("tool_config")
    elif items:
        edit.put("tools", b"[%b]" % b",".join(left))


def _gemini_system(there: bytes, system: str) -> bytes:
    part = to_json({"text": system})
    if not there:
        return b'{"parts":[%b]}' % part
    content = JsonObject(there, gemini.CONTENT, "The field 'systemInstruction'")
    parts = content.raw("parts")
    if parts and not _is_list(parts):
        raise _impossible("its own instructions cannot be read")
    inner = ObjectEdit(content)
    inner.put("parts", put_first(parts or b"[]", part))
    return inner.result()


# --- lists of tools ------------------------------------------------------------------------------


def _filter(
    fields: JsonObject,
    edit: ObjectEdit,
    name: str,
    items: list[JsonObject],
    stays: Callable[[JsonObject], bool],
) -> bool:
    """Keep the items of a list that stay, or no list where none does; return whether any went."""
    kept = [stays(item) for item in items]
    if all(kept):
        return False
    if any(kept):
        edit.put(name, keep_items(fields.raw(name), [item.data for item in items], kept))
    else:
        edit.remove(name)
    return True


def _forget_choice(
    fields: JsonObject, edit: ObjectEdit, stay: frozenset[str], names: tuple[str, ...]
) -> None:
    """Take out what chooses among tools, where it names one or none is left: providers refuse it."""
    for name in names:
        if not stay or fields.raw(name).startswith(b"{"):
            edit.remove(name)


_REWRITERS: Final[dict[str, Callable[["Route", bytes, Obligations], bytes]]] = {
    "openai": _openai,
    "anthropic": _anthropic,
    "gemini": _gemini,
}
