"""One self-contained page about a load test: no script, nothing to load."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader

from attack_client.load_figures import histogram, latency_by_rate
from attack_client.results import write_whole
from mithridate.evaluation.service_load import LoadStep, LoadSummary


def write_load_html(summary: LoadSummary, path: Path) -> None:
    """Writes the page."""
    # Names come from the service under load, which may not be a friend.
    environment = Environment(loader=PackageLoader("attack_client"), autoescape=True)
    environment.filters["ms"] = milliseconds
    shown = representative(summary)
    write_whole(
        path,
        environment.get_template("load.html.jinja").render(
            summary=summary,
            shown=shown,
            by_rate=latency_by_rate(summary),
            histogram=histogram(shown),
        ),
    )


def representative(summary: LoadSummary) -> LoadStep:
    """The step to look at closely: the knee where one was found, else the last."""
    if summary.knee and summary.knee.sustained:
        return next(s for s in reversed(summary.steps) if s.set_rate == summary.knee.sustained and s.sustained)
    return summary.steps[-1]


def milliseconds(value: float | None) -> str:
    """Three digits are enough of a latency; "-" where there were too few samples."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
