"""What is not usable is refused with the right status and a sentence that helps, and harms no later request."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from service_helpers import check_problem, post, predictions, save
from starlette.testclient import TestClient

MAX_IMAGES, MAX_BYTES = 4, 65_536
SMALL = save(Image.new("L", (8, 8), 100), "PNG")
NOISE = Image.effect_noise((8, 8), 60)
FRAMES = [Image.new("L", (8, 8), shade) for shade in (0, 120, 240)]
JSON = "application/json"
FORM = "multipart/form-data; boundary=frontier"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def part(data: bytes, *, name: str = "images", filename: str | None = "a.png") -> bytes:
    given = f'name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return f"--frontier\r\nContent-Disposition: form-data; {given}\r\n\r\n".encode() + data + b"\r\n"


def bomb(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that says it is as large as this."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


@dataclass(frozen=True)
class Case:
    """``content`` sent with ``query`` is answered ``status`` with ``says`` in its detail."""

    name: str
    status: int
    says: str
    content: bytes
    media_type: str | None = "image/png"
    query: dict[str, Any] = field(default_factory=dict)


END = b"--frontier--\r\n"
IMAGES = [
    Case("text", 415, "JPEG, PNG and WebP", b"hello, I am not an image"),
    Case("gif", 415, "JPEG, PNG and WebP", save(NOISE, "GIF")),
    Case("svg", 415, "JPEG, PNG and WebP", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    Case("truncated png", 400, "truncated", SMALL[:-20]),
    Case("png signature alone", 400, "truncated", SMALL[:8]),
    Case("truncated jpeg", 400, "truncated", save(NOISE, "JPEG")[:-40], "image/jpeg"),
    Case("truncated webp", 400, "WebP", save(NOISE, "WEBP")[:-12], "image/webp"),
    Case("png with a flipped bit", 400, "checksum", SMALL[:50] + bytes([SMALL[50] ^ 1]) + SMALL[51:]),
    Case("one pixel", 422, "exactly 8x8", save(Image.new("L", (1, 1)), "PNG")),
    Case("wrong size", 422, "image is 16x9 px", save(Image.new("RGB", (16, 9)), "PNG")),
    Case("bomb by side", 413, "30000x30000", bomb(30_000, 30_000)),
    Case("bomb by area", 413, "pixels are allowed", bomb(16_000, 16_000)),
    Case("no pixels", 400, "at least 1 px", bomb(0, 8)),
    Case("animated webp", 422, "animated", save(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:])),
    Case("animated png", 422, "animated", save(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:])),
]
JSON_BODIES = [
    Case("not json", 400, "Invalid JSON", b"{images: [}", JSON),
    Case("json cut off", 400, "Invalid JSON", body(images=[b64(SMALL)])[:-2], JSON),
    Case("json not utf-8", 400, "Invalid JSON", b'{"images": ["\xff"]}', JSON),
    Case("json too deep", 413, "too many lists", b"[" * 50_000, JSON),
    Case("json list", 422, "object", b"[]", JSON),
    Case("json null", 422, "object", b"null", JSON),
    Case("no images field", 422, "images", body(top_k=1), JSON),
    Case("no images", 422, "at least 1 item", body(images=[]), JSON),
    Case("images not a list", 422, "images", body(images=b64(SMALL)), JSON),
    Case("image not text", 422, "images.1", body(images=[b64(SMALL), 7]), JSON),
    Case("not base64", 400, "images.1: not base64", body(images=[b64(SMALL), "!!!"]), JSON),
    Case("base64 with a line break", 400, "not base64", body(images=[b64(SMALL)[:8] + "\n" + b64(SMALL)[8:]]), JSON),
    Case("base64 not ascii", 400, "not base64", body(images=["é"]), JSON),
    Case("base64 of nothing", 400, "empty", body(images=[""]), JSON),
    Case("second image bad", 415, "image 1: ", body(images=[b64(SMALL), b64(b"hello")]), JSON),
    Case("too many in json", 413, f"more than {MAX_IMAGES}", body(images=[b64(SMALL)] * 5), JSON),
    Case("unknown field", 422, "temperature", body(images=[b64(SMALL)], temperature=1), JSON),
    Case("long unknown field", 422, "kkk", body(images=[b64(SMALL)], **{"k" * 20_000: 1}), JSON),
    Case("long defence", 422, "defense", body(images=[b64(SMALL)], defense="k" * 20_000), JSON),
    Case("json top_k", 422, "top_k", body(images=[b64(SMALL)], top_k=0), JSON),
    Case("json nan", 422, "deadline_ms", body(images=[b64(SMALL)], deadline_ms=float("nan")), JSON),
    Case("query beside json", 422, "JSON fields", body(images=[b64(SMALL)]), JSON, {"top_k": 2}),
]
FORMS = [
    Case("no boundary", 400, "boundary", part(SMALL) + END, "multipart/form-data"),
    Case("other boundary", 400, "boundary", part(SMALL) + END, "multipart/form-data; boundary=other"),
    Case("not a form", 400, "multipart", b"hello --frontier--", FORM),
    Case("no part", 400, "images", END, FORM),
    Case("part without name", 400, "name", part(SMALL).replace(b'name="images"', b"x=y") + END, FORM),
    Case("other part name", 422, "part 'picture'", part(SMALL, name="picture") + END, FORM),
    Case("option as a part", 422, "part 'top_k'", part(SMALL) + part(b"3", name="top_k", filename=None) + END, FORM),
    Case("image as text", 422, "part 'images'", part(b"hello", filename=None) + END, FORM),
    Case("too many parts", 413, f"more than {MAX_IMAGES}", part(SMALL) * 5 + END, FORM),
    Case("too many parts by far", 413, f"more than {MAX_IMAGES}", part(b"x") * 700 + END, FORM),
    Case("part with endless headers", 400, "headers of a part", b"--frontier\r\n" + b"X: y\r\n" * 9000 + END, FORM),
    Case("nearly the boundary", 400, "too often", part(b"\r\n--frontiers" * 4000) + END, FORM),
    Case("empty part", 400, "empty", part(b"") + END, FORM),
    Case("cut off in the second part", 400, "multipart", part(SMALL) + part(SMALL)[:-30], FORM),
]
SERVED = "deepnn, none, rmc, webnn"
OPTIONS = [
    Case("unknown defence", 422, "(did you mean 'rmc'?); allowed: " + SERVED, SMALL, query={"defense": "rmcc"}),
    Case("unknown stage", 422, "'prm+rmcc'; allowed: " + SERVED, SMALL, query={"defense": "prm+rmcc"}),
    Case("empty defence", 422, "allowed: ", SMALL, query={"defense": ""}),
    Case("malformed defence", 422, "name:key=value", SMALL, query={"defense": "rmc:neighbors"}),
    Case("unknown option of a defence", 422, "neighbours", SMALL, query={"defense": "rmc:neighbours=3"}),
    Case("defence option not a number", 422, "not int", SMALL, query={"defense": "rmc:neighbors=many"}),
    Case("defence option absurd", 422, "out of range", SMALL, query={"defense": "rmc:neighbors=" + "9" * 180}),
    Case("defence option endless", 422, "defense", SMALL, query={"defense": "rmc:neighbors=" + "9" * 1000}),
    Case("defence not offered", 422, "not offered", SMALL, query={"defense": "rmc:neighbors=3"}),
    Case("unknown option", 422, "temperature", SMALL, query={"temperature": 1}),
    Case("top_k zero", 422, "top_k", SMALL, query={"top_k": 0}),
    Case("top_k text", 422, "top_k", SMALL, query={"top_k": "all"}),
    Case("top_k too large", 422, "top_k", SMALL, query={"top_k": 1001}),
    Case("explain", 422, "explain", SMALL, query={"explain": "perhaps"}),
    *(Case(f"deadline {v}", 422, "deadline_ms", SMALL, query={"deadline_ms": v}) for v in ("0", "-5", "nan", "soon")),
]
BODIES = [
    Case("nothing", 400, "empty", b""),
    Case("nothing as json", 400, "empty", b"", JSON),
    Case("nothing as a form", 400, "empty", b"", FORM),
    Case("too many bytes", 413, f"larger than {MAX_BYTES} bytes", bytes(MAX_BYTES + 1)),
    Case("html", 415, "text/html", b"<p>", "text/html"),
    Case("a gif as image/gif", 415, "JPEG, PNG and WebP", save(NOISE, "GIF"), "image/gif"),
    Case("urlencoded", 415, "allowed: image/*, application/octet-stream", SMALL, "application/x-www-form-urlencoded"),
    Case("endless content type", 415, "kkk", SMALL, "k" * 9000),
    Case("no content type", 415, "(none)", SMALL, None),
]
CASES = [*IMAGES, *JSON_BODIES, *FORMS, *OPTIONS, *BODIES]


@pytest.fixture(scope="module")
def small(serving: Any) -> Iterator[TestClient]:
    with serving(max_images=MAX_IMAGES, max_body_bytes=MAX_BYTES) as client:
        yield client


@pytest.fixture(scope="module")
def good(small: TestClient, clean: list[bytes]) -> list[dict[str, Any]]:
    return predictions(post(small, clean[0], top_k=10, explain=True))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused(small: TestClient, clean: list[bytes], good: list[dict[str, Any]], case: Case) -> None:
    headers = {"Content-Type": case.media_type} if case.media_type else {}
    response = small.post("/v1/predict", content=case.content, headers=headers, params=case.query)
    check_problem(response, case.status, case.says)
    assert predictions(post(small, clean[0], top_k=10, explain=True)) == good


def test_nothing_that_a_file_says_of_itself_is_told(
    small: TestClient, clean: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither to the client nor in the log: metadata, file names, and what comes after the pixels."""
    secret = "a name, a place"
    image, text = Image.open(io.BytesIO(clean[0])), PngInfo()
    text.add_text("Author", secret)
    exif = Image.Exif()
    exif[0x010E] = secret
    files = [save(image, "PNG", pnginfo=text, exif=exif), save(image, "WEBP", exif=exif, xmp=secret.encode())]
    files += [data[:-30] for data in files] + [clean[0] + secret.encode(), save(image, "GIF", comment=secret)]
    with caplog.at_level("DEBUG"):
        for data in files:
            for response in (
                post(small, data, explain=True),
                small.post("/v1/predict", files={"images": (f"{secret}.png", data, secret)}),
            ):
                assert response.status_code in (200, 400, 415)
                assert "a name" not in response.text
    assert "a name" not in caplog.text


