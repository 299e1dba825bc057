"""`veklom audit`: everything that is done with what was recorded, by whoever has the files.

Exit codes: 0 verified or done, 1 tampering, 2 incomplete or stale, 3 usage or a file that cannot be read.
"""

import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click

USAGE = 3


@click.group()
def audit() -> None:
    """Verify, read, prove and export what was recorded."""


_PATH = click.argument("path", type=click.Path(path_type=Path))
_KEY = click.option("--key", help="The trusted verification key, or a file that holds it.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _fail(message: object) -> NoReturn:
    click.echo(f"veklom audit: {message}", err=True)
    raise SystemExit(USAGE)


def _careful(command: Callable[..., Any]) -> Callable[..., Any]:
    """End with 3 where a file cannot be read or is not what it should be."""
    from gateway.audit.files import Damaged

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise SystemExit(0) from None
        except (OSError, ValueError, Damaged, tarfile.TarError) as error:
            _fail(error)

    return run


def _vkey(key: str | None) -> str | None:
    if key is None or "+" in key:
        return key
    return Path(key).read_text(encoding="ascii")


@contextmanager
def _opened(path: Path) -> Iterator[Path]:
    from gateway.audit.reading import opened

    with opened(path) as folder:
        yield folder


@audit.command()
@_PATH
@_KEY
@click.option(
    "--policy",
    "policy_path",
    type=click.Path(path_type=Path),
    help="A C2SP tlog-policy: the deployment key as its log, and who must have witnessed.",
)
@click.option(
    "--since",
    "since",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A checkpoint that was verified before; may be given more than once.",
)
@click.option(
    "--max-age",
    type=int,
    default=0,
    help="Seconds after which the last signature of a log that lives is stale.",
)
@_JSON
@_careful
def verify(  # noqa: PLR0913 - one argument for each option
    path: Path,
    key: str | None,
    policy_path: Path | None,
    since: tuple[Path, ...],
    max_age: int,
    *,
    as_json: bool,
) -> None:
    """Verify the audit log at PATH (a folder or a tarball), or every log below it.

    Exit codes: 0 verified, 1 tampering, 2 incomplete or stale, 3 usage.
    """
    from gateway.audit.checkpoint import Checkpoint
    from gateway.audit.trust import Policy
    from gateway.audit.verify import Trust, deployment_of, verify_path
    from gateway.clock import SystemClock

    policy = Policy.from_text(policy_path.read_text(encoding="utf-8")) if policy_path else None
    given = _vkey(key) or (policy.logs[0].verifier.vkey if policy and policy.logs else None)
    notes = [each.read_text(encoding="utf-8") for each in since]
    with _opened(path) as folder:
        trust = Trust(
            deployment=deployment_of(folder, given),
            is_given=given is not None,
            policy=policy,
            trusted={Checkpoint.claimed_by(note).origin: note for note in notes},
            not_before=int(SystemClock.now()) - max_age if max_age else 0,
        )
        report = verify_path(folder, trust=trust)
    if as_json:
        click.echo(report.to_json())
    else:
        for line in report.to_lines():
            click.echo(line)
    raise SystemExit(report.exit_code)


@audit.command()
@_PATH
@click.argument("call")
@click.option("--out", type=click.Path(path_type=Path), help="The file to write; standard output.")
@_careful
def prove(path: Path, call: str, out: Path | None) -> None:
    """Write the proof (.tlog-proof) of a CALL's last event, or of the event ORIGIN#INDEX."""
    from gateway.audit.reading import prove as prove_entry

    with _opened(path) as folder:
        found = _find(folder, call)
        if not found:
            _fail(f"there is no {call}")
        proof = prove_entry(*found[-1])
    if proof is None:
        _fail("no checkpoint is above it yet")
    text = proof.to_text()
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


def _find(folder: Path, position: str) -> list[Any]:
    from gateway.audit.files import LogFiles
    from gateway.audit.reading import CALL_ID, Entry, find_call, find_logs

    if CALL_ID.fullmatch(position):
        return find_call(folder, position)
    origin, separator, index = position.rpartition("#")
    if not separator or not index.isdigit():
        _fail("give a call's id, or ORIGIN#INDEX")
    for log in find_logs(folder):
        for at, line in LogFiles(log).lines(int(index)):
            fields = json.loads(line)
            if at == int(index) and fields.get("origin") == origin:
                return [(log, Entry(at, line, fields))]
            break
    return []


@audit.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--key", required=True, help="The trusted verification key, or a file that holds it.")
@_careful
def receipt(file: Path, key: str) -> None:
    """Verify a proof (.tlog-proof) by itself, without any log, and print its event."""
    from gateway.audit.proof import EventProof
    from gateway.audit.tree import ProofRefused
    from keys.signing import BadSignature, Verifier

    proof = EventProof.from_text(file.read_text(encoding="utf-8"))
    verifier = Verifier.from_vkey(_vkey(key) or "")
    try:
        checkpoint = proof.verify(verifier)
    except (BadSignature, ProofRefused, ValueError) as error:
        click.echo(f"REFUSED: {error}", err=True)
        raise SystemExit(1) from None
    click.echo(
        f"event {proof.index} of the {checkpoint.size} that {checkpoint.origin} signed:", err=True
    )
    click.echo(proof.event)


@audit.command()
@_PATH
@click.option("--call", default="", help="Only this call.")
@click.option("--session", default="", help="Only this session.")
@click.option("--tenant", default="", help="Only this tenant.")
@click.option("--type", "kind", default="", help="Only this type; `call.` for all that begin so.")
@click.option("--from", "begin", default="", help="From this time on (RFC 3339, UTC).")
@click.option("--to", "end", default="", help="Before this time.")
@_careful
def show(  # noqa: PLR0913, PLR0917 - one argument for each option
    path: Path, call: str, session: str, tenant: str, kind: str, begin: str, end: str
) -> None:
    """Print events as they stand in the logs."""
    from gateway.audit.reading import entries

    wanted = {"call": call, "session": session, "tenant": tenant}
    asked = {name: value for name, value in wanted.items() if value}
    with _opened(path) as folder:
        for entry in entries(folder):
            fields = entry.fields
            if (
                all(fields.get(name) == value for name, value in asked.items())
                and (
                    fields["type"] == kind
                    or fields["type"].startswith(kind if kind[-1:] in {"", "."} else "\0")
                )
                and (not begin or fields["ts"] >= begin)
                and (not end or fields["ts"] < end)
            ):
                click.echo(entry.line)


@audit.command()
@_PATH
@click.option("--lines", "-n", default=10, show_default=True, help="How many to begin with.")
@click.option("--follow", "-f", is_flag=True, help="Go on as events are recorded.")
@_careful
def tail(path: Path, lines: int, *, follow: bool) -> None:
    """Print the last events of all logs below PATH, in the order of their times."""
    from gateway.audit.files import LogFiles
    from gateway.audit.reading import find_logs

    reached: dict[Path, int] = {}
    limit = lines
    while True:
        fresh: list[tuple[str, bytes]] = []
        for log in find_logs(path):
            for index, line in LogFiles(log).lines(reached.get(log, 0)):
                reached[log] = index + 1
                fresh.append((json.loads(line).get("ts", ""), line))
        fresh.sort()
        for _, line in fresh[-limit:] if limit else ():
            click.echo(line)
        if not follow:
            return
        sys.stdout.flush()
        limit = len(fresh) + 1_000_000_000
        time.sleep(0.5)


@audit.command()
@_PATH
@_JSON
@_careful
def stats(path: Path, *, as_json: bool) -> None:
    """Count events by type, and calls by what came of them."""
    from gateway.audit.reading import entries
    from gateway.audit.stats import count

    with _opened(path) as folder:
        counted = count(entry.fields for entry in entries(folder))
    if as_json:
        click.echo(json.dumps(counted))
        return
    for name, value in counted.items():
        if isinstance(value, dict):
            click.echo(name)
            for key, number in value.items():
                click.echo(f"  {number:>10}  {key}")
        else:
            click.echo(f"{name:<8} {value}")


@audit.command()
@_PATH
@click.option("--from", "begin", default="", help="From this time on (RFC 3339, UTC).")
@click.option("--to", "end", default="", help="Before this time.")
@click.option("--tenant", default="", help="Only this tenant.")
@click.option("--key-fingerprint", "fingerprint", default="", help="Only this provider key.")
@click.option("--provider", default="", help="Only this provider.")
@click.option("--policy-digest", "policy", default="", help="Only what this policy set decided.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "csv"]),
    default="text",
    show_default=True,
    help="For people, for programs, or for a spreadsheet.",
)
@_careful
def affected(path: Path, form: str, **scope: str) -> None:
    """Report who and what an incident touched: calls, callers, sessions, counts and times."""
    from gateway.audit.affected import Affected, Scope
    from gateway.audit.reading import entries

    with _opened(path) as folder:
        found = Affected.collect((entry.fields for entry in entries(folder)), Scope(**scope))
    if form == "json":
        click.echo(found.to_json())
    elif form == "csv":
        click.echo(found.to_csv(), nl=False)
    else:
        for line in found.to_lines():
            click.echo(line)


@audit.command()
@_PATH
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    default="pack",
    show_default=True,
    type=click.Choice(["pack", "tiles", "ocsf", "ecs", "cloudevents"]),
    help="A tarball for auditors, C2SP tiles of every log, or events in others' words.",
)
@click.option(
    "--include",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="A file to put into the pack, such as a policy; may be given more than once.",
)
@_KEY
@_careful
def export(path: Path, out: Path, form: str, include: tuple[Path, ...], key: str | None) -> None:
    """Write what is at PATH to OUT, which must not exist."""
    from gateway.audit.export import mapped, write_pack, write_tiles
    from gateway.audit.reading import find_logs

    with _opened(path) as folder:
        if form == "pack":
            write_pack(folder, out, include, _vkey(key))
        elif form == "tiles":
            for log in find_logs(folder):
                write_tiles(log, out / log.name)
        else:
            with out.open("x", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in mapped(folder, form))


