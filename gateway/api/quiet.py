"""aiohttp, kept from saying what it heard.

Out of the box a malformed header is echoed in the answer and logged with its bytes, Authorization
included, and the access log holds whole request lines. Here a request that cannot be parsed gets a
fixed problem, nothing of it is logged, and there is no access log.
"""

import asyncio
import socket
import ssl
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server

from gateway.errors import Refused
from gateway.identity.slots import Presented, find_credentials
from gateway.problems import Problem, problem_from, retry_headers, to_problem_json
from gateway.telemetry.logs import get_log

MAX_FIELD_BYTES = 16 * 1024
"""Room for the longest token we accept (8 KiB) with its field name."""

READ_SECONDS: Final = 10.0
"""How long the body of a request of at most 16 KiB may take."""

log = get_log()


def problem_response(problem: Problem, challenge: str = "") -> web.Response:
    """Return a problem as an answer of the control plane; it always ends the connection."""
    headers = {name.decode(): value.decode() for name, value in retry_headers(problem)}
    if problem.status == 401:
        headers["www-authenticate"] = challenge or 'Bearer realm="veklom"'
    response = web.Response(
        status=problem.status,
        body=to_problem_json(problem),
        content_type="application/problem+json",
        headers={**headers, "cache-control": "no-store"},
    )
    response.force_close()
    return response


class _Handler(RequestHandler):
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - holds bytes of the request
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was already begun")
        if status >= 500:
            log.error("request.failed", error=type(exc).__name__)
            return problem_response(problem_from(Refused("internal", "Something went wrong.")))
        return problem_response(
            problem_from(Refused("invalid_request", "The request is not well-formed HTTP/1.1."))
        )

    def log_exception(self, *_args: object, **_kwargs: object) -> None:
        log.error("request.failed", error="connection")

    def log_debug(self, *_args: object, **_kwargs: object) -> None:
        pass


class _Server(Server):
    def __call__(self) -> RequestHandler:
        return _Handler(self, loop=self._loop, **self._kwargs)


class _Runner(web.AppRunner):
    async def _make_server(self) -> Server:
        server = await super()._make_server()
        server.__class__ = _Server
        return server


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every refusal into a problem, and what nobody foresaw into one without detail."""
    try:
        return await handler(request)
    except Refused as refusal:
        return problem_response(problem_from(refusal), refusal.challenge)
    except web.HTTPRequestEntityTooLarge:
        return problem_response(problem_from(Refused("body_too_large", "The body is too large.")))
    except web.HTTPMethodNotAllowed:
        return problem_response(problem_from(Refused("method_not_allowed", "Not this method.")))
    except web.HTTPNotFound:
        return problem_response(problem_from(Refused("unknown_route", "There is nothing here.")))
    except Exception as error:  # noqa: BLE001 - the edge: whatever it was, it is shown to nobody
        log.error("request.failed", error=type(error).__name__)
        return problem_response(problem_from(Refused("internal", "Something went wrong.")))


def presented(request: web.Request) -> Presented:
    """Return the tokens that a request carries.

    Raises:
        Refused: It carries none, or not as it must.
    """
    return find_credentials([(name.lower(), value) for name, value in request.raw_headers])


async def body_of(request: web.Request) -> bytes:
    """Return the body of a request, at most as long as its application allows.

    Raises:
        Refused: It is longer, or does not arrive within `READ_SECONDS`.
    """
    try:
        async with asyncio.timeout(READ_SECONDS):
            return await request.read()
    except TimeoutError:
        raise Refused("request_timeout", "The body did not arrive in time.") from None
    except web.HTTPRequestEntityTooLarge:
        raise Refused("body_too_large", "The body is too large.") from None


async def serve(
    app: web.Application, sock: socket.socket, context: ssl.SSLContext | None
) -> web.AppRunner:
    """Serve an application on a bound socket; the runner's `cleanup` ends it."""
    runner = _Runner(
        app,
        access_log=None,
        max_field_size=MAX_FIELD_BYTES,
        max_line_size=MAX_FIELD_BYTES,
        keepalive_timeout=15,
        lingering_time=2,
        auto_decompress=False,
        handler_cancellation=False,
        shutdown_timeout=5,
    )
    await runner.setup()
    await web.SockSite(runner, sock, ssl_context=context).start()
    return runner