def test_the_last_of_two_json_fields_of_one_name_counts(small: TestClient, clean: list[bytes]) -> None:
    twice = b'{"images":["aa"],"images":["%s"]}' % b64(clean[0]).encode()
    assert predictions(post(small, twice, media_type=JSON)) == predictions(post(small, clean[0]))


def test_elsewhere(small: TestClient) -> None:
    check_problem(small.get("/v1/nothing"), 404)
    for path in ("/v1/predict/", "/docs/", "/livez/"):
        nowhere = small.post(path, headers={"Host": "evil.example"}, follow_redirects=False)
        check_problem(nowhere, 404)
        assert "location" not in nowhere.headers
    check_problem(small.post("/nothing"), 404)
    response = small.get("/v1/predict")
    check_problem(response, 405)
    assert response.headers["allow"] == "POST"
    check_problem(small.delete("/v1/bundle"), 405)


def test_a_deadline_of_ages_is_the_services_own(small: TestClient, clean: list[bytes], good: Any) -> None:
    for ages in ("1e300", "1e400", "inf"):
        assert predictions(post(small, clean[0], top_k=10, explain=True, deadline_ms=ages)) == good


def test_limits_are_themselves_allowed(small: TestClient, clean: list[bytes]) -> None:
    padded = clean[0] + bytes(MAX_BYTES - len(clean[0]))  # what follows the last chunk of a PNG is nobody's
    assert predictions(post(small, padded)) == predictions(post(small, clean[0]))
    files = part(clean[0]) * MAX_IMAGES + END
    assert len(predictions(post(small, files, media_type=FORM))) == MAX_IMAGES


