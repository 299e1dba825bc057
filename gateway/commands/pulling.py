"""Fetching a signed bundle from an HTTPS URL, and putting it in a folder's place.

The transport is not trusted: what counts is the signature of a key that was pinned. A gateway never
fetches policies itself; whatever runs this does, and the gateway's watch takes what lies there then.

Laws of this file:
- an archive is a tar of plain files at its top, policies and their signature, of bounded size;
- nothing of it is written before the signature holds and the policies compile;
- the folder is replaced as a whole; a crash leaves the old one, or it beside the new one as `.old`.
"""

import io
import shutil
import ssl
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

from gateway.bundles import NOTE, Folder, PolicySource, signature_faults
from policies.testing import SUFFIX

MAX_ARCHIVE_BYTES: Final = 4 * 1024 * 1024
"""Compressed; a policy file alone may have 1 MiB."""

MAX_CONTENT_BYTES: Final = 16 * 1024 * 1024
MAX_FILES: Final = 256
PULL_SECONDS: Final = 30.0


class PullFailed(Exception):
    """A bundle that was not taken; its text says why."""


def pull(url: str, key: str, *, ca_file: str = "") -> Folder:
    """Return the bundle that lies at `url`, signed by `key`.

    Raises:
        PullFailed: It cannot be fetched, is no bundle, or is not signed by this key.
    """
    folder = _unpack(_fetch(url, ca_file), url)
    for fault in signature_faults(folder, key):
        raise PullFailed(fault)
    return folder


def _fetch(url: str, ca_file: str) -> bytes:
    request = urllib.request.Request(url)  # noqa: S310 - the scheme is checked below
    if request.type != "https":
        raise PullFailed(f"{url}: must be an https URL")
    context = ssl.create_default_context(cafile=ca_file or None)
    try:
        with urllib.request.urlopen(request, timeout=PULL_SECONDS, context=context) as answer:  # noqa: S310 - checked above
            if answer.url != url:
                raise PullFailed(f"{url}: redirects elsewhere; name the bundle's own URL")
            data: bytes = answer.read(MAX_ARCHIVE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise PullFailed(f"{url}: cannot be fetched: {getattr(error, 'reason', error)}") from None
    if len(data) > MAX_ARCHIVE_BYTES:
        raise PullFailed(f"{url}: is larger than {MAX_ARCHIVE_BYTES} bytes")
    return data


def _unpack(data: bytes, url: str) -> Folder:
    texts: dict[str, str] = {}
    left = MAX_CONTENT_BYTES
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if name in {"", "."}:
                    continue
                file = archive.extractfile(member) if member.isreg() else None
                is_ours = name == NOTE or name.endswith(".yaml")
                if file is None or not is_ours or "/" in name or name in texts:
                    raise PullFailed(f"{url}: holds {name!r}, which is no file of a bundle")
                left -= member.size
                if left < 0 or len(texts) >= MAX_FILES:
                    raise PullFailed(f"{url}: unpacks to more than a bundle may hold")
                texts[name] = file.read().decode()
    except (tarfile.TarError, UnicodeDecodeError, EOFError, OSError) as error:
        raise PullFailed(f"{url}: is no tar archive of texts: {error}") from None
    policies = [name for name in sorted(texts) if name != NOTE and not name.endswith(SUFFIX)]
    tests = [name for name in sorted(texts) if name.endswith(SUFFIX)]
    if not policies:
        raise PullFailed(f"{url}: holds no policy")
    return Folder(
        path=url,
        policies=tuple(PolicySource(name, texts[name]) for name in policies),
        tests=tuple(PolicySource(name, texts[name]) for name in tests),
        note=texts.get(NOTE, ""),
    )


def put_in_place(folder: Folder, where: Path) -> None:
    """Let `where` be a folder that holds this bundle and nothing else."""
    fresh, old = where.with_name(where.name + ".new"), where.with_name(where.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    for source in (*folder.policies, *folder.tests):
        (fresh / source.path).write_text(source.text, encoding="utf-8")
    (fresh / NOTE).write_text(folder.note, encoding="utf-8")
    if where.exists():
        where.rename(old)
    # A crash here leaves no folder: the gateway keeps what it has in force, and says what is missing.
    fresh.rename(where)
    shutil.rmtree(old, ignore_errors=True)
