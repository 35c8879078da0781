"""Frames: whatever a prediction is made of comes back, and nothing that is no frame is taken for one."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mithridate.defenses import Adaptation, Neighborhood, Prediction
from service.out_of_memory import join
from service.wire import PREFIX, Message, WireError, decode, encode, sizes


def sent(message: dict[str, Any]) -> Message:
    """What the other side reads."""
    data = b"".join(encode(message))
    header, body = sizes(data[: PREFIX.size])
    assert len(data) == PREFIX.size + header + body
    return decode(data[PREFIX.size : PREFIX.size + header], bytearray(data[PREFIX.size + header :]))


def make_prediction(images: int, *, abstained: bool = False) -> Prediction:
    generator = torch.Generator().manual_seed(images)
    neighborhood = Neighborhood(
        ids=torch.arange(3),
        distances=torch.rand(3, generator=generator).double(),
        label_counts={7: 2, 0: 1},
        adversarial_fraction=1 / 3,
    )
    adaptation = Adaptation(steps=4, stop_reason="patience", weights="base", held_out_loss=(math.inf, 0.1))
    return Prediction(
        scores=torch.rand(images, 10, generator=generator),
        base_scores=torch.rand(images, 10, generator=generator),
        adaptations=(adaptation, None)[:images] + (adaptation,) * (images - 2),
        neighborhoods=(None, neighborhood)[:images] + (neighborhood,) * (images - 2),
        seconds={"embed": 0.1, "adapt": 1e-9},
        abstained=torch.arange(images) % 2 == 0 if abstained else None,
    )


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, (Prediction, Adaptation, Neighborhood)):
        assert type(found) is type(expected)
        for field in fields(expected):
            assert_equal(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, tuple):
        assert isinstance(found, tuple)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert type(found) is type(expected)
        assert found == expected


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("abstained", [False, True])
def test_a_prediction_comes_back_bit_for_bit(images: int, abstained: bool) -> None:
    prediction = make_prediction(images, abstained=abstained)
    assert_equal(sent({"type": "answer", "prediction": prediction})["prediction"], prediction)


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from(["uint8", "int64", "float16", "float32", "float64", "bool"]),
)
def test_any_array_beside_any_other(shape: list[int], dtype: str) -> None:
    array = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    found = sent({"odd": np.ones(3, np.uint8), "arrays": [array, array[::-1] if shape else array], "t": torch.ones(2)})
    assert found["arrays"][0].dtype == array.dtype
    assert np.array_equal(found["arrays"][0], array)
    assert np.array_equal(found["arrays"][1], array[::-1] if shape else array)
    assert torch.from_numpy(found["arrays"][0]).shape == tuple(shape)
    assert torch.equal(found["t"], torch.ones(2))


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", np.array([object()]), print])
def test_what_is_not_data_is_not_sent(value: Any) -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        encode({"value": value})


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"nothing", b""),
        (b"[1]", b""),
        (json.dumps({"a": {"$array": ["|O", [1]]}}).encode(), bytes(8)),
        (json.dumps({"a": {"$array": ["<f4", [2]]}}).encode(), bytes(4)),
        (json.dumps({"a": {"$array": ["<f4", [-2]]}}).encode(), bytes(4)),
        (json.dumps({"a": {"$kind": "Popen", "args": "true"}}).encode(), b""),
        (json.dumps({"a": {"$kind": "Prediction", "scores": 1}}).encode(), b""),
    ],
)
def test_what_is_no_frame_is_refused(header: bytes, body: bytes) -> None:
    with pytest.raises(WireError):
        decode(header, bytearray(body))


def test_sides_that_are_out_of_step_notice_it() -> None:
    with pytest.raises(WireError, match="bytes"):
        sizes(b"POST /v1/pre")


@pytest.mark.parametrize("abstained", [False, True])
def test_two_halves_are_the_whole(abstained: bool) -> None:
    whole = make_prediction(5, abstained=abstained)
    found = join(whole.rows(0, 2), whole.rows(2, 5))
    doubled = {phase: 2 * seconds for phase, seconds in whole.seconds.items()}
    assert found.seconds == doubled
    for field in fields(whole):
        if field.name != "seconds":
            assert_equal(getattr(found, field.name), getattr(whole, field.name))
