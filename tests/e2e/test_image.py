"""The image, without a container engine: the Dockerfile's own steps, in environments of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.simulators.gateway import free_port

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).resolve().parents[2]
_, BUILD, SERVE = (ROOT / "Dockerfile").read_text().replace("\\\n", "").split("\nFROM ")
README = (ROOT / "README.md").read_text()


def copy_what_the_build_copies(folder: Path) -> None:
    """Do the first stage's COPY lines, and no more."""
    for line in re.findall(r"^COPY (.*)$", BUILD, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            path = ROOT / source
            ignored = shutil.ignore_patterns("__pycache__")
            if path.is_dir():
                shutil.copytree(path, folder / source, ignore=ignored)
            else:
                shutil.copy(path, folder)


def install_locked(requirements: Path, python: Path) -> None:
    """Put into an environment what a lock names, from the running one: the same files, offline."""
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    for line in requirements.read_text().splitlines():
        found = re.match(r"([a-z0-9-]+)==([^ ;]+)(?: ;.*)? \\", line)
        if found is None:
            continue
        try:
            held = distribution(found[1])
        except ModuleNotFoundError:
            assert ";" in line, f"{found[1]} is locked for every platform"
            continue
        assert held.version == found[2]
        for file in held.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), site / file)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step with nothing of this process's environment but its path."""
    clean = {"PATH": os.environ["PATH"], "HOME": str(cwd), **environment}
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the image's /opt/veklom lies, made as the Dockerfile makes it."""
    folder = tmp_path_factory.mktemp("image")
    copy_what_the_build_copies(folder)
    opt, dist = folder / "opt", folder / "dist"
    run(sys.executable, "-m", "venv", "--without-pip", opt, cwd=folder)
    install_locked(folder / "runtime.txt", opt / "bin" / "python")
    pip: tuple[str | Path, ...] = (sys.executable, "-m", "pip")
    built = run(
        *pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, ".",
        cwd=folder,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = dist.glob("*.whl")
    into: tuple[str | Path, ...] = ("--python", opt / "bin" / "python")
    installed = run(*pip, *into, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return opt


def test_the_dockerfile_installs_only_what_is_locked() -> None:
    """Every installation is by hash or offline, and what serves gets the run-time lock and the wheel."""
    installs = re.findall(r"pip .*?(?:install|wheel) ([^&\n]*)", BUILD)
    assert len(installs) == 4
    assert all("--require-hashes" in each or "--no-index" in each for each in installs)
    serving = re.findall(r"pip --python /opt/veklom/bin/python install ([^&\n]*)", BUILD)
    assert [each.split()[-1] for each in serving] == ["runtime.txt", "dist/*.whl"]
    assert "pip" not in SERVE


def test_what_builds_stays_behind(image: Path) -> None:
    """Nothing that builds, tests or installs is in the environment that serves, and it is consistent."""
    listed = run(
        image / "bin" / "python", "-c",
        "import importlib.metadata as m; print(*sorted({d.name.lower() for d in m.distributions()}))",
        cwd=image.parent,
    ).stdout.split()  # fmt: skip
    assert "veklom-gateway" in listed
    assert not set(listed) & {"hatchling", "editables", "openai", "pip", "pytest", "setuptools"}
    checked = run(
        sys.executable, "-m", "pip", "--python", image / "bin" / "python", "check", cwd=image
    )
    assert checked.returncode == 0, checked.stdout


def test_the_image_serves_from_anywhere(image: Path, tmp_path: Path) -> None:
    """With the Dockerfile's variables and the README's listeners, `check` passes, and health is well."""
    (line,) = re.findall(r"^ENV (.*)$", SERVE, re.MULTILINE)
    environment = {
        name: f"{tmp_path}{path}" for name, path in (each.split("=") for each in line.split())
    }
    path = Path(environment["VEKLOM_CONFIG"])
    path.parent.mkdir(parents=True)
    (block,) = re.findall(r"```yaml\n(listeners:.*?)```", README, re.DOTALL)
    config = YAML(typ="safe").load((ROOT / "config.yaml").read_text())
    config["listeners"] |= YAML(typ="safe").load(block)["listeners"]
    path.write_text(json.dumps(config))  # JSON is YAML 1.2
    checked = run(image / "bin" / "veklom", "check", cwd=tmp_path, **environment)
    assert checked.returncode == 0, checked.stderr
    assert f"configuration {path}" in checked.stdout
    admin = free_port()
    ports = {"proxy": 0, "sessions": 0, "admin": admin}
    config["listeners"] = {name: {"address": f"127.0.0.1:{n}"} for name, n in ports.items()}
    path.write_text(json.dumps(config))
    (asked,) = re.findall(r"HEALTHCHECK .*?CMD (\[.*\])", SERVE)
    health = [str(image / "bin" / "python"), *json.loads(asked.replace("8082", str(admin)))[1:]]
    assert run(*health, cwd=tmp_path).returncode != 0, "nobody is there yet"
    serving = subprocess.Popen(
        [image / "bin" / "veklom", "serve"],
        cwd=tmp_path, env={"PATH": os.environ["PATH"], **environment},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        # As an engine asks: again and again, while the gateway compiles itself and starts.
        assert any(run(*health, cwd=tmp_path).returncode == 0 for _ in range(60))
        assert list((tmp_path / "var/lib/veklom/audit").rglob("*.jsonl"))
    finally:
        serving.terminate()
        assert serving.wait(60) == 0
