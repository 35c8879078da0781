"""PGD beyond the published settings: restarts, losses, norms, and what its trace tells."""

from __future__ import annotations

import pytest
import torch

from mithridate.attacks import APGD, PGD, Trace, parse_attack
from mithridate.attacks.balls import Norm
from mithridate.attacks.losses import LOSSES, LossName
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources
from mithridate.errors import OptionError
from mithridate.types import Epsilon, to_images, to_pixels
from tests.mithridate.attack_helpers import answers, linear, noisy, random_pixels, run


def pgd(loss: LossName = "ce", *, levels: int = 16, steps: int = 6, restarts: int = 1, **more: object) -> PGD:
    size = 2.5 * levels / 255 / steps
    return PGD(epsilon=Epsilon(levels), steps=steps, step_size=size, loss=loss, restarts=restarts, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_a_temperature_hides_nothing_from_margins(loss: LossName) -> None:
    """Logits times 1,000: cross-entropy has no gradient left, and the trace says so."""
    plain, _, _ = linear(0)
    pixels = random_pixels(0, 24)
    labels = answers(plain, pixels)

    def hot(images: torch.Tensor) -> torch.Tensor:
        return 1000 * plain(images)

    trace, generator = Trace(), torch.Generator().manual_seed(0)
    found = pgd(loss, levels=40, random_start=False).run(hot, pixels, labels, generator=generator, trace=trace)
    wrong = (answers(plain, found) != labels).float().mean()
    if loss == "ce":
        assert (trace.zeros[0, 0] == 1).float().mean() > 0.9
        assert wrong < 0.1
    else:
        assert (trace.zeros[0, 0] == 0).all()
        assert wrong > 0.9


def test_the_trace_is_of_the_points_that_were_shown() -> None:
    forward, _, _ = linear(1)
    pixels, seen, trace = random_pixels(1, 9), [], Trace()
    labels = answers(forward, pixels)

    def recorded(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.detach().clone())
        return forward(images)

    attack = pgd("margin", levels=6, steps=4, restarts=3)
    found = attack.run(recorded, pixels, labels, generator=torch.Generator().manual_seed(0), trace=trace)
    assert trace.losses.shape == (3, 5, 9)
    assert trace.zeros.shape == trace.nans.shape == (3, 4, 9)
    left = torch.ones(9, dtype=torch.bool)
    for number, run_losses in enumerate(trace.losses):
        shown = seen[5 * number : 5 * number + 5]
        for losses, images in zip(run_losses, shown, strict=True):
            assert torch.allclose(losses[left], LOSSES["margin"](forward(images), labels[left]))
            assert losses[~left].isnan().all()
        left &= ~(run_losses > 0).any(0)
    assert 0 < left.sum() < 9
    assert torch.equal(answers(forward, found) != labels, ~left)
    with torch.no_grad():
        value = LOSSES["margin"](forward(to_images(found)), labels)
    assert torch.allclose(value, trace.losses.nan_to_num(-torch.inf).amax((0, 1)))  # the best of all restarts


def test_a_restart_begins_where_its_seed_says_whoever_has_left() -> None:
    """The starts of image 5 are the same whether image 0 was misread before or not."""
    forward, _, _ = linear(1)
    pixels = random_pixels(1, 9)
    truth = answers(forward, pixels)
    starts = []
    for labels in (truth, torch.where(torch.arange(9) < 5, (truth + 1) % 4, truth)):
        seen: list[torch.Tensor] = []

        def recorded(images: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(to_pixels(images.detach()))
            return forward(images)

        run(pgd(levels=1, steps=2, restarts=3), recorded, pixels, labels)
        starts.append([seen[3 * number][-1] for number in range(3)])
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))


def test_more_restarts_never_find_less(resources: Resources, digits_test: LabelledImages) -> None:
    pixels, labels = torch.from_numpy(digits_test.images[:60]), torch.from_numpy(digits_test.labels[:60])
    fallen = [
        answers(
            resources.classifier, run(pgd(levels=20, steps=3, restarts=count), resources.classifier, pixels, labels)
        )
        != labels
        for count in (1, 4)
    ]
    assert (fallen[1] >= fallen[0]).all()
    assert fallen[1].sum() > fallen[0].sum()


@pytest.mark.parametrize(
    "attack", [pgd(levels=120, steps=12, norm="l2"), APGD(epsilon=Epsilon(120), steps=8, norm="l2")], ids=repr
)
def test_an_l2_attack_finds_the_shortest_way_of_a_linear_network(attack: PGD | APGD) -> None:
    """The margin of a linear network of two classes falls by the length of its gradient times that of the change."""
    generator = torch.Generator().manual_seed(0)
    weight, pixels = torch.randn(48, generator=generator), random_pixels(0, 8)

    def forward(images: torch.Tensor) -> torch.Tensor:
        score = images.flatten(1) @ weight
        return torch.stack([score, torch.zeros_like(score)], 1)

    found = run(attack, forward, pixels, torch.zeros(8, dtype=torch.int64))
    change = (found.long() - pixels.long()).flatten(1)
    assert (change.square().sum(1) <= 120**2).all()
    fallen = -(change.float() / 255) @ weight
    assert (fallen > 0.97 * weight.norm() * 120 / 255).all()


