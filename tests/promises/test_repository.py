"""What the repository promises of itself: locked, explained, and without addresses of any registry."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["build", "runtime", "demo", "dev"])
def test_requirements_are_pinned_and_hashed(name: str) -> None:
    """Every requirement has one version and its hashes, and no address to fetch it from."""
    text = (ROOT / f"requirements/{name}.txt").read_text()
    requirements = re.findall(r"^([a-z0-9][^\s\\]*)", text, re.MULTILINE)
    assert len(requirements) > 4
    assert all(re.match(r"[a-z0-9._-]+==[0-9]", each) for each in requirements)
    assert text.count("--hash=sha256:") >= len(requirements)
    assert "://" not in text
    assert "index-url" not in text


def test_npm_packages_are_locked_without_addresses() -> None:
    """The doubles' lock file has integrity hashes and names no registry."""
    lock = json.loads((ROOT / "tests/npm/package-lock.json").read_text())
    packages = {name: each for name, each in lock["packages"].items() if name}
    assert packages
    assert all(each["integrity"].startswith("sha512-") for each in packages.values())
    assert not any("resolved" in each for each in packages.values())


def test_no_registry_is_named_anywhere() -> None:
    """No tracked file names the host of a package registry."""
    # Bracketed, so that this file does not hold what it looks for.
    hosts = re.compile(rb"p[y]p[i]\.org|p[y]thonhosted|registry\.n[p]m|d[e]b\.d[e]b")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    if not names:
        pytest.skip("not a git checkout")
    for name in names:
        path = ROOT / name
        if path.is_file():
            data = path.read_bytes()
            assert not hosts.search(data), name


def test_the_license_is_apache_2() -> None:
    """The licence text is whole."""
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize(
    "name", ["README", "ARCHITECTURE", "THREAT_MODEL", "CONTRIBUTING", "SECURITY"]
)
def test_every_file_that_the_pages_name_is_there(name: str) -> None:
    """A page points at code and tests that exist: a claim is worth what stands behind it."""
    text = (ROOT / f"{name}.md").read_text()
    for path in re.findall(r"`((?:tests|gateway|keys|policies|docs|bench)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path


def test_decisions_are_numbered_without_gaps() -> None:
    """Each decision has its own number, in its name and in its title."""
    pages = sorted((ROOT / "docs/adr").glob("*.md"))
    for number, page in enumerate(pages, 1):
        assert page.name.startswith(f"{number:04}-")
        assert page.read_text().startswith(f"# {number}. ")


def test_what_the_top_level_promises_is_there() -> None:
    """Everything that people look for beside the code exists and is not empty."""
    for name in (
        "README.md", "ARCHITECTURE.md", "THREAT_MODEL.md", "CHANGELOG.md", "CONTRIBUTING.md",
        "SECURITY.md", "Makefile", "Dockerfile", "config.yaml", ".ci/run",
    ):  # fmt: skip
        assert (ROOT / name).stat().st_size > 50, name
