"""A bundle of policies: its files, its tests, its signature; read whole and checked, or refused.

Laws of this file:
- a bundle is taken or refused as a whole: its files compile, its tests pass, its signature is right;
- what was checked is what is used: every process compiles the same bytes that were read here;
- `*_test.yaml` are tests, every other `*.yaml` is policy; the digest is that of the policy.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from gateway.config import Config, ConfigurationError, Policies, known_to, why
from keys.signing import BadSignature, Signer, Verifier
from policies.document import DocumentError
from policies.known import Known
from policies.rules import PolicySet, digest_of, load_policy_set
from policies.testing import SUFFIX, read_cases, run_cases

NOTE: Final = "bundle.note"
"""The signature's file, in the bundle's folder."""

_CONTEXT: Final = "veklom-policy-bundle/v1"
MAX_FAILURES: Final = 20
"""Of a bundle's tests that are told one by one; who repairs it runs them with `veklom policy test`."""


class PolicySource(msgspec.Struct, frozen=True):
    """One policy file as it was read: every process compiles the same bytes."""

    path: str
    text: str


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """The policies in force, and those of a candidate that is tried beside them."""

    policies: tuple[PolicySource, ...]
    candidate: tuple[PolicySource, ...] = ()

    @property
    def digest(self) -> str:
        """Return the digest of the policies in force."""
        return digest_of(_pairs(self.policies))

    @property
    def files(self) -> tuple[str, ...]:
        """Return the paths of the policies in force."""
        return tuple(source.path for source in self.policies)

    def compile(self, known: Known) -> PolicySet:
        """Return the policy set.

        Raises:
            DocumentError: Some file is wrong.
        """
        policy_set = load_policy_set(_pairs(self.policies), known)
        if not self.candidate:
            return policy_set
        return policy_set.trying(load_policy_set(_pairs(self.candidate), known))


class Folder(msgspec.Struct, frozen=True, kw_only=True):
    """What lies in a bundle's folder, or the one file that it is."""

    path: str
    policies: tuple[PolicySource, ...]
    tests: tuple[PolicySource, ...]
    note: str = ""
    unread: tuple[str, ...] = ()


class BundleRefused(ConfigurationError):
    """A bundle cannot be used; `unread` are sentences about files that could not be read."""

    def __init__(self, faults: Sequence[str], unread: Sequence[str] = ()) -> None:
        super().__init__((*unread, *faults))
        self.unread = tuple(unread)
        self.others = tuple(faults)


def _pairs(sources: tuple[PolicySource, ...]) -> list[tuple[str, str]]:
    return [(source.path, source.text) for source in sources]


def policy_files(path: str) -> list[Path]:
    """Return every file of a bundle, its tests and its signature included, in order."""
    where = Path(path)
    if not where.is_dir():
        beside = where.with_name(where.stem + SUFFIX)
        return [where, beside] if beside.exists() else [where]
    note = where / NOTE
    return [*sorted(where.glob("*.yaml")), *([note] if note.exists() else [])]


def read_folder(path: str) -> Folder:
    """Return the texts of a bundle's files, and a sentence about each that cannot be read."""
    policies, tests, note, unread = [], [], "", []
    for file in policy_files(path):
        try:
            source = PolicySource(str(file), file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            unread.append(f"{file}: cannot be read: {why(error)}")
            continue
        if file.name == NOTE:
            note = source.text
        elif file.name.endswith(SUFFIX):
            tests.append(source)
        else:
            policies.append(source)
    if not policies and not unread:
        unread = [f"{path}: holds no *.yaml file; the policy would allow nothing"]
    return Folder(
        path=path,
        policies=tuple(policies),
        tests=tuple(tests),
        note=note,
        unread=tuple(unread),
    )


def read_bundle(policies: Policies, known: Known) -> tuple[Bundle, PolicySet]:
    """Return the bundle that a configuration names and the policy set that it compiles to.

    Raises:
        BundleRefused: It cannot be read, is wrong, fails a test, or is not signed as required.
    """
    folder = read_folder(policies.path)
    unread = list(folder.unread)
    faults = list(signature_faults(folder, policies.signed_by))
    bundle = Bundle(policies=folder.policies)
    if policies.shadow:
        candidate = read_folder(policies.shadow)
        unread += candidate.unread
        faults += signature_faults(candidate, policies.signed_by)
        bundle = msgspec.structs.replace(bundle, candidate=candidate.policies)
    try:
        policy_set = bundle.compile(known)
        faults += test_faults(folder, policy_set)
    except DocumentError as error:
        raise BundleRefused([*faults, *map(str, error.faults)], unread) from None
    if faults or unread:
        raise BundleRefused(faults, unread)
    return bundle, policy_set


def test_faults(folder: Folder, policy_set: PolicySet) -> Iterator[str]:
    """Yield a line for each test of a bundle that fails.

    Raises:
        DocumentError: A test file is wrong.
    """
    outcomes = run_cases(read_cases(_pairs(folder.tests), policy_set.known), policy_set)
    failed = [each for each in outcomes if each.differences]
    for each in failed[:MAX_FAILURES]:
        case = each.case
        yield f"{case.suite}:{case.line}:1: test {case.name!r} failed: {'; '.join(each.differences)}"
    if len(failed) > MAX_FAILURES:
        yield f"{folder.path}: {len(failed) - MAX_FAILURES} more tests failed"


# --- signatures ----------------------------------------------------------------------------------


def sign_folder(folder: Folder, signer: Signer) -> str:
    """Return the signed note that vouches for a bundle."""
    return signer.sign_note(_statement(folder))


def signature_faults(folder: Folder, signed_by: str) -> Iterator[str]:
    """Yield what is wrong with a bundle's signature, where one is required."""
    if not signed_by:
        return
    try:
        if not folder.note:
            raise BadSignature(f"there is no {NOTE}; sign it with `veklom policy sign`")
        if Verifier.from_vkey(signed_by).open_note(folder.note) != _statement(folder):
            raise BadSignature("the note is another bundle's")
    except (BadSignature, ValueError) as error:
        yield f"{folder.path}: is not signed as policies.signed_by requires: {error}"


def _statement(folder: Folder) -> str:
    return f"{_CONTEXT}\n{digest_of(_pairs(folder.policies))}\n{digest_of(_pairs(folder.tests))}\n"


# --- changes -------------------------------------------------------------------------------------

Stamp = tuple[tuple[str, int, int], ...]
"""Name, time of change and size of each file: what says that a bundle may have changed."""


def stamp_of(config: Config) -> Stamp:
    """Return the stamp of the bundle, and of the candidate, as they lie there now."""
    found = []
    for path in filter(None, (config.policies.path, config.policies.shadow)):
        for file in policy_files(path):
            try:
                status = file.stat()
            except OSError:
                found.append((str(file), 0, -1))
            else:
                found.append((str(file), status.st_mtime_ns, status.st_size))
    return tuple(found)


def fresh_bundle(config: Config) -> Bundle:
    """Return the bundle as it lies there now, read and checked again.

    Raises:
        BundleRefused: It cannot be used; whatever is in force stays.
    """
    return read_bundle(config.policies, known_to(config))[0]
