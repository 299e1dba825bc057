"""The command line: one function for each command, each imports what it runs when it runs."""

import getpass
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn, TextIO

import click

from gateway import __version__
from gateway.commands.audit import audit
from gateway.commands.policy import policy


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
        raise SystemExit(run(load_checked(path), path, dev=dev))
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


@main.command(context_settings={"allow_interspersed_args": False})
@click.option("--sessions", default="http://127.0.0.1:8081", show_default=True, help="Its URL.")
@click.option(
    "--provider",
    "providers",
    multiple=True,
    metavar="NAME[=KEY_VARIABLE[,URL_VARIABLE]]",
    help="Whose key to deposit; by default openai, anthropic and gemini where their variable is set.",
)
@click.option("--token-command", help="A command that prints your identity provider's token.")
@click.option("--token-file", type=click.File(), help="A file that holds it; - for standard input.")
@click.option("--dev", is_flag=True, help="Take a development identity of a gateway with --dev.")
@click.option("--ttl", type=int, help="The session's life in seconds.")
@click.option("--json", "receipt", type=click.File("w"), help="Where to write the receipt as JSON.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(  # noqa: PLR0913 - one argument for each option
    sessions: str,
    providers: tuple[str, ...],
    token_command: str | None,
    token_file: TextIO | None,
    *,
    dev: bool,
    ttl: int | None,
    receipt: TextIO | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND in a session: it gets the session token in place of your provider keys.

    The session closes when the command ends, and the exit status is the command's; 125 where nothing
    was run.
    """
    from gateway.client.run import run_wrapped
    from gateway.client.sessions import ClientError, SessionClient
    from gateway.client.wrapping import KNOWN, keys_for, wrapping_from

    environment = dict(os.environ)  # noqa: TID251 - the wrapped program's, not our own settings
    try:
        asked = [wrapping_from(each) for each in providers] or [
            each for each in KNOWN.values() if any(map(environment.get, each.key_variables))
        ]
        if not asked:
            raise ClientError("no provider key is set; name a provider with --provider")
        keys = keys_for(asked, environment, _ask_for_key if sys.stdin.isatty() else None)
        client = SessionClient(sessions, _identity(sessions, token_command, token_file, dev=dev))
        status, said = run_wrapped(
            client, command, keys=keys, wrappings=asked, environment=environment, ttl_seconds=ttl
        )
    except ClientError as error:
        click.echo(f"veklom run: {error}", err=True)
        raise SystemExit(NOTHING_WAS_RUN) from None
    if receipt is not None:
        json.dump(said, receipt, indent=2)
        receipt.write("\n")
    click.echo(f"veklom run: session {said['session_id']}: {said.get('error', 'closed')}", err=True)
    raise SystemExit(status)


NOTHING_WAS_RUN = 125


def _ask_for_key(provider: str) -> str:
    return str(click.prompt(f"Key for {provider}", hide_input=True, err=True))


def _identity(sessions: str, command: str | None, file: TextIO | None, *, dev: bool) -> str:
    """Return the caller's identity token, from the one place that was named."""
    from gateway.client.sessions import ClientError, development_identity

    if sum((command is not None, file is not None, dev)) != 1:
        raise ClientError("say who you are: --token-command, --token-file or --dev")
    if dev:
        return development_identity(sessions, getpass.getuser(), "dev")
    if file is not None:
        return file.read().strip()
    done = subprocess.run(  # noqa: S603 - the user typed it
        shlex.split(command or ""), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode or not done.stdout.strip():
        raise ClientError(f"--token-command printed no token (exit status {done.returncode})")
    return done.stdout.strip()


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
    from gateway.client.sessions import ClientError, ask

    body = {"subject": subject, "tenant": tenant, "roles": roles, "amr": amr, "ttl_seconds": ttl}
    try:
        click.echo(ask("POST", f"{sessions}/dev/token", "", body)["token"])
    except (ClientError, KeyError) as error:
        _fail((f"no token: {error}; is a gateway running there with --dev?",))


main.add_command(policy)


def _fail(faults: tuple[str, ...]) -> NoReturn:
    for fault in faults:
        click.echo(fault, err=True)
    raise SystemExit(1)
