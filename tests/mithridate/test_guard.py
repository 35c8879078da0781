"""What a guard lets through, by hand; and that an attacker is given a way through it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import pytest
import torch

from mithridate.attacks import parse_attack
from mithridate.datasets import LabelledImages
from mithridate.defenses import Adaptation, Budget, Prediction, Resources, build_defence, describe_defence
from mithridate.defenses.adapting import Adapted, Query
from mithridate.defenses.guard import GuardConfig, Guarded, guard, guarded_logits, neighbor_votes, suited
from mithridate.defenses.none import BasePass
from mithridate.defenses.rmc import RMC
from mithridate.defenses.selection import Selection
from mithridate.errors import OptionError
from mithridate.types import Epsilon, to_images

ADAPTED = Adaptation(steps=1, stop_reason="converged")
FELL_BACK = Adaptation(steps=1, stop_reason="converged", weights="base")

# By hand: three classes, one image a row.
BASE = torch.tensor([[2.0, 0, 0], [2, 0, 0], [2, 0, 0], [0, 0, 3]])
LOGITS = torch.tensor([[0.0, 2, 0], [0, 2, 0], [3, 0, 0], [0, 4, 0]], dtype=torch.float64)
VOTES = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.4, 0], [1, 0, 0], [0, 0.9, 0.1]], dtype=torch.float64)
FATES = (ADAPTED, ADAPTED, ADAPTED, FELL_BACK)


def asked(base: torch.Tensor = BASE) -> Query:
    rows = len(base)
    nothing = torch.zeros(rows, 2)
    return Query(
        images=torch.zeros(rows, 1, 8, 8),
        base=BasePass(logits=base, embedding=nothing, head_input=nothing),
        selection=Selection(ids=nothing.long(), distances=nothing, weights=nothing),
        budgets=(Budget(),) * rows,
        seeds=(0,) * rows,
    )


def said(logits: torch.Tensor = LOGITS, fates: Sequence[Adaptation] = FATES) -> Adapted:
    return Adapted(logits=logits, adaptations=tuple(fates))


def let_through(**options: float) -> Guarded:
    return guard(asked(), said(), VOTES, GuardConfig(**options))


def test_votes_are_the_weighted_shares_of_the_classes() -> None:
    labels = torch.tensor([[0, 2, 2, 1], [1, 1, 1, 1]])
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    wanted = torch.tensor([[0.4, 0.1, 0.5], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(neighbor_votes(labels, weights, 3), wanted)


def test_without_a_guard_only_the_adapter_decides() -> None:
    guarded, base = let_through(), BASE.softmax(1).double()
    torch.testing.assert_close(guarded.scores[:3], LOGITS[:3].softmax(1))
    assert torch.equal(guarded.scores[3], base[3])
    assert guarded.adaptations == FATES
    assert guarded.abstained is None


@pytest.mark.parametrize("mix", [0.25, 1.0])
def test_mix_is_the_base_models_share_of_the_scores(mix: float) -> None:
    guarded = let_through(mix=mix)
    wanted = (1 - mix) * LOGITS.softmax(1) + mix * BASE.double().softmax(1)
    torch.testing.assert_close(guarded.scores[:3], wanted[:3])
    assert torch.equal(guarded.scores[3], BASE.softmax(1).double()[3])  # its logits do not count, mixed or not


def test_the_gate_stops_an_answer_that_the_neighbours_do_not_back_against_the_base() -> None:
    guarded, base = let_through(gate=0.3), BASE.softmax(1).double()
    torch.testing.assert_close(guarded.scores[0], LOGITS[0].softmax(0))  # 0.7 of its neighbours against 0.3
    assert torch.equal(guarded.scores[1], base[1])  # 0.4 against 0.6
    torch.testing.assert_close(guarded.scores[2], LOGITS[2].softmax(0))
    assert [a.weights for a in guarded.adaptations] == ["adapted", "base", "adapted", "base"]
    assert [a.steps for a in guarded.adaptations] == [1, 1, 1, 1]
    lead = float(VOTES[0, 1] - VOTES[0, 0])
    at_it, above = let_through(gate=lead).adaptations, let_through(gate=lead + 1e-9).adaptations
    assert [a.weights for a in at_it] == ["adapted", "base", "adapted", "base"]  # at least, not more than
    assert [a.weights for a in above] == ["base", "base", "adapted", "base"]


def test_the_gate_lets_through_what_the_base_model_says_too() -> None:
    """However few neighbours say it: nothing could be better."""
    votes = torch.tensor([[0.0, 0.0, 1.0]] * 4, dtype=torch.float64)
    fates = guard(asked(), said(), votes, GuardConfig(gate=1)).adaptations
    assert [a.weights for a in fates] == ["base", "base", "adapted", "base"]


def test_a_gate_that_was_not_settled_is_no_number() -> None:
    with pytest.raises(ValueError, match="gate=auto stands for a number that the exemplars give"):
        guard(asked(), said(), VOTES, GuardConfig(gate="auto"))


def withstanding(resources: Resources, shares: dict[str, float]) -> Resources:
    """With a copy a name, of which the base model gets that share right."""
    exemplars, sources = copy(resources.exemplars), resources.exemplars.clean_count
    labels = exemplars.labels[:sources]
    exemplars.layout = replace(exemplars.layout, copies=tuple(shares))
    exemplars.labels = labels.repeat(len(shares))
    wrong = [torch.arange(sources) >= share * sources for share in shares.values()]
    exemplars.predictions = ((exemplars.labels + torch.cat(wrong)) % 10).int()
    return replace(resources, exemplars=exemplars)


@pytest.mark.parametrize(
    ("shares", "gate"),
    [
        ({"clean": 1.0, "pgd10": 0.0}, 0.05),
        ({"clean": 1.0, "pgd10": 0.09}, 0.05),
        ({"clean": 0.0, "pgd10": 0.11}, 0.3),
        ({"clean": 1.0, "pgd10": 1.0}, 0.3),
        ({"clean": 1.0, "fgsm": 0.9, "pgd10": 0.0}, 0.05),  # the strongest attack counts
        ({"clean": 1.0, "pgd10": 0.5, "pgd10-at-rmc": 0.0}, 0.3),  # made on another model
        ({"clean": 0.0, "pgd10-at-rmc": 0.0}, 0.3),
        ({"clean": 0.0}, 0.3),  # nothing says that it falls
    ],
)
def test_an_automatic_gate_is_large_where_the_base_has_something_to_lose(
    resources: Resources, shares: dict[str, float], gate: float
) -> None:
    base = withstanding(resources, shares)
    assert suited(GuardConfig(gate="auto"), base.exemplars) == GuardConfig(gate=gate)
    assert suited(GuardConfig(gate=0.7), base.exemplars).gate == 0.7
    if set(shares) == {"clean", "pgd10"}:
        defence = build_defence("rmc", base)
        assert isinstance(defence, RMC)
        assert defence.name == "rmc"
        assert defence.guarding == GuardConfig(gate=gate)
        assert describe_defence(defence).endswith(f", gate {gate}")


@pytest.mark.parametrize("options", [{}, {"gate": 0.5}, {"mix": 0.5}, {"gate": 0.65, "mix": 0.1}])
@pytest.mark.parametrize("abstain", [1e-6, 0.2, 0.65, 1.0])
def test_it_abstains_where_one_of_three_grants_the_answer_too_little(options: dict[str, float], abstain: float) -> None:
    guarded = let_through(abstain=abstain, **options)
    without = let_through(**options)
    assert torch.equal(guarded.scores, without.scores)  # the answer is there all the same
    for row, scores in enumerate(without.scores.tolist()):
        answer = max(range(3), key=lambda c: scores[c])
        agreement = min(float(BASE[row].softmax(0)[answer]), float(VOTES[row, answer]), scores[answer])
        assert guarded.agreement[row].item() == pytest.approx(agreement)
        assert guarded.abstained is not None
        assert bool(guarded.abstained[row]) == (agreement < abstain)


@pytest.mark.parametrize("options", [{"mix": 1.1}, {"gate": -0.1}, {"abstain": float("nan")}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=rf"rmc: {next(iter(options))}=.* is out of range; allowed: 0 to 1"):
        GuardConfig(**options)


@pytest.mark.parametrize("options", [{}, {"gate": 0.5}, {"mix": 0.3}, {"mix": 0.3, "gate": 0.8}, {"abstain": 0.5}])
def test_the_attackers_logits_are_the_answer_forward_and_both_models_backward(options: dict[str, float]) -> None:
    base, logits, config = BASE.clone().requires_grad_(), LOGITS.clone().requires_grad_(), GuardConfig(**options)
    answer = guard(asked(), said(), VOTES, config)
    seen = guarded_logits(asked(base), said(logits), VOTES, config)
    torch.testing.assert_close(seen.softmax(1), answer.scores, rtol=0, atol=1e-7)
    to_base, to_adapted = torch.autograd.grad(seen[:, 0].sum(), (base, logits))
    assert to_adapted.any(1).all()
    switches = [bool(config.gate or config.mix) or a.weights == "base" for a in answer.adaptations]
    assert to_base.any(1).tolist() == switches


def test_a_rows_gradient_does_not_depend_on_who_falls_back_beside_it() -> None:
    gradients = []
    for fates in (FATES, (ADAPTED,) * 3 + (FELL_BACK,), (FELL_BACK, ADAPTED, ADAPTED, ADAPTED), (ADAPTED,) * 4):
        logits = LOGITS.clone().requires_grad_()
        seen = guarded_logits(asked(), said(logits, fates), VOTES, GuardConfig())
        gradients.append(torch.autograd.grad(seen[1, 0], logits)[0][1])
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# On digits

SETTINGS = [
    "",
    "mix=0.3",
    "mix=1",
    "gate=0.3",
    "gate=1",
    "abstain=0.5",
    "mix=0.2,gate=0.5,abstain=0.3",
    "radius=3,gate=0.5",
    "held_out=0,gate=0.5",
    "temperature=0,gate=0.5",
    "solver=adam,steps=10",
    "solver=adam,steps=10,mix=0.5,gate=0.3",
]


@pytest.fixture(scope="module")
def images(resources: Resources, digits_test: LabelledImages) -> torch.Tensor:
    """24 digits, every second one attacked."""
    pixels, labels = torch.from_numpy(digits_test.images[:24]), torch.from_numpy(digits_test.labels[:24])
    attack = parse_attack("pgd10", epsilon=Epsilon(32))
    found = attack.run(resources.classifier, pixels, labels, generator=torch.Generator().manual_seed(0))
    return to_images(torch.where((torch.arange(24) % 2 == 0)[:, None, None, None], pixels, found))


def build(options: str, resources: Resources) -> RMC:
    defence = build_defence(f"rmc:{options}" if options else "rmc", resources)
    assert isinstance(defence, RMC)
    return defence


def predict(defence: RMC, images: torch.Tensor) -> Prediction:
    return defence.predict(images, generator=torch.Generator().manual_seed(3), budget=Budget())


@pytest.mark.parametrize("options", SETTINGS)
def test_the_surrogate_shows_what_is_served_and_can_be_climbed(
    resources: Resources, images: torch.Tensor, options: str
) -> None:
    defence, point = build(options, resources), images.clone().requires_grad_()
    answer = predict(defence, images)
    logits = defence.surrogate(point, generator=torch.Generator().manual_seed(3), budget=Budget())
    assert torch.equal(logits.argmax(1), answer.scores.argmax(1))
    torch.testing.assert_close(logits.softmax(1).float(), answer.scores, rtol=0, atol=1e-5)
    losses = torch.nn.functional.cross_entropy(logits, answer.scores.argmax(1), reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), point)
    assert torch.isfinite(gradient).all()
    assert gradient.flatten(1).any(1).all()


@pytest.mark.parametrize("solver", ["ridge", "adam"])
def test_mixed_with_the_base_alone_the_answer_is_the_bases(
    resources: Resources, images: torch.Tensor, solver: str
) -> None:
    answer = predict(build(f"solver={solver},held_out=0,mix=1", resources), images)
    assert torch.equal(answer.scores.argmax(1), answer.base_scores.argmax(1))
    torch.testing.assert_close(answer.scores, answer.base_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gate", [1e-6, 0.3, 0.6])
@pytest.mark.parametrize("temperature", [0, 0.5])
def test_a_gated_answer_is_the_free_one_or_the_bases(
    resources: Resources, images: torch.Tensor, gate: float, temperature: float
) -> None:
    """The votes recounted from what the answer itself says of its neighbours."""
    options = f"held_out=0,neighbors=40,temperature={temperature}"
    free, gated = (predict(build(f"{options},gate={g}", resources), images) for g in (0, gate))
    stopped = []
    for row, neighborhood in enumerate(free.neighborhoods):
        assert neighborhood is not None
        squares = neighborhood.distances
        weights = (-squares / (temperature * squares.mean())).softmax(0) if temperature else torch.full((40,), 1 / 40)
        labels = resources.exemplars.labels[neighborhood.ids]
        answer, usual = free.scores[row].argmax(), free.base_scores[row].argmax()
        lead = float(weights[labels == answer].sum() - weights[labels == usual].sum())
        fate = gated.adaptations[row]
        assert fate is not None
        assert fate.weights == ("base" if answer != usual and lead < gate - 1e-9 else "adapted")
        stopped.append(fate.weights == "base")
        assert torch.equal(gated.scores[row], gated.base_scores[row] if stopped[-1] else free.scores[row])
    assert 0 < sum(stopped) < len(images)


def test_abstentions_are_where_the_agreement_is_below_the_threshold(resources: Resources, images: torch.Tensor) -> None:
    agreement = build("", resources).agreement(images)
    threshold = float(agreement.median())
    answer = predict(build(f"abstain={threshold}", resources), images)
    assert answer.abstained is not None
    assert torch.equal(answer.abstained, agreement < threshold)
    assert 0 < int(answer.abstained.sum()) < len(images)
    assert answer.rows(2, 9).abstained is not None
    assert torch.equal(answer.rows(2, 9).abstained, answer.abstained[2:9])  # type: ignore[arg-type]
    assert predict(build("", resources), images).abstained is None
