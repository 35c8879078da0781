"""Every defence: same image, same answer, whoever else is asking, and nothing stays behind."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.attacks import parse_attack
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

SMALL_ALL = "rmc:scope=all,neighbors=30,epochs=2,batch_size=8,learning_rate=0.001"
ALL = ["none", "rmc", "webnn", "deepnn", SMALL_ALL]


def predict(text: str, resources: Resources, images: torch.Tensor, budget: Budget | None = None) -> Prediction:
    generator = torch.Generator().manual_seed(3)
    return build_defence(text, resources).predict(images, generator=generator, budget=budget or Budget())


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
    tensors += [resources.index.embeddings(torch.arange(len(resources.index)))]
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
    count = 12 if text == SMALL_ALL else 100
    images, order = images[:count], torch.randperm(count, generator=torch.Generator().manual_seed(1))
    together, shuffled = predict(text, resources, images), predict(text, resources, images[order])
    alone = [predict(text, resources, image[None]) for image in images]
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
    wanted = [predict(text, resources, image[None]).scores for image in images[:4]]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(predict, ALL[i % 5], resources, images[i : i + 3]) for i in range(10)]
        answers = list(pool.map(lambda image: predict(text, resources, image[None]).scores, images[:4]))
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
    before, probe = fingerprint(resources), images[:2]
    wanted = predict(text, resources, probe)
    grad_mode, rng = torch.is_grad_enabled(), torch.random.get_rng_state()
    for hostile in (torch.full((2, 1, 8, 8), 1e30), torch.full((1, 1, 8, 8), torch.nan), torch.ones(1, 2, 8, 8)):
        try:
            predict(text, resources, hostile)
        except (MithridateError, RuntimeError, ValueError):
            assert torch.is_grad_enabled() == grad_mode
    for checks in (0, 1, 2, 3, 5):
        left = iter([False] * checks)
        for cancelled in (raising_after(checks), lambda left=left: next(left, True)):
            try:
                predict(text, resources, images[4:6], Budget(cancelled=cancelled))
            except (ConnectionResetError, MithridateError):
                assert torch.is_grad_enabled() == grad_mode
    build_defence(text, resources).surrogate(
        images[:3].clone().requires_grad_(), generator=torch.Generator().manual_seed(0), budget=Budget()
    ).sum().backward()
    assert fingerprint(resources) == before
    assert torch.equal(torch.random.get_rng_state(), rng)
    again = predict(text, resources, probe)
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
    assert all((a is not None) == text.startswith("rmc") for a in prediction.adaptations)
    assert all((n is None) == (text == "none") for n in prediction.neighborhoods)
    assert prediction.seconds
    assert min(prediction.seconds.values()) >= 0


# The attacker's path


@pytest.mark.parametrize("text", ALL)
def test_the_surrogate_is_differentiable_and_agrees_with_the_answer(
    resources: Resources, images: torch.Tensor, text: str
) -> None:
    images = images[: 8 if text == SMALL_ALL else 30]
    defence, asked = build_defence(text, resources), images.clone().requires_grad_()
    logits = defence.surrogate(asked, generator=torch.Generator().manual_seed(3), budget=Budget())
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum() - logits[:, 0].sum(), asked)
    assert torch.isfinite(gradient).all()
    moving = (gradient.flatten(1).abs().sum(1) > 0).float().mean()
    assert moving > 0.99
    agreement = (logits.argmax(1) == predict(text, resources, images).scores.argmax(1)).float().mean()
    assert agreement == 1 if text in ("none", "rmc", SMALL_ALL) else agreement > 0.8
    assert all(parameter.grad is None for parameter in resources.classifier.parameters())


# Neighbour votes


@pytest.mark.parametrize("kind", ["webnn", "deepnn"])
@pytest.mark.parametrize("neighbors", [1, 4, 64])
def test_votes_equal_a_count_by_hand(
    resources: Resources, images: torch.Tensor, digits_train: LabelledImages, kind: str, neighbors: int
) -> None:
    prediction, sources = predict(f"{kind}:neighbors={neighbors}", resources, images[:25]), len(digits_train)
    with torch.no_grad():
        embeddings = resources.classifier.embed(images[:25]).double()
    everything = resources.index.embeddings(torch.arange(len(resources.index))).double()
    candidates = everything[:sources] if kind == "deepnn" else everything
    for row, embedding in enumerate(embeddings):
        distances = (candidates - embedding).square().sum(1).tolist()
        nearest = sorted(range(len(candidates)), key=lambda i: (distances[i], i))[:neighbors]
        votes = Counter(int(digits_train.labels[i % sources]) for i in nearest)
        assert [round(float(s) * neighbors) for s in prediction.scores[row]] == [votes[c] for c in range(10)]
        winner = min(votes, key=lambda c: (-votes[c], c))
        assert prediction.scores[row].argmax() == winner
        seen = prediction.neighborhoods[row]
        assert seen is not None
        assert seen.ids.tolist() == nearest
        assert seen.label_counts == dict(votes)
        assert list(seen.label_counts.values()) == sorted(votes.values(), reverse=True)
        assert seen.adversarial_fraction == pytest.approx(sum(i >= sources for i in nearest) / neighbors)


def test_deepnn_asks_clean_exemplars_only(resources: Resources, images: torch.Tensor) -> None:
    clean, everyone = predict("deepnn", resources, images), predict("webnn", resources, images)
    assert all(n is not None and n.adversarial_fraction == 0 for n in clean.neighborhoods)
    assert any(n is not None and n.adversarial_fraction > 0 for n in everyone.neighborhoods)


# Names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rmcc", ["unknown defence 'rmcc'", "did you mean 'rmc'", "deepnn, none, rmc, webnn"]),
        ("", ["unknown defence ''"]),
        ("RMC", ["unknown defence 'RMC'"]),
        ("rmc:neighbours=3", ["unknown option of rmc 'neighbours'", "did you mean 'neighbors'"]),
        ("rmc:epochs=3", ["unknown option of rmc 'epochs'", "learning_rate, neighbors, steps, tolerance"]),
        ("rmc:scope=all,steps=3", ["unknown option of rmc:scope=all 'steps'"]),
        ("rmc:scope=tail", ["unknown scope 'tail'", "all, head"]),
        ("rmc:neighbors=many", ["rmc: neighbors='many' is not int"]),
        ("rmc:neighbors=2.5", ["neighbors='2.5' is not int"]),
        ("rmc:learning_rate=x", ["learning_rate='x' is not float"]),
        ("rmc:learning_rate=nan", ["learning_rate=nan is out of range"]),
        ("rmc:learning_rate=-1", ["learning_rate=-1.0 is out of range; allowed: 1e-09 to 100"]),
        ("rmc:neighbors=0", ["neighbors=0 is out of range", "1 to 65536"]),
        ("rmc:scope=all,neighbors=1", ["neighbors=1 is out of range", "2 to 65536"]),
        ("webnn:neighbors=70000", ["a neighbour vote: neighbors=70000 is out of range"]),
        ("rmc:steps=3,steps=4", ["cannot read 'steps=4'", "once each"]),
        ("rmc:steps", ["cannot read 'steps'"]),
        ("rmc:", ["cannot read ''", "name:key=value"]),
        ("rmc:steps=3,", ["cannot read ''"]),
        ("rmc:=3", ["cannot read '=3'"]),
        ("none:steps=3", ["none takes no options"]),
    ],
)
def test_a_defence_that_does_not_exist_is_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_defence(text)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def leads_back(resources: Resources, text: str) -> Defence:
    defence = build_defence(text, resources)
    again = build_defence(defence.name, resources)
    assert again.name == defence.name
    assert again == defence
    assert isinstance(defence, Defence)
    return defence


@settings(max_examples=50, deadline=None)
@given(
    neighbors=st.integers(2, 65_536),
    rate=st.floats(1e-9, 100),
    steps=st.integers(1, 1_000),
    tolerance=st.floats(0, 100),
)
def test_a_name_leads_back_to_the_same_defence(
    resources: Resources, neighbors: int, rate: float, steps: int, tolerance: float
) -> None:
    head = leads_back(
        resources, f"rmc:tolerance={tolerance},neighbors={neighbors},scope=head,learning_rate={rate},steps={steps}"
    )
    assert asdict(head.config) == {
        "neighbors": neighbors,
        "learning_rate": rate,
        "steps": steps,
        "tolerance": tolerance,
    }
    leads_back(resources, f"rmc:scope=all,neighbors={neighbors},learning_rate={rate},epochs={steps}")
    leads_back(resources, f"webnn:neighbors={neighbors}")


def test_defaults_have_the_shortest_name_and_a_description(resources: Resources) -> None:
    for text in DEFAULT_DEFENCES:
        defence = leads_back(resources, text)
        assert defence.name == text
        assert describe_defence(defence)
    assert len({describe_defence(build_defence(text, resources)) for text in DEFAULT_DEFENCES}) == len(DEFAULT_DEFENCES)
    assert leads_back(resources, " rmc:neighbors=256 ").name == "rmc"
