"""The configuration: every field documented, every fault found at once, where it stands."""

import ast
import json
import re
from pathlib import Path

import pytest

from gateway import config as config_module
from gateway.config import (
    ConfigurationError,
    parse_config,
    providers_from,
    read_draft,
)
from policies.document import DocumentError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (ROOT / "config.yaml").read_text()


def faults_of(text: str) -> list[str]:
    """Return the faults of a configuration, as an operator reads them."""
    with pytest.raises(DocumentError) as raised:
        parse_config(text, "c.yaml", {})
    return [str(fault) for fault in raised.value.faults]


def test_the_shipped_file_holds_the_defaults() -> None:
    """What `config.yaml` says of every field is what holds where the field is absent."""
    path = str(ROOT / "config.yaml")
    shipped = parse_config(SHIPPED, path, {})
    bare = parse_config("providers: {openai: {}, anthropic: {}, gemini: {}}\n", path, {})
    assert shipped == bare


def test_the_shipped_file_names_every_field() -> None:
    """Every key that the configuration reads stands in `config.yaml`, if only in a comment."""
    readers = {
        "read", "string", "integer", "number", "boolean", "choice", "strings", "duration", "size",
        "section", "sections",
    }  # fmt: skip
    read = set()
    for node in ast.walk(ast.parse(Path(config_module.__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            key = next((each for each in node.args if isinstance(each, ast.Constant)), None)
            if node.func.attr in readers and key is not None:
                read.add(key.value)
    assert len(read) > 50
    named = set(re.findall(r"^#?\s*-?\s*([a-z_]+):", SHIPPED, re.MULTILINE))
    named |= set(re.findall(r"[{,]\s*([a-z_]+):", SHIPPED))
    assert read - named == set()


def test_the_shipped_file_explains_every_field() -> None:
    """Beside every field of `config.yaml` stands what it means; sections and bare names need no words."""
    explained = 0
    for number, line in enumerate(SHIPPED.splitlines(), 1):
        field = re.match(r"#? *(?:- )?([a-z_]+):(?: +(.*))?$", line)
        if field is None or re.match(r"# \S", line):
            continue
        value, _, words = (field[2] or "").partition("# ")
        if value.strip() not in {"", "{}"}:
            assert re.search(r"\w+ \w+|\w{5}", words), f"config.yaml:{number}: {line}"
            explained += 1
    assert explained > 50


def test_all_faults_at_once() -> None:
    """One run shows everything that is wrong, each with line and column, in order."""
    text = """\
name: my gateway
workers: 0
wrokers: 2
listeners:
  proxy: {address: "0.0.0.0:8080"}
  admin: {address: here}
issuers:
  - issuer: http://login.example.com
    algorithms: [HS256]
providers:
  Mine: {dialect: openai, base_url: "http://127.0.0.1:1/v1"}
  other: {dialect: smtp}
timeouts: {drain: soon}
limits: {head: 1MiB, headers: "many"}
logs: {format: xml}
"""
    found = faults_of(text)
    places = [tuple(map(int, fault.split(":")[1:3])) for fault in found]
    assert places == sorted(places)
    about = {
        2: "workers", 3: "did you mean", 5: "not loopback", 6: "must be an IP address",
        13: "drain", 15: "format",
    }  # fmt: skip
    for line, words in about.items():
        assert any(f"c.yaml:{line}:" in fault and words in fault for fault in found), (line, found)
    for words in (
        "HS256",
        "plain HTTP",
        "audiences",
        "spaces",
        "it becomes a path",
        "64KiB",
        "openai, anthropic",
    ):
        assert any(words in fault for fault in found), words
    assert len(found) >= 13


def test_no_two_listeners_share_an_address() -> None:
    """One address is one listener's; port 0 is whatever is free, and may be written for each."""
    (fault,) = faults_of("listeners: {sessions: {address: '127.0.0.1:8080'}}")
    assert fault == "c.yaml:1:23: listeners.sessions has the address of proxy"
    free = {"address": "127.0.0.1:0"}
    parse_config(json.dumps({"listeners": {"proxy": free, "admin": free}}), "c.yaml", {})


@pytest.mark.parametrize(
    "text",
    [
        "listeners: {proxy: {address: '10.0.0.1:80'}}",
        "listeners: {proxy: {address: '[::]:80'}}",
        "listeners: {sessions: {address: '0.0.0.0:80', certificate: ''}}",
        "providers: {openai: {base_url: 'http://api.openai.com/v1'}}",
        "issuers: [{issuer: 'https://a', audiences: a, jwks_url: 'http://a/jwks'}]",
    ],
)
def test_plain_http_must_be_declared(text: str) -> None:
    """Off loopback, towards a provider or for an issuer's keys, nothing is plain by accident."""
    assert any("plain" in fault for fault in faults_of(text))


def test_a_declared_exception_is_accepted() -> None:
    """With `plain_http: true` the same listener, provider and issuer are what the operator says."""
    text = json.dumps(
        {
            "listeners": {"proxy": {"address": "0.0.0.0:8080", "plain_http": True}},
            "providers": {
                "mine": {"dialect": "openai", "base_url": "http://h:1/v1", "plain_http": True}
            },
            "issuers": [{"issuer": "http://i", "audiences": "a", "plain_http": True}],
        }
    )
    config = parse_config(text, "c.yaml", {})
    (provider,) = providers_from(config)
    assert (provider.origin, provider.is_tls) == ("http://h:1", False)


def test_the_environment_says_only_where(tmp_path: Path) -> None:
    """Locations may come from the environment; everything else in it is ignored."""
    environment = {
        "VEKLOM_STATE_DIR": "/s",
        "VEKLOM_AUDIT_DIR": "/a",
        "VEKLOM_WORKERS": "9",
        "OPENAI_API_KEY": "sk-never",
    }
    path = str(tmp_path / "c.yaml")
    config = parse_config("state_dir: s\naudit: {directory: a}", path, environment)
    assert (config.state_dir, config.audit.directory, config.workers) == ("/s", "/a", 1)
    assert "sk-never" not in repr(config)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """A configuration means the same wherever the gateway is started from."""
    config = parse_config("audit: {directory: logs}", str(tmp_path / "c.yaml"), {})
    assert config.audit.directory == str(tmp_path / "logs")


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"a: [", b""])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    """A missing, binary, broken or empty file is a fault with its name, not a traceback."""
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError) as raised:
        read_draft(path)
    assert all(fault.startswith(f"{path}:1:") for fault in raised.value.faults)


