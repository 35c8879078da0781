"""An answer of the Open Inference Protocol: outputs as JSON, as binary data, or as classifications."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from mithridate.bundle import Manifest
from service.oip_schemas import Datatype, InferRequest, OutputParameters, RequestedOutput, TensorMetadata
from service.problems import Problem
from service.schemas import ImagePrediction, PredictResponse

OUTPUTS: dict[str, Datatype] = {
    "class_index": "INT64",
    "label": "BYTES",
    "confidence": "FP32",
    "suspicious": "BOOL",
    "abstained": "BOOL",
    "scores": "FP32",
}
"""All but ``scores`` ``[N, classes]`` are ``[N]``."""

SCORES = "scores"
_ALL_CLASSES = 2**31
"""More than any model has: its number may change with the bundle while a request is on its way."""

_DTYPES = {"INT64": "<i8", "FP32": "<f4", "BOOL": "?"}


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """``values`` are in order of the rows; of BYTES, strings."""

    datatype: Datatype
    shape: list[int]
    values: list[Any] | NDArray[Any]

    def listed(self) -> list[Any]:
        return self.values if isinstance(self.values, list) else self.values.ravel().tolist()

    def packed(self) -> bytes:
        if isinstance(self.values, list):
            texts = [text.encode() for text in self.values]
            return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        return self.values.astype(_DTYPES[self.datatype]).tobytes()


def describe_outputs(manifest: Manifest) -> list[TensorMetadata]:
    """What the model's metadata says of its outputs."""
    shapes = {SCORES: [-1, len(manifest.classes)]}
    return [TensorMetadata(name=name, datatype=kind, shape=shapes.get(name, [-1])) for name, kind in OUTPUTS.items()]


def wanted_outputs(asked: InferRequest, offered: Sequence[str]) -> list[RequestedOutput]:
    """The outputs to send: those asked for, or all that are ``offered``. Raises Problem 400."""
    if not asked.outputs:
        return [RequestedOutput(name=name) for name in offered]
    names = [output.name for output in asked.outputs]
    for output in asked.outputs:
        if output.name not in OUTPUTS:
            allowed = ", ".join(OUTPUTS)
            raise Problem(400, f"output {output.name[:80]!r} is not one of this model's; allowed: {allowed}")
        if names.count(output.name) > 1:
            raise Problem(400, f"output {output.name} is asked for {names.count(output.name)} times")
        if output.parameters.classification and output.name != SCORES:
            raise Problem(400, f"output {output.name}: classification is for {SCORES} only")
    return asked.outputs


def classes_needed(wanted: Sequence[RequestedOutput]) -> int:
    """How many of the best classes the native answer must list for these outputs."""
    asked = [output.parameters.classification or _ALL_CLASSES for output in wanted if output.name == SCORES]
    return max(asked, default=1)


def encode_answer(
    answer: PredictResponse, asked: InferRequest, wanted: Sequence[RequestedOutput], version: str
) -> Response:
    """The HTTP answer, with the binary data that is wanted after the JSON."""
    outputs, parts = [], []
    for output in wanted:
        tensor = _tensor(output.name, output.parameters, answer.predictions)
        entry: dict[str, Any] = {"name": output.name, "shape": tensor.shape, "datatype": tensor.datatype}
        binary = output.parameters.binary_data
        if asked.parameters.binary_data_output if binary is None else binary:
            parts.append(tensor.packed())
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = tensor.listed()
        outputs.append(entry)
    text = json.dumps(
        {
            "model_name": answer.bundle.name,
            "model_version": version,
            "id": answer.id if asked.id is None else asked.id,
            "parameters": {
                "defense": answer.defense,
                "bundle_digest": answer.bundle.digest,
                "total_ms": answer.timings_ms.total,
            },
            "outputs": outputs,
        },
        ensure_ascii=False,
    ).encode()
    if not parts:
        return Response(text, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(len(text))}
    return Response(b"".join((text, *parts)), media_type="application/octet-stream", headers=headers)


def _tensor(name: str, parameters: OutputParameters, rows: Sequence[ImagePrediction]) -> _Tensor:
    datatype, count = OUTPUTS[name], len(rows)
    if name == SCORES and parameters.classification:
        return _classified(rows, parameters.classification)
    if name == SCORES:
        scores = np.zeros((count, len(rows[0].top)), np.float32)
        for row, prediction in zip(scores, rows, strict=True):
            row[[entry.class_index for entry in prediction.top]] = [entry.confidence for entry in prediction.top]
        return _Tensor(datatype=datatype, shape=list(scores.shape), values=scores)
    values = [getattr(prediction, name) for prediction in rows]
    if datatype == "BYTES":
        return _Tensor(datatype=datatype, shape=[count], values=values)
    return _Tensor(datatype=datatype, shape=[count], values=np.array(values, _DTYPES[datatype]))


def _classified(rows: Sequence[ImagePrediction], count: int) -> _Tensor:
    """The classification extension: the best classes, each ``value:index:label``."""
    listed = min(count, len(rows[0].top))
    texts = [f"{entry.confidence:.6f}:{entry.class_index}:{entry.label}" for row in rows for entry in row.top[:listed]]
    return _Tensor(datatype="BYTES", shape=[len(rows), listed], values=texts)
