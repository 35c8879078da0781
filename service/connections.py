"""What a connection may cost before there is a request to judge: time, headers, and a place among the others.

No middleware sees a client that never finishes its headers, and uvicorn waits for it forever (its only timer is the
one between two requests). Therefore uvicorn's own protocol is held here to ``ConnectionLimits``:

- headers complete within a time, counted from the connection or from the first byte after an answer, however the bytes
  trickle (408, closed); few enough and small enough (431, closed);
- a body in crumbs is refused (400, closed): each chunk costs the event loop the same, whatever it carries;
- a body that goes on after its answer, and an answer that is not read, are waited for so long and no longer;
- when all places are taken, whoever has waited longest without a request in hand loses theirs. A client that sends its
  request at once is never in that position for long, so clients that do nothing cannot keep it out. Only where every
  place has a request running is a new connection refused (503).

uvicorn's end is a cut: it closes what is idle just when the next request may be on its way, and tells nobody before.
Here an answer says that it is the last one (``Guard.draining``), and who is idle may ask once more (``Guard.leaving``).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, ClassVar, Literal, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.parser import Parser
from service.problems import MEDIA_TYPE, NOSNIFF, document
from service.settings import Settings

_LINGER_S = 1.0
"""After a refusal: how long to go on reading, so that the answer is not lost to a reset."""
_LATE_BODY_S = 5.0
"""After an answer that came before its request's body ended: how long the rest may take."""
_GRACE_S = 1.0
"""After the port was closed: how long a connection without a request in hand may still send one."""


TurnAway = Callable[[bytes, tuple[str, int] | None, bool], bytes | None]
"""The whole answer to what a connection at rest has received from a client; None where it must be read for that. The
last argument: whether the connection ends with it, as the answer must say."""


def read_all(data: bytes, client: tuple[str, int] | None, last: bool) -> None:
    """Turns nobody away."""


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """See the settings of the same names; ``write_timeout_s`` is how long an answer may wait to be read."""

    max_connections: int
    header_timeout_s: float
    max_headers: int
    max_header_bytes: int
    write_timeout_s: float = 30.0


@dataclass(kw_only=True)
class Guard:
    """What all connections of one server share."""

    limits: ConnectionLimits
    turn_away: TurnAway
    waiting: dict[GuardedProtocol, None] = field(default_factory=dict)
    """Connections without a request in hand, the one that has been so longest first."""
    ended: Counter[str] = field(default_factory=Counter)
    """How many were ended here, by reason."""
    draining: bool = False
    """Whether each answer is the last one on its connection, and says so."""
    leaving: bool = False
    """Whether the port is closed: who is idle goes, after a moment in which a request that is on its way arrives."""


def connection_options(settings: Settings, turn_away: TurnAway = read_all) -> dict[str, Any]:
    """The part of ``uvicorn.Config`` that holds connections to the settings' limits."""
    limits = ConnectionLimits(
        max_connections=settings.max_connections,
        header_timeout_s=settings.header_timeout_s,
        max_headers=settings.max_headers,
        max_header_bytes=settings.max_header_bytes,
    )
    return {
        "http": guarded(limits, turn_away),
        "ws": "none",
        "timeout_keep_alive": settings.keep_alive_s,
        "h11_max_incomplete_event_size": limits.max_header_bytes,
    }