@audit.command()
@click.option("--markdown", is_flag=True, help="The page for people instead.")
def schema(*, markdown: bool) -> None:
    """Print the JSON Schema of every event."""
    from gateway.audit.schema import to_json_schema, to_markdown

    if markdown:
        click.echo(to_markdown(), nl=False)
    else:
        click.echo(json.dumps(to_json_schema(), indent=1))


@audit.command()
@_PATH
@click.argument("log")
@click.option("--event", "events", type=int, multiple=True, required=True, help="Its index.")
@click.option("--reason", required=True, help="Why; it is recorded.")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    required=True,
    help="Where the deployment key is.",
)
@_careful
def redact(path: Path, log: str, events: tuple[int, ...], reason: str, state_dir: Path) -> None:
    """Erase single events of LOG (its folder's name) below PATH; their hashes stay.

    The log's process must have ended. That it was done is recorded first, under the deployment key.
    """
    from gateway.audit.anchor import Anchor
    from gateway.audit.erase import redact as erase
    from gateway.audit.keyfile import load_signer
    from gateway.audit.trust import Delegated
    from gateway.audit.verify import deployment_of
    from gateway.clock import SystemClock

    deployment = deployment_of(path, None)
    signer = load_signer(state_dir, deployment.name)
    if signer.vkey != deployment.vkey:
        _fail("the key in --state-dir is not the one in vkey")
    delegation = (path / log / "delegation").read_text(encoding="utf-8")
    origin = Delegated.from_note(delegation, deployment).log.name
    erase(path / log, origin, events, reason, Anchor(path, signer, SystemClock()))
    click.echo(f"erased {len(set(events))} events of {origin}")


