"""The answers of HTTP/1.1, in whatever portions they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attack_client.wire import AnswerReader, MalformedAnswerError, Target
from mithridate.errors import OptionError

ANSWERS = {
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, True),
    "empty": (b"HTTP/1.1 429 No\r\nX: y\r\nCONTENT-LENGTH: 0\r\n\r\n", 429, True),
    "no content": (b"HTTP/1.1 204 None\r\n\r\n", 204, True),
    "chunked": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;x=y\r\nab\r\n\r\nA\r\n0123456789\r\n0\r\nT: 1\r\n\r\n",
        200,
        True,
    ),
    "early hints": (b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno", 500, True),
    "closes": (b"HTTP/1.1 503 Off\r\nConnection: Close\r\nContent-Length: 1\r\n\r\n.", 503, False),
    "old": (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n.", 200, False),
}


@pytest.mark.parametrize("name", ANSWERS)
@given(data=st.data())
def test_an_answer_is_complete_at_its_last_byte_however_it_is_cut(name: str, data: st.DataObject) -> None:
    content, status, keeps_alive = ANSWERS[name]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(content) - 1))))
    pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    reader = AnswerReader()
    assert [reader.feed(piece) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (reader.status, reader.keeps_alive) == (status, keeps_alive)


def test_without_a_length_the_end_of_the_connection_is_the_end_of_the_answer() -> None:
    reader = AnswerReader()
    assert not reader.feed(b"HTTP/1.1 200 OK\r\n\r\nsome")
    assert not reader.feed(b"thing")
    assert reader.end()
    assert not reader.keeps_alive


def test_a_connection_cut_short_is_no_answer() -> None:
    reader = AnswerReader()
    assert not reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
    assert not reader.end()


@pytest.mark.parametrize(
    "content",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_no_http_is_said_so(content: bytes) -> None:
    with pytest.raises(MalformedAnswerError):
        AnswerReader().feed(content)


def test_a_prefix_and_an_ipv6_address_are_kept() -> None:
    request = Target.parse("http://[::1]:81/models/a/").predict(b"IMG", defense="prm+rmc")
    assert request.startswith(b"POST /models/a/v1/predict?defense=prm%2Brmc HTTP/1.1\r\nHost: [::1]:81\r\n")
    assert request.endswith(b"Content-Length: 3\r\n\r\nIMG")


@pytest.mark.parametrize(
    "url", ["", "nonsense", "ftp://x", "http://", "http://x:port", "http://x/?a=b", "http://x/\r\nA: b"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(OptionError, match="write it as http"):
        Target.parse(url)
