"""Handing logs on: as a pack for auditors, as C2SP tiles, or event by event in the words of others."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from gateway.audit.checkpoint import Checkpoint
from gateway.audit.files import REDACTED, LogFiles
from gateway.audit.mappings import MAPPINGS
from gateway.audit.reading import entries, find_logs
from gateway.audit.stats import count
from gateway.audit.tiles import WIDTH, bundle, tile_path, tiles_of
from gateway.audit.verify import verify_path

_README: Final = """\
# An audit pack

`logs/` holds the audit logs of a gateway as they lay on its disk. `summary.txt` is what the
gateway's own verifier said of them, `summary.json` what they add up to, `keys.txt` the key of each
log with the deployment key's word for it, `configuration.jsonl` which configurations and policies
were in force and when. `included/` holds files that whoever made this pack added, such as the
policies themselves: `sha256sum` them.

Trust nothing in here before you have compared `logs/vkey` with the key that you were given another way.

To verify without the gateway's program you need the specifications and any implementation of them:
- a log's folder: `seg/*.jsonl` are its events, one a line; the leaf of an event is SHA-256(0x00 || line);
- the tree is that of RFC 6962, section 2.1; its root and size are signed in `checkpoint`;
- checkpoints are C2SP tlog-checkpoint in C2SP signed-note, keys C2SP vkeys, `delegation` a note by the
  deployment key whose text is a C2SP tlog-policy with the log's own keys;
- `anchor` is the log that names checkpoints of all others, signed by the deployment key itself.
`verify.sh` checks the signatures with OpenSSL 3 alone.
"""

_VERIFY: Final = """\
#!/bin/sh
# Checks the signature of every log's checkpoint and delegation with OpenSSL 3, and with nothing of ours.
set -eu
cd "$(dirname "$0")/logs"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# public <vkey> <file>: the Ed25519 key of a vkey, as OpenSSL reads it.
public() {
    printf '%s' "$1" | sed 's/^[^+]*+[^+]*+//' | base64 -d | tail -c 32 >"$work/raw"
    { printf '\\060\\052\\060\\005\\006\\003\\053\\145\\160\\003\\041\\000'; cat "$work/raw"; } >"$2.der"
    openssl pkey -pubin -inform DER -in "$2.der" -out "$2"
}
# signed <note> <public key>: the first signature of a note.
signed() {
    sed '/^$/,$d' "$1" >"$work/text"
    sed '1,/^$/d' "$1" | head -1 | awk '{print $3}' | base64 -d | tail -c 64 >"$work/signature"
    openssl pkeyutl -verify -pubin -inkey "$2" -rawin -in "$work/text" -sigfile "$work/signature" >/dev/null
}
public "$(cat vkey)" "$work/deployment"
for log in */; do
    log=${log%/}
    [ -f "$log/checkpoint" ] || continue
    if [ "$log" = anchor ]; then
        signed "$log/checkpoint" "$work/deployment"
    else
        signed "$log/delegation" "$work/deployment"
        public "$(sed -n 's/^log //p' "$log/delegation")" "$work/log"
        signed "$log/checkpoint" "$work/log"
    fi
    echo "$log: signed, $(sed -n 2p "$log/checkpoint") events"
done
"""


def mapped(path: Path, form: str) -> Iterator[str]:
    """Return every event below `path` as a line in the words of `form`."""
    mapping = MAPPINGS[form]
    for entry in entries(path):
        yield json.dumps(mapping(entry.fields, entry.line), separators=(",", ":"))


def write_tiles(log: Path, out: Path) -> None:
    """Lay a log out as a C2SP tlog-tiles log: its latest checkpoint, all tiles, all bundles."""
    files = LogFiles(log)
    note = files.read("checkpoint") or b""
    size = Checkpoint.claimed_by(note.decode()).size
    for level, index, width in tiles_of(size):
        hashes = [files.node(8 * level, index * WIDTH + at) for at in range(width)]
        _write(out / tile_path(level, index, width), b"".join(hashes))
    lines: list[bytes] = []
    for index, line in files.lines():
        lines.append(line)
        if index + 1 == size or len(lines) == WIDTH:
            # A bundle with an erased event cannot be had: its hash is all that is left.
            if not any(each.startswith(REDACTED) for each in lines):
                _write(out / tile_path("entries", index // WIDTH, len(lines)), bundle(lines))
            lines = []
        if index + 1 == size:
            break
    _write(out / "checkpoint", note)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_pack(path: Path, out: Path, include: Sequence[Path], key: str | None) -> None:
    """Write a tarball for auditors.

    Raises:
        OSError: Something cannot be read or written.
        ValueError: The key is malformed, or none is given and none is found.
    """
    report = verify_path(path, key)
    texts = {
        "README.md": _README,
        "verify.sh": _VERIFY,
        "summary.txt": "\n".join(report.to_lines()) + "\n",
        "summary.json": json.dumps(count(entry.fields for entry in entries(path)), indent=1) + "\n",
        "keys.txt": "\n".join(_keys(path)),
        "configuration.jsonl": "".join(_configurations(path)),
    }
    with tarfile.open(out, "x:gz") as archive:
        for name, text in texts.items():
            info = tarfile.TarInfo(f"audit-pack/{name}")
            data = text.encode()
            info.size, info.mode = len(data), 0o755 if name == "verify.sh" else 0o644
            archive.addfile(info, io.BytesIO(data))
        archive.add(path, "audit-pack/logs")
        for file in include:
            archive.add(file, f"audit-pack/included/{file.name}")


def _keys(path: Path) -> Iterator[str]:
    for log in find_logs(path):
        yield f"== {log.name}"
        yield (
            LogFiles(log).read("delegation") or b"signed by the deployment key itself\n"
        ).decode()


def _configurations(path: Path) -> Iterator[str]:
    for entry in entries(path):
        if entry.fields["type"] in {"configuration.loaded", "policy.loaded"}:
            yield entry.line.decode() + "\n"
