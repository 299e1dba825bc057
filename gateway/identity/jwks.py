"""Issuers' keys, fetched by the control process and passed on to whoever verifies.

Laws of this file:
- one fetch at a time for an issuer, however many wait for it;
- an unknown key id causes at most one fetch in `COOLDOWN_SECONDS`; fetches at the start and by age
  are not counted, for a key may be published right after them;
- keys that were once had stay in use while the issuer is unreachable, for `STALE_SECONDS` after they
  were fetched and no longer;
- `on_keys` hears what holds now: a key set to verify by, or None, which means that there is none and
  that whatever was had must be forgotten. A fetch that fails while the keys are young enough is no
  None, nor is one at the start of this process: workers may have young keys from the one before;
- the cache keeps itself fresh in a task of its own: an issuer that hangs delays nobody but those who
  wait for its keys;
- HTTPS only (plain HTTP where declared), no redirects, bounded size and time, and the discovery
  document must name the issuer byte for byte.
"""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import aiohttp

from gateway.clock import Clock
from gateway.identity.tokens import MAX_JWKS_BYTES, JwksSource, KeySet
from gateway.telemetry.logs import get_log

REFRESH_SECONDS: Final = 300.0
"""Keys are fetched again this long after they came; Envoy's default lifetime is twice that."""

COOLDOWN_SECONDS: Final = 30.0
STALE_SECONDS: Final = 24 * 3600.0
FETCH_SECONDS: Final = 5.0

REFRESH_CHECK_SECONDS: Final = 1.0
"""How often keys are checked for their age."""

OnKeys = Callable[[str, bytes | None], None]

log = get_log()


class JwksUnavailable(Exception):
    """An issuer's keys could not be fetched."""


# JSON nested too deep is a RecursionError; TimeoutError is an OSError.
_FAILURES = (ValueError, OSError, RecursionError, aiohttp.ClientError)


class _State:
    def __init__(self, source: JwksSource, now: float) -> None:
        self.source = source
        self.jwks: bytes | None = None
        self.fetched_at = now  # a worker may have keys from an earlier control process
        self.tried_at = -math.inf
        self.asked_at = -math.inf
        self.has_answered = False
        self.task: asyncio.Task[None] | None = None

    @property
    def pause(self) -> float:
        """Return the seconds to wait after a fetch before the next."""
        return COOLDOWN_SECONDS if self.jwks is not None else 1.0

    def is_due(self, now: float) -> bool:
        """Return whether the keys should be fetched without anybody's asking."""
        is_old = self.jwks is None or now - self.fetched_at > REFRESH_SECONDS
        return is_old and now - self.tried_at >= self.pause


class JwksCache:
    """The key sets of every configured issuer. `on_keys` hears each, or None to forget it."""

    def __init__(self, sources: Sequence[JwksSource], clock: Clock, on_keys: OnKeys) -> None:
        self._states = {source.issuer: _State(source, clock.monotonic()) for source in sources}
        self._clock = clock
        self._on_keys = on_keys
        self._session: aiohttp.ClientSession | None = None
        self._refreshing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Fetch every issuer's keys, from now on again and again; one that is silent is asked later."""
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=FETCH_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        await asyncio.gather(*map(self._renew, self._states.values()))
        self._refreshing = asyncio.get_running_loop().create_task(self._keep_fresh())

    def known(self) -> list[tuple[str, bytes]]:
        """Return every issuer whose keys are at hand, with them."""
        return [(name, state.jwks) for name, state in self._states.items() if state.jwks]

    async def need(self, issuer: str) -> bool:
        """Fetch the keys for a token that names an unknown one, unless that was just done.

        Return whether the issuer answered last: only then is a key that is still unknown not its own.
        """
        state = self._states.get(issuer)
        if state is None:
            return False
        now = self._clock.monotonic()
        if now - state.asked_at >= state.pause:
            state.asked_at = now
            return await self._renew(state)
        if state.task is not None:
            await asyncio.shield(state.task)
        return self._tell(state)

    async def _renew(self, state: _State) -> bool:
        if state.task is None:
            state.tried_at = self._clock.monotonic()
            state.task = asyncio.get_running_loop().create_task(self._refresh(state))
        await asyncio.shield(state.task)
        return self._tell(state)

    def _tell(self, state: _State) -> bool:
        if self._clock.monotonic() - state.fetched_at > STALE_SECONDS:
            state.jwks = None
            self._on_keys(state.source.issuer, None)
        elif state.has_answered:
            self._on_keys(state.source.issuer, state.jwks)
        return state.has_answered

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_CHECK_SECONDS)
            # What is unforeseen must not end this: keys that nobody refreshes grow stale unnoticed.
            for result in await self.refresh_due():
                if isinstance(result, Exception):
                    log.error("issuer.keys_not_fetched", error=type(result).__name__)

    async def refresh_due(self) -> list[BaseException | bool]:
        """Fetch what has grown old, drop what is too old; return what went wrong, if anything."""
        now = self._clock.monotonic()
        due = [state for state in self._states.values() if state.is_due(now)]
        return await asyncio.gather(*map(self._renew, due), return_exceptions=True)

    async def _refresh(self, state: _State) -> None:
        try:
            jwks = await self._fetch(state.source)
            KeySet.from_json(jwks)
            state.jwks, state.fetched_at = jwks, self._clock.monotonic()
            state.has_answered = True
        except (JwksUnavailable, *_FAILURES) as error:
            # The text of a client error may hold a URL's query: the kind of error is enough.
            log.warning(
                "issuer.keys_not_fetched", issuer=state.source.issuer, error=type(error).__name__
            )
            state.has_answered = False
        finally:
            state.task = None

    async def _fetch(self, source: JwksSource) -> bytes:
        if source.file:
            return await asyncio.to_thread(Path(source.file).read_bytes)
        url = source.url
        if not url:
            base = source.issuer.rstrip("/")
            place = f"{base}/.well-known/openid-configuration"
            document = json.loads(await self._get(place, source))
            if not isinstance(document, dict) or document.get("issuer") != source.issuer:
                raise JwksUnavailable("the discovery document is another issuer's")
            url = str(document.get("jwks_uri", ""))
        return await self._get(url, source)

    async def _get(self, url: str, source: JwksSource) -> bytes:
        if not url.startswith("https://") and not (source.plain_http and url.startswith("http://")):
            raise JwksUnavailable("not https")
        if self._session is None:
            raise JwksUnavailable("not started")
        async with self._session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                raise JwksUnavailable(f"status {response.status}")
            body = await response.content.read(MAX_JWKS_BYTES + 1)
            while len(body) <= MAX_JWKS_BYTES and (more := await response.content.readany()):
                body += more
        if len(body) > MAX_JWKS_BYTES:
            raise JwksUnavailable("too large")
        return body

    async def close(self) -> None:
        """Stop fetching."""
        tasks = [self._refreshing, *(state.task for state in self._states.values())]
        live = [task for task in tasks if task is not None]
        for task in live:
            task.cancel()
        await asyncio.gather(*live, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
