"""The proof of the gates: what is broken on purpose is flagged and falls, and what does nothing is neither."""

from __future__ import annotations

import pytest
import torch

from mithridate.datasets import LabelledImages
from mithridate.defenses import Defence, Resources, build_defence
from mithridate.evaluation.findings import Gate
from mithridate.evaluation.paired import worst_case
from mithridate.evaluation.planted import BROKEN, attack_planted, planted
from mithridate.evaluation.probes import ProbeSettings
from mithridate.evaluation.repeated import score
from mithridate.evaluation.trust import Tried, run_gates
from mithridate.evaluation.verdict import Verdict, rule
from mithridate.types import Epsilon, Labels, Pixels

IMAGES, EPSILON = 40, Epsilon(32)
SETTINGS = ProbeSettings(images=IMAGES, steps=20, unbounded_steps=60, noise=5, batch=IMAGES)

Measured = tuple[tuple[bool, ...], tuple[bool, ...], list[Tried], tuple[Gate, ...]]


@pytest.fixture(scope="module")
def digits(digits_test: LabelledImages) -> tuple[Pixels, Labels]:
    return torch.from_numpy(digits_test.images[:IMAGES]), torch.from_numpy(digits_test.labels[:IMAGES])


def measure(defence: Defence, resources: Resources, digits: tuple[Pixels, Labels]) -> Measured:
    base = build_defence("none", resources)
    clean = score(defence, *digits, repeats=1, seed=0).right
    tried = attack_planted(defence, base, *digits, epsilon=EPSILON, seed=0, queries=250)
    found = run_gates(defence, base, *digits, tried, epsilon=EPSILON, seed=0, settings=SETTINGS)
    return clean, worst_case([clean, *(t.right for t in tried)]), tried, found


@pytest.fixture(scope="module")
def base(resources: Resources, digits: tuple[Pixels, Labels]) -> Measured:
    return measure(build_defence("none", resources), resources, digits)


def judged(name: str, of: Measured, base: Measured) -> Verdict:
    return rule(
        name,
        clean=of[0],
        worst=of[1],
        base_clean=base[0],
        base_worst=base[1],
        gates=of[3],
        base_gates=base[3],
        seed=0,
    )


def flags(measured: Measured) -> set[str]:
    return {gate.id for gate in measured[3] if gate.passed is False}


EXPECTED = {
    "gradient-killer": {"G1", "G4", "G5", "G6", "G7"},
    "quantiser": {"G1", "G4", "G5", "G6", "G7"},
    "temperature": {"G1", "G6", "G7"},
    "hidden-randomness": {"G12"},
}
"""At least these."""


@pytest.mark.parametrize("name", BROKEN)
def test_broken_on_purpose_is_flagged_and_falls(
    name: str, resources: Resources, digits: tuple[Pixels, Labels], base: Measured
) -> None:
    found = measure(planted(name, resources), resources, digits)
    assert flags(found) >= EXPECTED[name]
    assert sum(found[0]) >= 0.8 * IMAGES  # it looks like a working classifier
    assert sum(found[1]) <= sum(base[1]) + 0.1 * IMAGES  # and stands no longer than its base, to a few lucky draws
    assert judged(name, found, base).ruling == "not trustworthy"
    fallen = [t for t in found[2] if t.kind in ("black-box", "transfer", "white-box")]
    lucky = 0.1 if name == "hidden-randomness" else 0.0  # one draw says right of some that most draws misread
    assert min(sum(t.right) for t in fallen) <= (0.15 + lucky) * IMAGES


def test_gradients_alone_would_have_called_it_strong(resources: Resources, digits: tuple[Pixels, Labels]) -> None:
    """Why gates: against PGD on what it shows, the gradient killer keeps nearly everything."""
    base = build_defence("none", resources)
    killer = planted("gradient-killer", resources)
    tried = attack_planted(killer, base, *digits, epsilon=EPSILON, seed=0, queries=2)
    assert min(sum(t.right) for t in tried if t.kind == "white-box") >= 0.85 * IMAGES


def test_what_does_nothing_gains_nothing_and_is_not_flagged(
    resources: Resources, digits: tuple[Pixels, Labels], base: Measured
) -> None:
    found = measure(planted("identity", resources), resources, digits)
    assert flags(found) == flags(base) == set()
    assert found[1] == base[1]
    verdict = judged("identity", found, base)
    assert (verdict.ruling, verdict.below_base) == ("no evidence of gain", False)


def test_all_gates_are_asked_in_order_and_each_says_why(base: Measured) -> None:
    numbers = [int(gate.id.removeprefix("G")) for gate in base[3]]
    assert numbers == sorted(set(numbers))
    assert all(gate.evidence for gate in base[3])
    assert {gate.id for gate in base[3] if gate.passed is None} == {"G11"}  # it always answers the same


def test_a_real_random_defence_is_not_flagged_for_nothing(
    resources: Resources, digits: tuple[Pixels, Labels], base: Measured
) -> None:
    """Random resizing falls to an attack that resizes too: nothing is hidden, so nothing is flagged."""
    found = measure(build_defence("randomization:size=keep,attack_passes=2", resources), resources, digits)
    assert flags(found) == set()
    assert sum(found[1]) <= sum(base[1]) + 3
