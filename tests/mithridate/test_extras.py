"""Questions beside the matrix: what is said there was measured, and a server that mixes its clients up is caught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from mithridate.attacks import PGD
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Defence, Prediction, Resources, build_defence
from mithridate.defenses.base import Outcome, Request, answer_one
from mithridate.evaluation.battery import Sent, Target
from mithridate.evaluation.cells import CellStore
from mithridate.evaluation.effort import Effort, Pace
from mithridate.evaluation.extras import Ground, approximate, contamination, cost, run_extras, unseen
from mithridate.evaluation.extras.approximate import factories
from mithridate.evaluation.findings import Extra, Share
from mithridate.evaluation.front import Front
from mithridate.evaluation.repeated import answered_right
from mithridate.neighbors import NeighborIndex
from mithridate.types import Epsilon, Images, Logits

EPSILON = Epsilon(32)
IMAGES = 6


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


@pytest.fixture
def store(tmp_path: Path) -> CellStore:
    return CellStore.open(tmp_path / "work", {})


def ground(defence: Defence, data: LabelledImages, *, random: bool = False, seconds: float = 1200.0) -> Ground:
    """The first images, attacked on the base model."""
    pixels, labels = torch.from_numpy(data.images[:IMAGES]), torch.from_numpy(data.labels[:IMAGES])
    attack = PGD(epsilon=EPSILON, steps=10, step_size=8 / 255)
    classifier = defence.resources.classifier
    attacked = attack.run(classifier, pixels, labels, generator=torch.Generator().manual_seed(0))
    target = Target(
        defence=defence,
        random=random,
        pixels=pixels,
        labels=labels,
        epsilon=EPSILON,
        effort=Effort(steps=10, probed=IMAGES, seconds=seconds),
        seed=0,
    )
    sent = Sent(attack="pgd10", kind="transfer", config=repr(attack), pixels=attacked, seconds=1.0)
    front = Front(target=target, pace=Pace(answer=0.001, step=0.001), sent=(sent,), notes=())
    return Ground(front=front, worst=attacked)


def column(extra: Extra, name: str, row: int = 0) -> object:
    return extra.rows[row][extra.columns.index(name)]


@dataclass(frozen=True, kw_only=True)
class Leaky:
    """Answers as its ``inner`` defence, but mixes the images of all requests of a batch; with ``lasting``, it also
    remembers the last batch."""

    inner: Defence
    lasting: bool
    seen: list[Images] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def resources(self) -> Resources:
        return self.inner.resources

    def predict(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Prediction:
        return answer_one(self.predict_together, images, generator, budget)

    def predict_together(self, requests: Sequence[Request]) -> list[Outcome]:
        everyone = torch.cat([request.images for request in requests]).mean(0, keepdim=True)
        trace = self.seen[-1] if self.lasting and self.seen else everyone
        if len(requests) > 1:
            self.seen.append(everyone)
        trace = trace if self.lasting or len(requests) > 1 else requests[0].images.mean(0, keepdim=True)
        mixed = [replace(request, images=0.9 * request.images + 0.1 * trace) for request in requests]
        return self.inner.predict_together(mixed)

    def surrogate(self, images: Images, *, generator: torch.Generator, budget: Budget) -> Logits:
        return self.inner.surrogate(images, generator=generator, budget=budget)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_server_that_mixes_its_clients_up_is_caught(
    resources: Resources, digits_test: LabelledImages, store: CellStore, lasting: bool
) -> None:
    honest = build_defence("none", resources)
    found = contamination(
        [ground(honest, digits_test), ground(Leaky(inner=honest, lasting=lasting), digits_test)], store, quiet
    )
    assert found.failed == ("none",)
    assert column(found, "largest change of a score") == 0
    assert column(found, "largest change of a score", 1) > 1e-3  # type: ignore[operator]


@pytest.mark.parametrize("text", ["rmc", "prm+rmc:solver=adam", "webnn"])
def test_defences_keep_their_clients_apart_random_ones_too(
    manipulated_bundle: Path, digits_test: LabelledImages, store: CellStore, text: str
) -> None:
    defence = build_defence(text, Resources.load(Bundle.open(manipulated_bundle)))
    found = contamination([ground(defence, digits_test, random="prm" in text)], store, quiet)
    assert found.failed == ()
    assert column(found, "hostile sets") == (1 if text == "webnn" else 2)  # and those of the cost attack
    assert column(found, "victims") == 2 * IMAGES


def test_unseen_attacks_stay_out_of_the_known_ball_and_in_their_own(
    resources: Resources, digits_bundle: Path, digits_test: LabelledImages, store: CellStore
) -> None:
    copies = Bundle.open(digits_bundle).manifest.copies
    grounds = [ground(build_defence(text, resources), digits_test) for text in ("none", "rmc")]
    made, stands = unseen(grounds, copies, store, quiet)
    levels = dict(zip((str(row[0]) for row in made.rows), (row[3] for row in made.rows), strict=True))
    assert levels["pgd10, 48/255"] == 48
    assert levels["pgd10, 64/255"] == 64
    assert levels["jsma"] > 200  # type: ignore[operator]
    length = next(row for row in made.rows if "L2" in str(row[0]))
    assert 0.9 * 74 / 255 < length[4] <= 74 / 255 + 1e-6  # type: ignore[operator]
    # The base model falls to what was made on it; and clean images are scored as everywhere else.
    assert [row[0] for row in stands.rows] == ["none", "rmc"]
    target = grounds[1].front.target
    clean = answered_right(target.defence, target.pixels, target.labels, generator=torch.Generator().manual_seed(0))
    assert column(stands, "clean", 1) == Share(right=int(clean.sum()), n=IMAGES)
    assert column(stands, "pgd10, 64/255", 0) == Share(right=0, n=IMAGES)
    assert "pgd10 at 32/255" in made.note


def test_the_cost_attack_drives_up_steps_that_depend_on_the_image(
    resources: Resources, digits_test: LabelledImages, store: CellStore
) -> None:
    grounds = [
        ground(build_defence(text, resources), digits_test) for text in ("none", "rmc", "rmc:solver=adam,steps=100")
    ]
    found = cost(grounds, store, quiet)
    assert found is not None
    closed, adam = found.rows  # the base model adapts nothing
    assert closed[2] == closed[4]
    assert adam[4] > adam[2]  # type: ignore[operator]
    assert adam[-2] == pytest.approx(adam[8] / adam[6])  # type: ignore[operator]


def test_what_was_made_is_not_made_again(
    resources: Resources, digits_bundle: Path, digits_test: LabelledImages, store: CellStore
) -> None:
    bundle = Bundle.open(digits_bundle)
    grounds = [ground(build_defence(text, resources), digits_test) for text in ("none", "rmc")]
    first = run_extras(grounds, bundle, store)
    files = {path: path.stat().st_mtime_ns for path in store.path.iterdir()}
    # A machine that has become slower affords fewer images: those that are there stay.
    slower = [replace(one, front=replace(one.front, pace=Pace(answer=5.0, step=5.0))) for one in grounds]
    again = run_extras(slower, bundle, store)
    assert {path: path.stat().st_mtime_ns for path in store.path.iterdir()} == files
    assert [extra.rows for extra in again if extra.kind in ("unseen", "index")] == [
        extra.rows for extra in first if extra.kind in ("unseen", "index")
    ]


def test_a_slow_defence_is_asked_about_fewer_images(resources: Resources, digits_test: LabelledImages) -> None:
    one = ground(build_defence("rmc", resources), digits_test, seconds=0.5)
    assert one.affordable(100) == 5
    assert one.affordable(100, 150) == 2
    assert one.affordable(1e9) == 1


@pytest.mark.parametrize(
    ("vectors", "dimension", "expected"),
    [
        (100_000, 64, (("Flat", 1), ("IVF1265,Flat", 1), ("IVF1265,Flat", 79), ("PQ16", 1))),
        (16_000, 65, (("Flat", 1), ("IVF410,Flat", 1), ("IVF410,Flat", 26), ("PQ13", 1))),
        (700, 7, (("Flat", 1), ("IVF17,Flat", 1), ("PQ7x4", 1))),
        (20, 64, (("Flat", 1),)),
    ],
)
def test_faiss_takes_every_index_without_complaint(
    vectors: int, dimension: int, expected: tuple[tuple[str, int], ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert factories(vectors, dimension) == expected
    if vectors < 1000:
        embeddings = torch.rand(vectors, dimension, generator=torch.Generator().manual_seed(0)).numpy()
        for factory, probes in expected:
            NeighborIndex.build(embeddings, factory=factory, probes=probes)
        assert "WARNING" not in capfd.readouterr().err


def test_an_approximate_index_is_held_against_the_exact_one(
    resources: Resources, digits_bundle: Path, digits_test: LabelledImages, store: CellStore
) -> None:
    bundle = Bundle.open(digits_bundle)
    rmc = ground(build_defence("rmc", resources), digits_test)
    found = approximate([ground(build_defence("none", resources), digits_test), rmc], bundle, store, quiet)
    assert found is not None
    assert [row[0] for row in found.rows] == ["rmc"] * 4
    exact, cells, more, _ = found.rows
    assert exact[1] == "Flat"
    assert exact[3:6] == (100, 100, 100)
    target = rmc.front.target
    for name, pixels in (("clean", target.pixels), ("attacked", rmc.worst)):
        right = answered_right(target.defence, pixels, target.labels, generator=torch.Generator().manual_seed(0))
        assert column(found, name) == Share(right=int(right.sum()), n=IMAGES)
    for row in found.rows:
        *_, attacked, anew = row
        assert isinstance(attacked, Share)
        assert isinstance(anew, Share)
        assert anew.right <= attacked.right
    # By hand: of the exact neighbours of the clean images those that the cells give.
    index = NeighborIndex.build(bundle.embeddings, factory=str(cells[1]).removesuffix(", 1 cell"))
    queries = resources.classifier.embed(target.pixels / 255).detach()
    wanted, got = (one.search(queries, 256).ids for one in (resources.index, index))
    shares = [len(set(w.tolist()) & set(g.tolist())) / 256 for w, g in zip(wanted, got, strict=True)]
    assert cells[3] == pytest.approx(100 * sum(shares) / IMAGES)
    assert 0 < cells[3] < more[3]  # type: ignore[operator]


def test_defences_without_neighbours_are_asked_about_no_index(
    resources: Resources, digits_bundle: Path, digits_test: LabelledImages, store: CellStore
) -> None:
    alone = [ground(build_defence("none", resources), digits_test)]
    assert approximate(alone, Bundle.open(digits_bundle), store, quiet) is None
    assert cost(alone, store, quiet) is None
