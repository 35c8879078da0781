"""Whatever a body of the Open Inference Protocol holds: images of the bundle's kind, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mithridate.bundle import Bundle
from service.oip_request import parse_infer
from service.problems import Problem
from service.settings import Settings

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
_JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
_NUMBERS = st.lists(st.integers(0, 255) | st.floats(0, 1), min_size=64, max_size=64)
_INPUT = st.fixed_dictionaries(
    {"name": st.just("images") | _JSON, "datatype": st.sampled_from(["UINT8", "FP32", "BYTES", "FP16"]) | _JSON},
    optional={
        "shape": st.sampled_from([[1, 1, 8, 8], [1], [2, 1, 4, 8], [10**18, 1, 8, 8]]) | _JSON,
        "data": _NUMBERS | _JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 99)}) | _JSON,
    },
)
_BODY = st.fixed_dictionaries(
    {"inputs": st.lists(_INPUT, max_size=2) | _JSON},
    optional={"parameters": _JSON, "outputs": _JSON, "id": _JSON},
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=_BODY | _JSON, tail=st.binary(max_size=70), cut=st.integers(0, 3))
def test_any_body_is_images_or_one_clear_error(digits_bundle: Path, body: Any, tail: bytes, cut: int) -> None:
    # Binary data may follow, and the JSON may be cut short.
    manifest, limits = Bundle.open(digits_bundle, verify=False).manifest, Settings(bundle=digits_bundle)
    text = json.dumps(body).encode()
    refused: Problem | None = None
    try:
        found = parse_infer(text + tail, (len(text) - (cut == 1)) if tail else None, manifest, limits)
    except Problem as problem:
        refused = problem
    if refused is not None:
        assert refused.status in (400, 413)
        assert refused.detail
        assert "\n" not in refused.detail
        assert len(refused.detail) < 600
    else:
        assert 1 <= len(found.images) <= limits.max_images
        for image in found.images:
            assert isinstance(image, bytes) or (image.dtype == np.uint8 and image.shape[0] == 1)
