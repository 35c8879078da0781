"""Stages joined by +: each does to the next what it does alone, and nobody's randomness is anybody else's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_prm import fresh
from torch.nn import functional as F

from index_builder.build import BuildPlan, build_bundle
from index_builder.training import TrainingPlan
from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import (
    Budget,
    Prediction,
    Request,
    Resources,
    build_defence,
    defence_name,
    describe_defence,
    parse_defence,
)
from mithridate.defenses.none import base_pass
from mithridate.defenses.pruning import prune
from mithridate.defenses.randomness import pass_generators, row_seeds
from mithridate.defenses.rmc import RMC
from mithridate.defenses.rmc_tail import TailAdapter
from mithridate.errors import BudgetExceededError, OptionError
from mithridate.types import Epsilon, Images, to_images

HEADS = ["rmc:gate=0", "rmc:solver=adam,steps=10,gate=0,neighbors=40"]
DEEP = [
    "rmc:scope=tail,epochs=2,neighbors=24,gate=0,learning_rate=0.003",
    "rmc:scope=all,epochs=1,neighbors=24,gate=0,learning_rate=0.001",
]
WHOLE = "+sap:fraction=1000.0,passes=2"
"""So many draws that nothing is dropped."""


@pytest.fixture(scope="module")
def composed(
    tmp_path_factory: pytest.TempPathFactory, resources: Resources, digits_bundle: object, digits_train: LabelledImages
) -> Resources:
    """With a tail and a PRM."""
    out = tmp_path_factory.mktemp("composed") / "digits"
    data = replace(digits_train, images=digits_train.images[:400], labels=digits_train.labels[:400])
    model = digits_bundle / "model.safetensors"  # type: ignore[operator]
    build_bundle(BuildPlan(data=data, out=out, model=model, tail_layer="auto", attacks=("pgd10",), epsilon=Epsilon(32)))
    return replace(Resources.load(Bundle.open(out)), prms=(fresh("v0"), fresh("v1", seed=1)))


@pytest.fixture(scope="module")
def images(composed: Resources, digits_test: LabelledImages) -> Images:
    """Five digits, attacked, so that adaptation changes most of their answers."""
    pixels, labels = torch.from_numpy(digits_test.images[:5]), torch.from_numpy(digits_test.labels[:5])
    attack = parse_attack("pgd10", epsilon=Epsilon(32))
    return to_images(attack.run(composed.classifier, pixels, labels, generator=torch.Generator().manual_seed(0)))


def ask(text: str, resources: Resources, images: Images, seed: int = 3) -> Prediction:
    generator = torch.Generator().manual_seed(seed)
    return build_defence(text, resources).predict(images, generator=generator, budget=Budget())


def close(found: torch.Tensor, wanted: torch.Tensor, within: float = 1e-4) -> None:
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=within)


# Each stage is what it is alone


@pytest.mark.parametrize("text", [*HEADS, *DEEP])
def test_the_adapted_weights_are_what_is_averaged(composed: Resources, images: Images, text: str) -> None:
    """Where SAP drops nothing, rmc+sap is rmc: whichever weights were adapted are those of the passes."""
    alone, both = ask(text, composed, images), ask(text + WHOLE, composed, images)
    assert (alone.scores - alone.base_scores).abs().max() > 0.05
    close(both.scores, alone.scores, 2e-3)
    assert [a.weights for a in both.adaptations if a] == [a.weights for a in alone.adaptations if a]
    assert both.neighborhoods[0] is not None
    close(both.base_scores, alone.base_scores)


@pytest.mark.parametrize("text", ["rmc:anchor=1e9,gate=0", "rmc:scope=tail,epochs=1,learning_rate=1e-9,neighbors=24"])
def test_without_adaptation_it_is_sap(composed: Resources, images: Images, text: str) -> None:
    adapted, plain = (ask(t, composed, images).scores for t in (f"{text}+sap:passes=5", "sap:passes=5"))
    close(adapted, plain, 0.01)  # the closed form's scores are kept above 0, which costs that much


@pytest.mark.parametrize("text", ["rmc", "sap:passes=3", "region:passes=7", "rmc+sap:passes=3", DEEP[0]])
def test_a_transform_that_changes_nothing_changes_nothing(composed: Resources, images: Images, text: str) -> None:
    close(ask(f"prm:lambda=0,shift=none+{text}", composed, images).scores, ask(text, composed, images).scores)


@torch.no_grad()
def test_rmc_then_sap_is_the_loop_one_would_write(
    composed: Resources, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass: the base network with pruning patched in behind its activations, then the image's own head."""
    text, relu = "rmc:solver=adam,steps=10,gate=0,neighbors=40", F.relu
    defence = build_defence(text, composed)
    assert isinstance(defence, RMC)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    heads = _fitted(defence, images)
    total = torch.zeros(5, 10, dtype=torch.float64)
    for number in range(4):
        own = pass_generators(row_seeds([seed] * 5, images), [number])
        monkeypatch.setattr(
            F,
            "relu",
            lambda x, *_, g=own, **__: prune(relu(x), fraction=1, sampling="multinomial", generators=g),  # type: ignore[misc]
        )
        points = F.pad(_head_inputs(composed, images).double(), (0, 1), value=1.0)
        total += torch.einsum("bcd,bd->bc", heads, points).softmax(1)
    monkeypatch.undo()
    close(ask(f"{text}+sap:passes=4", composed, images).scores, total / 4)


