"""Real servers at a port of this machine whose times are known."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

Respond = Callable[[str, bytes], Awaitable[bytes | None]]
"""From path and body to the bytes of an answer; None closes the connection without one."""


def http(content: bytes = b"{}", *, status: int = 200, fields: str = "") -> bytes:
    """An answer."""
    return f"HTTP/1.1 {status} Said\r\nContent-Length: {len(content)}\r\n{fields}\r\n".encode() + content


@contextmanager
def serving(make: Callable[[], Respond]) -> Iterator[str]:
    """Serves what ``make`` gives, called in the server's own loop; yields the address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> asyncio.Server:
        respond = make()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while (answer := await respond(*await _request(reader))) is not None:
                    writer.write(answer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            except asyncio.CancelledError:  # the test is over
                pass
            finally:
                writer.close()

        return await asyncio.start_server(talk, "127.0.0.1", 0)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def after(seconds: Callable[[bytes], float], answer: bytes | None = None) -> Respond:
    """Any number at once, each after so many seconds, which may depend on the body."""

    async def respond(path: str, body: bytes) -> bytes | None:
        del path
        await asyncio.sleep(seconds(body))
        return http() if answer is None else answer

    return respond


def one_at_a_time(seconds: float) -> Respond:
    """A server whose capacity is exactly ``1 / seconds`` requests a second: it works by its own clock."""
    loop = asyncio.get_running_loop()
    ready = loop.time()

    async def respond(path: str, body: bytes) -> bytes | None:
        nonlocal ready
        del body
        if path != "/v1/predict":
            return http(json.dumps(DESCRIBED[path]).encode())
        ready = max(ready, loop.time()) + seconds
        await asyncio.sleep(ready - loop.time())
        return http(json.dumps(ANSWER).encode())

    return respond


DESCRIBED = {
    "/v1/bundle": {
        "name": "fake",
        "digest": "sha256:0",
        "classes": [str(digit) for digit in range(10)],
        "image_shape": [1, 8, 8],
        "arch": "fake",
    },
    "/v1/defenses": {"default": "none", "defenses": [{"name": "none", "description": "-"}]},
}
_SCORED = {"label": "0", "class_index": 0, "confidence": 1.0}
ANSWER = {
    "id": "1",
    "bundle": {"name": "fake"},
    "defense": "none",
    "predictions": [{**_SCORED, "top": [], "undefended": _SCORED, "suspicious": False, "adaptation": None}],
    "timings_ms": {"total": 1.0},
}


async def _request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    lengths = [int(line.partition(":")[2]) for line in head if line.lower().startswith("content-length:")]
    path = head[0].split()[1].partition("?")[0]
    return path, await reader.readexactly(lengths[0]) if lengths else b""


async def _stop(server: asyncio.Server) -> None:
    server.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