@audit.group()
def witness() -> None:
    """Watch somebody's logs, so that they cannot be cut back or forked unseen."""


@witness.command()
@click.argument("name")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    required=True,
    help="Where the key is kept; made if missing, mode 0600.",
)
@_careful
def key(name: str, key_file: Path) -> None:
    """Print the verification key of the witness NAME, for the policy of whoever is witnessed."""
    from gateway.audit.keyfile import load_or_create_seed
    from keys.signing import Cosigner

    click.echo(Cosigner(name, load_or_create_seed(key_file)).vkey)


@witness.command("serve")
@click.argument("name")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    required=True,
    help="Where the key is kept; made if missing, mode 0600.",
)
@click.option(
    "--log",
    "logs",
    multiple=True,
    required=True,
    help="The verification key of a log to witness (a gateway's vkey), or its file.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    required=True,
    help="The file that remembers what was seen, in a folder of its own.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", default=8090, show_default=True, help="The port.")
@_careful
def serve_witness(  # noqa: PLR0913, PLR0917 - one argument for each option
    name: str, key_file: Path, logs: tuple[str, ...], state: Path, host: str, port: int
) -> None:
    """Run the witness NAME (C2SP tlog-witness) until it is told to stop."""
    from aiohttp import web

    from gateway.audit.keyfile import load_or_create_seed
    from gateway.audit.witness_server import WitnessServer
    from gateway.clock import SystemClock
    from keys.signing import Cosigner, Verifier

    cosigner = Cosigner(name, load_or_create_seed(key_file))
    verifiers = [Verifier.from_vkey(_vkey(each) or "") for each in logs]
    server = WitnessServer(cosigner, verifiers, state, SystemClock())
    click.echo(f"witness {cosigner.vkey} at http://{host}:{port}/", err=True)
    web.run_app(server.app(), host=host, port=port, print=None, access_log=None)