def test_unusual_but_usable(small: TestClient, clean: list[bytes]) -> None:
    grey = Image.open(io.BytesIO(clean[2]))
    expected = predictions(post(small, clean[2], top_k=10))
    sixteen = Image.frombytes("I;16", (8, 8), b"".join(struct.pack("<H", 257 * level) for level in grey.tobytes()))
    assert predictions(post(small, save(sixteen, "PNG"), top_k=10)) == expected
    assert predictions(post(small, save(grey.convert("P"), "PNG"), top_k=10)) == expected
    cmyk = save(grey.convert("CMYK"), "JPEG", quality=95)
    assert predictions(post(small, cmyk))[0]["label"] == expected[0]["label"]


@pytest.mark.parametrize("declared", ["image/gif", "image/jpeg", "image/x-anything", "IMAGE/PNG; q=1", "image/"])
def test_the_content_decides_and_not_what_is_declared(
    small: TestClient, good: Any, clean: list[bytes], declared: str
) -> None:
    assert predictions(post(small, clean[0], media_type=declared, top_k=10, explain=True)) == good


def test_exif_orientation_is_applied(small: TestClient, clean: list[bytes]) -> None:
    lying = Image.open(io.BytesIO(clean[2])).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    tagged, plain = save(lying, "JPEG", quality=95, exif=exif), save(lying, "JPEG", quality=95)
    upright = save(Image.open(io.BytesIO(plain)).transpose(Image.Transpose.ROTATE_270), "PNG")
    assert predictions(post(small, tagged, top_k=10)) == predictions(post(small, upright, top_k=10))
    assert predictions(post(small, tagged, top_k=10)) != predictions(post(small, plain, top_k=10))
