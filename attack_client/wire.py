"""HTTP/1.1 as little as a load generator needs of it: requests made once, answers read and thrown away.

A general client spends about a millisecond of this process on a request, which is what a small service needs for the
whole answer: its times would be the client's. This one spends about a twentieth of that.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit

from mithridate.errors import OptionError

_LONGEST_HEAD = 65_536
_WITHOUT_BODY = (204, 304)


class MalformedAnswerError(ValueError):
    """What came is no HTTP/1.1 answer."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go: ``prefix`` is what the address has before the paths of the service."""

    url: str
    host: str
    port: int
    secure: bool
    prefix: str
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, *, api_key: str | None = None) -> Target:
        """Raises OptionError where ``url`` is not the address of a service, or ``api_key`` cannot be sent."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port, parts = None, None, urlsplit("")
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or parts.username:
            raise OptionError(f"{url!r} is not a service's address; write it as http://host:port")
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/")
        if not (host.isascii() and prefix.isascii() and prefix.isprintable() and " " not in prefix):
            raise OptionError(f"{url!r} has characters that a request cannot carry; write it as http://host:port")
        return cls(
            url=url.rstrip("/"),
            host=host,
            port=port or (443 if secure else 80),
            secure=secure,
            prefix=prefix,
            api_key=None if api_key is None else check_key(api_key),
        )

    def get(self, path: str) -> bytes:
        """The bytes of a request for ``path``."""
        return self._head("GET", path)

    def predict(self, image: bytes, *, defense: str | None = None) -> bytes:
        """The bytes of a request to classify one encoded image."""
        query = f"?{urlencode({'defense': defense})}" if defense else ""
        fields = ("Content-Type: application/octet-stream", f"Content-Length: {len(image)}")
        return self._head("POST", f"/v1/predict{query}", *fields) + image

    def tls(self) -> ssl.SSLContext | None:
        """How to speak with it."""
        return ssl.create_default_context() if self.secure else None

    def _head(self, method: str, path: str, *fields: str) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.api_key is not None:
            fields = (f"Authorization: Bearer {self.api_key}", *fields)
        lines = (f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {host}:{self.port}", "Accept: */*", *fields, "", "")
        return "\r\n".join(lines).encode()


def check_key(key: str) -> str:
    """``key`` where a header can carry it. Raises OptionError, which does not quote it."""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise OptionError("the API key has characters that a header cannot carry, or none; is it the whole key?")
    return key


class AnswerReader:
    """Reads one answer from bytes in any portions, and forgets its body.

    ``status`` and ``keeps_alive`` hold once ``feed`` or ``end`` has returned True.
    """

    def __init__(self) -> None:
        self.status = 0
        self.keeps_alive = True
        self.begun = False
        self._buffer = bytearray()
        self._part = "head"
        self._missing = 0

    def feed(self, data: bytes) -> bool:
        """Whether the answer is complete. Raises MalformedAnswerError."""
        self.begun = True
        self._buffer += data
        while self._part != "done" and self._step():
            pass
        if self._part == "done" and self._buffer:  # nobody asked for more: what comes next cannot be told apart
            self.keeps_alive = False
        return self._part == "done"

    def end(self) -> bool:
        """The server closed the connection. Whether that completes the answer."""
        self.keeps_alive = False
        return self._part == "until close"

    def _step(self) -> bool:
        """Takes the next part from the buffer. False where it is not all there."""
        if self._part == "head":
            return self._head()
        if self._part == "until close":
            self._buffer.clear()
            return False
        if self._part in ("body", "chunk"):
            return self._body()
        line, found, rest = self._buffer.partition(b"\r\n")
        if not found:
            return self._wait()
        self._buffer = rest
        if self._part == "size":
            self._missing = _number(bytes(line).partition(b";")[0], 16)
            self._part = "trailer" if self._missing == 0 else "chunk"
            self._missing += 2  # the line end after the chunk
        elif not line:
            self._part = "done"
        return True

    def _body(self) -> bool:
        taken = min(self._missing, len(self._buffer))
        del self._buffer[:taken]
        self._missing -= taken
        if self._missing:
            return False
        self._part = "size" if self._part == "chunk" else "done"
        return True

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return self._wait()
        first, *lines = bytes(self._buffer[:end]).lower().split(b"\r\n")
        del self._buffer[: end + 4]
        version, _, rest = first.partition(b" ")
        if version not in (b"http/1.1", b"http/1.0"):
            raise MalformedAnswerError(f"an answer begins with {first[:40]!r}")
        self.status = _number(rest[:3], 10)
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        connection = fields.get(b"connection", b"")
        self.keeps_alive = b"close" not in connection and (version == b"http/1.1" or b"keep-alive" in connection)
        self._part, self._missing = self._body_of(fields)
        return True

    def _body_of(self, fields: dict[bytes, bytes]) -> tuple[str, int]:
        if 100 <= self.status < 200:
            return "head", 0  # the answer proper follows
        if self.status in _WITHOUT_BODY:
            return "done", 0
        if b"chunked" in fields.get(b"transfer-encoding", b""):
            return "size", 0
        if b"content-length" in fields:
            return "body", _number(fields[b"content-length"], 10)
        return "until close", 0

    def _wait(self) -> bool:
        if len(self._buffer) > _LONGEST_HEAD:
            raise MalformedAnswerError(f"a line or head of more than {_LONGEST_HEAD} bytes")
        return False


def _number(text: bytes, base: int) -> int:
    try:
        value = int(text, base)
    except ValueError as error:
        raise MalformedAnswerError(f"{text[:20]!r} is not a number") from error
    if value < 0:
        raise MalformedAnswerError(f"{value} is negative")
    return value
