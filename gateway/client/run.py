"""`veklom run`: a program inside a session, with the session token in place of provider keys.

Laws of this file:
- the session ends with the program, however that ends, or with this process where it can still act;
- the program is left alone: its terminal, its signals and its exit status are as without us.
"""

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from gateway.client.sessions import ClientError, SessionClient
from gateway.client.wrapping import Wrapping, wrapped
from gateway.hardening import forbid_dumps

SIGNALS_PASSED_ON: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What is sent to us alone. A terminal's own (SIGINT, SIGQUIT, SIGTSTP) reach the program anyway."""

COMMAND_NOT_FOUND: Final = 127
COMMAND_NOT_RUNNABLE: Final = 126
SIGNALLED: Final = 128
"""Exit statuses as a shell gives them."""


def run_wrapped(  # noqa: PLR0913 - what a run is made of
    client: SessionClient,
    command: Sequence[str],
    *,
    keys: Mapping[str, str],
    wrappings: Sequence[Wrapping],
    environment: Mapping[str, str],
    ttl_seconds: int | None,
) -> tuple[int, dict[str, Any]]:
    """Run `command` in a session of its own; return its exit status and the session's receipt.

    Raises:
        ClientError: The session did not open; nothing was run.
    """
    # The keys stay in this process's own environment: no other process of the user may read it.
    forbid_dumps()
    session = client.open(keys, label=command[0][:128], ttl_seconds=ttl_seconds)
    try:
        status = _run(command, wrapped(wrappings, environment, session))
    finally:
        receipt = _close(client, session.session_id)
    return status, receipt


def _close(client: SessionClient, session_id: str) -> dict[str, Any]:
    try:
        return client.close(session_id)
    except ClientError as error:
        # It idles out; the program's own end is no worse for that.
        return {"session_id": session_id, "error": str(error)}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    with _signals_passed_on() as program:
        try:
            process = subprocess.Popen(command, env=dict(environment))  # noqa: S603 - what the user typed
        except FileNotFoundError:
            return COMMAND_NOT_FOUND
        except OSError:
            return COMMAND_NOT_RUNNABLE
        program.is_running(process)
        status = process.wait()
    return SIGNALLED - status if status < 0 else status


class _Program:
    """Whoever signals are passed on to; what comes before it runs is kept for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def is_running(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on to this process from now on."""
        self._process = process
        for number in self._early:
            process.send_signal(number)

    def hear(self, number: int, _frame: object) -> None:
        """Pass a signal on."""
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)


@contextmanager
def _signals_passed_on() -> Iterator[_Program]:
    """Pass on what is sent to us alone, and sit out what the terminal sends to both."""
    program = _Program()
    before = {number: signal.signal(number, program.hear) for number in SIGNALS_PASSED_ON}
    for number in (signal.SIGINT, signal.SIGQUIT):
        # Not SIG_IGN: the program would inherit that.
        before[number] = signal.signal(number, lambda *_: None)
    try:
        yield program
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
