"""Protections are reported as found, never as asked for; a required one that is missing is fatal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import hardening
from gateway.hardening import (
    WIPING_ENVIRONMENT,
    Finding,
    Protection,
    ProtectionMissing,
    demand,
    memory_finding,
    to_reasons,
)
from keys import region as region_module
from keys.region import MemoryProtection, SecretRegion

ROOT = Path(__file__).resolve().parents[2]


def in_child(program: str, **environment: str) -> str:
    """Return what a fresh process prints: hardening is irrevocable, so it is not done to this one."""
    plain = {name: os.environ[name] for name in ("PATH",)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**plain, **environment},
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FOUND = """
import json, sys
from pathlib import Path
from gateway.hardening import harden, to_reasons
print(json.dumps(to_reasons(harden([Path({folder!r})], wipes=True))))
"""


def found(folder: Path, **environment: str) -> dict[str, str]:
    """Return what a hardened child finds of itself."""
    reasons: dict[str, str] = json.loads(
        in_child(FOUND.format(folder=str(folder)), **{**WIPING_ENVIRONMENT, **environment})
    )
    return reasons


def test_a_hardened_process_finds_itself_protected(tmp_path: Path) -> None:
    """Dumps, cores, debug modes and key logs are shut, and freed memory is wiped."""
    reasons = found(tmp_path)
    assert set(reasons) == set(Protection) - {"secret_memory"}
    for name in ("wipe_on_free", "not_dumpable", "no_core", "no_key_log", "no_debug"):
        assert not reasons[name], name


def test_freed_memory_is_readable_without_the_wiping_environment(tmp_path: Path) -> None:
    """The self-test can fail: with the ordinary allocator what was freed is still there."""
    program = FOUND.format(folder=str(tmp_path))
    assert json.loads(in_child(program))["wipe_on_free"] == "freed memory is readable"


@pytest.mark.parametrize(
    ("variable", "protection", "reason"),
    [
        ("SSLKEYLOGFILE", "no_key_log", "SSLKEYLOGFILE is set"),
        ("PYTHONASYNCIODEBUG", "no_debug", "PYTHONASYNCIODEBUG"),
        ("PYTHONTRACEMALLOC", "no_debug", "PYTHONTRACEMALLOC"),
        ("PYTHONDEVMODE", "no_debug", "PYTHONDEVMODE"),
    ],
)
def test_variables_that_leak_are_found(
    tmp_path: Path, variable: str, protection: str, reason: str
) -> None:
    """A variable that makes Python keep or print values is named."""
    assert found(tmp_path, **{variable: "1"})[protection] == reason


def test_writes_are_confined(tmp_path: Path) -> None:
    """A process makes, changes and removes files in its folders, and nowhere else."""
    (inside := tmp_path / "inside").mkdir()
    (tmp_path / "outside").write_text("as it was")
    program = f"""
from pathlib import Path
from gateway.hardening import writes_finding
inside, outside = Path({str(inside)!r}), Path({str(tmp_path / "outside")!r})
print("found:", writes_finding([inside]).reason)
(inside / "a").mkdir()
(inside / "a" / "b").write_text("new")
(inside / "a" / "b").rename(inside / "a" / "c")
for attempt in (
    lambda: outside.write_text("changed"), outside.unlink, lambda: outside.rename(inside / "x"),
    lambda: outside.with_name("new").write_text("new"), outside.with_name("d").mkdir,
):
    try:
        attempt()
        print("succeeded")
    except OSError as error:
        print(error.strerror)
"""
    reason, *attempts = in_child(program).removeprefix("found:").strip(" ").split("\n")
    if reason.startswith("Landlock"):
        pytest.skip("this kernel has no Landlock")
    assert not reason
    assert set(attempts) <= {"Permission denied", "Invalid cross-device link"}
    assert len(attempts) == 5
    assert (tmp_path / "outside").read_text() == "as it was"
    assert (inside / "a" / "c").read_text() == "new"


SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


@pytest.mark.parametrize(
    ("swaps", "limit", "reason"),
    [
        (SWAPS, "max", ""),
        (SWAPS + "/dev/sda2  partition 1 0 -2\n", "max", "swap is on: /dev/sda2"),
        (SWAPS + "/dev/sda2  partition 1 0 -2\n", "0", ""),
        (SWAPS + "/dev/zram0 partition 1 0 100\n", "", "swap is on: /dev/zram0"),
    ],
)
def test_swap_is_found_unless_the_control_group_forbids_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: str, limit: str, reason: str
) -> None:
    """Any active swap counts, compressed memory too, unless this process's group may not swap."""
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    if limit:
        (group.parent / "memory.swap.max").write_text(limit + "\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/swaps").write_text(swaps)
    (tmp_path / "proc/self/cgroup").write_text("1:name=x:/y\n0::/a/b\n")
    monkeypatch.setattr(hardening, "ROOT", tmp_path)
    found_swap = next(f for f in hardening.process_findings() if f.protection == "no_swap")
    assert found_swap.reason == reason


def test_a_container_sees_its_own_group_as_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a control group namespace the limit stands at the root of what is mounted."""
    for folder in ("sys/fs/cgroup", "proc/self"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.swap.max").write_text("0\n")
    (tmp_path / "proc/swaps").write_text(SWAPS + "/dev/sda2  partition 1 0 -2\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    monkeypatch.setattr(hardening, "ROOT", tmp_path)
    found_swap = next(f for f in hardening.process_findings() if f.protection == "no_swap")
    assert not found_swap.reason


def test_a_region_without_secret_pages_is_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What guards the slots instead is named."""
    monkeypatch.setattr(region_module, "_MEMFD_SECRET", 99_999)
    finding = memory_finding(SecretRegion.open(slots=1, slot_bytes=4096))
    assert finding.reason in {
        f"{MemoryProtection.LOCKED} instead",
        f"{MemoryProtection.NONE} instead",
    }


def test_only_what_is_required_is_fatal() -> None:
    """A missing protection stops the process where it is required, and is reported where not."""
    findings = [Finding(Protection.NO_CORE), Finding(Protection.NO_SWAP, "swap is on: /dev/sda2")]
    demand(findings, ["no_core"])
    with pytest.raises(ProtectionMissing, match="no_swap: swap is on: /dev/sda2"):
        demand(findings, ["no_core", "no_swap"])
    assert to_reasons(findings) == {"no_core": "", "no_swap": "swap is on: /dev/sda2"}
