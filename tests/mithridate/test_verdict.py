"""One word for a defence: never a gain without proof, never silence about harm."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.evaluation.findings import Gate
from mithridate.evaluation.verdict import BELOW_BASE, Verdict, rule

FAILED = Gate(id="G6", name="there are gradients", passed=False, evidence="200 of 200 gradients are zero")
PASSED = Gate(id="G3", name="many steps beat one", passed=True, evidence="0 of 100")
SKIPPED = Gate(id="G4", name="no black box", passed=None, evidence="not run")


def ruled(worst: int, base: int, *gates: Gate, n: int = 200, name: str = "rmc", **more: tuple[Gate, ...]) -> Verdict:
    """The defence stands on the first ``worst`` images, its base on the first ``base``."""
    return rule(
        name,
        clean=[True] * n,
        worst=[i < worst for i in range(n)],
        base_clean=[True] * n,
        base_worst=[i < base for i in range(n)],
        gates=gates,
        seed=0,
        **more,
    )


def test_the_words() -> None:
    assert ruled(100, 70, PASSED, SKIPPED).ruling == "gain"
    assert ruled(71, 70, PASSED).ruling == "no evidence of gain"
    assert ruled(70, 70).ruling == "no evidence of gain"
    assert ruled(50, 70, PASSED).ruling == "harmful"
    assert ruled(50, 70, name="none").ruling == "base"


def test_a_failed_gate_leaves_no_word_but_harmful() -> None:
    for worst in (200, 100, 70):
        found = ruled(worst, 70, PASSED, FAILED)
        assert found.ruling == "not trustworthy"
        assert any("200 of 200 gradients are zero" in reason for reason in found.reasons)
    assert ruled(50, 70, FAILED).ruling == "harmful"


def test_four_images_are_no_gain() -> None:
    found = ruled(74, 70)
    assert found.gain is not None
    assert found.gain.interval[0] > 0
    assert found.ruling == "no evidence of gain"
    assert any("only 4 images decide it" in reason for reason in found.reasons)


def test_more_than_a_point_below_is_said_even_where_it_is_not_shown() -> None:
    found = ruled(67, 70)
    assert found.ruling == "no evidence of gain"
    assert found.below_base
    assert any(BELOW_BASE in reason for reason in found.reasons)
    for worst in (68, 70, 90):
        assert not ruled(worst, 70).below_base


def test_the_sentences_carry_counts_and_intervals() -> None:
    text = " ".join(ruled(100, 70).reasons)
    assert "50.0 % of 200 images (95 % 43.1 to 56.9)" in text
    assert "+15.0 points (95 % interval +10.0 to +20.0; 30 images gained, 0 lost of 200; McNemar p = 1.9e-09)" in text


def test_a_base_that_was_not_attacked_well_is_named() -> None:
    assert any("base failed G6" in reason for reason in ruled(60, 70, base_gates=(FAILED,)).reasons)
    assert not any("base failed" in reason for reason in ruled(60, 70, base_gates=(PASSED,)).reasons)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80), st.booleans())
def test_never_a_gain_without_proof(answers: list[tuple[bool, bool]], trusted: bool) -> None:
    worst, base_worst = zip(*answers, strict=True)
    clean = [True] * len(answers)
    found = rule(
        "rmc",
        clean=clean,
        worst=worst,
        base_clean=clean,
        base_worst=base_worst,
        gates=(PASSED,) if trusted else (FAILED,),
        seed=1,
    )
    assert found.gain is not None
    if found.ruling == "gain":
        assert trusted
        assert sum(worst) > sum(base_worst)
        assert found.gain.interval[0] > 0
        assert found.gain.p <= 0.05
    if found.gain.interval[1] < 0:
        assert found.ruling == "harmful"
    assert found.below_base == (sum(worst) - sum(base_worst) < -0.01 * len(worst))
