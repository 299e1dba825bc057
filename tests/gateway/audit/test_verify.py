"""Verification accepts what the journal writes and nothing else, byte by byte and line by line."""

import asyncio
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import cli
from gateway.audit import writer as writer_module
from gateway.audit.checkpoint import Checkpoint
from gateway.audit.files import LogFiles
from gateway.audit.tree import Frontier
from gateway.audit.trust import LogKeys
from gateway.audit.verify import ExitCode, Trust, verify_path
from keys.signing import Signer, Verifier
from tests.gateway.audit.conftest import SIGNER, appended, begun, ended, open_log, started

MARKS = ("seg", "checkpoint", "checkpoints.jsonl", "delegation")


DRAWN: list[LogKeys] = []
"""The keys of the log that the tests spoil; its writer has forgotten them."""


async def _write(folder: Path, drawn: list[LogKeys]) -> None:
    journal = open_log(folder, drawn=drawn)
    for call in (f"{folder.name}1", f"{folder.name}2"):
        await appended(journal, begun(call))
        await appended(journal, started())
        await appended(journal, ended(call))
    journal.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed log of nine events in three segments with several checkpoints."""
    folder = tmp_path_factory.mktemp("written") / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "MAX_SEGMENT_BYTES", 900)
        patch.setattr(writer_module, "CHECKPOINT_EVENTS", 3)
        asyncio.run(_write(folder, DRAWN))
    assert len(list((folder / "seg").iterdir())) > 2
    return folder


def verdict(folder: Path) -> ExitCode:
    """Return what `veklom audit verify` ends with under the trusted key."""
    return verify_path(folder, SIGNER.vkey).exit_code


def files(folder: Path) -> list[Path]:
    """Return every file of a log."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_accepts_what_was_written(written: Path) -> None:
    """An untouched, sealed log verifies, and the report counts what is in it."""
    report = verify_path(written, SIGNER.vkey)
    assert report.exit_code is ExitCode.VERIFIED, list(report.to_lines())
    (log,) = report.logs
    assert (log.events, log.started, log.ended, log.is_sealed) == (8, 2, 2, True)
    assert "RESULT   VERIFIED" in list(report.to_lines())
    assert json.loads(report.to_json())["verdict"] == "verified"


def test_any_flipped_byte_is_found(written: Path) -> None:
    """Whatever byte of whatever file is changed, the log does not verify."""
    for path in files(written):
        whole = path.read_bytes()
        try:
            for at in range(len(whole)):
                changed = bytearray(whole)
                changed[at] ^= 1 << at % 8
                path.write_bytes(changed)
                assert verdict(written) is not ExitCode.VERIFIED, (path.name, at)
        finally:
            path.write_bytes(whole)


def test_any_cut_is_found(written: Path) -> None:
    """Wherever any file is cut short, the log does not verify."""
    for path in files(written):
        whole = path.read_bytes()
        try:
            for length in range(len(whole)):
                path.write_bytes(whole[:length])
                assert verdict(written) is not ExitCode.VERIFIED, (path.name, length)
        finally:
            path.write_bytes(whole)


def test_a_missing_or_added_file_is_found(written: Path, tmp_path: Path) -> None:
    """A log without one of its files, or with one that nobody wrote, does not verify."""
    for path in files(written):
        copy = tmp_path / path.name
        shutil.copytree(written, copy)
        (copy / path.relative_to(written)).unlink()
        assert verdict(copy) is not ExitCode.VERIFIED, path.name
        shutil.rmtree(copy)
    shutil.copytree(written, tmp_path / "more")
    (tmp_path / "more/seg" / f"{8:020}.jsonl").write_bytes(b"")
    assert verdict(tmp_path / "more") is ExitCode.VERIFIED  # an empty segment holds no event
    (tmp_path / "more/seg/notes.txt").write_bytes(b"")
    assert verdict(tmp_path / "more") is ExitCode.TAMPERED


@pytest.mark.parametrize(
    "left", [*itertools.combinations(MARKS, 1), *itertools.combinations(MARKS, 2)]
)
def test_what_is_left_of_a_log_is_found(
    written: Path, tmp_path: Path, left: tuple[str, ...]
) -> None:
    """Whatever one or two parts of a log are left beside a whole one, they are found and not enough."""
    folder = tmp_path / "audit"
    asyncio.run(_write(folder / "whole", []))
    shutil.copytree(written, folder / "robbed")
    for part in set(MARKS) - set(left):
        found = folder / "robbed" / part
        shutil.rmtree(found) if found.is_dir() else found.unlink()
    report = verify_path(folder, SIGNER.vkey)
    whole, robbed = sorted(report.logs, key=lambda log: log.path != "whole")
    assert whole.exit_code is ExitCode.VERIFIED
    assert robbed.exit_code is not ExitCode.VERIFIED
    if "seg" not in left and left != ("delegation",):
        assert robbed.exit_code is ExitCode.TAMPERED


