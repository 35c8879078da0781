"""Which exemplars are chosen, and what they count: equal to sorting all distances by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mithridate.defenses import Resources, build_defence
from mithridate.defenses.selection import Selection, SelectionConfig, Selector
from mithridate.errors import OptionError
from mithridate.exemplars import ExemplarStore, Layout
from mithridate.models import Classifier, build_classifier
from mithridate.neighbors import Metric, NeighborIndex

CLASSES, SOURCES, WIDTH = 4, 40, 6
LABELS = np.arange(SOURCES) % 3  # of the fourth class there is no exemplar
LABELS[LABELS == 2] = np.where(np.arange((LABELS == 2).sum()) < 3, 2, 0)  # of the third there are three
METRICS: tuple[Metric, ...] = ("l2", "cosine", "ip")


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return build_classifier("small-cnn", num_classes=CLASSES, image_shape=(1, 8, 8))


def make(classifier: Classifier, metric: Metric = "l2", copies: tuple[str, ...] = ("clean", "pgd10")) -> Resources:
    """Forty images in three of the four classes, and a copy of each a little way off."""
    random = np.random.default_rng(0)
    clean = random.normal(size=(SOURCES, WIDTH)) + LABELS[:, None]
    everything = np.concatenate([clean + 0.4 * copy * random.normal(size=clean.shape) for copy in range(len(copies))])
    embeddings, count = everything.astype(np.float32), len(everything)
    exemplars = ExemplarStore(
        Layout(sources=SOURCES, copies=copies, shard_size=SOURCES),
        shards=[np.zeros((SOURCES, 1, 8, 8), np.uint8)] * len(copies),
        labels=LABELS.astype(np.int64),
        features=embeddings,
        predictions=np.zeros(count, np.int32),
    )
    return Resources(classifier=classifier, index=NeighborIndex.build(embeddings, metric=metric), exemplars=exemplars)


def queries(count: int = 7, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(5)).to(dtype) + 1


def select(resources: Resources, asked: torch.Tensor | None = None, **options: float | bool) -> Selection:
    config = SelectionConfig(**options)  # type: ignore[arg-type]
    return Selector(resources=resources, config=config).select(queries() if asked is None else asked)


def distance(query: list[float], exemplar: list[float], metric: Metric) -> float:
    if metric == "l2":
        return sum((q - x) ** 2 for q, x in zip(query, exemplar, strict=True))
    product = sum(q * x for q, x in zip(query, exemplar, strict=True))
    return -product if metric == "ip" else 1 - product / (math.hypot(*query) * math.hypot(*exemplar))


def all_sorted(resources: Resources, query: torch.Tensor) -> list[tuple[float, int]]:
    """Every exemplar's distance and id, nearest first."""
    everything = resources.exemplars.features.tolist()
    return sorted((distance(query.tolist(), x, resources.index.metric), i) for i, x in enumerate(everything))


