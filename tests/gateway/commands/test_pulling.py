"""Bundles from afar: taken whole and signed, or not at all."""

import http.server
import io
import ssl
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner, Result

from gateway.cli import main

POLICY = "rules: [{id: a, effect: allow, match: {tenant: acme}}]\n"
TESTS = "fixtures: {call: {tenant: acme}}\ntests: [{name: t, given: call, expect: allow}]\n"


class Server:
    """An HTTPS server on loopback that holds one archive."""

    def __init__(self, folder: Path) -> None:
        ca = trustme.CA()
        self.ca_file = folder / "ca.pem"
        ca.cert_pem.write_to_path(self.ca_file)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert("127.0.0.1").configure_cert(context)
        self.archive = b""
        held = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/moved":
                    self.send_response(302)
                    self.send_header("location", "/bundle.tar.gz")
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("content-length", str(len(held.archive)))
                self.end_headers()
                self.wfile.write(held.archive)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_port}/bundle.tar.gz"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A running one."""
    server = Server(tmp_path)
    yield server
    server.close()


def archive_of(
    files: dict[str, str], *, spoil: Callable[[tarfile.TarFile], None] | None = None
) -> bytes:
    """Return a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        if spoil:
            spoil(archive)
    return out.getvalue()


def signed(tmp_path: Path, files: dict[str, str]) -> tuple[dict[str, str], str]:
    """Return the files with their signature, and its verification key."""
    folder = tmp_path / "authored"
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    done = CliRunner().invoke(
        main, ["policy", "sign", str(folder), "--key", str(tmp_path / "seed")]
    )
    return {**files, "bundle.note": (folder / "bundle.note").read_text()}, done.output.strip()


def pull(server: Server, key: str, where: Path, url: str = "") -> Result:
    """Run `veklom policy pull`."""
    return CliRunner().invoke(
        main,
        [
            "policy",
            "pull",
            url or server.url,
            str(where),
            "--key",
            key,
            "--ca-file",
            str(server.ca_file),
        ],
    )


def test_a_signed_bundle_replaces_the_folder(server: Server, tmp_path: Path) -> None:
    """It lies there as it was signed, and what lay there before is gone."""
    files, key = signed(tmp_path, {"p.yaml": POLICY, "p_test.yaml": TESTS})
    server.archive = archive_of(files)
    where = tmp_path / "policies"
    where.mkdir()
    (where / "old.yaml").write_text("rules: []")
    result = pull(server, key, where)
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_text() for path in where.iterdir()} == files
    assert sorted(path.name for path in tmp_path.glob("policies*")) == ["policies"]


WRONG: dict[str, tuple[dict[str, str], int, str]] = {
    "changed": ({"p.yaml": POLICY + "# x"}, 1, "another bundle's"),
    "more": ({"q.yaml": "rules: []"}, 1, "another bundle's"),
    "unsigned": ({"bundle.note": ""}, 1, "there is no bundle.note"),
    "folder": ({"sub/p.yaml": POLICY}, 1, "no file of a bundle"),
    "above": ({"../p.yaml": POLICY}, 1, "no file of a bundle"),
    "program": ({"p.sh": "rm"}, 1, "no file of a bundle"),
}


@pytest.mark.parametrize(("changes", "code", "said"), WRONG.values(), ids=WRONG)
def test_what_was_not_signed_like_that_changes_nothing(
    server: Server, tmp_path: Path, changes: dict[str, str], code: int, said: str
) -> None:
    """Another byte, another file or no signature: the folder stays as it was."""
    files, key = signed(tmp_path, {"p.yaml": POLICY})
    server.archive = archive_of({**files, **changes})
    result = pull(server, key, tmp_path / "policies")
    assert result.exit_code == code
    assert said in result.stderr
    assert not list(tmp_path.glob("policies*"))


def test_what_is_signed_but_wrong_changes_nothing(server: Server, tmp_path: Path) -> None:
    """A bundle that does not compile, or fails its own tests, is not put in place."""
    files, key = signed(tmp_path, {"p.yaml": POLICY.replace("allow", "alow")})
    server.archive = archive_of(files)
    assert pull(server, key, tmp_path / "policies").exit_code == 3
    files, key = signed(tmp_path, {"p.yaml": POLICY, "p_test.yaml": TESTS.replace("acme", "beta")})
    server.archive = archive_of(files)
    assert pull(server, key, tmp_path / "policies").exit_code == 4
    assert not list(tmp_path.glob("policies*"))


def test_only_from_where_it_was_said(server: Server, tmp_path: Path) -> None:
    """Plain HTTP, redirects, foreign certificates, links and what is no archive are refused."""
    files, key = signed(tmp_path, {"p.yaml": POLICY})
    server.archive = archive_of(files)
    where = tmp_path / "policies"
    assert "must be an https URL" in pull(server, key, where, "http://127.0.0.1:1/x").stderr
    assert (
        "redirects" in pull(server, key, where, server.url.replace("bundle.tar.gz", "moved")).stderr
    )
    strange = CliRunner().invoke(main, ["policy", "pull", server.url, str(where), "--key", key])
    assert "cannot be fetched" in strange.stderr

    def link(archive: tarfile.TarFile) -> None:
        member = tarfile.TarInfo("q.yaml")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)

    server.archive = archive_of(files, spoil=link)
    assert "no file of a bundle" in pull(server, key, where).stderr
    server.archive = b"no archive"
    assert "is no tar archive" in pull(server, key, where).stderr
    assert not list(tmp_path.glob("policies*"))
