"""``multipart/form-data`` (RFC 7578) of a body that is all here: in one pass, in memory.

A parser for streams goes through a file byte by byte where it resembles the boundary, which an attacker can arrange
(python-multipart: 11 s of the event loop for 32 MiB), and spools large parts to disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header

_MAX_HEADER_BYTES = 8192
_MAX_BOUNDARY_BYTES = 200  # RFC 2046: 70

_MAX_LOOKALIKES = 1000
"""How often a line may begin like a boundary and be none: by chance it never happens."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """``content`` is a copy; ``filename`` is None where the part is no file, and is otherwise never used."""

    name: str
    filename: str | None
    content: bytes


def read_parts(body: bytes, content_type: str, *, max_parts: int) -> list[Part]:
    """The parts, at most one more than ``max_parts``. Raises ValueError, in one sentence, for what is not a form."""
    _, parameters = parse_options_header(content_type[:1024])
    boundary = parameters.get(b"boundary", b"")
    if not 1 <= len(boundary) <= _MAX_BOUNDARY_BYTES:
        raise ValueError(f"its content type must name a boundary of 1 to {_MAX_BOUNDARY_BYTES} bytes")
    delimiter, ending = b"\r\n--" + boundary, re.compile(rb"(--)|[ \t]*+\r\n")
    parts: list[Part] = []
    start = None
    at = 0 if body.startswith(delimiter[2:]) else body.find(delimiter)
    for _ in range(max_parts + _MAX_LOOKALIKES):
        if at < 0:
            raise ValueError("it ends before its last boundary")
        found = ending.match(body, at + len(delimiter) - 2 * (at == 0 and body[0] != 13))
        if found:
            if start is not None:
                parts.append(_part(body[start : max(start, at)]))
            if found[1] or len(parts) > max_parts:
                return parts
            start = found.end()
        # The line break that ends a delimiter may begin the next one.
        at = body.find(delimiter, found.end() - 2 if found else at + 1)
    raise ValueError("what looks like its boundary is in it too often")


def _part(text: bytes) -> Part:
    end = text.find(b"\r\n\r\n", 0, _MAX_HEADER_BYTES)
    if end < 0:
        raise ValueError(f"the headers of a part do not end within {_MAX_HEADER_BYTES} bytes")
    for line in text[:end].split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            kind, options = parse_options_header(value.strip())
            name, filename = options.get(b"name"), options.get(b"filename")
            if kind == b"form-data" and name is not None:
                return Part(
                    name=name.decode("utf-8", "replace"),
                    filename=None if filename is None else filename.decode("utf-8", "replace"),
                    content=text[end + 4 :],
                )
    raise ValueError("a part has no name (Content-Disposition: form-data; name=...)")
