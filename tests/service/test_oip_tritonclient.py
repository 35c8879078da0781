"""A client that we did not write: NVIDIA's tritonclient asks a service in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from service_helpers import ServerProcess, post_json, predictions, wait_ready

from mithridate.datasets import LabelledImages
from mithridate.images import encode_png

triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")

MODEL = "digits-small-cnn"


@pytest.fixture(scope="module")
def server(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    started = ServerProcess(tmp_path_factory.mktemp("oip") / "log", bundle=digits_bundle, threads=1)
    wait_ready(started.client)
    yield started
    started.close()


@pytest.fixture(scope="module")
def asking(server: ServerProcess) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def pixels(digits_test: LabelledImages) -> np.ndarray[Any, Any]:
    return digits_test.images[:5]


@pytest.fixture(scope="module")
def native(server: ServerProcess, pixels: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    return predictions(post_json(server.client, [encode_png(image) for image in pixels], top_k=10))


def tensor(values: np.ndarray[Any, Any], datatype: str, *, binary: bool = True) -> Any:
    made = triton.InferInput("images", list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def check_like(found: Any, native: list[dict[str, Any]]) -> None:
    scores = [[s["confidence"] for s in sorted(row["top"], key=lambda s: s["class_index"])] for row in native]
    assert found.as_numpy("class_index").tolist() == [row["class_index"] for row in native]
    assert [label.decode() for label in found.as_numpy("label").tolist()] == [row["label"] for row in native]
    assert found.as_numpy("suspicious").tolist() == [row["suspicious"] for row in native]
    assert found.as_numpy("scores").dtype == np.float32
    assert np.allclose(found.as_numpy("scores"), scores, rtol=0, atol=1e-4)


def test_health_and_metadata(asking: Any, server: ServerProcess) -> None:
    assert asking.is_server_live()
    assert asking.is_server_ready()
    assert asking.is_model_ready(MODEL)
    assert not asking.is_model_ready("mnist")
    assert not asking.is_model_ready(MODEL, "1")
    assert "binary_tensor_data" in asking.get_server_metadata()["extensions"]
    described = asking.get_model_metadata(MODEL)
    assert described["inputs"][0]["name"] == "images"
    assert described["inputs"][0]["datatype"] == "UINT8"
    (version,) = described["versions"]
    assert asking.is_model_ready(MODEL, version)
    assert asking.get_model_metadata(MODEL, version) == described


def test_pixels_and_files_get_the_native_answer(asking: Any, pixels: Any, native: list[dict[str, Any]]) -> None:
    floats = (pixels / 255).astype(np.float32)
    files = np.array([encode_png(image) for image in pixels], np.object_)
    for sent in (
        tensor(pixels, "UINT8"),
        tensor(pixels, "UINT8", binary=False),
        tensor(floats, "FP32"),
        tensor(floats, "FP32", binary=False),
        tensor(files, "BYTES"),
    ):
        check_like(asking.infer(MODEL, [sent]), native)


def test_outputs_version_id_and_defence(asking: Any, pixels: Any, native: list[dict[str, Any]]) -> None:
    (version,) = asking.get_model_metadata(MODEL)["versions"]
    wanted = [
        triton.InferRequestedOutput("scores", binary_data=False),
        triton.InferRequestedOutput("label", binary_data=True),
    ]
    sent = tensor(pixels, "UINT8")
    found = asking.infer(MODEL, [sent], version, wanted, request_id="mine", parameters={"defense": "none"})
    answer = found.get_response()
    assert answer["id"] == "mine"
    assert answer["model_version"] == version
    assert answer["parameters"]["defense"] == "none"
    assert [output["name"] for output in answer["outputs"]] == ["scores", "label"]
    assert found.as_numpy("class_index") is None
    base = [row["undefended"] for row in native]
    assert [label.decode() for label in found.as_numpy("label").tolist()] == [row["label"] for row in base]
    assert np.allclose(found.as_numpy("scores").max(1), [row["confidence"] for row in base], rtol=0, atol=1e-4)
    best = triton.InferRequestedOutput("scores", class_count=2)
    found = asking.infer(MODEL, [sent], outputs=[best]).as_numpy("scores")
    assert found.shape == (5, 2)
    assert [text.decode().split(":")[2] for text in found[:, 0].tolist()] == [row["label"] for row in native]


def test_its_other_arguments(asking: Any, pixels: Any, native: list[dict[str, Any]]) -> None:
    sent = [tensor(pixels, "UINT8")]
    check_like(asking.infer(MODEL, sent, timeout=20_000_000, priority=2, sequence_id=0), native)
    late = {"timeout": 1, "parameters": {"deadline_ms": 20_000}}
    stateful = {"sequence_id": 7, "sequence_start": True}
    for options, status, says in ((late, "504", "deadline"), (stateful, "400", "keeps no state between requests")):
        with pytest.raises(triton.InferenceServerException) as raised:
            asking.infer(MODEL, sent, **options)
        assert raised.value.status() == status
        assert says in raised.value.message()


def test_many_at_once(asking: Any, server: ServerProcess, pixels: Any, native: list[dict[str, Any]]) -> None:
    url = server.url.removeprefix("http://")
    with triton.InferenceServerClient(url, concurrency=4) as client:
        sent = [client.async_infer(MODEL, [tensor(pixels[n : n + 1], "UINT8")]) for n in range(5)]
        for number, one in enumerate(sent):
            check_like(one.get_result(), native[number : number + 1])


def test_errors_are_understood(asking: Any, pixels: Any) -> None:
    def refused(name: str, sent: Any, **options: Any) -> str:
        with pytest.raises(triton.InferenceServerException) as raised:
            asking.infer(name, [sent], **options)
        return f"{raised.value.status()} {raised.value.message()}"

    good = tensor(pixels, "UINT8")
    assert refused("mnist", good).startswith("404 there is no model 'mnist'")
    assert refused(MODEL, good, model_version="1").startswith("404 model")
    assert refused(MODEL, tensor(pixels[:, :, :4], "UINT8")).startswith("400 image 0: image is 8x4 px")
    assert refused(MODEL, tensor(pixels.astype(np.float32), "FP32")).startswith("400 input images: FP32 must be within")
    assert refused(MODEL, tensor(np.array([b"GIF89a"], np.object_), "BYTES")).startswith("400 ")
    assert refused(MODEL, good, parameters={"defence": "none"}).startswith("400 parameters.defence")
    many = np.repeat(pixels[:1], 65, axis=0)
    assert refused(MODEL, tensor(many, "UINT8")).startswith("413 more than 64 images")
    assert refused(MODEL, good, parameters={"deadline_ms": 1e-3}).startswith("504 ")
    assert refused(MODEL, good, request_compression_algorithm="gzip").startswith("400 content encoding 'gzip'")