def assert_selected(found: Selection, row: int, wanted: list[tuple[float, int]]) -> None:
    assert found.ids[row].tolist() == [i for _, i in wanted]
    np.testing.assert_allclose(found.distances[row].numpy(), [d for d, _ in wanted], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_the_nearest_count_alike(classifier: Classifier, metric: Metric) -> None:
    resources = make(classifier, metric)
    found = select(resources, neighbors=9)
    for row, query in enumerate(queries()):
        assert_selected(found, row, all_sorted(resources, query)[:9])
    assert found.weights.dtype == found.distances.dtype == torch.float64
    torch.testing.assert_close(found.weights, torch.full((7, 9), 1 / 9, dtype=torch.float64))
    assert torch.equal(found.neighbors.ids, found.ids)
    part = found.rows(2, 5)
    assert torch.equal(part.ids, found.ids[2:5])
    assert torch.equal(part.weights, found.weights[2:5])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("neighbors", [4, 8, 15, 30])
def test_balanced_takes_the_nearest_of_each_class(classifier: Classifier, metric: Metric, neighbors: int) -> None:
    """The lower classes get what cannot be divided; a class that has fewer gives what it has. They take turns, so that
    whatever is held out from the front has all of them."""
    resources = make(classifier, metric)
    found = select(resources, neighbors=neighbors, balanced=True)
    labels = resources.exemplars.labels
    for row, query in enumerate(queries()):
        wanted = []
        for label in range(CLASSES):
            share = neighbors // CLASSES + (label < neighbors % CLASSES)
            mine = [(d, i) for d, i in all_sorted(resources, query) if labels[i] == label][:share]
            wanted += [(turn, d, i) for turn, (d, i) in enumerate(mine)]
        assert_selected(found, row, [(d, i) for _, d, i in sorted(wanted)])
        told = found.by_distance()
        assert told.ids[row].tolist() == [i for _, i in sorted((d, i) for _, d, i in wanted)]  # nearest first
        assert told.distances[row].diff().min() >= 0
    torch.testing.assert_close(found.weights.sum(1), torch.ones(7, dtype=torch.float64))
    assert torch.equal(found.weights, found.weights[:1, :1].expand_as(found.weights))


@pytest.mark.parametrize(("share", "attacked"), [(0.0, 0), (0.1, 1), (0.5, 5), (0.75, 8), (1.0, 10)])
def test_adversarial_says_how_many_are_attacked_copies(classifier: Classifier, share: float, attacked: int) -> None:
    resources = make(classifier)
    found = select(resources, neighbors=10, adversarial=share)
    for row, query in enumerate(queries()):
        ranked = all_sorted(resources, query)
        clean, copies = ([(d, i) for d, i in ranked if (i >= SOURCES) == flag] for flag in (False, True))
        assert_selected(found, row, sorted(clean[: 10 - attacked] + copies[:attacked]))
    assert (found.ids >= SOURCES).sum(1).tolist() == [attacked] * 7


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_radius_leaves_the_near_ones(classifier: Classifier, metric: Metric, temperature: float) -> None:
    """In the numbers that explain prints: for l2 the distance itself, not its square."""
    resources = make(classifier, metric)
    free = select(resources, neighbors=12, temperature=temperature)
    printed = free.distances.sqrt() if metric == "l2" else free.distances
    radius = float(printed.median())
    found = select(resources, neighbors=12, temperature=temperature, radius=radius)
    near = printed <= radius
    assert 0 < int(near.sum()) < near.numel()
    assert torch.equal(found.ids, free.ids)
    assert torch.equal(found.weights > 0, near)
    for row in range(7):
        if near[row].any():
            kept = torch.where(near[row], free.weights[row], 0)
            torch.testing.assert_close(found.weights[row], kept / kept.sum())


def test_a_radius_that_none_is_within_leaves_no_weight(classifier: Classifier) -> None:
    asked = queries()
    asked[3] += 100
    weights = select(make(classifier), asked, neighbors=12, radius=5, temperature=0.5).weights
    assert weights.sum(1).round(decimals=12).tolist() == [1, 1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 0.5, 20.0])
def test_soft_weights_are_what_the_formula_says(classifier: Classifier, metric: Metric, temperature: float) -> None:
    found = select(make(classifier, metric), neighbors=12, temperature=temperature)
    for distances, weights in zip(found.distances.tolist(), found.weights.tolist(), strict=True):
        # Inner products have no zero to measure from: there it is the mean distance beyond the nearest.
        scale = sum(distances) / 12 - (distances[0] if distances[0] < 0 else 0)
        heights = [(distances[0] - d) / (temperature * scale) for d in distances]
        wanted = [math.exp(h) / math.fsum(map(math.exp, heights)) for h in heights]
        np.testing.assert_allclose(weights, wanted, rtol=1e-9, atol=1e-15)
        assert weights == sorted(weights, reverse=True)


def test_temperature_goes_from_the_nearest_alone_to_all_alike(classifier: Classifier) -> None:
    resources = make(classifier)
    cold, hot = (select(resources, neighbors=12, temperature=t).weights for t in (1e-6, 1e6))
    assert cold[:, 0].min() > 0.999
    assert (hot - 1 / 12).abs().max() < 1e-6


def test_a_query_on_top_of_its_neighbours_is_no_division_by_zero(classifier: Classifier) -> None:
    resources = make(classifier)
    same = np.repeat(resources.exemplars.features[:1].numpy(), 2 * SOURCES, axis=0)
    twins = replace(resources, index=NeighborIndex.build(same))
    asked = torch.from_numpy(same[:1]).requires_grad_()
    weights = select(twins, asked, neighbors=5, temperature=0.5).weights
    torch.testing.assert_close(weights.detach(), torch.full((1, 5), 0.2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(weights.square().sum(), asked)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("more", [{}, {"balanced": True}, {"adversarial": 0.5}])
def test_soft_weights_have_the_gradient_of_the_formula(
    classifier: Classifier, metric: Metric, more: dict[str, float]
) -> None:
    """The whole path from query to weights; a step of 1e-6 changes no neighbour."""
    selector = Selector(
        resources=make(classifier, metric),
        config=SelectionConfig(neighbors=8, temperature=0.5, **more),  # type: ignore[arg-type]
    )
    asked = queries(3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: selector.select(q).weights, (asked,))
    weights = selector.select(asked).weights
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), asked)
    assert (gradient != 0).any(1).all()


