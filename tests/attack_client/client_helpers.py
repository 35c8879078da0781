"""Services to attack: any ASGI application at a port of this machine, and small ones that misbehave on purpose."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import uvicorn

Application = Callable[[Any, Any, Any], Awaitable[None]]
DIGITS = tuple("0123456789")


@contextmanager
def listening(app: Application, *, lifespan: Any = "off") -> Iterator[str]:
    """Serves ``app`` in a thread; yields its address."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan=lifespan))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def answer(label: str = "0", class_index: int = 0, **more: Any) -> dict[str, Any]:
    """What ``POST /v1/predict`` answers for one image."""
    scored = {"label": label, "class_index": class_index, "confidence": 0.9}
    image = {**scored, "top": [scored], "undefended": scored, "suspicious": False, "adaptation": None}
    bundle = {"name": "fake", "digest": "sha256:0"}
    return {"id": "1", "bundle": bundle, "defense": "none", "predictions": [image], "timings_ms": {"total": 20}, **more}


class FakeService:
    """Speaks the API without a model. It ``says`` of every image that it is that class, by its ``label``, after
    ``seconds`` of work, one request at a time; every ``fails_every``-th request gets a 500 instead, and every one with
    several images if ``fails_together``. It ``abstains`` from all answers; a share ``random`` of them is another
    class. So many requests to predict, of one image and of several, it ``refuses`` before it takes any. ``card``:
    status and content of its card."""

    def __init__(
        self,
        *,
        label: str | None = None,
        says: int = 0,
        seconds: float = 0,
        fails_every: int = 0,
        fails_together: bool = False,
        abstains: bool = False,
        random: float = 0.0,
        defenses: tuple[str, ...] = ("none", "rmc"),
        arch: str = "fake",
        refuses: int = 0,
        card: tuple[int, dict[str, Any]] = (404, {"detail": "no card", "request_id": "r"}),
    ) -> None:
        self.images = 0
        self.refused = {False: 0, True: 0}
        self._refuses, self._card = refuses, card
        self._says = says
        self._label = DIGITS[says] if label is None else label
        self._seconds = seconds
        self._fails_every = fails_every
        self._fails_together = fails_together
        self._abstains = abstains
        self._random = random
        self._draws = Random(0)
        self._described = {
            "/readyz": {"status": "ready"},
            "/v1/bundle": {
                "name": "fake",
                "digest": "sha256:0",
                "classes": DIGITS,
                "image_shape": [1, 8, 8],
                "arch": arch,
            },
            "/v1/defenses": {
                "default": defenses[-1],
                "defenses": [{"name": name, "description": "-"} for name in defenses],
            },
        }
        self._numbers = itertools.count(1)
        self._work = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        status, content = 200, self._described.get(scope["path"])
        headers = [(b"content-type", b"application/json")]
        together = body.startswith(b"{")
        if scope["path"] == "/v1/card":
            status, content = self._card
        elif content is None and self.refused[together] < self._refuses:
            self.refused[together] += 1
            status, content = 429, {"detail": "60 requests a minute", "request_id": "r"}
            headers.append((b"retry-after", b"0"))
        elif content is None:
            async with self._work:
                await asyncio.sleep(self._seconds)
            if (self._fails_together and together) or (
                self._fails_every and next(self._numbers) % self._fails_every == 0
            ):
                status, content = 500, {"detail": "a bad day", "request_id": "r"}
            else:
                content = self._answer(json.loads(body) if together else {"images": [body], "top_k": 1})
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """0.9 for the class it names, the rest for the others."""
        images = []
        for _ in asked["images"]:
            index = (self._says + (self._draws.random() < self._random)) % 10
            (image,) = answer(self._label if index == self._says else DIGITS[index], index)["predictions"]
            others = [c for c in range(10) if c != index][: asked["top_k"] - 1]
            top = [image["top"][0], *({"label": DIGITS[c], "class_index": c, "confidence": 0.01} for c in others)]
            images.append({**image, "top": top, "abstained": self._abstains})
        self.images += len(images)
        return {**answer(), "predictions": images}
