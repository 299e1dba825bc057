"""Health and metrics, for operators and their machines. No secret is behind these routes."""

from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from gateway.api.quiet import problems

Checks = Callable[[], Awaitable[dict[str, bool]]]
Page = Callable[[], Awaitable[bytes]]


def admin_app(
    checks: Checks, metrics: Page, protections: Mapping[str, Mapping[str, str]]
) -> web.Application:
    """Return the application of the admin listener.

    `checks` names each thing that must be true to be ready; `metrics` renders the Prometheus page;
    `protections` says of each process what guards keys in its memory, and why not where it does not:
    a gateway that lacks one is ready, but degraded.
    """

    async def livez(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_request: web.Request) -> web.Response:
        found = await checks()
        ready = all(found.values())
        missing = {
            process: {name: reason for name, reason in each.items() if reason}
            for process, each in protections.items()
        }
        custody = {"degraded": any(missing.values()), "missing": missing}
        return web.json_response(
            {"ready": ready, "checks": found, "custody": custody}, status=200 if ready else 503
        )

    async def page(_request: web.Request) -> web.Response:
        return web.Response(
            body=await metrics(),
            headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    app = web.Application(middlewares=[problems], client_max_size=1024)
    app.add_routes(
        [web.get("/livez", livez), web.get("/readyz", readyz), web.get("/metrics", page)]
    )
    return app
