"""`veklom policy`: the workbench for those who write policies. It needs no gateway, and starts none.

A BUNDLE is a policy file or a folder of them; without one it is what the configuration names. Which
providers there are, and what is vouched for about them, comes from the configuration; where BUNDLE is
given and `--config` is not, every provider that is built in counts as configured.

Exit codes: 0 in order, 1 something else is wrong, 2 usage, 3 the policy is wrong, 4 a test failed.
"""

import json
import sys
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import click

from gateway.audit.keyfile import load_or_create_seed
from gateway.bundles import NOTE, Folder, read_folder, sign_folder, signature_faults, test_faults
from gateway.commands.pulling import PullFailed, put_in_place
from gateway.commands.pulling import pull as pulled
from gateway.commands.recorded import read_decisions, shadow_report
from gateway.commands.reports import percent, to_json, to_junit, to_tree
from gateway.config import (
    BUNDLE,
    Config,
    ConfigurationError,
    default_config_path,
    known_to,
    read_draft,
)
from gateway.providers.catalogue import CATALOGUE
from keys.signing import Signer
from policies.analysis import findings
from policies.document import DocumentError, Fault, Section, read_document
from policies.explanation import explain as explained
from policies.facts import FACTS, from_record
from policies.formatting import formatted
from policies.known import Known
from policies.reference import to_markdown, to_schema
from policies.replay import replay as replayed
from policies.request import AccessRequest, ProviderFacts
from policies.rules import PolicySet, load_policy_set
from policies.testing import coverage, read_cases, read_question, run_cases, uncovered


class Exit(IntEnum):
    """What a command ends with."""

    OK = 0
    FAILED = 1
    USAGE = 2
    POLICY = 3
    TESTS = 4


@click.group()
def policy() -> None:
    """Check, test, explain and replay policies."""


