"""The first section: the verdict in sentences, and two small drawings for each defence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from mithridate.evaluation.findings import DefenceFindings, Evaluation, Paired, Ruling, Share
from mithridate.evaluation.report.matrix import others
from mithridate.evaluation.wording import percent, points, points_span, span, stated_ruling

_NAMED = 6
"""So many defences are named in a sentence; the others are counted."""


def headline(evaluation: Evaluation) -> list[str]:
    """The verdict in a few sentences; the first is the answer."""
    ruled: dict[Ruling, list[str]] = {}
    for found in others(evaluation):
        ruled.setdefault(stated_ruling(found), []).append(found.name)
    count = len(others(evaluation))
    if not count:
        return ["Only the base model was evaluated."]
    if gains := ruled.get("gain"):
        said = [f"Gain over the base model, {len(gains)} of {count}: {_listed(gains)}."]
    else:
        who = f"none of the {count} defences is" if count > 1 else f"{others(evaluation)[0].name} is not"
        said = [f"No evidence of gain: {who} shown to keep more than the base model."]
    if harmful := ruled.get("harmful"):
        said.append(f"Harmful on this base, {len(harmful)} of {count}: {_listed(harmful)}.")
    if doubtful := ruled.get("not trustworthy"):
        said.append(
            f"Not to be judged, because a check of the evaluation failed, {len(doubtful)} of {count}: "
            f"{_listed(doubtful)}."
        )
    return said


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def reach(evaluation: Evaluation) -> float:
    """Half the width of the axis for differences: what holds all intervals, in (0, 1]."""
    ends = [abs(end) for found in others(evaluation) if found.gain for end in found.gain.interval if math.isfinite(end)]
    longest = max([0.02, *ends])
    return next((step for step in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75) if step >= longest), 1.0)


def difference_bar(paired: Paired, reach: float) -> Markup:
    """A point with its interval on an axis from minus to plus ``reach``, zero marked."""
    low, middle, high = (_on_axis(x, reach) for x in (paired.interval[0], paired.difference, paired.interval[1]))
    spoken = f"difference {points(paired.difference)} points, {points_span(paired)}"
    return Markup(
        '<svg class="bar" viewBox="0 0 200 22" role="img" aria-label="{}"><line class="grid" x1="4" x2="196" y1="11" '
        'y2="11"/><line class="zero" x1="100" x2="100" y1="1" y2="21"/><line class="whisker" x1="{low:.1f}" '
        'x2="{high:.1f}" y1="11" y2="11"/><line class="whisker" x1="{low:.1f}" x2="{low:.1f}" y1="6" y2="16"/>'
        '<line class="whisker" x1="{high:.1f}" x2="{high:.1f}" y1="6" y2="16"/><circle class="dot" cx="{middle:.1f}" '
        'cy="11" r="4.5"/></svg>'
    ).format(spoken, low=low, middle=middle, high=high)


def _on_axis(difference: float, reach: float) -> float:
    if not math.isfinite(difference):
        return 100.0
    return 100 + 96 * min(1.0, max(-1.0, difference / reach))


def standing_bars(base: DefenceFindings, found: DefenceFindings) -> Markup:
    """What base and defence keep in the worst case, one over the other, from 0 to 100 %."""
    rows = []
    for row, (look, name, entry) in enumerate((("base", base.name, base), ("mine", found.name, found))):
        share = Share(right=sum(entry.worst), n=len(entry.worst))
        value = share.value if share.n else 0.0
        y = 4 + 17 * row
        rows.append(
            Markup(
                '<g class="{}"><title>{}</title><rect class="track" x="0" y="{y}" width="300" height="11"/>'
                '<rect class="fill" x="0" y="{y}" width="{:.1f}" height="11"/><line class="range" x1="{:.1f}" '
                'x2="{:.1f}" y1="{mid}" y2="{mid}"/></g>'
            ).format(
                look,
                f"{name}: {percent(value)} ({span(share.interval)})",
                300 * value,
                300 * share.interval.low,
                300 * share.interval.high,
                y=y,
                mid=y + 5.5,
            )
        )
    return Markup('<svg class="standing" viewBox="0 0 300 36" aria-hidden="true">{}</svg>').format(
        Markup("").join(rows)
    )
