"""The admin listener: health and metrics for machines, the kill switch for operators.

Health and metrics hold no secret, and need none; everything else names the permission that it needs.
"""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

from aiohttp import web

from gateway.api.kills import KillSwitch
from gateway.api.operators import Operators
from gateway.api.quiet import problems
from policies.roles import Permission

Checks = Callable[[], Awaitable[dict[str, bool]]]
Page = Callable[[], Awaitable[bytes]]


MAX_BODY_BYTES: Final = 16 * 1024


def admin_app(
    *,
    checks: Checks,
    metrics: Page,
    protections: Mapping[str, Mapping[str, str]],
    operators: Operators,
    kills: KillSwitch,
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

    reads = partial(operators.only, Permission.KILLS_READ)
    changes = partial(operators.only, Permission.KILLS_WRITE)
    app = web.Application(middlewares=[problems], client_max_size=MAX_BODY_BYTES)
    app.add_routes(
        [
            web.get("/livez", livez),
            web.get("/readyz", readyz),
            web.get("/metrics", page),
            web.get("/admin/v1/kills", reads(kills.list_route)),
            web.post("/admin/v1/kill", changes(kills.place_route)),
            web.delete(
                "/admin/v1/kills/{kill_id}",
                changes(kills.lift_route),
            ),
        ]
    )
    return app
