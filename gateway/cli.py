"""The command line: one function for each command, each imports what it runs when it runs."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import NoReturn

import click

from gateway import __version__
from gateway.audit_commands import audit


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="veklom")
def main() -> None:
    """Governed execution of LLM calls with the customer's own provider keys."""


main.add_command(audit)


_CONFIG = click.option(
    "--config",
    "-c",
    "config_path",
    type=click.Path(path_type=Path),
    help="The configuration file; $VEKLOM_CONFIG or config.yaml by default.",
)


@main.command()
@_CONFIG
@click.option("--dev", is_flag=True, help="Accept a development issuer too. Loopback only.")
def serve(config_path: Path | None, *, dev: bool) -> None:
    """Run the gateway until it is told to stop."""
    from gateway.config import ConfigurationError, default_config_path
    from gateway.setup import load_checked
    from gateway.supervisor import serve as run

    path = config_path or default_config_path()
    try:
        raise SystemExit(run(load_checked(path).config, path, dev=dev))
    except ConfigurationError as error:
        _fail(error.faults)


@main.command()
def demo() -> None:
    """Show a whole governed call on loopback: no account, no Redis, no cloud."""
    from gateway.demo.story import run

    raise SystemExit(run())


@main.command()
@_CONFIG
def check(config_path: Path | None) -> None:
    """Check the configuration and every file that it names, and print every fault."""
    from gateway.config import ConfigurationError, default_config_path
    from gateway.setup import check_deployment

    try:
        report = check_deployment(config_path or default_config_path())
    except ConfigurationError as error:
        _fail(error.faults)
    for line in report:
        click.echo(line)


@main.group()
def token() -> None:
    """Tokens for development."""


@token.command()
@click.option("--sessions", default="http://127.0.0.1:8081", show_default=True, help="Its URL.")
@click.option("--subject", default="dev", show_default=True, help="Who the token speaks for.")
@click.option("--tenant", default="dev", show_default=True, help="The tenant it names.")
@click.option("--role", "roles", multiple=True, help="A role; may be given more than once.")
@click.option("--amr", multiple=True, help="How they authenticated, such as mfa; repeatable.")
@click.option("--ttl", default=3600, show_default=True, help="Its life in seconds.")
def dev(  # noqa: PLR0913, PLR0917 - one argument for each option
    sessions: str, subject: str, tenant: str, roles: tuple[str, ...], amr: tuple[str, ...], ttl: int
) -> None:
    """Print an identity token of a gateway that runs with --dev."""
    body = {"subject": subject, "tenant": tenant, "roles": roles, "amr": amr, "ttl_seconds": ttl}
    request = urllib.request.Request(  # noqa: S310 - the scheme is checked below
        f"{sessions}/dev/token", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    if request.type not in {"http", "https"}:
        _fail(("--sessions must be an http or https URL",))
    try:
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - checked above
            click.echo(json.load(response)["token"])
    except (urllib.error.URLError, KeyError, ValueError) as error:
        reason = getattr(error, "reason", error)
        _fail((f"no token: {reason}; is a gateway running there with --dev?",))


def _fail(faults: tuple[str, ...]) -> NoReturn:
    for fault in faults:
        click.echo(fault, err=True)
    raise SystemExit(1)
