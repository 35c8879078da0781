"""Every defence: same image, same answer, whoever else is asking, and nothing stays behind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from index_builder.build import BuildPlan, build_bundle
from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import (
    DEFAULT_DEFENCES,
    Budget,
    Defence,
    Prediction,
    Resources,
    build_defence,
    describe_defence,
    parse_defence,
)
from mithridate.errors import MithridateError, OptionError
from mithridate.types import Epsilon, to_images

SLOW = {
    "rmc:scope=tail,neighbors=30,epochs=2,batch_size=8,learning_rate=0.01",
    "rmc:scope=all,neighbors=30,epochs=2,batch_size=8,learning_rate=0.001",
    "knn-oat:neighbors=16,attack=pgd2,learning_rate=0.001,epochs=1,batch_size=8",
}
ALL = ["none", "rmc", "rmc:solver=adam", "webnn", "deepnn", "webnn:scores=softmax,weights=cbw-d", *sorted(SLOW)]


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory, digits_train: LabelledImages) -> Resources:
    """With a tail: every scope has what it needs."""
    out = tmp_path_factory.mktemp("bundles") / "digits-with-tail"
    plan = BuildPlan(
        data=digits_train, out=out, attacks=("pgd10",), epsilon=Epsilon(32), shard_size=512, tail_layer="auto"
    )
    build_bundle(plan)
    return Resources.load(Bundle.open(out))


def ask(defence: Defence, images: torch.Tensor, budget: Budget | None = None) -> Prediction:
    return defence.predict(images, generator=torch.Generator().manual_seed(3), budget=budget or Budget())


def predict(text: str, resources: Resources, images: torch.Tensor, budget: Budget | None = None) -> Prediction:
    return ask(build_defence(text, resources), images, budget)


@pytest.fixture(scope="module")
def images(resources: Resources, digits_test: LabelledImages) -> torch.Tensor:
    """100 digits, every second one attacked."""
    pixels, labels = torch.from_numpy(digits_test.images[:100]), torch.from_numpy(digits_test.labels[:100])
    attack = parse_attack("pgd5", epsilon=Epsilon(24))
    found = attack.run(resources.classifier, pixels, labels, generator=torch.Generator().manual_seed(0))
    return to_images(torch.where((torch.arange(100) % 2 == 0)[:, None, None, None], pixels, found))


def fingerprint(resources: Resources) -> str:
    """Of everything that requests share."""
    digest = hashlib.sha256()
    tensors = [*resources.classifier.state_dict().values(), resources.classifier.head.weight]
    tensors += [resources.exemplars.features, resources.exemplars.labels, resources.exemplars.predictions]
    tensors += [resources.index.embeddings(torch.arange(len(resources.exemplars)))]
    assert resources.exemplars.activations is not None
    tensors += [resources.exemplars.activations]
    tensors += [resources.exemplars.pixels(torch.arange(len(resources.exemplars)))]
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    assert not any(p.requires_grad or p.grad is not None for p in resources.classifier.parameters())
    assert not any(module.training for module in resources.classifier.network.modules())
    return digest.hexdigest()


# Whoever else is asking


@pytest.mark.parametrize("text", ALL)
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(
    resources: Resources, images: torch.Tensor, text: str
) -> None:
    count = 12 if text in SLOW else 100
    defence = build_defence(text, resources)
    images, order = images[:count], torch.randperm(count, generator=torch.Generator().manual_seed(1))
    together, shuffled = ask(defence, images), ask(defence, images[order])
    alone = [ask(defence, image[None]) for image in images]
    single = torch.cat([one.scores for one in alone])
    assert (single - together.scores).abs().max() <= 1e-4
    assert torch.equal(single.argmax(1), together.scores.argmax(1))
    assert (shuffled.scores - together.scores[order]).abs().max() <= 1e-4
    for place, row in enumerate(order.tolist()):
        assert shuffled.adaptations[place] == together.adaptations[row] == alone[row].adaptations[0]
        here, there, lone = shuffled.neighborhoods[place], together.neighborhoods[row], alone[row].neighborhoods[0]
        if here is not None or there is not None or lone is not None:
            assert here.ids.tolist() == there.ids.tolist() == lone.ids.tolist()


@pytest.mark.parametrize("text", ALL)
def test_an_answer_does_not_depend_on_what_runs_beside_it(
    resources: Resources, images: torch.Tensor, text: str
) -> None:
    # Made beforehand: making one traces the network, and no other thread may run it meanwhile.
    defence, others = build_defence(text, resources), [build_defence(other, resources) for other in ALL]
    wanted = [ask(defence, image[None]).scores for image in images[:4]]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(ask, other, images[i : i + 3]) for i, other in enumerate(others)]
        answers = list(pool.map(lambda image: ask(defence, image[None]).scores, images[:4]))
        assert all(torch.isfinite(job.result().scores).all() for job in jobs)
    assert (torch.cat(answers) - torch.cat(wanted)).abs().max() <= 1e-4


def raising_after(checks: int) -> Callable[[], bool]:
    left = iter([False] * checks)

    def cancelled() -> bool:
        if next(left, True):
            raise ConnectionResetError("the caller hung up")
        return False

    return cancelled


@pytest.mark.parametrize("text", ALL)
def test_nothing_stays_behind(resources: Resources, images: torch.Tensor, text: str) -> None:
    """After hostile images, exceptions in the middle of the work, and callers who leave."""
    before, probe, defence = fingerprint(resources), images[:2], build_defence(text, resources)
    wanted = ask(defence, probe)
    grad_mode, rng = torch.is_grad_enabled(), torch.random.get_rng_state()
    for hostile in (torch.full((2, 1, 8, 8), 1e30), torch.full((1, 1, 8, 8), torch.nan), torch.ones(1, 2, 8, 8)):
        try:
            ask(defence, hostile)
        except (MithridateError, RuntimeError, ValueError):
            assert torch.is_grad_enabled() == grad_mode
    for checks in (0, 1, 2, 3, 5):
        left = iter([False] * checks)
        for cancelled in (raising_after(checks), lambda left=left: next(left, True)):
            try:
                ask(defence, images[4:6], Budget(cancelled=cancelled))
            except (ConnectionResetError, MithridateError):
                assert torch.is_grad_enabled() == grad_mode
    defence.surrogate(
        images[:3].clone().requires_grad_(), generator=torch.Generator().manual_seed(0), budget=Budget()
    ).sum().backward()
    assert fingerprint(resources) == before
    assert torch.equal(torch.random.get_rng_state(), rng)
    again = ask(defence, probe)
    assert torch.equal(again.scores, wanted.scores)
    assert again.adaptations == wanted.adaptations


@pytest.mark.parametrize("text", ALL)
def test_scores_are_a_distribution_over_the_classes(resources: Resources, images: torch.Tensor, text: str) -> None:
    prediction, base = predict(text, resources, images[:10]), predict("none", resources, images[:10])
    for scores in (prediction.scores, prediction.base_scores):
        assert scores.shape == (10, 10)
        assert scores.dtype == torch.float32
        assert not scores.requires_grad
        assert scores.min() >= 0
        torch.testing.assert_close(scores.sum(1), torch.ones(10))
    assert torch.equal(prediction.base_scores, base.scores)
    assert len(prediction.adaptations) == len(prediction.neighborhoods) == 10
    assert all((a is not None) == text.startswith(("rmc", "knn-oat")) for a in prediction.adaptations)
    assert all((n is None) == (text == "none") for n in prediction.neighborhoods)
    assert prediction.seconds
    assert min(prediction.seconds.values()) >= 0


# The attacker's path


@pytest.mark.parametrize("text", ALL)
def test_the_surrogate_is_differentiable_and_agrees_with_the_answer(
    resources: Resources, images: torch.Tensor, text: str
) -> None:
    images = images[: 8 if text in SLOW else 30]
    defence, asked = build_defence(text, resources), images.clone().requires_grad_()
    logits = defence.surrogate(asked, generator=torch.Generator().manual_seed(3), budget=Budget())
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum() - logits[:, 0].sum(), asked)
    assert torch.isfinite(gradient).all()
    moving = (gradient.flatten(1).abs().sum(1) > 0).float().mean()
    assert moving > 0.99
    scores = ask(defence, images).scores
    best = scores.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-2  # of two classes with equal votes it may name the other
    assert clear.float().mean() >= 0.8
    assert torch.equal(logits.argmax(1)[clear], scores.argmax(1)[clear])
    assert all(parameter.grad is None for parameter in resources.classifier.parameters())


# Names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "rmcc",
            [
                "unknown defence 'rmcc'",
                "did you mean 'rmc'",
                "deepnn, knn-oat, none, pixel-deflection, prm, randomization, region, rmc, sap, tta, webnn",
            ],
        ),
        ("", ["unknown defence ''"]),
        ("RMC", ["unknown defence 'RMC'"]),
        ("knn_oat", ["unknown defence 'knn_oat'", "did you mean 'knn-oat'"]),
        ("none:steps=3", ["none takes no options"]),
        ("webnn:neighbors=3,neighbors=4", ["cannot read 'neighbors=4'", "once each"]),
        ("webnn:neighbors", ["cannot read 'neighbors'"]),
        ("webnn:", ["cannot read ''", "name:key=value"]),
    ],
)
def test_a_defence_that_does_not_exist_is_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_defence(text)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_defaults_have_the_shortest_name_and_a_description(resources: Resources) -> None:
    for text in DEFAULT_DEFENCES:
        defence = build_defence(text, resources)
        assert isinstance(defence, Defence)
        assert defence.name == text
    described = [describe_defence(build_defence(text, resources)) for text in (*DEFAULT_DEFENCES, *SLOW)]
    assert all(described)
    assert len(set(described)) == len(described)


def test_what_a_service_offers_unasked_is_fit_for_one(resources: Resources) -> None:
    assert not any(getattr(build_defence(text, resources), "offline", False) for text in DEFAULT_DEFENCES)
