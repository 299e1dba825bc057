"""The data plane: HTTP/1.1 in, HTTP/1.1 out, on uvloop transports through llhttp.

Framing and bytes live here; what may happen to a call is `gateway.execution`'s to say.
"""
