"""The command line, and that what the README shows is what there is."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gateway.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def commands(
    group: click.Group, path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], click.Command]:
    """Return every command below a group, by its path."""
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, (*path, name))
        else:
            found[(*path, name)] = command
    return found


ALL = commands(main)


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    """`--help` of every command works, says what it is for, and explains every option."""
    result = CliRunner().invoke(main, [*path, "--help"])
    assert result.exit_code == 0
    assert ALL[path].help
    for parameter in ALL[path].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_the_readme_shows_only_commands_that_exist() -> None:
    """Every `veklom` line of the README names a command and options that the program has."""
    lines = re.findall(r"^(?:\.venv/bin/)?veklom (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line.partition(" -- ")[0])  # what follows is another program's
        path = next((path for n in (3, 2, 1) if (path := tuple(words[:n])) in ALL), ())
        assert path, line
        known = {option for each in ALL[path].params for option in each.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_readme_shows_only_targets_and_files_that_exist() -> None:
    """Every `make` target and every linked file of the README is there."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_ci_runs_the_readmes_test_command() -> None:
    """`.ci/run` calls `make test` and adds nothing."""
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line[:1] != "#"]
    assert lines[-1] == "exec make test"


def test_check_prints_every_fault(tmp_path: Path) -> None:
    """`veklom check` ends with 1 and shows each fault on its own line, with its place."""
    path = tmp_path / "c.yaml"
    path.write_text("workers: none\nnmae: x\n")
    result = CliRunner().invoke(main, ["check", "--config", str(path)])
    assert result.exit_code == 1
    assert result.stderr.count(f"{path}:") == 2
    assert "did you mean" in result.stderr


def test_check_prints_policy_faults(tmp_path: Path) -> None:
    """A wrong policy is found before anything starts, with its place."""
    (tmp_path / "p.yaml").write_text("rules:\n  - id: a\n    efect: allow\n    match: {}\n")
    path = tmp_path / "c.yaml"
    path.write_text("policies: {path: p.yaml}\n")
    result = CliRunner().invoke(main, ["check", "--config", str(path)])
    assert result.exit_code == 1
    assert f"{tmp_path / 'p.yaml'}:3:" in result.stderr
    serve = CliRunner().invoke(main, ["serve", "--config", str(path)])
    assert (serve.exit_code, "p.yaml:3:" in serve.stderr) == (1, True)


def test_check_accepts_what_is_shipped() -> None:
    """The shipped configuration and policy are in order, and the missing issuer is pointed out."""
    result = CliRunner().invoke(main, ["check", "--config", str(ROOT / "config.yaml")])
    assert result.exit_code == 0
    assert "policy sha256:" in result.stdout
    assert "warning: no issuer is configured" in result.stdout


def test_check_warns_of_limits_that_workers_count_apart(tmp_path: Path) -> None:
    """With several workers the operator is told what the limits then mean."""
    (tmp_path / "p.yaml").write_text(
        "rules:\n  - {id: a, effect: allow, match: {tenant: acme}}\n"
        "limits:\n  - {name: l, key: [tenant], requests: {rate: 1/s}}\n"
    )
    path = tmp_path / "c.yaml"
    path.write_text("workers: 3\npolicies: {path: p.yaml}\n")
    result = CliRunner().invoke(main, ["check", "--config", str(path)])
    assert result.exit_code == 0
    assert "3 times what is written" in result.stdout


def test_a_development_gateway_stays_on_loopback(tmp_path: Path) -> None:
    """`serve --dev` refuses a sessions listener that others reach: it mints identities."""
    path = tmp_path / "c.yaml"
    path.write_text('listeners: {sessions: {address: "0.0.0.0:0", plain_http: true}}\n')
    result = CliRunner().invoke(main, ["serve", "--dev", "--config", str(path)])
    assert result.exit_code == 1
    assert "loopback" in result.stderr


def test_token_dev_needs_a_gateway(unused_tcp_port: int) -> None:
    """Without a gateway there is a sentence, not a traceback."""
    url = f"http://127.0.0.1:{unused_tcp_port}"
    result = CliRunner().invoke(main, ["token", "dev", "--sessions", url])
    assert result.exit_code == 1
    assert "is a gateway running there" in result.stderr
    assert CliRunner().invoke(main, ["token", "dev", "--sessions", "file:///etc"]).exit_code == 1


def test_limits_must_fit_the_descriptors(tmp_path: Path) -> None:
    """More connections than the system lets a process hold are refused by `check` and `serve` alike."""
    path = tmp_path / "c.yaml"
    path.write_text("limits: {connections: 500, upstream_connections: 400}\n")

    def run(command: str, limit: int) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "gateway", command, "--config", str(path)]
        return subprocess.run(
            ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *program],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip

    for command in ("check", "serve"):
        refused = run(command, 1155)
        assert refused.returncode == 1
        assert "need 1156 descriptors in a worker, and this process may have 1155" in refused.stderr
    assert run("check", 1156).returncode == 0