def guarded(limits: ConnectionLimits, turn_away: TurnAway = read_all) -> type[GuardedProtocol]:
    """The protocol for one server; ``.guard`` tells what became of its connections."""

    class Protocol(GuardedProtocol):
        guard = Guard(limits=limits, turn_away=turn_away)

    return Protocol


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, held to ``guard.limits``. Always h11: whether httptools is installed changes nothing."""

    guard: ClassVar[Guard]

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        limits = self.guard.limits
        self.conn = Parser(
            max_headers=limits.max_headers,
            max_header_bytes=limits.max_header_bytes,
            last=lambda: self.guard.draining,
        )
        self._answering = cast(asyncio.Transport, _Answering(self))
        self._timer: asyncio.TimerHandle | None = None
        self._awaited = ""
        self._writing: asyncio.TimerHandle | None = None
        self._over = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limits = self.guard.limits
        if len(self.connections) > limits.max_connections:
            oldest = next(iter(self.guard.waiting), None)
            if oldest is None:
                self._refuse(503, "all connections are in use", retry=True)
                return
            oldest.give_up_place()
        self.guard.waiting[self] = None
        self._await("request" if self.guard.leaving else "headers")

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.waiting.pop(self, None)
        self._stop()
        if self._writing:
            self._writing.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        last = self.guard.draining
        answer = self.guard.turn_away(data, self.client, last) if self._at_rest else None
        if answer is None:
            super().data_received(data)
            return
        self._unset_keepalive_if_required()
        self.transport.write(answer)
        if last:
            self.end()
            return
        self.guard.waiting.pop(self, None)  # it has just asked: it waits from now on
        self._stop()
        self._wait()

    @property
    def _at_rest(self) -> bool:
        """No request is in hand, no byte of one either, and the last answer has been read."""
        return (
            self.conn.states == {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE}
            and not self.conn.trailing_data[0]
            and not self.flow.write_paused
            and not self.transport.is_closing()
        )

    def handle_events(self) -> None:
        super().handle_events()
        if self._over or self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.transport = self._answering
            self.guard.waiting.pop(self, None)
            self._stop()
        else:
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Else a pipelined request has begun, or there is no other.
        if self.cycle.response_complete and not self._over and not self.transport.is_closing():
            self._wait()

    def end(self) -> None:
        """Closes the connection after its last answer. Where a part of what the client sends was not read, the system
        would cut the answer off with it: then the rest is read first, and looked at by nobody."""
        if self.transport.is_closing():
            return
        if self.conn.their_state is not h11.SEND_BODY and not self.conn.trailing_data[0]:
            self.transport.close()
            self._abort_later()  # where the client does not read
            return
        self.guard.waiting.setdefault(self)
        self.flow.resume_reading()
        unsent = self.transport.get_write_buffer_size()
        self._linger(self.guard.limits.write_timeout_s if unsent else _LATE_BODY_S)

    def shutdown(self) -> None:
        """Called by uvicorn once the port is closed. A request that is being answered, or on its way, is not cut off:
        answers say that they are the last, and who is idle has a moment left."""
        self.guard.draining = self.guard.leaving = True
        if self in self.guard.waiting and not self._over and not self.conn.trailing_data[0]:
            self._stop()
            self._wait()

    def give_up_place(self) -> None:
        """Ends a connection that has no request in hand."""
        self.guard.ended["place taken"] += 1
        self.guard.waiting.pop(self, None)
        self.connections.discard(self)
        self._stop()
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn where the parser has raised."""
        del msg
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        limits = self.guard.limits
        if status == 431:
            detail = f"at most {limits.max_headers} headers of {limits.max_header_bytes} bytes in all are taken"
        else:
            detail = f"not readable as HTTP/1.1: {error}"[:200]
        self._refuse(status, detail)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.guard.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing:
            self._writing.cancel()

    def _should_upgrade(self) -> bool:
        return False  # no protocol but this one; the answer is that of the same request without the wish

    def _wait(self) -> None:
        """There is no request in hand: for what comes next a time runs, which no further byte prolongs."""
        self.guard.waiting.setdefault(self)
        if self.conn.their_state is h11.SEND_BODY:
            self._await("body")
        else:
            self._await("headers" if self.conn.trailing_data[0] else "request")

    def _await(self, what: Literal["headers", "body", "request"]) -> None:
        if what == self._awaited or (what, self._awaited) == ("request", "headers"):
            return
        if what == "body":
            self._start(_LATE_BODY_S, self._body_late)
        elif what == "headers":
            self._start(self.guard.limits.header_timeout_s, self._headers_late)
        else:
            usual = self.timeout_keep_alive
            self._start(min(usual, _GRACE_S) if self.guard.leaving else usual, self._idle)
        self._awaited = what

    def _idle(self) -> None:
        self.guard.ended["idle"] += 1
        self.timeout_keep_alive_handler()

    def _headers_late(self) -> None:
        if self.conn.trailing_data[0]:
            seconds = self.guard.limits.header_timeout_s
            self._refuse(408, f"the request's headers did not arrive within {seconds:g} s")
        else:
            self.guard.ended["no request"] += 1
            self.transport.close()

    def _body_late(self) -> None:
        self.guard.ended["endless body"] += 1
        self.transport.abort()

    def _refuse(self, status: int, detail: str, *, retry: bool = False) -> None:
        """Answers for uvicorn, whose own answers are not problem documents, and ends the connection."""
        self.guard.ended[str(status)] += 1
        self.guard.waiting.pop(self, None)
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:  # the request whose body it was
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            answered = self.cycle.response_started
        else:
            answered = False
        if not answered:
            self.transport.write(_answer(status, detail, retry=retry))
        self._linger(_LINGER_S)
        if len(self.connections) > 2 * self.guard.limits.max_connections:
            self.transport.abort()

    def _linger(self, seconds: float) -> None:
        """Says that no more will be said, and waits for the client to close."""
        self._over = True
        try:
            self.transport.write_eof() if self.transport.can_write_eof() else self.transport.close()
        except OSError:  # the client has gone before
            self.transport.abort()
        self._start(seconds, self.transport.abort)

    def _abort_later(self) -> None:
        self._start(self.guard.limits.write_timeout_s, self.transport.abort)

    def _start(self, seconds: float, then: Any) -> None:
        self._stop()
        self._timer = self.loop.call_later(seconds, then)

    def _stop(self) -> None:
        self._awaited = ""
        if self._timer:
            self._timer.cancel()
            self._timer = None


class _Answering:
    """A connection's transport, as uvicorn sees it while a request is answered: closed, it is ended with care."""

    def __init__(self, protocol: GuardedProtocol) -> None:
        self._protocol = protocol

    def write(self, data: bytes) -> None:
        self._protocol.transport.write(data)

    def is_closing(self) -> bool:
        return self._protocol.transport.is_closing()

    def close(self) -> None:
        self._protocol.end()


def _answer(status: int, detail: str, *, retry: bool) -> bytes:
    body = json.dumps(document(status, detail, "", "")).encode()
    headers = {"Content-Type": MEDIA_TYPE, **NOSNIFF, "Content-Length": len(body), "Connection": "close"}
    headers |= {"Retry-After": 1} if retry else {}
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
