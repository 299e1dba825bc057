"""`when:` expressions in CEL over the facts. The only module that knows the CEL library, an extra.

Facts are declared under their own names, dots included, so that a name that is no fact and a
comparison of two types are faults when a policy is loaded. The library bounds iterations and
recursion; a result that is an error is raised here, so that it is never taken for false.

No I/O.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

from policies.document import nearest
from policies.facts import FACTS, Kind, Phase
from policies.known import Known
from policies.request import AccessRequest

try:
    from cel_expr_python import cel
except ImportError:  # the extra is not installed: a policy that needs it does not load
    cel = None

MAX_EXPRESSION: Final = 4096
"""Characters; far above what a person can review."""

_MISSING = "needs the extra `cel`: pip install 'veklom-gateway[cel]', or write it as match:"
_PLACE = re.compile(r"<input>:(\d+):(\d+): (.*)")
_NAME = re.compile(r"[a-z_]+(?:\.[a-z_]+)*")
_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'")
_COMPARED = re.compile(
    r"(?<![\w.])([a-z_]+(?:\.[a-z_]+)*)\s*[!=]=\s*(?:\"([^\"\\]*)\"|'([^'\\]*)')"
    r"|(?:\"([^\"\\]*)\"|'([^'\\]*)')\s+in\s+([a-z_]+)"
)


class ExpressionError(Exception):
    """An expression that cannot be used; `column` counts from its first character."""

    def __init__(self, message: str, line: int = 1, column: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column


class EvaluationError(Exception):
    """An expression that has no answer for one question."""


def compile_expression(
    text: str, known: Known
) -> tuple[Callable[[AccessRequest], bool], frozenset[str]]:
    """Return the predicate that an expression is, and the facts that it reads.

    Raises:
        ExpressionError: It cannot be compiled, is not true or false, or names what nobody knows.
    """
    if cel is None:
        raise ExpressionError(_MISSING)
    if len(text) > MAX_EXPRESSION:
        raise ExpressionError(f"is longer than {MAX_EXPRESSION} characters; split the rule")
    try:
        expression = _environment().compile(text)
    except RuntimeError as error:
        raise _explained(str(error)) from None
    if expression.return_type() != cel.Type.BOOL:
        raise ExpressionError(
            f"is of type {expression.return_type()}, not true or false; compare it with something"
        )
    read = _facts_in(text)
    _check_names(text, known)
    readers = [(name, _reader(name)) for name in sorted(read)]

    def holds(request: AccessRequest) -> bool:
        try:
            value = expression.eval(data={name: get(request) for name, get in readers})
        except RuntimeError as error:
            raise EvaluationError(str(error)) from None
        if value.type() != cel.Type.BOOL:
            raise EvaluationError(str(value.value()))
        return bool(value.value())

    return holds, read


def _facts_in(text: str) -> frozenset[str]:
    """Return the facts that an expression names: of `provider.region.size` the longest that is one."""
    found = set()
    for name in _NAME.findall(_QUOTED.sub("", text)):
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        found.update([next((prefix for prefix in prefixes if prefix in FACTS), "")])
    return frozenset(found - {""})


def _check_names(text: str, known: Known) -> None:
    for found in _COMPARED.finditer(text):
        fact = found[1] or found[6]
        name = next(each for each in (found[2], found[3], found[4], found[5]) if each is not None)
        if fault := known.fault_of(fact, name):
            raise ExpressionError(fault, column=found.start() + 1)


def _explained(error: str) -> ExpressionError:
    found = _PLACE.search(error)
    if found is None:
        return ExpressionError("is no CEL expression")
    message = found[3].replace(" (in container '')", "").partition(" expecting ")[0]
    hint = ""
    if undeclared := re.fullmatch(r"undeclared reference to '([^']*)'", message):
        message = f"reads {undeclared[1]!r}, which is no fact"
        if undeclared[1] in FACTS:
            message = f"reads {undeclared[1]!r}"
            hint = ", known only when the provider has answered; rules decide before that"
        else:
            hint = "; `veklom policy facts` lists them" + nearest(undeclared[1], sorted(FACTS))
    return ExpressionError(f"{message}{hint}", int(found[1]), int(found[2]))


@cache
def _environment() -> Any:
    types = cel.Type
    of_kind = {
        Kind.TEXT: types.STRING,
        Kind.TEXTS: types.List(types.STRING),
        Kind.NUMBER: types.INT,
        Kind.SIZE: types.INT,
        Kind.DURATION: types.INT,
        Kind.FLAG: types.BOOL,
        Kind.ADDRESS: types.STRING,
        Kind.INSTANT: types.TIMESTAMP,
    }
    readable = [fact for fact in FACTS.values() if fact.phase is not Phase.RESPONSE]
    return cel.NewEnv(variables={fact.name: of_kind[fact.kind] for fact in readable})


def _reader(name: str) -> Callable[[AccessRequest], Any]:
    fact = FACTS[name]
    get = fact.read
    if fact.kind is Kind.TEXTS:
        return lambda request: list(get(request))
    if fact.kind is Kind.INSTANT:
        return lambda request: datetime.fromtimestamp(get(request), UTC)
    if fact.kind in {Kind.NUMBER, Kind.SIZE, Kind.DURATION}:
        # Absent is unbounded here as it is in `match:`, so that `max_tokens < 5` does not hold.
        return lambda request: number if (number := int(get(request))) >= 0 else UNBOUNDED
    return lambda request: str(value) if isinstance(value := get(request), str) else value


UNBOUNDED: Final = 2**63 - 1
"""What an absent number is in an expression: the largest that CEL knows."""
