"""A typed client for the service, synchronous and asynchronous.

>>> with Client("http://127.0.0.1:8000") as client:
...     client.predict(Path("x.png").read_bytes()).predictions[0].label
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx2

from attack_client.answers import Answer, BundleDescription, Defenses, parse_answer
from attack_client.retry import RetryPolicy, Tries, seconds_asked
from attack_client.wire import check_key
from mithridate.errors import InputError, MithridateError, OptionError
from mithridate.evaluation.card import Card
from mithridate.evaluation.wording import printable

_LONGEST_DETAIL = 1000
_SENT_NOTHING = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


class ServiceError(MithridateError):
    """The service answered with an error: HTTP ``status``, its ``detail`` and ``request_id``; ``retry_after`` in
    seconds, where it says so."""

    def __init__(self, status: int, detail: str, request_id: str, *, retry_after: float | None = None) -> None:
        super().__init__(f"HTTP {status}: {detail}" + (f" (request {request_id})" if request_id else ""))
        self.status = status
        self.detail = detail
        self.request_id = request_id
        self.retry_after = retry_after


class LostAnswerError(InputError):
    """The request went out and no answer came back: whether the service worked on it, nobody knows."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One HTTP request, the same for both clients."""

    method: str
    path: str
    content: bytes | None = None
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


def _predict_call(images: bytes | Sequence[bytes], options: dict[str, Any]) -> _Call:
    """One image goes as it is, several as base64."""
    given = {key: value for key, value in options.items() if value is not None}
    if isinstance(images, bytes):
        params = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in given.items()}
        headers = {"Content-Type": "application/octet-stream"}
        return _Call(method="POST", path="/v1/predict", content=images, params=params, headers=headers)
    body = {"images": [base64.b64encode(image).decode() for image in images], **given}
    headers = {"Content-Type": "application/json"}
    return _Call(method="POST", path="/v1/predict", content=json.dumps(body).encode(), headers=headers)


