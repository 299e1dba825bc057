"""The house keeps its own laws: who may import what, and every exception with its reason."""

import ast
import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CODE = [
    path
    for folder in ("gateway", "policies", "keys", "tests", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "node_modules" not in path.parts
]


def contract(name: str) -> dict[str, Any]:
    """Return the import contract of this name."""
    (found,) = (c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["name"] == name)
    return dict(found)


def module_of(path: Path) -> str:
    """Return the dotted name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_who_says_no_io_is_held_to_it() -> None:
    """Every module whose docstring says "No I/O" is in the contract that forbids it."""
    sources = contract("pure modules do no I/O")["source_modules"]
    say_so = [
        module_of(path)
        for path in CODE
        if path.parts[len(ROOT.parts)] not in {"tests", "bench"}
        and "No I/O" in (ast.get_docstring(ast.parse(path.read_text())) or "")
    ]
    assert len(say_so) > 20
    for name in say_so:
        assert any(name == held or name.startswith(f"{held}.") for held in sources), name


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("keys import cryptography and nothing else", {"cryptography"}),
        ("policies import msgspec and ruamel.yaml and nothing else", {"msgspec", "ruamel"}),
    ],
)
def test_the_cores_may_import_only_what_is_listed(name: str, allowed: set[str]) -> None:
    """Whatever is installed to run the gateway is forbidden to a core unless the core needs it."""
    locked = (ROOT / "requirements/runtime.txt").read_text()
    installed = set(re.findall(r"^([a-z0-9-]+)==", locked, re.MULTILINE))
    packages = {
        package
        for package, distributions in packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", each).lower() in installed for each in distributions)
        and package.isidentifier()
    }
    assert len(packages) > 15
    forbidden = set(contract(name)["forbidden_modules"])
    assert packages - forbidden == allowed
    assert not forbidden & allowed


def test_every_exception_says_why() -> None:
    """No `noqa` and no `type: ignore` stands without its codes, no `noqa` without a reason."""
    marked = re.compile(r"#\s*noqa(.*)|#\s*type:\s*ignore(.*)")
    for path in CODE:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if (found := marked.search(line)) and path != Path(__file__):
                noqa, ignore = found.groups()
                told = (
                    re.match(r"\[[a-z-]+(, ?[a-z-]+)*\]", ignore)
                    if noqa is None
                    else re.match(r": [A-Z]+[0-9]+(, [A-Z]+[0-9]+)* - \w", noqa)
                )
                assert told, f"{path}:{number}: {line.strip()}"


def test_every_ignored_rule_says_why() -> None:
    """Every rule that the linter is told to leave out has its reason beside it."""
    text = (ROOT / "pyproject.toml").read_text()
    (ignored,) = re.findall(r"^ignore = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert all(re.match(r'\s+"[A-Z]+[0-9]+",\s*# \w', line) for line in ignored.splitlines())
