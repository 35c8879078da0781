"""Made-up answers to the questions beside the matrix, as wide as they get."""

from __future__ import annotations

from evaluation_helpers import HOSTILE, LONG

from mithridate.evaluation.findings import Extra, Share

COST = Extra(
    kind="cost",
    title="Cost attack",
    columns=(
        *("defence", "images", "steps clean, mean", "steps clean, p99", "steps attacked, mean", "steps attacked, p99"),
        *("ms clean, median", "ms clean, p99", "ms attacked, median", "ms attacked, p99"),
        *("median attacked / clean", "p99 attacked / clean"),
    ),
    rows=tuple((name, 1250, 40.0, 40, 97.5, 100, 12.34, 17.0, 1234.5, 1300.0, 17.25, 20.0) for name in ("rmc", LONG)),
    note="one at a time",
)
APART = Extra(
    kind="contamination",
    title="One client's images against another's",
    columns=("defence", "changed answers", "largest change of a score"),
    rows=(("rmc", 0, 6e-08), (HOSTILE, 3, 0.25)),
    note="must fail",
    failed=(HOSTILE,),
)
STANDS = Extra(
    kind="unseen",
    title="Never seen",
    columns=("defence", "clean", *(f"pgd{steps}, 16/255" for steps in range(40, 45)), "carlini-wagner", "jsma"),
    rows=(
        ("none", *[Share(right=45, n=50)] * 7, None),
        ("rmc", *[Share(right=0, n=50)] * 7, Share(right=0, n=0)),
    ),
    note="static",
)

MADE = Extra(
    kind="unseen",
    title="What was made",
    columns=("attack on the base model", "settings", "images", "pixel changes by, levels", "L2", "changed, %"),
    rows=(("pgd40, 12/255", f"PGD(epsilon=Epsilon(levels=12), steps=40, {LONG})", 50, 12.0, 1.93, 98.7),),
    note=HOSTILE,
)
