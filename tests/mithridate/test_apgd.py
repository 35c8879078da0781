"""APGD: the published procedure on what can be sent, as strong as its authors' own code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from mithridate.attacks import APGD, Forward, Trace
from mithridate.attacks.balls import Norm
from mithridate.attacks.losses import dlr, targeted_dlr
from mithridate.attacks.white_box.apgd import APGDLoss, checkpoints
from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources
from mithridate.types import Epsilon, to_images, to_pixels
from tests.mithridate.attack_helpers import answers, linear, random_pixels, run


def attack_of(
    loss: APGDLoss, *, levels: int = 24, steps: int = 20, norm: Norm = "linf", restarts: int = 1, targets: int = 9
) -> APGD:
    return APGD(epsilon=Epsilon(levels), steps=steps, loss=loss, norm=norm, restarts=restarts, targets=targets)


def bumpy(seed: int) -> Forward:
    """Rises and falls within the ball, so that steps have to be halved; float64 inside, so that signs are sure."""
    _, weight, bias = linear(seed)
    return lambda images: (3 * (images.double().flatten(1) @ weight.double().T + bias.double())).sin()


def recorded(forward: Forward, seen: list[torch.Tensor]) -> Forward:
    def call(images: torch.Tensor) -> torch.Tensor:
        seen.append(to_pixels(images.detach()))
        return forward(images)

    return call


def looked_at(forward: Forward, point: torch.Tensor, label: int) -> tuple[float, torch.Tensor]:
    """Cross-entropy and its gradient at ``point`` ``[C, H, W]``, rounded to what can be sent."""
    sent = ((point * 255).round() / 255)[None].requires_grad_()
    loss = torch.nn.functional.cross_entropy(forward(sent), torch.tensor([label]))
    return float(loss.detach()), torch.autograd.grad(loss, sent)[0][0]


def published(
    forward: Forward, image: torch.Tensor, label: int, start: torch.Tensor, epsilon: float, steps: int
) -> tuple[list[torch.Tensor], int]:
    """Algorithm 1 of the paper on one image, line by line: the points the network is shown, and how often the step
    was halved."""
    clean = image / 255  # float32, as it is ours: there are ties, of halves of a level

    def project(point: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(point, clean - epsilon), clean + epsilon).clamp(0, 1)

    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    turns = [int(np.ceil(share * steps - 1e-9)) for share in shares]
    size, halved, rises, passed = 2 * epsilon, 0, 0, 0
    point = before = project(start)
    shown = [point]
    loss, slope = looked_at(forward, point, label)
    top = (loss, point, slope)
    at_turn: tuple[float, float] | None = None  # step size and best loss
    for step in range(1, steps + 1):
        ahead = project(point + size * slope.sign())
        if step > 1:
            ahead = project(point + 0.75 * (ahead - point) + 0.25 * (point - before))
        before, point, last = point, ahead, loss
        shown.append(point)
        loss, slope = looked_at(forward, point, label)
        top = max(top, (loss, point, slope), key=lambda seen: seen[0])
        rises, passed = rises + (loss > last), passed + 1
        if step in turns:
            now = (size, top[0])
            if rises < 0.75 * passed or now == at_turn:
                size, halved = size / 2, halved + 1
                loss, point, slope = top
            at_turn, rises, passed = now, 0, 0
    return shown, halved


@pytest.mark.parametrize("steps", [10, 40])
def test_is_the_published_algorithm(steps: int) -> None:
    """Every point the network is shown, to the level."""
    forward, pixels, labels = bumpy(3), random_pixels(4, 8), torch.arange(8) % 4
    seen: list[torch.Tensor] = []
    run(attack_of("ce", levels=40, steps=steps), recorded(forward, seen), pixels, labels, seed=5)
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(5))
    start = to_images(pixels) + (2 * noise - 1) * (40 / 255)
    halvings = 0
    for row, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        shown, halved = published(forward, image, label, start[row], 40 / 255, steps)
        halvings += halved
        assert len(seen) == len(shown) == steps + 1
        for point, wanted in zip(seen, shown, strict=True):
            assert torch.equal(point[row], to_pixels(wanted))
    assert halvings > 8  # of them on an average image more than one, or this has shown little


def test_a_climb_that_never_gets_back_to_its_best_takes_smaller_steps() -> None:
    """Condition 2: almost every step rises, but from a fall after the start."""
    _, weight, _ = linear(1)

    def scripted() -> Forward:
        calls = iter([5.0, *(0.1 * step for step in range(40))])

        def forward(images: torch.Tensor) -> torch.Tensor:
            lead = 1e-4 * (images.double().flatten(1) @ weight[0].double()).cos() + next(calls)
            return torch.stack([torch.zeros_like(lead), lead], 1)

        return forward

    image, label, seen = random_pixels(0, 1), torch.tensor([0]), []
    run(attack_of("ce", levels=40, steps=40), recorded(scripted(), seen), image, label, seed=5)
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(5))
    start = to_images(image) + (2 * noise - 1) * (40 / 255)
    shown, halved = published(scripted(), image[0], 0, start[0], 40 / 255, 40)
    assert halved >= 4
    for point, wanted in zip(seen, shown, strict=True):
        assert torch.equal(point[0], to_pixels(wanted))


def test_looks_at_the_step_size_when_the_paper_does() -> None:
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 5, 33, 1000):
        turns = checkpoints(steps)
        assert np.cumsum(list(turns.values())).tolist() == list(turns)
        assert max(turns, default=0) < steps or not turns


@settings(max_examples=25, deadline=None)
@given(
    loss=st.sampled_from(["ce", "margin", "dlr", "t"]),
    norm=st.sampled_from(["linf", "l2"]),
    levels=st.integers(0, 200),
    seed=st.integers(0, 2**32),
)
def test_only_ever_shows_and_returns_what_can_be_sent(loss: APGDLoss, norm: Norm, levels: int, seed: int) -> None:
    forward, pixels, labels = bumpy(seed), random_pixels(seed, 4), torch.arange(4)
    attack, seen = attack_of(loss, levels=levels, steps=9, norm=norm), []
    found = run(attack, recorded(forward, seen), pixels, labels, seed)
    for number, point in enumerate([found, *seen]):
        change = point.long() - pixels.long() if len(point) == 4 else None
        if change is None:  # those that are left after the first target: somewhere in the ball of some image
            assert number > 0
        elif norm == "linf":
            assert change.abs().max() <= levels
        else:
            assert (change.square().flatten(1).sum(1) <= levels**2).all()
    with torch.no_grad():
        shown = [point for point in seen if len(point) == 4]
        best = torch.stack([forward(to_images(point)).argmax(1) != labels for point in shown]).any(0)
    assert ((answers(forward, found) != labels) >= best).all()  # a misread point that was seen is not lost


@pytest.mark.parametrize("loss", ["ce", "t"])
def test_the_seed_decides_and_nothing_else(loss: APGDLoss) -> None:
    forward, pixels, labels = bumpy(1), random_pixels(1, 6), torch.arange(6) % 4
    attack, before = attack_of(loss, steps=8, restarts=2), pixels.clone()
    first = run(attack, forward, pixels, labels, seed=1)
    state = torch.random.get_rng_state()
    assert torch.equal(run(attack, forward, pixels, labels, seed=1), first)
    assert not torch.equal(run(attack, forward, pixels, labels, seed=2), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(pixels, before)


def test_leaving_early_changes_no_outcome() -> None:
    (forward, _, _), pixels = linear(2), random_pixels(2, 24)
    labels = answers(forward, pixels)
    whole = attack_of("dlr", levels=6, steps=25)
    early = APGD(epsilon=whole.epsilon, steps=25, loss="dlr", early_stop=True)
    asked: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    wrong = {
        attack.early_stop: answers(forward, run(attack, recorded(forward, asked[attack.early_stop]), pixels, labels))
        != labels
        for attack in (whole, early)
    }
    assert torch.equal(wrong[False], wrong[True])
    assert 0 < wrong[True].sum() < 24
    assert sum(map(len, asked[True])) < sum(map(len, asked[False]))


def test_a_trace_tells_the_loss_at_every_point_of_every_run() -> None:
    forward, pixels, labels = bumpy(2), random_pixels(2, 6), torch.arange(6) % 4
    trace, seen = Trace(), []
    attack_of("dlr", steps=7).run(
        recorded(forward, seen), pixels, labels, generator=torch.Generator().manual_seed(0), trace=trace
    )
    assert trace.losses.shape == (1, 8, 6)
    for losses, point in zip(trace.losses[0], seen, strict=True):
        assert torch.allclose(losses, dlr(forward(to_images(point)), labels))
    targets = Trace()
    attack_of("t", levels=3, steps=7).run(
        forward, pixels, labels, generator=torch.Generator().manual_seed(0), trace=targets
    )
    assert targets.losses.shape == (3, 8, 6)  # four classes: three targets
    assert targets.zeros.shape == (3, 7, 6)


def test_targets_are_gone_for_from_the_likeliest_on() -> None:
    forward, pixels, labels = bumpy(5), random_pixels(5, 5), torch.arange(5) % 4
    trace = Trace()
    attack_of("t", levels=0, steps=1).run(forward, pixels, labels, generator=torch.Generator(), trace=trace)
    logits = forward(to_images(pixels))
    held = logits.argmax(1) == labels
    order = logits.scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)
    for place in range(3):
        wanted = targeted_dlr(logits, labels, order[:, place])
        assert torch.allclose(trace.losses[place, 0, held], wanted[held])


@pytest.mark.parametrize(("norm", "levels"), [("linf", 16), ("l2", 100)])
@pytest.mark.parametrize("loss", ["ce", "dlr", "t"])
def test_is_as_strong_as_the_code_of_its_authors(
    loss: APGDLoss, norm: Norm, levels: int, resources: Resources, digits_test: LabelledImages
) -> None:
    """Which attacks real numbers; ours are on the lattice, and no weaker."""
    count, steps, targets = (40, 15, 3) if loss == "t" else (100, 20, 9)
    pixels, labels = torch.from_numpy(digits_test.images[:count]), torch.from_numpy(digits_test.labels[:count])
    attack = attack_of(loss, levels=levels, steps=steps, norm=norm, targets=targets)
    forward = resources.classifier
    ours = int((answers(forward, run(attack, forward, pixels, labels)) == labels).sum())
    setting = {"n_iter": steps, "eps": levels / 255, "norm": {"linf": "Linf", "l2": "L2"}[norm], "device": "cpu"}
    theirs = (
        APGDAttack_targeted(forward, n_target_classes=targets, **setting)
        if loss == "t"
        else APGDAttack(forward, loss=loss, **setting)
    )
    with torch.no_grad():
        held = int((forward(theirs.perturb(to_images(pixels), labels)).argmax(1) == labels).sum())
    assert 0.1 * count < held < 0.9 * count  # neither too easy nor too hard to tell attacks apart
    assert held - 4 <= ours <= held + 2, (ours, held)