def _head_inputs(resources: Resources, images: Images) -> torch.Tensor:
    """From the network as its author wrote it: the traced trunk calls its activations by themselves."""
    seen: list[torch.Tensor] = []
    hook = resources.classifier.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    resources.classifier(images)
    hook.remove()
    return seen[0]


def _fitted(defence: RMC, images: Images) -> torch.Tensor:
    """The heads ``[B, C, D + 1]`` that RMC fits to these images, found by asking for their answers."""
    from mithridate.defenses import head_adam, rmc_head

    found: list[torch.Tensor] = []
    fit_heads = head_adam.fit_heads

    def noted(*args: object) -> head_adam.HeadFit:
        fit = fit_heads(*args)  # type: ignore[arg-type]
        found.append(fit.weight)
        return fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rmc_head, "fit_heads", noted)
        defence.predict(images, generator=torch.Generator(), budget=Budget())
    return torch.cat(found)


def test_neighbours_are_those_of_the_image_as_it_was_moved(composed: Resources, images: Images) -> None:
    found = ask("prm:shift=e,module=0+rmc", composed, images)
    moved = build_defence("prm:shift=e,module=0", composed)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), composed.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        moved.predict(images, generator=torch.Generator(), budget=Budget())
        embedding = base_pass(composed.classifier, seen[-1]).embedding
    nearest = composed.index.search(embedding, 1).ids[:, 0]
    assert [int(n.ids[0]) for n in found.neighborhoods if n is not None] == nearest.tolist()
    close(found.base_scores, ask("none", composed, images).scores)  # undefended: the image as it came


# Randomness and isolation

COMPOSED = [
    "prm+rmc",
    "prm+sap:passes=3",
    "rmc+sap:passes=3",
    "prm+rmc+sap:passes=3",
    "randomization+rmc+region:passes=5",
]


@pytest.mark.parametrize("text", COMPOSED)
def test_seeded_calls_repeat_and_others_differ(composed: Resources, images: Images, text: str) -> None:
    first = ask(text, composed, images).scores
    assert torch.equal(ask(text, composed, images).scores, first)
    assert not torch.allclose(ask(text, composed, images, seed=4).scores, first, atol=1e-4)
    close(first.sum(1), torch.ones(5))


@pytest.mark.parametrize("text", [*COMPOSED, f"prm+{DEEP[0]}+sap:passes=2"])
def test_nobodys_company_changes_an_answer(composed: Resources, images: Images, text: str) -> None:
    defence = build_defence(text, composed)
    requests = [
        Request(images=part, generator=torch.Generator().manual_seed(seed))
        for seed, part in [(3, images[:2]), (9, images[2:3]), (4, images[3:])]
    ]
    outcomes = defence.predict_together(requests)
    for (seed, part), outcome in zip([(3, images[:2]), (9, images[2:3]), (4, images[3:])], outcomes, strict=True):
        assert isinstance(outcome, Prediction)
        close(outcome.scores, ask(text, composed, part, seed).scores)
    close(ask(text, composed, images[1:2]).scores, ask(text, composed, images).scores[1:2])


