"""The Open Inference Protocol by hand: every form of input and output, its errors, and what it says of itself."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest
from service_helpers import Serving, crowd, post, post_json, predictions, wait_until
from starlette.testclient import TestClient

from mithridate.datasets import LabelledImages
from mithridate.defenses import DEFAULT_DEFENCES
from mithridate.images import encode_png

MODEL = "digits-small-cnn"
INFER = f"/v2/models/{MODEL}/infer"
Body = dict[str, Any]


@pytest.fixture(scope="module")
def pixels(digits_test: LabelledImages) -> np.ndarray[Any, Any]:
    """Four digits, uint8 ``[4, 1, 8, 8]``."""
    return digits_test.images[:4]


@pytest.fixture(scope="module")
def native(client: TestClient, pixels: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """What the native API says of them."""
    return predictions(post_json(client, [encode_png(image) for image in pixels], top_k=10))


def request(data: Any, datatype: str = "UINT8", shape: Any = (4, 1, 8, 8), **fields: Any) -> Body:
    return {"inputs": [{"name": "images", "datatype": datatype, "shape": list(shape), "data": data}], **fields}


def send_binary(client: httpx2.Client, body: Body, *parts: bytes, **headers: str) -> httpx2.Response:
    text = json.dumps(body).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), **headers}
    return client.post(INFER, content=b"".join((text, *parts)), headers=headers)


def binary(size: int, datatype: str = "UINT8", shape: Any = (4, 1, 8, 8), **fields: Any) -> Body:
    tensor = {"name": "images", "datatype": datatype, "shape": list(shape), "parameters": {"binary_data_size": size}}
    return {"inputs": [tensor], **fields}


def outputs(response: httpx2.Response) -> dict[str, Any]:
    """By name; numbers in the shape that is stated, binary data read as the extension says."""
    assert response.status_code == 200, response.text
    length = response.headers.get("inference-header-content-length")
    text, rest = (
        (response.content[: int(length)], response.content[int(length) :]) if length else (response.content, b"")
    )
    found = {}
    for output in json.loads(text)["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        assert ("data" in output) == (size is None)
        data, rest = (output["data"], rest) if size is None else (unpack(rest[:size], output["datatype"]), rest[size:])
        assert len(data) == np.prod(output["shape"])
        found[output["name"]] = np.array(data).reshape(output["shape"])
    assert not rest
    return found


def unpack(data: bytes, datatype: str) -> list[Any]:
    if datatype != "BYTES":
        code, size = {"INT64": ("q", 8), "FP32": ("f", 4), "BOOL": ("?", 1)}[datatype]
        return list(struct.unpack(f"<{len(data) // size}{code}", data))
    found = []
    while data:
        (length,) = struct.unpack("<I", data[:4])
        found.append(data[4 : 4 + length].decode())
        data = data[4 + length :]
    return found


def check_like(found: dict[str, Any], native: list[dict[str, Any]]) -> None:
    assert found["class_index"].tolist() == [row["class_index"] for row in native]
    assert found["label"].tolist() == [row["label"] for row in native]
    assert found["suspicious"].tolist() == [row["suspicious"] for row in native]
    assert found["abstained"].tolist() == [row["abstained"] for row in native]
    assert np.allclose(found["confidence"], [row["confidence"] for row in native], atol=1e-4)
    ranked = [sorted(row["top"], key=lambda entry: entry["class_index"]) for row in native]
    assert np.allclose(found["scores"], [[entry["confidence"] for entry in row] for row in ranked], atol=1e-4)


def check_error(response: httpx2.Response, status: int, *contains: str) -> None:
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    document = response.json()
    assert set(document) == {"error"}
    for text in contains:
        assert text in document["error"], document["error"]
    assert len(document["error"]) < 600
    assert "\n" not in document["error"]


def test_what_it_says_of_itself(client: TestClient) -> None:
    server = client.get("/v2").json()
    assert server["name"] == "mithridate"
    assert server["extensions"] == ["binary_tensor_data", "classification"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"live": True, "ready": True}
    model = client.get(f"/v2/models/{MODEL}").json()
    digest = client.get("/v1/bundle").json()["digest"].removeprefix("sha256:")
    assert digest.startswith(model["versions"][0])
    assert model["inputs"][0]["shape"] == [-1, 1, 8, 8]
    assert {output["name"]: output["shape"] for output in model["outputs"]}["scores"] == [-1, 10]
    version = f"/v2/models/{MODEL}/versions/{model['versions'][0]}"
    assert client.get(version).json() == model
    for address in (f"/v2/models/{MODEL}/ready", f"{version}/ready"):
        assert client.get(address).json() == {"name": MODEL, "ready": True}


FORMS: dict[str, Callable[[TestClient, Any], httpx2.Response]] = {
    "uint8 flat": lambda client, x: client.post(INFER, json=request(x.ravel().tolist())),
    "uint8 nested": lambda client, x: client.post(INFER, json=request(x.tolist())),
    "uint8 binary": lambda client, x: send_binary(client, binary(x.size), x.tobytes()),
    "uint8 binary, binary outputs": lambda client, x: send_binary(
        client, binary(x.size, parameters={"binary_data_output": True}), x.tobytes()
    ),
    "uint8 NHWC": lambda client, x: client.post(
        INFER,
        json=request(x.transpose(0, 2, 3, 1).tolist(), shape=(4, 8, 8, 1), parameters={"layout": "NHWC"}),
    ),
    "fp32": lambda client, x: client.post(INFER, json=request((x / 255).tolist(), "FP32")),
    "fp32 binary": lambda client, x: send_binary(client, binary(4 * x.size, "FP32"), (x / 255).astype("<f4").tobytes()),
    "fp32 between levels": lambda client, x: client.post(
        INFER, json=request(np.clip((x + np.resize([0.4, -0.4], x.shape)) / 255, 0, 1).tolist(), "FP32")
    ),
    "bytes": lambda client, x: client.post(
        INFER, json=request([base64.b64encode(encode_png(image)).decode() for image in x], "BYTES", (4,))
    ),
    "bytes binary": lambda client, x: send_bytes(client, [encode_png(image) for image in x]),
}


def send_bytes(client: TestClient, files: list[bytes]) -> httpx2.Response:
    packed = b"".join(struct.pack("<I", len(data)) + data for data in files)
    return send_binary(client, binary(len(packed), "BYTES", (len(files), 1)), packed)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gets_the_native_answer(
    client: TestClient, pixels: Any, native: list[dict[str, Any]], form: str
) -> None:
    check_like(outputs(FORMS[form](client, pixels)), native)


def test_outputs_as_asked_for(client: TestClient, pixels: Any, native: list[dict[str, Any]]) -> None:
    wanted = [
        {"name": "scores"},
        {"name": "label", "parameters": {"binary_data": False}},
        {"name": "class_index", "parameters": {"binary_data": True}},
        {"name": "suspicious"},
    ]
    body = request(pixels.tolist(), outputs=wanted, parameters={"binary_data_output": True}, id="seven")
    response = client.post(INFER, json=body)
    assert response.headers["content-type"] == "application/octet-stream"
    text = json.loads(response.content[: int(response.headers["inference-header-content-length"])])
    assert text["id"] == "seven"
    assert text["model_name"] == MODEL
    assert text["parameters"]["defense"] == "rmc"
    assert [output["name"] for output in text["outputs"]] == ["scores", "label", "class_index", "suspicious"]
    assert ["data" in output for output in text["outputs"]] == [False, True, False, False]
    found = outputs(response)
    assert found["label"].tolist() == [row["label"] for row in native]
    assert found["class_index"].tolist() == [row["class_index"] for row in native]
    assert found["scores"].shape == (4, 10)


def test_classifications(client: TestClient, pixels: Any, native: list[dict[str, Any]]) -> None:
    wanted = [{"name": "scores", "parameters": {"classification": 3}}]
    found = outputs(client.post(INFER, json=request(pixels.tolist(), outputs=wanted)))["scores"]
    expected = [
        [f"{entry['confidence']:.6f}:{entry['class_index']}:{entry['label']}" for entry in row["top"][:3]]
        for row in native
    ]
    assert [[text.split(":")[1:] for text in row] for row in found] == [
        [text.split(":")[1:] for text in row] for row in expected
    ]
    values = [[float(text.split(":")[0]) for text in row] for row in found]
    assert np.allclose(values, [[float(text.split(":")[0]) for text in row] for row in expected], atol=1e-4)
    wanted[0]["parameters"] = {"classification": 500}
    assert outputs(client.post(INFER, json=request(pixels.tolist(), outputs=wanted)))["scores"].shape == (4, 10)


def test_the_defence_is_the_one_named(client: TestClient, adversarial: list[bytes]) -> None:
    for defense in ("none", "webnn"):
        native = predictions(post_json(client, adversarial[:6], defense=defense, top_k=10))
        text = [base64.b64encode(data).decode() for data in adversarial[:6]]
        response = client.post(INFER, json=request(text, "BYTES", (6,), parameters={"defense": defense}))
        assert response.json()["parameters"]["defense"] == defense
        check_like(outputs(response), native)


def test_what_other_servers_clients_send_by_themselves_is_taken(
    client: TestClient, pixels: Any, native: list[dict[str, Any]]
) -> None:
    body = request(pixels.tolist(), id=None, parameters=None, outputs=None)
    body["inputs"][0]["parameters"] = None
    check_like(outputs(client.post(INFER, json=body)), native)
    body["inputs"][0]["parameters"] = {"content_type": "np", "binary_data_size": None}
    body["outputs"] = [{"name": "label", "parameters": None}]
    sequence = {"sequence_id": 0, "sequence_start": False, "sequence_end": False}
    body["parameters"] = {"content_type": "np", "priority": 3, "timeout": 0, "layout": None, **sequence}
    assert outputs(client.post(INFER, json=body))["label"].tolist() == [row["label"] for row in native]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (request([[1, 2], [3]]), ("different lengths",)),
        (request([0] * 255), ("[255]", "[4, 1, 8, 8]")),
        (request([0] * 256, shape=(1, 8, 8)), ("[1, 8, 8]", "[N, 1, H, W]")),
        (request([0] * 256, shape=(4, 8, 8, 1)), ("[N, 1, H, W]",)),
        (request([], shape=(0, 1, 8, 8)), ("no axis empty",)),
        (request([0] * 324, shape=(4, 1, 9, 9)), ("9x9", "8x8")),
        (request([256] * 256), ("[0, 255]", "256")),
        (request([0.5] * 256), ("whole numbers", "0.5")),
        (request([10**400] * 256), ("too large",)),
        (request(["0"] * 256), ("must be numbers",)),
        (request([True] * 256), ("must be numbers",)),
        (request([1.5] * 256, "FP32"), ("[0, 1]", "1.5")),
        (request([-0.1] * 256, "FP32"), ("[0, 1]", "-0.1")),
        (request([0] * 256, "FP64"), ("FP64", "UINT8, FP32, BYTES")),
        (request("0", "UINT8"), ("must be a list", "str")),
        (request(None), ("either data or",)),
        (request(["!"], "BYTES", (1,)), ("not base64",)),
        (request([7], "BYTES", (1,)), ("base64",)),
        (request(["R0lGODlh"], "BYTES", (1,)), ("JPEG",)),
        (request(["R0lGODlh"], "BYTES", (2,)), ("1 files", "[2]")),
        ({"inputs": []}, ("inputs",)),
        ({"inputs": [{"name": "input0", "datatype": "UINT8", "shape": [1]}]}, ("'input0'", "allowed: images")),
        ({"inputs": 2 * request([0] * 256)["inputs"]}, ("2 times",)),
        (request([0] * 256, outputs=[{"name": "logits"}]), ("'logits'", "class_index, label")),
        (request([0] * 256, outputs=[{"name": "label"}, {"name": "label"}]), ("label is asked for 2 times",)),
        (request([0] * 256, outputs=[{"name": "label", "parameters": {"classification": 1}}]), ("scores only",)),
        (request([0] * 256, parameters={"defence": "none"}), ("parameters.defence", "allowed: defense, deadline_ms")),
        (request([0] * 256, parameters={"defense": "strong"}), ("unknown defence 'strong'",)),
        (request([0] * 256, parameters={"layout": "CHWN"}), ("NCHW",)),
        (request([0] * 256, parameters={"defence": None}), ("parameters.defence",)),
        (request([0] * 256, parameters={"timeout": -1}), ("parameters.timeout", "greater than or equal to 0")),
        (request([0] * 256, parameters={"timeout": 0.5}), ("parameters.timeout", "integer")),
        (request([0] * 256, parameters={"sequence_id": "s"}), ("keeps no state between requests",)),
        (request([0] * 256, parameters={"sequence_start": True}), ("keeps no state between requests",)),
        (binary(7), ("0 bytes of binary data", "7")),
    ],
)  # fmt: skip
def test_unusable_tensors(client: TestClient, body: Body, says: tuple[str, ...]) -> None:
    check_error(client.post(INFER, json=body), 400, *says)


def test_unusable_bodies(client: TestClient, pixels: Any) -> None:
    check_error(client.post(INFER, content=b""), 400, "not JSON")
    check_error(client.post(INFER, content=b"[1]"), 400, "must be an object", "list")
    check_error(client.post(INFER, content=b"[" * 50_000), 400, "not JSON")
    nan = json.dumps(request([float("nan")] * 256, "FP32")).encode()
    check_error(client.post(INFER, content=nan), 400, "[0, 1]", "nan")
    inf = np.full(256, np.inf, "<f4").tobytes()
    check_error(send_binary(client, binary(1024, "FP32"), inf), 400, "[0, 1]", "inf")
    raw = pixels.tobytes()
    check_error(send_binary(client, binary(256), raw, b"?"), 400, "257 bytes", "256")
    check_error(send_binary(client, binary(200), raw[:200]), 400, "has 256 bytes")
    check_error(send_binary(client, binary(9, "BYTES", (1,)), b"\xff\xff\xff\xff12345"), 400, "cut off")
    check_error(send_binary(client, binary(256), raw, **{"Inference-Header-Content-Length": "1e3"}), 400, "'1e3'")
    check_error(send_binary(client, binary(256), raw, **{"Inference-Header-Content-Length": "99999"}), 400, "99999")
    check_error(send_binary(client, binary(256), raw, **{"Content-Encoding": "gzip"}), 400, "gzip")
    check_error(send_binary(client, binary(256), raw, **{"Content-Type": "text/plain"}), 400, "text/plain")


def test_addresses_that_are_not_there(client: TestClient) -> None:
    check_error(client.get("/v2/models/mnist"), 404, "'mnist'", MODEL)
    for path in ("mnist/ready", f"{MODEL}/versions/1/ready"):  # needs no key: what is served is not for everybody
        missing = client.get(f"/v2/models/{path}")
        check_error(missing, 404, "no ")
        assert "served" not in missing.text
    check_error(client.post("/v2/models/mnist/infer", json={}), 404, "'mnist'")
    check_error(client.get(f"/v2/models/{MODEL}/versions/1"), 404, "'1'")
    check_error(client.post(f"/v2/models/{MODEL}/versions/1/infer", json={}), 404, "'1'")
    check_error(client.get("/v2/nothing"), 404)


def test_the_methods_of_an_address(client: TestClient) -> None:
    """A model's name may have slashes: what ends in /infer is nevertheless no model's own address."""
    for path in (INFER, INFER.replace("infer", "versions/1/infer"), "/v2/models/a/b/infer"):
        for method in ("GET", "HEAD", "DELETE"):
            refused = client.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    check_error(client.get(INFER), 405, "Method Not Allowed")
    for path in (
        f"/v2/models/{MODEL}",
        f"/v2/models/{MODEL}/ready",
        f"/v2/models/{MODEL}/versions/1",
        "/v2/health/live",
    ):
        refused = client.delete(path)
        check_error(refused, 405)
        assert refused.headers["allow"] == "GET, HEAD"
    check_error(client.get("/v2/models/infer"), 404, "'infer'")
    check_error(client.get("/v2/models/a/b"), 404, "'a/b'")


def test_the_limits_of_a_request(serving: Serving, pixels: Any) -> None:
    with serving(max_images=3, max_body_bytes=2_000_000, max_pixels=64) as client:
        check_error(client.post(INFER, json=request(pixels.tolist())), 413, "more than 3 images")
        check_error(client.post(INFER, json=request([""] * 4, "BYTES", (4,))), 413, "more than 3 images")
        check_error(client.post(INFER, json=request([0] * 65, shape=(1, 1, 5, 13))), 413, "64 pixels")
        check_error(client.post(INFER, content=b"[0," + b"0," * 400_000), 413, "400000", "binary data")
        check_error(client.post(INFER, content=b"[" + b"[[]]," * 150_000), 413, "400000", "binary data")
        check_error(client.post(INFER, content=bytes(2_000_001)), 413, "2000000 bytes")


def test_shed_and_late(serving: Serving, clean: list[bytes], pixels: Any) -> None:
    with serving(queue_size=2) as client, crowd(client, clean[0]) as waiting:
        late = client.post(INFER, json=request(pixels.tolist(), parameters={"deadline_ms": 30}))
        check_error(late, 504, "deadline")
        waiting.ask(clean[1])
        shed = client.post(INFER, json=request(pixels.tolist()))
        check_error(shed, 429, "waiting already")
        assert int(shed.headers["retry-after"]) >= 1
        waiting.open()
        wait_until(lambda: waiting.engine.waiting == 0)


def test_draining(serving: Serving) -> None:
    with serving() as client:
        app: Any = client.app
        app.state.service.drain()
        check_error(client.get("/v2/health/ready"), 503, "draining")
        check_error(client.get(f"/v2/models/{MODEL}/ready"), 503, "draining")
        assert client.get("/v2/health/live").status_code == 200


def test_both_protocols_are_answered_together(
    serving: Serving, clean: list[bytes], pixels: Any, native: list[dict[str, Any]]
) -> None:
    with serving(offer=DEFAULT_DEFENCES) as client, crowd(client, clean[0]) as waiting:
        one = waiting.ask(clean[1])
        other = waiting._threads.submit(client.post, INFER, json=request(pixels.tolist()))
        wait_until(lambda: waiting.engine.waiting == 2)
        waiting.open()
        check_like(outputs(other.result()), native)
        assert one.result().json()["batch"] == {"requests": 2, "images": 5}


def test_the_examples_of_the_documentation_work(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    described = document["paths"]["/v2/models/{name}/infer"]["post"]
    assert "$ref" not in json.dumps([described["requestBody"], described["responses"]["200"]])
    body = described["requestBody"]["content"]["application/json"]
    assert set(body["schema"]["properties"]) == {"id", "parameters", "inputs", "outputs"}
    found = [client.post(INFER, json=example["value"]) for example in body["examples"].values()]
    labels = [outputs(response) for response in found]
    assert labels[0]["label"] == labels[2]["label"] == ["4"]
    assert re.fullmatch(r"0\.\d{6}:4:4", labels[1]["scores"][0][0])
    assert found[0].json()["id"] == "42"
    command = described["requestBody"]["content"]["application/octet-stream"]["examples"]["pixels"]["description"]
    text = re.findall("json='(.*?)'", command, re.DOTALL)[0]
    assert outputs(send_binary(client, json.loads(text), bytes(64)))["label"].shape == (1,)
    for status in ("400", "404", "413", "429", "503", "504"):
        example = described["responses"][status]["content"]["application/json"]["example"]
        assert set(example) == {"error"}


def test_native_errors_stay_as_they_are(client: TestClient) -> None:
    assert post(client, b"GIF89a").headers["content-type"] == "application/problem+json"
    assert client.get("/v2x").headers["content-type"] == "application/problem+json"
