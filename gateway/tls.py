"""TLS on both sides: 1.3 only towards callers, certificates always verified towards providers."""

import ssl

from gateway.config import Listener


def server_context(listener: Listener) -> ssl.SSLContext | None:
    """Return the context of a listener that was given a certificate, else None.

    Raises:
        OSError: The certificate or its key cannot be read.
        ssl.SSLError: They do not belong together.
    """
    if not listener.certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    # A key under a passphrase is refused: without an answer here OpenSSL asks on the terminal.
    context.load_cert_chain(listener.certificate, listener.private_key or None, password="")
    return context


def client_context(ca_file: str) -> ssl.SSLContext:
    """Return the context for one provider: host name and chain verified, TLS 1.2 at least.

    `ca_file` replaces the system's authorities where an operator's own provider needs it.
    """
    context = ssl.create_default_context(cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
