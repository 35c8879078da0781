"""Forms: every part as it was sent, whatever is in it, and no form that makes the reader slow."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.multipart import Part, read_parts

TYPE = "multipart/form-data; boundary=frontier"
contents = st.binary(max_size=40) | st.text("\r\n-frontie ", max_size=60).map(str.encode)


def form(*files: bytes, head: bytes = b'Content-Disposition: form-data; name="images"; filename="a"') -> bytes:
    return b"".join(b"--frontier\r\n" + head + b"\r\n\r\n" + file + b"\r\n" for file in files) + b"--frontier--\r\n"


@given(files=st.lists(contents.filter(lambda content: b"\r\n--frontier" not in b"\r\n" + content), max_size=5))
@settings(max_examples=200, deadline=None)
def test_every_part_comes_back(files: list[bytes]) -> None:
    expected = [Part(name="images", filename="a", content=file) for file in files]
    for before, after in ((b"", b""), (b"\r\n", b"--frontier\r\n"), (b"hello\r\n", bytes(5))):
        assert read_parts(before + form(*files) + after, TYPE, max_parts=5) == expected


@given(data=st.lists(st.sampled_from([b"\r\n", b"--frontier", b"--", b": ", b"Content-Disposition", b";", b'"', b"x"])))
@settings(max_examples=300, deadline=None)
def test_what_is_no_form_is_one_error(data: list[bytes]) -> None:
    try:
        read_parts(b"".join(data), TYPE, max_parts=5)
    except ValueError as error:
        assert len(str(error)) < 200  # noqa: PT017


def test_a_line_that_only_begins_like_the_boundary_is_content() -> None:
    (part,) = read_parts(form(b"a\r\n--frontiers\r\nb"), TYPE, max_parts=5)
    assert part.content == b"a\r\n--frontiers\r\nb"
    (part,) = read_parts(form(b"x").replace(b"frontier\r", b"frontier \t\r"), TYPE, max_parts=5)
    assert part.content == b"x"


def test_a_thousand_parts_are_not_read_to_their_end() -> None:
    assert len(read_parts(form(*[b"x"] * 1000), TYPE, max_parts=64)) == 65


HOSTILE = {
    "nearly the boundary": form(b"\r\n--frontierx" * 1_000_000),
    "line breaks": form(b"\r\n" * 8_000_000),
    "many headers": form(b"", head=b"X: y\r\n" * 2_000_000),
    "one header": form(b"", head=b"X: " + b"y" * 16_000_000),
    "many options": form(b"", head=b"Content-Disposition: form-data" + b"; a=b" * 1_600),
    "a boundary and spaces": form(b"\r\n--frontier" + b" " * 16_000_000),
    "a long preamble": b"\r\n--" * 4_000_000 + form(b"x"),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_no_form_takes_long(body: bytes) -> None:
    """A parser for streams took 11 s of the event loop for 32 MiB of the first one."""
    started = time.process_time()
    with contextlib.suppress(ValueError):
        read_parts(body, TYPE, max_parts=64)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", f"multipart/form-data; boundary={'b' * 300}", "a;" * 9999]
)
def test_a_form_without_a_boundary(content_type: str) -> None:
    with pytest.raises(ValueError, match="boundary of 1 to 200"):
        read_parts(form(b"x"), content_type, max_parts=5)