def _check(response: httpx2.Response) -> bytes:
    """The body of a good answer. Raises ServiceError for the others."""
    if response.status_code < 400:
        return response.content
    try:
        problem = response.json()
        detail, identity = str(problem["detail"]), str(problem.get("request_id", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        detail, identity = response.text[:200], ""
    # It is written into reports and onto terminals: control characters and lone surrogates of a stranger are not.
    detail, identity = printable(detail[:_LONGEST_DETAIL]), printable(identity[:100])
    asked = seconds_asked(response.headers.get("Retry-After"))
    raise ServiceError(response.status_code, detail, identity, retry_after=asked)


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {check_key(api_key)}"}


def _base_url(url: str) -> str:
    try:
        parts = httpx2.URL(url)
        usable = parts.scheme in ("http", "https") and bool(parts.host) and 0 < (parts.port or 80) <= 65_535
    except httpx2.InvalidURL:
        usable = False
    if not usable:
        raise OptionError(f"{url!r} is not a service's address; write it as http://host:port")
    return url.rstrip("/")


def _is_ready(url: str, response: httpx2.Response) -> bool:
    """False for a service that is not ready yet. Raises InputError for a server that is something else."""
    if response.status_code not in (200, 503):
        raise InputError(f"{url}/readyz answers with HTTP {response.status_code}; is this a Mithridate service?")
    return response.status_code == 200


class Client:
    """The synchronous client. Safe to share between threads. ``api_key`` is sent with every request."""

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 60.0,
        retry: RetryPolicy | None = None,
        transport: httpx2.BaseTransport | None = None,
        api_key: str | None = None,
    ) -> None:
        self.url = _base_url(url)
        self._retry = retry or RetryPolicy()
        self._http = httpx2.Client(
            base_url=self.url, timeout=timeout_seconds, transport=transport, headers=_headers(api_key)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Gives back the connections."""
        self._http.close()

    def predict(
        self,
        images: bytes | Sequence[bytes],
        *,
        defense: str | None = None,
        top_k: int | None = None,
        explain: bool | None = None,
        deadline_ms: float | None = None,
    ) -> Answer:
        """Classifies one encoded image, or several in one request.

        Raises ServiceError for an error answer, InputError where nobody answers.
        """
        options = {"defense": defense, "top_k": top_k, "explain": explain, "deadline_ms": deadline_ms}
        answer: Answer = parse_answer(self._send(_predict_call(images, options)), Answer, self.url)
        return answer

    def bundle(self) -> BundleDescription:
        """What is served."""
        content = self._send(_Call(method="GET", path="/v1/bundle"))
        description: BundleDescription = parse_answer(content, BundleDescription, self.url)
        return description

    def defenses(self) -> Defenses:
        """What a request may ask for."""
        defenses: Defenses = parse_answer(self._send(_Call(method="GET", path="/v1/defenses")), Defenses, self.url)
        return defenses

    def card(self) -> Card:
        """What the bundle was found to be worth. Raises ServiceError, 404, where it was not evaluated."""
        card: Card = parse_answer(self._send(_Call(method="GET", path="/v1/card")), Card, self.url)
        return card

    def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """Returns once the service is ready. Raises InputError where it is not in time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                patience = max(0.05, deadline - time.monotonic())
                if _is_ready(self.url, self._http.get("/readyz", timeout=patience)):
                    return
            except httpx2.RequestError:
                pass  # not listening yet
            if time.monotonic() >= deadline:
                raise InputError(f"{self.url} was not ready within {timeout_seconds:g} s")
            time.sleep(0.05)

    def _send(self, call: _Call) -> bytes:
        tries = Tries(self._retry)
        while True:
            try:
                response = self._http.request(
                    call.method, call.path, content=call.content, params=call.params, headers=call.headers
                )
            except httpx2.RequestError as error:
                wait = tries.next_wait(None) if isinstance(error, _SENT_NOTHING) else None
                if wait is None:
                    raise _unreachable(self.url, error) from error
            else:
                wait = tries.next_wait(response.status_code, response.headers.get("Retry-After"))
                if wait is None:
                    return _check(response)
            time.sleep(wait)


class AsyncClient:
    """The asynchronous client: the same methods, awaited."""

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 60.0,
        retry: RetryPolicy | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        connections: int = 100,
        api_key: str | None = None,
    ) -> None:
        self.url = _base_url(url)
        self._retry = retry or RetryPolicy()
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = httpx2.AsyncClient(
            base_url=self.url, timeout=timeout_seconds, transport=transport, limits=limits, headers=_headers(api_key)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Gives back the connections."""
        await self._http.aclose()

    async def predict(
        self,
        images: bytes | Sequence[bytes],
        *,
        defense: str | None = None,
        top_k: int | None = None,
        explain: bool | None = None,
        deadline_ms: float | None = None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Classifies one encoded image, or several in one request; errors as the synchronous client's.

        ``on_retry`` is called each time before the same request is sent again.
        """
        options = {"defense": defense, "top_k": top_k, "explain": explain, "deadline_ms": deadline_ms}
        answer: Answer = parse_answer(await self._send(_predict_call(images, options), on_retry), Answer, self.url)
        return answer

    async def bundle(self) -> BundleDescription:
        """What is served."""
        content = await self._send(_Call(method="GET", path="/v1/bundle"))
        description: BundleDescription = parse_answer(content, BundleDescription, self.url)
        return description

    async def defenses(self) -> Defenses:
        """What a request may ask for."""
        content = await self._send(_Call(method="GET", path="/v1/defenses"))
        defenses: Defenses = parse_answer(content, Defenses, self.url)
        return defenses

    async def card(self) -> Card:
        """What the bundle was found to be worth. Raises ServiceError, 404, where it was not evaluated."""
        card: Card = parse_answer(await self._send(_Call(method="GET", path="/v1/card")), Card, self.url)
        return card

    async def wait_until_ready(self, timeout_seconds: float = 60.0) -> None:
        """Returns once the service is ready. Raises InputError where it is not in time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                patience = max(0.05, deadline - time.monotonic())
                if _is_ready(self.url, await self._http.get("/readyz", timeout=patience)):
                    return
            except httpx2.RequestError:
                pass  # not listening yet
            if time.monotonic() >= deadline:
                raise InputError(f"{self.url} was not ready within {timeout_seconds:g} s")
            await asyncio.sleep(0.05)

    async def _send(self, call: _Call, on_retry: Callable[[], None] = lambda: None) -> bytes:
        tries = Tries(self._retry)
        while True:
            try:
                response = await self._http.request(
                    call.method, call.path, content=call.content, params=call.params, headers=call.headers
                )
            except httpx2.RequestError as error:
                wait = tries.next_wait(None) if isinstance(error, _SENT_NOTHING) else None
                if wait is None:
                    raise _unreachable(self.url, error) from error
            else:
                wait = tries.next_wait(response.status_code, response.headers.get("Retry-After"))
                if wait is None:
                    return _check(response)
            await asyncio.sleep(wait)
            on_retry()


def _unreachable(url: str, error: httpx2.RequestError) -> InputError:
    kind = InputError if isinstance(error, _SENT_NOTHING) else LostAnswerError
    return kind(f"{url} does not answer ({type(error).__name__}: {error or 'no details'}); is the service running?")
