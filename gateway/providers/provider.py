"""A provider: where its calls go and how its credential is presented. No I/O."""

from typing import Self
from urllib.parse import urlsplit

import msgspec

from gateway.providers.addresses import Reach, reach_of
from gateway.providers.anthropic import Anthropic
from gateway.providers.dialect import Dialect
from gateway.providers.gemini import Gemini
from gateway.providers.openai import OpenAI
from policies.request import ProviderFacts

DIALECTS: dict[str, Dialect] = {each.name: each for each in (OpenAI(), Anthropic(), Gemini())}
"""Every dialect there is."""


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """One configured provider. Only these hosts are ever dialled, where `reach` allows.

    `authority` is the Host field's value, which names the port unless it is the scheme's own;
    `origin` is it with the scheme, and what a deposited credential is bound to.
    """

    name: str
    dialect: Dialect
    is_tls: bool
    host: str
    port: int
    authority: bytes
    origin: str
    base_path: bytes
    auth_header: bytes
    auth_prefix: bytes
    request_stream_usage: bool
    reach: Reach
    facts: ProviderFacts
    ca_file: str = ""

    @classmethod
    def from_url(  # noqa: PLR0913 - what a provider is made of
        cls,
        name: str,
        dialect: str,
        base_url: str,
        *,
        request_stream_usage: bool,
        ca_file: str = "",
        private_addresses: bool = False,
        facts: ProviderFacts | None = None,
    ) -> Self:
        """Return the provider at `base_url`; `facts` are what the operator vouches for.

        Raises:
            ValueError: It is not an http(s) URL of a host, with nothing behind the path.
        """
        url = urlsplit(base_url)
        if url.scheme not in {"http", "https"} or not url.hostname:
            raise ValueError("must be an http or https URL")
        if url.query or url.fragment or url.username or url.password:
            raise ValueError("must hold a host and a path, nothing else")
        if not base_url.isascii() or any(char.isspace() for char in base_url):
            raise ValueError("must be plain ASCII")
        is_tls = url.scheme == "https"
        port = url.port or (443 if is_tls else 80)
        authority = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
        if port != (443 if is_tls else 80):
            authority += f":{port}"
        spoken = DIALECTS[dialect]
        auth_header, auth_prefix = spoken.default_auth
        return cls(
            name=name,
            dialect=spoken,
            is_tls=is_tls,
            host=url.hostname,
            port=port,
            authority=authority.encode(),
            origin=f"{url.scheme}://{authority}",
            base_path=url.path.rstrip("/").encode(),
            auth_header=auth_header,
            auth_prefix=auth_prefix,
            request_stream_usage=request_stream_usage,
            reach=reach_of(url.hostname, private_addresses=private_addresses),
            facts=msgspec.structs.replace(facts or ProviderFacts(), dialect=dialect),
            ca_file=ca_file,
        )
