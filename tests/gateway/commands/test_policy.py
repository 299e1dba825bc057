"""The workbench as people and CI use it: what it prints, and what it ends with."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway.cli import main
from policies.facts import to_record
from tests.policies.asking import ask

POLICY = """\
rules:
  - id: a
    effect: allow
    match: {tenant: acme, model: ["gpt-5*"]}
  - id: b
    effect: deny
    match: {model: gpt-5-pro}
    message: Too dear.
"""
TESTS = """\
fixtures: {call: {tenant: acme, provider: openai, model: gpt-5}}
tests:
  - {name: small, given: call, expect: allow}
  - {name: "dear & large", given: call, with: {model: gpt-5-pro}, expect: {verdict: deny, rules: b}}
"""


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a policy and its tests, where there is no configuration."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "p.yaml").write_text(POLICY)
    (folder / "p_test.yaml").write_text(TESTS)
    return folder


def run(*arguments: object, stdin: str = "") -> Result:
    """Run `veklom policy`."""
    return CliRunner().invoke(main, ["policy", *map(str, arguments)], input=stdin)


def test_check(bundle: Path) -> None:
    """A sound bundle has a digest and no advice; a wrong one every fault and its own exit code."""
    result = run("check", bundle)
    assert result.exit_code == 0
    assert "2 rules (0 in shadow), 0 limits, 0 warnings" in result.output
    (bundle / "q.yaml").write_text("rules: [{id: c, effect: allow, match: {provider: opnai}}]")
    result = run("check", bundle)
    assert result.exit_code == 3
    assert "q.yaml:1:50: rules[0].match.provider names 'opnai'" in result.stderr
    assert "did you mean 'openai'?" in result.stderr


def test_check_advises(bundle: Path) -> None:
    """A rule that can do nothing is advice; with --strict it fails."""
    (bundle / "q.yaml").write_text(
        "rules: [{id: c, effect: allow, match: {tenant: acme, model: gpt-5}}]"
    )
    result = run("check", bundle)
    assert (result.exit_code, run("check", "--strict", bundle).exit_code) == (0, 3)
    assert "q.yaml:1:9: warning: allow 'c' adds nothing" in result.output


def test_the_configuration_says_what_there_is(bundle: Path) -> None:
    """Without a bundle the configuration names it, its providers and its issuers' tenants."""
    config = bundle.parent / "config.yaml"
    config.write_text(
        "providers: {openai: {region: eu}}\npolicies: {path: policies}\n"
        "issuers: [{issuer: 'https://i', audiences: a, tenants: [acme]}]\n"
    )
    assert run("check").exit_code == 0
    assert run("test").exit_code == 0
    (bundle / "q.yaml").write_text(
        "rules: [{id: c, effect: deny, match: {tenant: acmee, provider: gemini}}]"
    )
    result = run("check", "--config", config)
    assert result.exit_code == 3
    assert "names 'acmee', which is no known tenant" in result.stderr
    assert "names 'gemini', which is no configured provider" in result.stderr


def test_test(bundle: Path) -> None:
    """Tests are counted, failures told, and CI learns of them by the exit code."""
    result = run("test", bundle, "--coverage")
    assert result.exit_code == 0
    assert "2 passed, 0 failed, coverage 40 %" in result.output
    assert "rule 'a': rule was never seen false" in result.output
    assert run("test", bundle, "--min-coverage", 41).exit_code == 4
    assert "1 passed, 0 failed" in run("test", bundle, "--filter", "small").output
    (bundle / "p_test.yaml").write_text(TESTS.replace("rules: b", "rules: a"))
    result = run("test", bundle)
    assert result.exit_code == 4
    assert "FAILED dear & large" in result.output
    assert "expected rules [a], got [b]" in result.output
    (bundle / "p_test.yaml").write_text(TESTS.replace("given", "givn"))
    assert run("test", bundle).exit_code == 3
    (bundle / "p_test.yaml").unlink()
    assert run("test", bundle).exit_code == 0
    assert run("test", bundle, "--require-tests").exit_code == 4


def test_results_for_machines(bundle: Path) -> None:
    """JUnit and JSON hold every case, with its place and what is otherwise."""
    (bundle / "p_test.yaml").write_text(TESTS.replace("rules: b", "rules: a"))
    suites = ET.fromstring(run("test", bundle, "-o", "junit").output)  # noqa: S314 - our own words
    (suite,) = suites
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert [case.get("name") for case in suite] == ["small", "dear & large"]
    assert suite[1][0].text == "expected rules [a], got [b]; because deny 'b' matched"
    report: Any = json.loads(run("test", bundle, "-o", "json").output)
    assert [case["passed"] for case in report["tests"]] == [True, False]
    assert report["coverage"]["percent"] == 40


def test_explain(bundle: Path, tmp_path: Path) -> None:
    """A question from a file, from standard input or from the log is explained condition by condition."""
    facts = tmp_path / "facts.yaml"
    facts.write_text("{tenant: acme, provider: openai, model: o3}")
    result = run("explain", bundle, "--facts", facts)
    assert result.exit_code == 0
    assert result.output.splitlines()[:2] == [
        "deny by default",
        "  because no allow matched; nearest is 'a', which failed at model: 'o3' is not gpt-5*",
    ]
    assert "    no    model: 'o3' is not gpt-5*" in result.output
    told: Any = json.loads(
        run("explain", bundle, "--facts", "-", "--json", stdin=facts.read_text()).output
    )
    assert told["verdict"] == "deny"
    assert [step["answer"] for step in told["trace"][1]["conditions"]] == ["yes", "no"]
    log = written(tmp_path, [("call.denied", "c1", "policy_denied", "gpt-5-pro")])
    assert run("explain", bundle, "--call", "c1", "--log", log).output.startswith("deny by b\n")
    assert run("explain", bundle, "--call", "c2", "--log", log).exit_code == 1
    assert run("explain", bundle).exit_code == 2
    assert run("explain", bundle, "--facts", "-", stdin="{tenat: x}").exit_code == 1