def test_fewer_events_than_were_signed(written: Path, tmp_path: Path) -> None:
    """A log whose events are gone while what was signed is left says that it was tampered with."""
    shutil.copytree(written, tmp_path / "log")
    shutil.rmtree(tmp_path / "log/seg")
    report = verify_path(tmp_path, SIGNER.vkey)
    assert report.exit_code is ExitCode.TAMPERED
    assert "were signed, 0 are there" in "\n".join(report.to_lines())


@settings(max_examples=150)
@given(st.data())
def test_lines_dropped_swapped_doubled_or_inserted(written: Path, data: st.DataObject) -> None:
    """The lines of a log, events or checkpoints, stand only as they were written."""
    lines_files = [path for path in files(written) if path.suffix == ".jsonl"]
    path = data.draw(st.sampled_from([each for each in lines_files if each.stat().st_size]))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    changed = list(lines)
    at = data.draw(st.integers(0, len(lines) - 1))
    match data.draw(st.sampled_from(["drop", "swap", "double", "insert"])):
        case "drop":
            del changed[at]
        case "swap":
            other = data.draw(st.integers(0, len(lines) - 1))
            changed[at], changed[other] = changed[other], changed[at]
        case "double":
            changed.insert(at, lines[at])
        case _:
            changed.insert(at, data.draw(st.binary(max_size=40)).replace(b"\n", b"") + b"\n")
    try:
        path.write_bytes(b"".join(changed))
        expected = changed == lines
        assert (verdict(written) is ExitCode.VERIFIED) == expected
    finally:
        path.write_bytes(whole)


def resigned(written: Path, copy: Path, change: Callable[[list[bytes]], None]) -> Path:
    """Return a copy whose events were changed, signed again by a key of the forger's own choosing."""
    shutil.copytree(written, copy)
    lines = [line for path in sorted(copy.glob("seg/*")) for line in path.read_bytes().splitlines()]
    change(lines)
    for path in copy.glob("seg/*"):
        path.unlink()
    (copy / "seg" / f"{0:020}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    tree = Frontier()
    for line in lines:
        tree.append(line)
    forger = Signer("test", b"forger".ljust(32))
    note = Checkpoint("test/log", tree.size, tree.root()).sign(forger)
    (copy / "checkpoint").write_text(note)
    (copy / "checkpoints.jsonl").write_text(json.dumps(note, ensure_ascii=False) + "\n")
    (copy / "vkey").write_text(forger.vkey + "\n")
    return copy


def test_a_log_written_anew_by_a_forger(written: Path, tmp_path: Path) -> None:
    """A consistent log under another key is refused by whoever pins the real one."""

    def change(lines: list[bytes]) -> None:
        lines[1] = lines[1].replace(b'"acme"', b'"evil"')

    assert verdict(resigned(written, tmp_path / "forged", change)) is ExitCode.TAMPERED


def test_two_logs_do_not_mix(written: Path, tmp_path: Path) -> None:
    """A log's event put at the same index of another log of the same key is found."""
    other = tmp_path / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "MAX_SEGMENT_BYTES", 900)
        patch.setattr(writer_module, "CHECKPOINT_EVENTS", 3)
        asyncio.run(_write(other, []))
    for path in files(written):
        if path.suffix == ".jsonl":
            shutil.copy(path, other / path.relative_to(written))
            assert verdict(other) is not ExitCode.VERIFIED
            break


def _half_a_line(log: Path) -> None:
    with max(path for path in (log / "seg").iterdir() if path.stat().st_size).open("ab") as file:
        file.write(b'{"v":1,"origin":"test/log","ts":"2026-01-01T00:00:00.0')


def _published(note: str) -> str:
    text = note.partition("\n\n")[0] + "\n"
    return note + DRAWN[0].clock.cosign(text, 1_700_000_000)


def _unsigned_seal(log: Path) -> None:
    lines = (log / "checkpoints.jsonl").read_bytes().splitlines(keepends=True)
    (log / "checkpoints.jsonl").write_bytes(b"".join(lines[:-1]))
    (log / "checkpoint").write_text(_published(json.loads(lines[-2])))