@pytest.mark.parametrize(
    "given",
    ["providers: {mine: {dialect: openai}}", "providers: {mine: {dialect: openai, base_url: ''}}"],
)
def test_one_fault_is_told_once(given: str) -> None:
    """A provider without a URL is one fault, whether the URL is absent or empty."""
    (fault,) = faults_of(given)
    assert "base_url" in fault


REDIS = "backend: redis, url: "


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("backend: redis", "url is what backend: redis needs"),
        ("url: 'rediss://h:1'", "url is what backend: redis needs"),
        ("backend: etcd", "must be one of memory, redis"),
        (f"{REDIS}'rediss://u:planted@h:1'", "holds credentials: name username"),
        (f"{REDIS}'rediss://:planted@h:1'", "holds credentials: name username"),
        (f"{REDIS}'rediss://h:1?password=planted'", "must be rediss://host:port"),
        (f"{REDIS}'rediss://h:planted'", "must be rediss://host:port"),
        (f"{REDIS}'http://h:1'", "must be rediss://host:port"),
        (f"{REDIS}'rediss://'", "must be rediss://host:port"),
        (f"{REDIS}'rediss://h/one'", "must be rediss://host:port"),
        (f"{REDIS}'redis://h:1'", "is plain: use rediss"),
        (f"{REDIS}'redis://127.0.0.1:1', ca_file: a.pem", "certificates need rediss"),
        (f"{REDIS}'rediss://h:1', private_key: a.pem", "private_key needs a certificate"),
        (f"{REDIS}'rediss://h:1', username: u", "username needs a password_file"),
        (f"{REDIS}'rediss://h:1', namespace: '{{a}}'", "namespace must be"),
        (f"{REDIS}'rediss://h:1', staleness: 500ms", "staleness must be between"),
        (f"{REDIS}'rediss://h:1', staleness: 2m", "staleness must be between"),
        (f"{REDIS}'rediss://h:1', timeout: 6s", "timeout must be between"),
        (f"{REDIS}'rediss://h:1', connections: 1", "connections must be between"),
        (f"{REDIS}'rediss://h:1', password: planted", "unknown key 'password'"),
    ],
)
def test_a_store_that_cannot_be_is_a_fault(store: str, said: str) -> None:
    """Each is told once, where it stands; no message repeats what may be a password."""
    faults = faults_of(f"store: {{{store}}}")
    assert sum(said in fault for fault in faults) == 1, faults
    assert all(re.match(r"c\.yaml:1:\d+: ", fault) for fault in faults)
    assert "planted" not in "".join(faults)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("rediss://redis.example:6380/2", ("redis.example", 6380, 2, True)),
        ("rediss://redis.example", ("redis.example", 6379, 0, True)),
        ("redis://localhost:7000", ("localhost", 7000, 0, False)),
        ("redis://[::1]:7000/", ("::1", 7000, 0, False)),
    ],
)
def test_a_store_is_where_its_url_says(url: str, address: tuple[str, int, int, bool]) -> None:
    """Host, port and database come from the URL, with Redis's own defaults."""
    store = parse_config(f"store: {{{REDIS}'{url}'}}", "c.yaml", {}).store
    assert (store.host, store.port, store.database, store.is_tls) == address
    assert store.is_shared
    assert not parse_config("store: {}", "c.yaml", {}).store.is_shared