def written(folder: Path, calls: list[tuple[str, str, str, str]], **more: Any) -> Path:
    """Write an audit log of decisions: type, id, code and model of each."""
    path = folder / "seg" / "0.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = []
    for kind, call, code, model in calls:
        facts = to_record(ask(model=model, roles=(), max_tokens=-1))
        line = {
            "type": kind,
            "call": call,
            "tenant": "acme",
            "code": code,
            "rules": ["a"],
            "facts": facts,
        }
        lines.append(json.dumps({**line, **more}, separators=(",", ":")))
    path.write_text("\n".join(lines) + "\n")
    return folder


def test_replay(bundle: Path, tmp_path: Path) -> None:
    """Who would newly be denied or allowed is named by tenant and rule; limits' refusals are left out."""
    log = written(
        tmp_path,
        [
            ("call.start", "c1", "", "gpt-5"),
            ("call.start", "c2", "", "gpt-5-pro"),
            ("call.denied", "c3", "policy_denied", "gpt-5-mini"),
            ("call.denied", "c4", "rate_limit_exceeded", "gpt-5"),
            ("call.denied", "c5", "policy_denied", "o3"),
        ],
    )
    report: Any = json.loads(run("replay", log, bundle, "--json").output)
    assert (report["decisions"], report["newly_denied"], report["newly_allowed"]) == (5, 1, 1)
    assert {(group["now"], *group["calls"], *group["rules"]) for group in report["groups"]} == {
        ("denied", "c2", "b"),
        ("allowed", "c3", "a"),
    }
    result = run("replay", log, bundle)
    assert "newly denied  1" in result.output
    assert (
        "denied: 1 of tenant 'acme', before by a, now by b: deny 'b' matched [c2]" in result.output
    )
    assert run("replay", bundle, bundle).exit_code == 1


def test_replay_of_what_rules_in_shadow_said(bundle: Path, tmp_path: Path) -> None:
    """The report counts what enforcing would have changed, by rule and tenant."""
    log = written(tmp_path, [("call.start", "c1", "", "m")] * 3, would="deny", would_rules=["s"])
    result = run("replay", log, "--recorded")
    assert "3 decisions, 3 of them otherwise with rules in shadow" in result.output
    assert "would deny: 3 of tenant 'acme' by s [c1]" in result.output


def test_diff(bundle: Path, tmp_path: Path) -> None:
    """What came, went or changed is named, with the part that changed."""
    other = tmp_path / "other.yaml"
    other.write_text(
        POLICY.replace("gpt-5-pro}", "gpt-5-max}").replace("id: a", "id: z")
        + "limits: [{name: l, key: tenant, requests: {rate: 1/s}}]\n"
    )
    assert run("diff", bundle, other).output.splitlines() == [
        "+ limit l", "- rule a", "~ rule b: match", "+ rule z",
    ]  # fmt: skip
    assert run("diff", bundle, bundle).output == ""


def test_fmt(bundle: Path) -> None:
    """Files are laid out; --check only says which would be."""
    path = bundle / "p.yaml"
    path.write_text("rules:\n- {effect: deny, id: b,  match: {model: x}}\n")
    before = path.read_text()
    assert run("fmt", "--check", bundle).exit_code == 1
    assert path.read_text() == before
    assert run("fmt", path).exit_code == 0
    assert path.read_text() == "rules:\n  - {id: b, effect: deny, match: {model: x}}\n"
    assert run("fmt", "--check", path).exit_code == 0


def test_sign(bundle: Path, tmp_path: Path) -> None:
    """A signed bundle is taken where its key is required; changed by a byte, or unsigned, it is not."""
    vkey = run("sign", bundle, "--key", tmp_path / "seed").output.strip()
    config = tmp_path / "config.yaml"
    config.write_text(
        f"providers: {{openai: {{}}}}\npolicies: {{path: policies, signed_by: {vkey}}}\n"
    )
    check = ["check", "--config", str(config)]
    assert CliRunner().invoke(main, check).exit_code == 0
    for name in ("p.yaml", "p_test.yaml"):
        text = (bundle / name).read_text()
        (bundle / name).write_text(text + "# changed\n")
        result = CliRunner().invoke(main, check)
        assert result.exit_code == 1
        assert (
            "is not signed as policies.signed_by requires: the note is another bundle's"
            in result.stderr
        )
        (bundle / name).write_text(text)
    (bundle / "bundle.note").unlink()
    assert "there is no bundle.note" in CliRunner().invoke(main, check).stderr
    other = run("sign", bundle, "--key", tmp_path / "other").output
    assert other != vkey
    assert CliRunner().invoke(main, check).exit_code == 1


def test_facts() -> None:
    """Every fact is listed, in words, as a page and as a schema."""
    assert "auth_age" in run("facts").output
    assert run("facts", "--markdown").output.startswith("# Facts\n")
    assert json.loads(run("facts", "--schema").output)["title"] == "Veklom Gateway policy"
