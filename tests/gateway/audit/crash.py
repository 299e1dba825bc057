"""Kills writers at random moments, many times over, and looks at what each left.

Run as a program, so that children are forked from a process without threads.
"""

import asyncio
import os
import secrets
import select
import signal
import sys
from pathlib import Path

from gateway.audit.event import Event
from gateway.audit.keeper import Keeper
from gateway.audit.verify import ExitCode, verify_path
from gateway.clock import SystemClock
from tests.gateway.audit.conftest import SIGNER, appended, begun, ended, open_log

CALLERS = 24


async def _load(log: Path, acknowledged: int) -> None:
    """Record calls until killed; say of each event that it is durable once it is."""
    journal = open_log(log, calls=CALLERS)

    async def caller(number: int) -> None:
        for turn in range(1_000_000):
            call = f"{number:04x}{turn:08x}"
            assert await appended(journal, begun(call)) is None
            os.write(acknowledged, f"+{call}\n".encode())
            assert await appended(journal, ended(call)) is None
            os.write(acknowledged, f"-{call}\n".encode())

    await asyncio.gather(*map(caller, range(CALLERS)))


def _child(log: Path, acknowledged: int) -> int:
    pid = os.fork()
    if pid == 0:
        asyncio.run(_load(log, acknowledged))
        os._exit(0)
    return pid


def _run(folder: Path, number: int) -> None:
    audit = folder / f"{number}"
    audit.mkdir()
    log = audit / "boot-worker-0.1"
    reader, writer = os.pipe()
    pid = _child(log, writer)
    os.close(writer)
    select.select([reader], [], [], 10)  # it has begun
    select.select([], [], [], secrets.randbelow(60) / 1000)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as pipe:
        said = {line for line in pipe.read().decode().split("\n") if len(line) == 13}
    asyncio.run(_recover(audit))
    report = verify_path(audit, SIGNER.vkey)
    assert report.exit_code is ExitCode.VERIFIED, "\n".join(report.to_lines())
    text = b"".join(path.read_bytes() for path in sorted((log / "seg").iterdir())).decode()
    for each in said:
        kind = "call.start" if each[0] == "+" else "call.end"
        assert f'"type":"{kind}","call":"{each[1:]}"' in text, each
    recovering = next((audit / "boot-control.2" / "seg").iterdir()).read_text()
    started, gone = text.count('"call.start"'), text.count('"call.end"')
    torn = text.rpartition("\n")[2]  # never acknowledged, and no event
    started -= torn.count('"call.start"')
    gone -= torn.count('"call.end"')
    assert recovering.count('"call.unclosed"') == started - gone


async def _recover(audit: Path) -> None:
    journal = open_log(audit / "boot-control.2")

    async def record(event: Event) -> None:
        assert await appended(journal, event) is None

    keeper = Keeper(audit, SIGNER, SystemClock(), record=record)
    await keeper.round()
    journal.close()
    keeper.conclude()


def main(folder: Path, runs: int) -> None:
    """Run it so many times."""
    for number in range(runs):
        _run(folder, number)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