def _half_a_checkpoint(log: Path) -> None:
    lines = (log / "checkpoints.jsonl").read_bytes().splitlines(keepends=True)
    (log / "checkpoints.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    (log / "checkpoint").write_text(_published(json.loads(lines[-2])))


def _checkpoint_behind(log: Path) -> None:
    lines = (log / "checkpoints.jsonl").read_bytes().splitlines()
    (log / "checkpoint").write_text(_published(json.loads(lines[-2])))


def _checkpoint_far_behind(log: Path) -> None:
    lines = (log / "checkpoints.jsonl").read_bytes().splitlines()
    (log / "checkpoint").write_text(_published(json.loads(lines[0])))


def _no_checkpoint_yet(log: Path) -> None:
    (log / "checkpoint").unlink()


@pytest.mark.parametrize(
    "crash",
    [
        _half_a_line,
        _unsigned_seal,
        _half_a_checkpoint,
        _checkpoint_behind,
        _checkpoint_far_behind,
        _no_checkpoint_yet,
    ],
)
def test_a_crash_is_incomplete_not_tampered(
    tmp_path: Path, written: Path, crash: Callable[[Path], None]
) -> None:
    """What a power cut leaves at any step of the writer is told apart from a forgery."""
    shutil.copytree(written, tmp_path / "log")
    crash(tmp_path / "log")
    assert verdict(tmp_path / "log") is ExitCode.INCOMPLETE


def test_the_command(written: Path, tmp_path: Path) -> None:
    """`veklom audit verify` prints the findings and ends with the verdict's code."""
    run = CliRunner().invoke
    good = run(cli.main, ["audit", "verify", str(written), "--key", SIGNER.vkey])
    assert (good.exit_code, "RESULT   VERIFIED" in good.output) == (0, True)
    key_file = tmp_path / "vkey"
    key_file.write_text(SIGNER.vkey + "\n")
    as_json = run(cli.main, ["audit", "verify", str(written), "--key", str(key_file), "--json"])
    assert json.loads(as_json.output)["verdict"] == "verified"
    copy = tmp_path / "log"
    shutil.copytree(written, copy)
    segment = min((copy / "seg").iterdir())
    segment.write_bytes(segment.read_bytes().replace(b"acme", b"evil"))
    bad = run(cli.main, ["audit", "verify", str(copy), "--key", SIGNER.vkey])
    assert (bad.exit_code, "TAMPERED" in bad.output) == (1, True)
    assert run(cli.main, ["audit", "verify", str(tmp_path / "none")]).exit_code == 3
    assert run(cli.main, ["audit", "verify", str(written), "--key", "a+b+c"]).exit_code == 3
    (tmp_path / "empty").mkdir()
    empty = run(cli.main, ["audit", "verify", str(tmp_path / "empty"), "--key", SIGNER.vkey])
    assert empty.exit_code == 2


def trusting(note: str) -> Trust:
    """Return the trust of whoever has verified a checkpoint before."""
    return Trust(
        deployment=Verifier.from_vkey(SIGNER.vkey), is_given=True, trusted={"test/log": note}
    )


def test_goes_on_from_a_trusted_checkpoint(written: Path) -> None:
    """Of a log that was verified before only what came since is read, and the calls still add up."""
    notes = LogFiles(written).notes()
    for note in notes:
        report = verify_path(written, trust=trusting(note))
        assert report.exit_code is ExitCode.VERIFIED, list(report.to_lines())
        (log,) = report.logs
        assert log.begin == Checkpoint.claimed_by(note).size
        assert log.events == 8


@pytest.mark.parametrize("size", [3, 8, 100])
def test_two_contradicting_notes_are_shown(written: Path, size: int) -> None:
    """A checkpoint that somebody holds and the log does not have is tampering; both notes are printed."""
    held = Checkpoint("test/log", size, bytes(32)).sign(DRAWN[0].log)
    report = verify_path(written, trust=trusting(held))
    assert report.exit_code is ExitCode.TAMPERED
    (log,) = report.logs
    assert log.evidence == [held, LogFiles(written).notes()[-1]]
    assert held.splitlines()[2] in "\n".join(report.to_lines())


def test_a_log_that_is_gone_though_a_checkpoint_of_it_is_held(tmp_path: Path) -> None:
    """Whoever holds a checkpoint of a log misses the log."""
    held = Checkpoint("test/log", 3, bytes(32)).sign(DRAWN[0].log)
    report = verify_path(tmp_path, trust=trusting(held))
    assert report.exit_code is ExitCode.TAMPERED
    assert report.evidence == [held]


@pytest.mark.parametrize("name", ["checkpoint", "delegation"])
def test_stripped_signatures(written: Path, tmp_path: Path, name: str) -> None:
    """A note without its signatures is worth nothing, whatever it says."""
    shutil.copytree(written, tmp_path / "log")
    file = tmp_path / "log" / name
    file.write_text(file.read_text().partition("\n\n")[0] + "\n")
    assert verdict(tmp_path / "log") is ExitCode.TAMPERED


def test_checkpoints_stripped_of_their_signatures(written: Path, tmp_path: Path) -> None:
    """A list of unsigned checkpoints is not one of signed ones."""
    shutil.copytree(written, tmp_path / "log")
    unsigned = [note.partition("\n\n")[0] + "\n\n" for note in LogFiles(written).notes()]
    (tmp_path / "log/checkpoints.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in unsigned)
    )
    assert verdict(tmp_path / "log") is ExitCode.TAMPERED


def test_a_log_that_should_live_and_was_not_signed_lately(tmp_path: Path, written: Path) -> None:
    """A log without a seal is stale when its last signature is too old; a sealed one never is."""
    shutil.copytree(written, tmp_path / "log")
    _unsigned_seal(tmp_path / "log")
    (segment,) = [
        path for path in (tmp_path / "log/seg").iterdir() if b"log.sealed" in path.read_bytes()
    ]
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(lines[:-1]))
    for not_before, code in (
        (1_700_000_000, ExitCode.VERIFIED),
        (1_700_000_001, ExitCode.INCOMPLETE),
    ):
        trust = Trust(
            deployment=Verifier.from_vkey(SIGNER.vkey), is_given=True, not_before=not_before
        )
        assert verify_path(tmp_path / "log", trust=trust).exit_code is code
        assert verify_path(written, trust=trust).exit_code is ExitCode.VERIFIED