def test_no_gradient_where_none_is_wanted(classifier: Classifier) -> None:
    resources, asked = make(classifier), queries().requires_grad_()
    assert not select(resources, asked, neighbors=8).weights.requires_grad  # hard: all alike
    with torch.no_grad():
        quiet = select(resources, asked, neighbors=8, temperature=0.5).weights
    assert not quiet.requires_grad
    torch.testing.assert_close(select(resources, asked, neighbors=8, temperature=0.5).weights.detach(), quiet)


# Holding out


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("options", [{}, {"radius": 2.2}, {"radius": 2.2, "balanced": True}, {"temperature": 0.5}])
def test_held_out_is_the_first_share_of_those_that_count(
    classifier: Classifier, share: float, options: dict[str, float]
) -> None:
    found = select(make(classifier), neighbors=20, **options)
    split, held = found.hold_out(share)
    assert held == max(1, int(share * found.ids.shape[1]))
    counted = set()
    for row in range(len(found.ids)):
        before, after = ([*zip(*part, strict=True)] for part in (_row(found, row), _row(split, row)))
        assert sorted(before) == sorted(after)  # the same exemplars, with the same distances and weights
        those = [entry for entry in before if entry[2] > 0]
        first = max(1, int(share * len(those))) if those else 0
        assert [entry for entry in after[:held] if entry[2] > 0] == those[:first]
        assert [entry for entry in after[held:] if entry[2] > 0] == those[first:]
        counted.add(len(those))
    if options.get("radius"):
        assert len(counted) > 3
        assert 0 < min(counted - {0}) < 20 * share + 3  # fewer than are held out of a full row


def _row(selection: Selection, row: int) -> tuple[list[int], list[float], list[float]]:
    return selection.ids[row].tolist(), selection.distances[row].tolist(), selection.weights[row].tolist()


def test_nothing_is_held_out_where_nothing_is_asked_for(classifier: Classifier) -> None:
    found = select(make(classifier), neighbors=20, radius=2.2)
    split, held = found.hold_out(0)
    assert held == 0
    assert split is found


def test_held_out_weights_keep_their_gradient(classifier: Classifier) -> None:
    selector = Selector(resources=make(classifier), config=SelectionConfig(neighbors=12, temperature=0.5, radius=2.5))
    asked = queries(4, torch.float64).requires_grad_()
    split, held = selector.select(asked).hold_out(0.2)
    (gradient,) = torch.autograd.grad(split.weights[:, :held].sum(), asked)
    assert gradient.any()


def test_fewer_neighbours_than_classes_cannot_be_balanced(classifier: Classifier) -> None:
    with pytest.raises(
        OptionError, match=r"^rmc: neighbors=3 are too few to be balanced over 4 classes; allowed: 4 and"
    ):
        select(make(classifier), neighbors=3, balanced=True)


def test_a_radius_in_what_is_no_distance_is_refused(classifier: Classifier) -> None:
    with pytest.raises(OptionError, match=r"^rmc: radius needs a metric that is a distance; the bundle's is ip, allow"):
        select(make(classifier, "ip"), neighbors=4, radius=3)


def test_a_selection_that_cannot_be_made_is_refused_in_one_line(classifier: Classifier) -> None:
    refused = {
        "balanced and adversarial both": {"balanced": True, "adversarial": 0.5},
        "neighbors=1 is out of range; allowed: 2 to 65536": {"neighbors": 1},
        "neighbors=65537 is out": {"neighbors": 65_537},
        "radius=-1 is out": {"radius": -1},
        "radius=nan is out": {"radius": math.nan},
        "temperature=-0.1 is out": {"temperature": -0.1},
        "adversarial=1.5 is out of range; allowed: 0 to 1": {"adversarial": 1.5},
    }
    for message, options in refused.items():
        with pytest.raises(OptionError) as caught:
            SelectionConfig(**options)  # type: ignore[arg-type]
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_attacked_copies_that_are_not_there_are_missed_when_the_defence_is_built(classifier: Classifier) -> None:
    clean = make(classifier, copies=("clean",))
    with pytest.raises(OptionError, match=r"^rmc: adversarial=0.5, but the bundle holds no attacked copies$"):
        select(clean, neighbors=4, adversarial=0.5)
    assert select(clean, neighbors=4, adversarial=0).ids.shape == (7, 4)
    with pytest.raises(OptionError, match="no attacked copies"):
        build_defence("rmc:solver=adam,adversarial=1", clean)
