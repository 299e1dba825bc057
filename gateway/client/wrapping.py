"""What a wrapped program is given in place of provider keys. No I/O.

A program finds its key and its base URL in variables of its environment. Where a key stands, the
session token takes its place, and the base URL becomes the gateway's; no key is left in it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec

from gateway.client.sessions import ClientError, OpenSession


class Wrapping(msgspec.Struct, frozen=True, kw_only=True):
    """Which variables hold a provider's key, and which its base URL. The first key found counts."""

    provider: str
    key_variables: tuple[str, ...]
    url_variables: tuple[str, ...]


KNOWN: Final[dict[str, Wrapping]] = {
    each.provider: each
    for each in (
        Wrapping(
            provider="openai",
            key_variables=("OPENAI_API_KEY",),
            url_variables=("OPENAI_BASE_URL", "OPENAI_API_BASE"),
        ),
        Wrapping(
            provider="anthropic",
            key_variables=("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"),
            url_variables=("ANTHROPIC_BASE_URL",),
        ),
        Wrapping(
            provider="gemini",
            key_variables=("GOOGLE_API_KEY", "GEMINI_API_KEY"),
            url_variables=("GOOGLE_GEMINI_BASE_URL",),
        ),
    )
}
"""As their SDKs and agents read them: openai 2, anthropic 2, google-genai 3; Claude Code, Gemini CLI."""


def wrapping_from(text: str) -> Wrapping:
    """Return the wrapping that `NAME`, `NAME=KEY_VARIABLE` or `NAME=KEY_VARIABLE,URL_VARIABLE` means.

    Raises:
        ClientError: The provider is not known, and its variables are not given.
    """
    name, equals, rest = text.partition("=")
    if not equals:
        if name not in KNOWN:
            raise ClientError(
                f"say where {name} finds its key: --provider {name}=KEY_VARIABLE,URL_VARIABLE"
            )
        return KNOWN[name]
    key, _, url = rest.partition(",")
    known = KNOWN[name].url_variables if name in KNOWN else ()
    urls = (url,) if url else known
    if not (name and key and urls):
        raise ClientError(f"--provider {text}: write NAME=KEY_VARIABLE,URL_VARIABLE")
    return Wrapping(provider=name, key_variables=(key,), url_variables=urls)


def keys_for(
    wrappings: Iterable[Wrapping],
    environment: Mapping[str, str],
    ask: Callable[[str], str] | None,
) -> dict[str, str]:
    """Return each provider's key, from the environment or else from whom `ask` asks.

    Raises:
        ClientError: One is missing.
    """
    keys = {}
    for wrapping in wrappings:
        found = [environment[name] for name in wrapping.key_variables if environment.get(name)]
        key = found[0] if found else (ask(wrapping.provider) if ask is not None else "")
        if not key:
            names = " or ".join(wrapping.key_variables)
            raise ClientError(f"no key for {wrapping.provider}: set {names}")
        keys[wrapping.provider] = key
    return keys


def wrapped(
    wrappings: Iterable[Wrapping], environment: Mapping[str, str], session: OpenSession
) -> dict[str, str]:
    """Return the program's environment: every variable as it was, but no key, and the gateway's URLs.

    Any other variable whose value is, or holds, one of the keys is left out too.
    """
    wrappings = tuple(wrappings)
    names = {name for each in (*KNOWN.values(), *wrappings) for name in each.key_variables}
    keys = {environment[name] for name in names if environment.get(name)}
    passed = {
        name: value
        for name, value in environment.items()
        if name not in names and not any(key in value for key in keys)
    }
    for wrapping in wrappings:
        held = [name for name in wrapping.key_variables if environment.get(name)]
        passed |= dict.fromkeys(held or wrapping.key_variables[:1], session.token)
        url = session.providers[wrapping.provider].base_url
        passed |= dict.fromkeys(wrapping.url_variables, url)
    return passed