@pytest.mark.parametrize(
    "text", ["prm+sap:passes=1", "prm+sap:passes=3,sampling=binomial", "prm:lambda=0.5+rmc+sap:passes=3"]
)
def test_company_changes_nothing_where_rounding_depends_on_it(text: str, colour: Resources) -> None:
    """On 32-pixel images, what a PRM gives has other last bits in another batch: draws must not depend on them."""
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    images = (images * 255).round() / 255
    together = ask(text, colour, images).scores
    for row in range(4):
        close(ask(text, colour, images[row : row + 1]).scores[0], together[row])


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    """A small bundle of 32-pixel noise."""
    out = tmp_path_factory.mktemp("colour") / "noise"
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    data = LabelledImages(images=images, labels=np.arange(40) % 4, classes=tuple("abcd"), spec="noise")
    training = TrainingPlan(arch="resnet20", epochs=1)
    build_bundle(BuildPlan(data=data, out=out, arch="resnet20", attacks=("fgsm",), training=training))
    return replace(Resources.load(Bundle.open(out)), prms=(fresh("v0", (3, 32, 32)),))


def test_a_budget_that_ends_between_two_groups_of_images_is_said(
    composed: Resources, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it ends: there is an answer of all stages, or none."""
    monkeypatch.setattr("mithridate.defenses.averaging._IMAGES_AT_A_TIME", 2)
    defence = build_defence("rmc+sap:passes=1", composed)
    for allowed in range(12):
        looks = iter([False] * allowed)
        budget = Budget(cancelled=lambda looks=looks: next(looks, True))  # type: ignore[misc]
        (outcome,) = defence.predict_together([Request(images=images, generator=torch.Generator(), budget=budget)])
        if isinstance(outcome, Prediction):
            cut_short = {a.stop_reason for a in outcome.adaptations if a is not None} & {"cancelled"}
            assert cut_short or allowed > 5


@pytest.mark.parametrize("text", ["rmc+sap:passes=50", "prm+sap:passes=50"])
def test_a_budget_that_ends_between_passes_is_its_owners_alone(
    composed: Resources, images: Images, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mithridate.defenses.averaging._BYTES_AT_A_TIME", 1)
    looks = iter([False] * 12)
    leaving = Budget(cancelled=lambda: next(looks, True))
    defence = build_defence(text, composed)
    left, stayed = defence.predict_together(
        [
            Request(images=images[:1], generator=torch.Generator().manual_seed(3), budget=leaving),
            Request(images=images[1:2], generator=torch.Generator().manual_seed(3)),
        ]
    )
    assert isinstance(left, BudgetExceededError)
    assert isinstance(stayed, Prediction)
    close(stayed.scores, ask(text, composed, images[1:2]).scores)


# What attackers are given


@pytest.mark.parametrize(
    "text",
    [
        "rmc:gate=0,held_out=0+sap:fraction=1000.0,attack_passes=1",
        "prm:shift=e,module=0+rmc:gate=0,held_out=0",
        "prm:shift=e,module=0+rmc:gate=0,held_out=0+sap:fraction=1000.0,attack_passes=1",
    ],
)
def test_the_gradient_goes_through_all_stages(composed: Resources, images: Images, text: str) -> None:
    """It is the slope of what the closed form answers, but for the choice of the neighbours, which is held."""
    defence, point = build_defence(text, composed), images[:1].clone().requires_grad_()

    def ahead(at: Images) -> torch.Tensor:
        scores = defence.surrogate(at, generator=torch.Generator().manual_seed(0), budget=Budget()).log_softmax(1)
        return scores[0, 3] - scores[0, 5]

    (gradient,) = torch.autograd.grad(ahead(point), point)
    way, step = gradient / gradient.norm(), 2e-3
    with torch.no_grad():
        slope = (ahead(point + step * way) - ahead(point - step * way)) / (2 * step)
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.25)


@pytest.mark.parametrize("text", [*COMPOSED, f"prm:attack_passes=2+{DEEP[0]}+sap:passes=2,attack_passes=2"])
def test_what_is_kept_for_a_gradient_is_bounded(
    composed: Resources, images: Images, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups that are run again instead of kept, the gradient is the same."""
    defence = build_defence(text, composed)

    def gradient() -> torch.Tensor:
        point = images.clone().requires_grad_()
        logits = defence.surrogate(point, generator=torch.Generator().manual_seed(0), budget=Budget())
        assert logits.shape == (5, 10)
        (found,) = torch.autograd.grad(logits[:, 0].sum(), point)
        return found

    whole = gradient()
    assert torch.isfinite(whole).all()
    assert whole.flatten(1).any(1).all()
    monkeypatch.setattr("mithridate.defenses.averaging._BYTES_ATTACKED_AT_A_TIME", 1)
    torch.testing.assert_close(gradient(), whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("text", [f"{DEEP[0]}+sap:passes=1,attack_passes=2", f"prm:attack_passes=2+{DEEP[0]}"])
def test_fine_tuning_is_not_done_again_for_the_gradient(
    composed: Resources, images: Images, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own gradient steps would each run all that came before them again."""
    monkeypatch.setattr("mithridate.defenses.averaging._BYTES_ATTACKED_AT_A_TIME", 1)
    defence, point, adapted = build_defence(text, composed), images.clone().requires_grad_(), []
    adapt = TailAdapter.adapt
    monkeypatch.setattr(TailAdapter, "adapt", lambda self, query: adapted.append(len(query)) or adapt(self, query))
    logits = defence.surrogate(point, generator=torch.Generator().manual_seed(0), budget=Budget())
    torch.autograd.grad(logits[:, 0].sum(), point)
    assert sum(adapted) == len(images) * (2 if "prm" in text else 1)


def test_the_surrogate_averages_over_the_moves_that_are_adapted_to(composed: Resources, images: Images) -> None:
    text = "rmc:neighbors=48"
    found = build_defence(f"prm:module=0+{text}", composed).surrogate(
        images, generator=torch.Generator(), budget=Budget()
    )
    fixed = [
        ask(f"prm:module=0,shift={shift}+{text}", composed, images).scores.double()
        for shift in ("n", "ne", "e", "se", "s", "sw", "w", "nw")
    ]
    close(found.softmax(1), torch.stack(fixed).mean(0))


# Names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("prm+rmc+sap", "prm+rmc+sap"),
        ("prm rmc sap", "prm+rmc+sap"),  # what a + in a URL arrives as
        ("prm:lambda=1+rmc:neighbors=256+sap:passes=100", "prm+rmc+sap"),
        ("rmc:anchor=1e+3+sap:passes=3", "rmc:anchor=1000.0+sap:passes=3"),
        ("randomization:size=keep+region", "randomization:size=keep+region"),
    ],
)
def test_a_name_leads_back(composed: Resources, text: str, name: str) -> None:
    assert defence_name(text, composed) == name == build_defence(text, composed).name == defence_name(name, composed)


def test_every_stage_is_described(composed: Resources) -> None:
    said = describe_defence(build_defence("prm+rmc:scope=tail+sap", composed))
    assert said.count("; then ") == 2
    assert "stored activations" in said


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("sap+rmc", "not in order, or has two stages of a kind: sap (average), rmc (adapt)"),
        ("rmc+prm", "rmc (adapt), prm (transform); allowed: at most one each of prm | randomization"),
        ("prm+randomization", "two stages of a kind"),
        ("sap+sap", "two stages of a kind"),
        ("rmc+rmc", "two stages of a kind"),
        ("prm+webnn", "webnn stands alone and is no stage of 'prm+webnn'"),
        ("none+rmc", "none stands alone"),
        ("prm" + "+rmc" * 10_000, "10001 stages are joined in 'prm+rmc+"),
        ("prm:passes=3+rmc", "passes=3 cannot be followed by another stage"),
        ("prm+", "unknown defence 'prm+'"),
        ("prm++rmc", "unknown defence 'prm+'"),
        ("+rmc", "unknown defence ''"),
        ("prm+rmd", "unknown defence 'rmd' (did you mean 'rmc'?)"),
        ("prm+rmc:steps=1", "unknown option"),
    ],
)
def test_nonsense_is_refused_before_there_is_a_bundle(text: str, part: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_defence(text)
    assert part in str(caught.value)
