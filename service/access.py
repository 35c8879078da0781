"""Who may do what: from a request's headers to a ``Caller``, or to 401 and 403."""

from __future__ import annotations

import ipaddress
import logging
import time
from urllib.parse import urlsplit

from fastapi import Security, params
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.requests import Request

from mithridate.errors import OptionError
from service.keys import SCOPES, Caller, Key, KeyRing, Scope, read_keys
from service.problems import Problem
from service.settings import Settings

logger = logging.getLogger("mithridate.service")

_LOOK_EVERY_SECONDS = 1.0
_PROXIES = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
_BEARER = HTTPBearer(scheme_name="key", description="A key of `mithridate keys new`", auto_error=False)
_HEADER = APIKeyHeader(name="X-API-Key", scheme_name="key-header", auto_error=False)
_EVERYBODY = frozenset(SCOPES) - {"admin"}


class Access:
    """The door. Without keys whoever reaches the port may do all but ``admin``, so only loopback may be listened at."""

    def __init__(self, settings: Settings) -> None:
        """Raises OptionError where the keys cannot be used, or where strangers would need none."""
        self._settings = settings
        self._looked = time.monotonic()
        self._seen = self._stamp()
        self._ring: KeyRing | None = None
        if settings.keys_file is not None or settings.keys:
            self._ring = self._read()
            if not self._ring.keys:
                raise OptionError(f"{settings.keys_file} holds no key; make one with `mithridate keys new`")
        elif not is_loopback(settings.host):
            if not settings.insecure_no_keys:
                raise OptionError(
                    f"without keys only loopback is served, not {settings.host}; make keys with `mithridate keys new` "
                    "and give --keys FILE, or --insecure-no-keys where something before this service asks who is there"
                )
            logger.warning("no keys: whoever reaches %s:%d may use the service", settings.host, settings.port)

    @property
    def dependencies(self) -> list[params.Depends]:
        """For a route that needs a key: what puts that into the OpenAPI document. It is ``authorize`` that asks."""
        return [Security(_BEARER), Security(_HEADER)] if self._ring is not None else []

    @property
    def keys(self) -> tuple[Key, ...]:
        """All that are valid now; empty where the service has none."""
        return self._ring.keys if self._ring else ()

    def authorize(self, request: Request, *scopes: Scope) -> Caller:
        """Who asks, who has all of ``scopes``; also left at ``request.state.caller``.

        Raises Problem: 401 where the service has keys and none of them was sent, 403 where a scope is missing.
        """
        caller: Caller | None = getattr(request.state, "caller", None)
        if caller is None:
            caller = request.state.caller = self._identify(request)
        missing = [scope for scope in scopes if not caller.may(scope)]
        if missing:
            raise _forbidden(caller, missing)
        return caller

    def _identify(self, request: Request) -> Caller:
        if self._ring is None:
            self._refuse_foreign_names(request)
            return Caller(key_id=None, scopes=frozenset(SCOPES) if _is_operator(request) else _EVERYBODY)
        self._refresh()
        key = self._ring.find(_presented(request))  # also where nothing was sent: it must take as long
        if key is None:
            detail = "a key is needed that this service knows; send it as Authorization: Bearer KEY"
            raise Problem(401, detail, headers={"WWW-Authenticate": 'Bearer realm="mithridate"'})
        return Caller(key_id=key.id, scopes=key.scopes, key=key)

    def _refuse_foreign_names(self, request: Request) -> None:
        """A web page may have its own name lead to 127.0.0.1 (DNS rebinding), and is then no other site to a browser:
        where reaching loopback is all that is asked, the request must be for a loopback name. Raises Problem 403."""
        if self._settings.insecure_no_keys or not is_loopback(self._settings.host) or _names_loopback(request):
            return
        raise Problem(
            403,
            "without keys only requests to a name of the service's own machine are answered (localhost, 127.0.0.1, "
            f"[::1]), not to {request.headers['host'][:80]!r}; give the service keys, or --insecure-no-keys "
            "behind a proxy that asks who is there",
        )

    def _refresh(self) -> None:
        """Looks now and then whether the file has changed: a key that is revoked must not work until a restart."""
        now = time.monotonic()
        if self._settings.keys_file is None or now - self._looked < _LOOK_EVERY_SECONDS:
            return
        self._looked, stamp = now, self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._ring = self._read()
            logger.info("read %d keys", len(self._ring.keys))
        except OptionError as error:
            logger.error("the keys have changed and cannot be used; the old ones stay: %s", error)

    def _read(self) -> KeyRing:
        path = self._settings.keys_file
        return KeyRing([*self._settings.keys, *(read_keys(path) if path else ())])

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            found = self._settings.keys_file.stat() if self._settings.keys_file else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``. A name counts as reachable unless it is ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _names_loopback(request: Request) -> bool:
    """Whether the header ``Host`` names this machine only. No browser leaves it out."""
    host = request.headers.get("host")
    if host is None:
        return True
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _is_operator(request: Request) -> bool:
    """From this machine, through no proxy that says so, and not from a page in somebody's browser: where there are no
    keys, nothing else tells an operator from whoever a browser or a proxy here lets through."""
    if request.client is None or not is_loopback(request.client.host):
        return False
    return not any(name in request.headers for name in (*_PROXIES, "origin"))


def _presented(request: Request) -> str:
    own = request.headers.get("x-api-key", "").strip()
    if own:  # a proxy may use the other one for itself
        return own
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _forbidden(caller: Caller, missing: list[Scope]) -> Problem:
    if caller.key_id is None:
        return Problem(403, f"{', '.join(missing)} needs a key, or a client on the service's own machine")
    names = " ".join(missing)
    header = f'Bearer realm="mithridate", error="insufficient_scope", scope="{names}"'
    return Problem(403, f"this key may not: it lacks the scope {names}", headers={"WWW-Authenticate": header})