_BUNDLE = click.argument("bundle", required=False, type=click.Path(path_type=Path))
_CONFIG = click.option(
    "--config",
    "-c",
    "config_path",
    type=click.Path(path_type=Path),
    help="The configuration; without BUNDLE $VEKLOM_CONFIG, or config.yaml where that is there.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


# --- what every command reads --------------------------------------------------------------------


def _configuration(config_path: Path | None) -> Config | None:
    """Return the configuration that is named, or lies there."""
    if config_path is None and not default_config_path().exists():
        return None
    try:
        draft = read_draft(config_path or default_config_path())
    except ConfigurationError as error:
        _fail(error.faults, Exit.POLICY)
    if draft.faults:
        _fail(map(str, draft.faults), Exit.POLICY)
    return draft.config


def _read(bundle: Path | None, config_path: Path | None) -> tuple[Folder, Known, Config | None]:
    config = None if bundle and config_path is None else _configuration(config_path)
    path = str(bundle) if bundle else config.policies.path if config else str(BUNDLE)
    folder = read_folder(path)
    if folder.unread:
        _fail(folder.unread, Exit.FAILED)
    return folder, known_to(config) if config else _built_in(), config


def _built_in() -> Known:
    return Known.of(
        {name: ProviderFacts(dialect=entry.dialect) for name, entry in CATALOGUE.items()}
    )


def _compile(folder: Folder, known: Known) -> PolicySet:
    try:
        return load_policy_set([(each.path, each.text) for each in folder.policies], known)
    except DocumentError as error:
        _fail(map(str, error.faults), Exit.POLICY)


def _fail(lines: Iterable[str], code: Exit) -> NoReturn:
    for line in lines:
        click.echo(line, err=True)
    raise SystemExit(code)


# --- check and test ------------------------------------------------------------------------------


@policy.command()
@_BUNDLE
@_CONFIG
@click.option("--strict", is_flag=True, help="Let advice fail the check, too.")
def check(bundle: Path | None, config_path: Path | None, *, strict: bool) -> None:
    """Compile BUNDLE, and print every fault and every rule that can do nothing."""
    folder, known, config = _read(bundle, config_path)
    policy_set = _compile(folder, known)
    if config is not None and bundle is None:
        faults = list(signature_faults(folder, config.policies.signed_by))
        if faults:
            _fail(faults, Exit.POLICY)
    advice = findings(policy_set, is_configured=config is not None)
    for each in advice:
        click.echo(str(each))
    shadow = sum(rule.is_shadow for rule in policy_set.rules)
    click.echo(
        f"policy {policy_set.digest}: {len(policy_set.rules)} rules ({shadow} in shadow), "
        f"{len(policy_set.limits)} limits, {len(advice)} warnings"
    )
    raise SystemExit(Exit.POLICY if strict and advice else Exit.OK)


@policy.command()
@_BUNDLE
@_CONFIG
@click.option("--filter", "part", default="", help="Run tests whose name holds this.")
@click.option(
    "--output",
    "-o",
    "form",
    type=click.Choice(["tree", "json", "junit"]),
    default="tree",
    help="For people, for programs, or for a build's test report.",
)
@click.option("--require-tests", is_flag=True, help="Fail where there is no test.")
@click.option("--coverage", "show", is_flag=True, help="Print what no test saw true and false.")
@click.option("--min-coverage", default=0, type=click.IntRange(0, 100), help="Percent to reach.")
def test(  # noqa: PLR0913, PLR0917 - one argument for each option
    bundle: Path | None,
    config_path: Path | None,
    part: str,
    form: str,
    require_tests: bool,  # noqa: FBT001 - click passes options by name
    show: bool,  # noqa: FBT001 - click passes options by name
    min_coverage: int,
) -> None:
    """Run the tests beside the policies of BUNDLE: files that end in `_test.yaml`."""
    folder, known, _ = _read(bundle, config_path)
    policy_set = _compile(folder, known)
    try:
        cases = read_cases([(each.path, each.text) for each in folder.tests], policy_set.known)
    except DocumentError as error:
        _fail(map(str, error.faults), Exit.POLICY)
    outcomes = run_cases([case for case in cases if part in case.name], policy_set)
    seen = coverage(outcomes, policy_set)
    failed = sum(bool(each.differences) for each in outcomes)
    if form == "junit":
        click.echo(to_junit(outcomes))
    elif form == "json":
        click.echo(to_json(outcomes, seen))
    else:
        for line in to_tree(outcomes):
            click.echo(line)
        click.echo(f"{len(outcomes) - failed} passed, {failed} failed, coverage {percent(seen)} %")
        for line in uncovered(seen) if show else ():
            click.echo(f"  {line}")
    if require_tests and not outcomes:
        _fail([f"{folder.path}: holds no test"], Exit.TESTS)
    if failed or percent(seen) < min_coverage:
        raise SystemExit(Exit.TESTS)


# --- explain, diff, replay -----------------------------------------------------------------------


@policy.command()
@_BUNDLE
@_CONFIG
@click.option(
    "--facts",
    "facts_path",
    type=click.Path(path_type=Path),
    help="A YAML file of facts; - reads stdin.",
)
@click.option("--call", "call", default="", help="The id of a recorded call; needs --log.")
@click.option(
    "--log", "log", type=click.Path(path_type=Path), help="An audit log, or a folder of them."
)
@click.option("--all", "every", is_flag=True, help="Show rules that did not come near, too.")
@_JSON
def explain(  # noqa: PLR0913, PLR0917 - one argument for each option
    bundle: Path | None,
    config_path: Path | None,
    facts_path: Path | None,
    call: str,
    log: Path | None,
    every: bool,  # noqa: FBT001 - click passes options by name
    as_json: bool,  # noqa: FBT001 - click passes options by name
) -> None:
    """Say how BUNDLE decides a call, condition by condition."""
    if bool(facts_path) == bool(call) or bool(call) != bool(log):
        raise click.UsageError("give --facts FILE, or --call ID with --log PATH")
    folder, known, _ = _read(bundle, config_path)
    policy_set = _compile(folder, known)
    request = _recorded(call, log) if log else _asked(facts_path, policy_set.known)
    explanation = explained(policy_set, request)
    if as_json:
        click.echo(json.dumps(explanation.to_json(), indent=2))
        return
    for line in explanation.to_lines(every_rule=every):
        click.echo(line)


def _asked(path: Path | None, known: Known) -> AccessRequest:
    text = sys.stdin.read() if path is None or str(path) == "-" else path.read_text()
    name = str(path)
    faults: list[Fault] = []
    try:
        request = read_question(Section(read_document(text, name), name, faults), known)
    except DocumentError as error:
        _fail(map(str, error.faults), Exit.FAILED)
    if faults or request is None:
        _fail(map(str, faults), Exit.FAILED)
    return request


def _recorded(call: str, log: Path) -> AccessRequest:
    try:
        for decision in read_decisions(log):
            if decision.call == call:
                return from_record(decision.facts)
    except (OSError, ValueError) as error:
        _fail([f"veklom policy explain: {error}"], Exit.FAILED)
    _fail([f"{log}: no decision about call {call!r}"], Exit.FAILED)


@policy.command()
@click.argument("old", type=click.Path(path_type=Path, exists=True))
@click.argument("new", type=click.Path(path_type=Path, exists=True))
@_CONFIG
def diff(old: Path, new: Path, config_path: Path | None) -> None:
    """Say which rules and limits differ between two bundles, and in what."""
    before, after = (_parts(_compile(*_read(path, config_path)[:2])) for path in (old, new))
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            click.echo(f"+ {name}")
        elif name not in after:
            click.echo(f"- {name}")
        elif changed := [key for key, value in after[name].items() if value != before[name][key]]:
            click.echo(f"~ {name}: {', '.join(changed)}")


def _parts(policy_set: PolicySet) -> dict[str, dict[str, object]]:
    """Return what there is to compare of each rule and limit."""
    parts: dict[str, dict[str, object]] = {}
    for rule in policy_set.rules:
        parts[f"rule {rule.id}"] = {
            "effect": rule.effect,
            "mode": rule.is_shadow,
            "match": tuple(each.spec for each in rule.match),
            "that": tuple(each.spec for each in rule.that),
            "change": rule.change,
            "message": rule.message,
        }
    for limit in policy_set.limits:
        parts[f"limit {limit.name}"] = {
            "key": limit.key,
            "match": tuple(each.spec for each in limit.match),
            "figures": limit.measure,
            "overrides": tuple(
                (tuple(condition.spec for condition in each.match), each.measure)
                for each in limit.overrides
            ),
            "mode": limit.is_shadow,
            "on_store_error": limit.on_store_error,
            "on_unknown_price": limit.allows_unpriced,
        }
    return parts


@policy.command()
@click.argument("log", type=click.Path(path_type=Path, exists=True))
@_BUNDLE
@_CONFIG
@click.option("--recorded", is_flag=True, help="Report what rules in shadow said at the time.")
@_JSON
def replay(
    log: Path, bundle: Path | None, config_path: Path | None, *, recorded: bool, as_json: bool
) -> None:
    """Decide the calls of an audit log again by BUNDLE, and print which would end otherwise."""
    try:
        if recorded:
            for line in shadow_report(log):
                click.echo(line)
            return
        folder, known, _ = _read(bundle, config_path)
        report = replayed(read_decisions(log), _compile(folder, known))
    except (OSError, ValueError) as error:
        _fail([f"veklom policy replay: {error}"], Exit.FAILED)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
        return
    for line in report.to_lines():
        click.echo(line)


# --- facts, fmt, sign ----------------------------------------------------------------------------


@policy.command()
@click.option("--markdown", "form", flag_value="markdown", help="Print the reference page.")
@click.option("--schema", "form", flag_value="schema", help="Print the JSON Schema for editors.")
def facts(form: str | None) -> None:
    """List every fact that rules may read."""
    if form == "markdown":
        click.echo(to_markdown(), nl=False)
    elif form == "schema":
        click.echo(json.dumps(to_schema(), indent=2))
    else:
        width = max(map(len, FACTS))
        for fact in FACTS.values():
            click.echo(f"{fact.name:{width}}  {fact.kind:8}  {fact.meaning}")


@policy.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--check", "only_check", is_flag=True, help="Change nothing; fail where something would."
)
def fmt(paths: tuple[Path, ...], *, only_check: bool) -> None:
    """Lay policy files out in one way, comments and meaning unchanged."""
    files = [
        file
        for path in paths
        for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])
    ]
    changed = 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        try:
            result = formatted(text, str(file))
        except DocumentError as error:
            _fail(map(str, error.faults), Exit.POLICY)
        if result != text:
            changed += 1
            click.echo(f"{file}: {'would be laid out' if only_check else 'laid out'}")
            if not only_check:
                file.write_text(result, encoding="utf-8")
    if changed and only_check:
        raise SystemExit(Exit.FAILED)