@pytest.mark.parametrize(("norm", "levels"), [("linf", 8), ("l2", 60)])
def test_a_gradient_of_nan_is_a_gap_and_no_end(norm: Norm, levels: int) -> None:
    """The gradient alone, of one colour: the others still show the way."""
    plain, _, _ = linear(0)
    pixels, trace, shown = random_pixels(0, 4), Trace(), []

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, images: torch.Tensor) -> torch.Tensor:
            return images.clone()

        @staticmethod
        def backward(ctx: object, upstream: torch.Tensor) -> torch.Tensor:
            poisoned = upstream.clone()
            poisoned[:, 0] = torch.nan
            return poisoned

    def poisoned(images: torch.Tensor) -> torch.Tensor:
        shown.append(to_pixels(images.detach()))
        return plain(Poison.apply(images))

    labels, generator = answers(plain, pixels), torch.Generator().manual_seed(0)
    attack = pgd(levels=levels, norm=norm, random_start=False)
    found = attack.run(poisoned, pixels, labels, generator=generator, trace=trace)
    for point in (found, *shown):
        assert (point.int() - pixels.int()).abs().max() <= levels
    assert torch.allclose(trace.nans, torch.tensor(1 / 3, dtype=torch.float64))
    assert torch.equal(found[:, 0], pixels[:, 0])
    assert ((found[:, 1:] != pixels[:, 1:]).flatten(1).sum(1) > 16).all()


def test_a_network_without_a_gradient_is_no_error() -> None:
    plain, _, _ = linear(0)
    pixels, trace = random_pixels(0, 4), Trace()
    found = pgd(levels=8, random_start=False).run(
        lambda images: plain(images).detach(),
        pixels,
        answers(plain, pixels),
        generator=torch.Generator(),
        trace=trace,
    )
    assert torch.equal(found, pixels)
    assert (trace.zeros == 1).all()


@pytest.mark.parametrize("kind", [PGD, APGD])
def test_luck_is_not_counted_as_a_misread_point(kind: type) -> None:
    """A network that answers at random is misread somewhere; ``checks`` asks again before it is believed."""
    forward, _, _ = linear(0)
    pixels = random_pixels(0, 40)
    labels = answers(forward, pixels)
    more = {"step_size": 1 / 255} if kind is PGD else {}
    left = []
    for checks in (1, 12):
        trace = Trace()
        attack = kind(epsilon=Epsilon(1), steps=8, early_stop=True, checks=checks, **more)
        attack.run(noisy(forward, 1, 1.5), pixels, labels, generator=torch.Generator().manual_seed(0), trace=trace)
        left.append(int(trace.losses[0, -1].isfinite().sum()))
    assert left[1] > left[0] + 5


@pytest.mark.parametrize(
    "name",
    [
        "fgsm",
        "fgsm-margin",
        "fgsm-l2",
        "pgd7",
        "pgd20x5",
        "pgd20-dlr",
        "pgd20x5-margin-l2",
        "apgd-ce100",
        "apgd-t9x2-l2",
    ],
)
def test_a_name_is_read_as_it_is_written(name: str) -> None:
    attack = parse_attack(name, epsilon=Epsilon(8))
    assert attack.name == name
    assert attack.epsilon == Epsilon(8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apgd-ce", APGD(epsilon=Epsilon(8), steps=100, loss="ce")),
        ("apgd-dlr50x3", APGD(epsilon=Epsilon(8), steps=50, loss="dlr", restarts=3)),
        ("apgd-t-l2", APGD(epsilon=Epsilon(8), steps=100, loss="t", norm="l2")),
        ("pgd50x2-dlr", PGD(epsilon=Epsilon(8), steps=50, step_size=2.5 * (8 / 255) / 50, restarts=2, loss="dlr")),
        (
            "pgd10-l2",
            PGD(epsilon=Epsilon(8), steps=10, step_size=2.5 * (8 / 255) / 10, norm="l2"),
        ),  # not RMC's, which is of L-inf
    ],
)
def test_names_stand_for_settings(name: str, expected: PGD | APGD) -> None:
    assert repr(parse_attack(name, epsilon=Epsilon(8))) == repr(expected)


@pytest.mark.parametrize(
    "name",
    [
        "apgd",
        "apgd-ce0",
        "apgd-ce10001",
        "apgd-cex3",
        "apgd-fab",
        "apgd-t-dlr",
        "fgsmx2",
        "pgd20x0",
        "pgd20-ce",
        "pgd20-l2-dlr",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"unknown attack '.*'; allowed: fgsm, or pgdN.*apgd-t50x2.*-l2"):
        parse_attack(name, epsilon=Epsilon(8))
