"""Test-time augmentation: what the views are, and that nothing of it is hidden from attackers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mithridate.bundle import Bundle
from mithridate.defenses import Budget, Resources, build_defence
from mithridate.defenses.averaging import Draws
from mithridate.defenses.networks import BaseNetwork
from mithridate.defenses.tta import TTAConfig, Views
from mithridate.errors import OptionError
from mithridate.types import Images


@pytest.fixture(scope="module")
def resources(digits_bundle: Path) -> Resources:
    return Resources.load(Bundle.open(digits_bundle))


@pytest.fixture(scope="module")
def images() -> Images:
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def by_hand(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Pixel by pixel: what is not in the image is 0."""
    moved = torch.zeros_like(image)
    height, width = image.shape[-2:]
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[..., y, x] = image[..., y - down, x - right]
    return moved


@pytest.mark.parametrize("flip", ["true", "false"])
def test_the_answer_is_the_mean_over_mirrored_and_moved_images(resources: Resources, images: Images, flip: str) -> None:
    places = [(0, 0), (-2, 0), (2, 0), (0, -2), (0, 2)]
    sources = [images, images.flip(3)] if flip == "true" else [images]
    with torch.no_grad():
        slow = torch.stack(
            [resources.classifier(by_hand(source, *place)).softmax(1) for source in sources for place in places]
        ).mean(0)
    defence = build_defence(f"tta:shift=2,flip={flip}", resources)
    fast = defence.predict(images, generator=torch.Generator(), budget=Budget()).scores
    assert torch.allclose(fast, slow, atol=1e-5)


def test_attackers_get_the_very_same_mean(resources: Resources, images: Images) -> None:
    defence = build_defence("tta", resources)
    answer = defence.predict(images, generator=torch.Generator(), budget=Budget()).scores
    point = images.clone().requires_grad_()
    shown = defence.surrogate(point, generator=torch.Generator(), budget=Budget())
    assert torch.allclose(shown.exp().float(), answer, atol=1e-5)
    (gradient,) = torch.autograd.grad(shown[:, 0].sum(), point)
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


def test_an_edge_is_continued_where_that_is_asked_for(resources: Resources, images: Images) -> None:
    views = Views(resources=resources, config=TTAConfig(padding="edge"))
    seen: list[Images] = []

    class Looking(BaseNetwork):
        def logits(self, images: Images) -> torch.Tensor:
            seen.append(images)
            return super().logits(images)

    views.begin(images, Looking(classifier=resources.classifier))(Draws(rows=(1, 2, 3), passes=range(5)))
    down = seen[0].unflatten(0, (3, 5))[:, 2]  # [3, 1, 8, 8]: moved down by one
    assert torch.equal(down[:, :, 0], images[:, :, 0])
    assert torch.equal(down[:, :, 1:], images[:, :, :-1])


def test_a_grey_image_is_not_mirrored_unless_asked(resources: Resources) -> None:
    assert len(Views(resources=resources, config=TTAConfig()).views) == 5
    assert len(Views(resources=resources, config=TTAConfig(flip="true")).views) == 10
    assert Views(resources=resources, config=TTAConfig(shift=0)).views == ((0, 0, False),)


@pytest.mark.parametrize(
    "text", ["tta:shift=-1", "tta:shift=65", "tta:shift=8", "tta:flip=maybe", "tta+rmc", "tta:passes=3"]
)
def test_nonsense_is_refused_in_one_line(resources: Resources, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        build_defence(text, resources)
    assert "allowed" in str(caught.value) or "known" in str(caught.value) or "did you mean" in str(caught.value)