@policy.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--key",
    "key_path",
    required=True,
    type=click.Path(path_type=Path),
    help="The key's seed; made where it is not there.",
)
@click.option("--name", default="veklom-policy", show_default=True, help="The key's name.")
def sign(bundle: Path, key_path: Path, name: str) -> None:
    """Sign the folder BUNDLE, and print the verification key for `policies.signed_by`."""
    signer = Signer(name, load_or_create_seed(key_path))
    (bundle / NOTE).write_text(sign_folder(read_folder(str(bundle)), signer), encoding="utf-8")
    click.echo(signer.vkey)


@policy.command()
@click.argument("url")
@click.argument("folder", type=click.Path(path_type=Path))
@_CONFIG
@click.option("--key", required=True, help="The verification key that has to have signed it.")
@click.option("--ca-file", default="", help="Authorities instead of the system's.")
def pull(url: str, folder: Path, config_path: Path | None, key: str, ca_file: str) -> None:
    """Fetch a signed bundle, a tar archive, and put it in the place of FOLDER.

    What is not signed by the key, does not compile, or fails its own tests changes nothing.
    """
    try:
        found = pulled(url, key, ca_file=ca_file)
    except PullFailed as error:
        _fail([str(error)], Exit.FAILED)
    config = _configuration(config_path) if config_path else None
    policy_set = _compile(found, known_to(config) if config else _built_in())
    try:
        failed = list(test_faults(found, policy_set))
    except DocumentError as error:
        _fail(map(str, error.faults), Exit.POLICY)
    if failed:
        _fail(failed, Exit.TESTS)
    put_in_place(found, folder)
    click.echo(f"policy {policy_set.digest}: in {folder}")
