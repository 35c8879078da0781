"""What a prediction tells of the images as they came."""

from __future__ import annotations

import pytest
import torch

from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Prediction, Request, Resources, build_defence
from mithridate.types import to_images


@pytest.mark.parametrize(
    "text", ["none", "rmc", "webnn", "deepnn", "tta", "randomization", "randomization+rmc", "sap:passes=2"]
)
def test_embeddings_are_the_base_models_of_the_image_as_it_came(
    text: str, resources: Resources, digits_test: LabelledImages
) -> None:
    images = to_images(torch.from_numpy(digits_test.images[:5]))
    expected = resources.classifier.embed(images).detach()
    defence = build_defence(text, resources)
    requests = [Request(images=part, generator=torch.Generator().manual_seed(0)) for part in images.split([2, 3])]
    parts = [defence.predict(images, generator=torch.Generator().manual_seed(0), budget=Budget())]
    together = [outcome for outcome in defence.predict_together(requests) if isinstance(outcome, Prediction)]
    for prediction, rows in zip([*parts, *together], [slice(0, 5), slice(0, 2), slice(2, 5)], strict=True):
        assert prediction.embeddings is not None
        assert prediction.embeddings.dtype == torch.float32
        torch.testing.assert_close(prediction.embeddings, expected[rows], atol=1e-5, rtol=1e-4)
