"""What a hostile client sends: one request of some kind, and the statuses that it may be answered with."""

from __future__ import annotations

import base64
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

MAX_BODY = 256 * 1024
"""The service's limit on a body, in this benchmark."""

FINE_TUNING = "rmc:scope=all,neighbors=48,learning_rate=0.001,epochs=2,batch_size=12"
ENDLESS = "rmc:scope=all,neighbors=1024,epochs=1000,patience=1000"
"""Takes a minute, so whoever asks for it is asking for it to be cancelled."""

DEFENCES = ("none", "rmc", "webnn", "deepnn", FINE_TUNING)
LEFT = "left"
"""What is noted instead of a status where the client did not wait for one."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """``send`` gives a status or ``LEFT``; any but ``allowed`` is a fault of the service."""

    send: Callable[[], int | str]
    allowed: tuple[int | str, ...]
    weight: int


class Hostile:
    """One client with a connection of its own, and its choice of what to send next."""

    def __init__(self, url: str, model: str, attacked: Sequence[bytes], seed: int) -> None:
        self._client = httpx2.Client(base_url=url, timeout=120)
        self._address = (str(urlsplit(url).hostname), int(urlsplit(url).port or 80))
        self._infer = f"/v2/models/{model}/infer"
        self._attacked = attacked
        self._random = random.Random(seed)  # noqa: S311 - what to send next is no secret
        self.kinds: dict[str, Kind] = {
            "attacked image": Kind(send=self._one, allowed=(200,), weight=30),
            "attacked images, together": Kind(send=self._several, allowed=(200,), weight=8),
            "attacked image, /v2": Kind(send=self._tensor, allowed=(200,), weight=10),
            "junk": Kind(send=self._junk, allowed=(415,), weight=6),
            "cut or corrupted file": Kind(send=self._corrupt, allowed=(200, 400, 413, 415, 422), weight=6),
            "pixel bomb": Kind(send=self._bomb, allowed=(413,), weight=5),
            "body too large": Kind(send=self._large, allowed=(413,), weight=4),
            "too many images": Kind(send=self._many, allowed=(413,), weight=4),
            "wrong media type": Kind(send=self._media_type, allowed=(415,), weight=4),
            "wrong JSON": Kind(send=self._json, allowed=(400, 413, 422), weight=6),
            "wrong tensor, /v2": Kind(send=self._wrong_tensor, allowed=(400,), weight=6),
            "unknown options": Kind(send=self._options, allowed=(422,), weight=4),
            "deadline of 2 ms": Kind(send=self._late, allowed=(200, 504), weight=4),
            "left while it was answered": Kind(send=self._leave, allowed=(LEFT,), weight=6),
            "left while it was sent": Kind(send=self._leave_early, allowed=(LEFT,), weight=3),
        }

    def send(self) -> tuple[str, int | str]:
        """Sends the next request and waits for its end. Returns its kind, and its status."""
        name = self._random.choices(list(self.kinds), [kind.weight for kind in self.kinds.values()])[0]
        try:
            return name, self.kinds[name].send()
        except httpx2.TransportError as error:  # a body that is refused may be answered while it is still being sent
            return name, type(error).__name__

    def close(self) -> None:
        """Closes its connection."""
        self._client.close()

    def _post(self, body: bytes, media_type: str = "image/png", **options: Any) -> int:
        found = self._client.post("/v1/predict", content=body, headers={"Content-Type": media_type}, params=options)
        return found.status_code

    def _image(self) -> bytes:
        return self._random.choice(self._attacked)

    def _one(self) -> int:
        return self._post(self._image(), defense=self._random.choice(DEFENCES), top_k=10, explain=True)

    def _several(self) -> int:
        files = [base64.b64encode(self._image()).decode() for _ in range(self._random.randint(2, 16))]
        defense = self._random.choice(DEFENCES[:-1])
        return self._client.post("/v1/predict", json={"images": files, "defense": defense}).status_code

    def _tensor(self) -> int:
        tensor = {"name": "images", "datatype": "BYTES", "shape": [1]}
        tensor["data"] = [base64.b64encode(self._image()).decode()]
        body = {"inputs": [tensor], "parameters": {"defense": self._random.choice(DEFENCES)}}
        return self._client.post(self._infer, json=body).status_code

    def _junk(self) -> int:
        return self._post(b"?" + self._random.randbytes(self._random.randint(1, 20_000)))

    def _corrupt(self) -> int:
        data = bytearray(self._image())
        if self._random.random() < 0.5:
            return self._post(bytes(data[: self._random.randint(1, len(data) - 1)]))
        for _ in range(3):
            data[self._random.randrange(len(data))] = self._random.randrange(256)
        return self._post(bytes(data))

    def _bomb(self) -> int:
        header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        return self._post(b"\x89PNG\r\n\x1a\n" + chunk + self._image()[33:])

    def _large(self) -> int:
        return self._post(bytes(MAX_BODY + self._random.randint(1, MAX_BODY)))

    def _many(self) -> int:
        files = [base64.b64encode(self._image()).decode()] * self._random.randint(65, 200)
        return self._client.post("/v1/predict", json={"images": files}).status_code

    def _media_type(self) -> int:
        return self._post(
            self._image(), media_type=self._random.choice(["text/html", "image/gif", "application/x-tar"])
        )

    def _json(self) -> int:
        body = self._random.choice(
            [b'{"images": 7}', b'{"images": [null]}', b"[]", b'{"images": ["!"]}', b"{", b"[" * 9000, b'{"x": 1}']
        )
        return self._post(body, media_type="application/json")

    def _wrong_tensor(self) -> int:
        data: Any = self._random.choice([[float("nan")] * 64, [2.0] * 64, [0] * 63, "0", [[1], [1, 2]], ["0"] * 64])
        body = {"inputs": [{"name": "images", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": data}]}
        return self._client.post(self._infer, content=json.dumps(body).encode()).status_code

    def _options(self) -> int:
        options = self._random.choice(
            [{"defense": "rmc:neighbors=3"}, {"defense": "../etc"}, {"top_k": -1}, {"deadline_ms": 0}, {"explain": "?"}]
        )
        return self._post(self._image(), **options)

    def _late(self) -> int:
        return self._post(self._image(), defense=self._random.choice(DEFENCES), deadline_ms=2)

    def _leave(self) -> str:
        return self._hang_up(ENDLESS, whole=True)

    def _leave_early(self) -> str:
        return self._hang_up("rmc", whole=False)

    def _hang_up(self, defense: str, *, whole: bool) -> str:
        image = self._image()
        head = f"POST /v1/predict?defense={defense} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        request = f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image
        with socket.create_connection(self._address, timeout=60) as connection:
            connection.sendall(request if whole else request[: self._random.randint(1, len(request) - 1)])
            connection.settimeout(self._random.uniform(0.001, 0.1))
            try:
                connection.recv(1)
            except TimeoutError:
                return LEFT
        return "answered"
