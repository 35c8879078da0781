"""``mithridate evaluate``."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli import options as shared
from cli.output import note, percent, print_json, print_table, progress

if TYPE_CHECKING:
    from mithridate.bundle import Bundle
    from mithridate.evaluation.card import Card
    from mithridate.evaluation.findings import DefenceFindings, Evaluation

_WORK = "work"


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="The bundle")],
    dataset: shared.DatasetOption,
    out: Annotated[Path, typer.Option(help="Where to write the report; a directory that does not exist yet")],
    defense: Annotated[
        list[str] | None, typer.Option(help="Attack these and none; repeat (default: all of the published table)")
    ] = None,
    attacks: Annotated[
        Literal["standard", "adaptive", "full"],
        typer.Option(help="standard: transfer, white box, noise; adaptive: and all that knows the defence; full: more"),
    ] = "adaptive",
    epsilon: shared.EpsilonOption = None,
    rounds: Annotated[int, typer.Option(help="Rounds of FPA and GMSA")] = 10,
    steps: Annotated[int, typer.Option(help="Gradient steps of a round; lock-step and hijack take twice as many")] = 40,
    queries: Annotated[int, typer.Option(help="Queries an image of black-box attacks")] = 1000,
    repeats: Annotated[int, typer.Option(help="Answers of a random defence for its score")] = 20,
    gate_images: Annotated[int, typer.Option(help="Images that the gates are probed on")] = 50,
    curve_images: Annotated[int, typer.Option(help="Images of the curve against epsilon; 0: no curve")] = 50,
    minutes: Annotated[
        float,
        typer.Option(help="What an attack on one defence may take; slower ones are made smaller, as is said"),
    ] = 20.0,
    load: Annotated[Path | None, typer.Option(help="summary.json of mithridate load, for the report")] = None,
    card: Annotated[
        bool | None,
        typer.Option(
            "--card/--no-card",
            help="Write the verdict into the bundle; unless given, where no stronger run's card is there",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 where a defence is harmful, not trustworthy or contaminated")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run left in --out")] = False,
    arch: shared.ArchOption = None,
    image_size: shared.ImageSizeOption = None,
    data_root: shared.DataRootOption = None,
    download: shared.DownloadOption = False,
    device: shared.DeviceOption = "cpu",
    threads: shared.ThreadsOption = None,
    seed: shared.SeedOption = 0,
    as_json: shared.JsonOption = False,
) -> None:
    """Attack a bundle's defences, knowing them, and write what they are worth: a report, and a card in the bundle."""
    from mithridate.bundle import Bundle
    from mithridate.defenses import Resources, parse_defence
    from mithridate.errors import OptionError
    from mithridate.evaluation.card import make_card
    from mithridate.evaluation.effort import Effort
    from mithridate.evaluation.evaluate import EvaluationPlan
    from mithridate.evaluation.evaluate import evaluate as run
    from mithridate.evaluation.report import write_report

    if out.resolve().is_relative_to(bundle.resolve()):
        raise OptionError(f"{out} lies in the bundle, which a file more would spoil; choose a place outside {bundle}")
    if out.exists() and not resume:
        raise OptionError(f"{out} exists already; choose another name, or go on with --resume")
    effort = Effort(
        rounds=rounds,
        steps=steps,
        queries=queries,
        repeats=repeats,
        probed=gate_images,
        curve=curve_images,
        seconds=60 * minutes,
    )
    for text in defense or []:
        parse_defence(text)
    shared.use_threads(threads)
    shared.allow_local_code(arch)
    opened = Bundle.open(bundle)
    service = None if load is None else _read_load(load, opened.digest)
    data = shared.load_data(dataset, data_root=data_root, download=download, image_size=image_size, split="test")
    opened.check_fits(data)
    resources = Resources.load(opened, device=shared.check_device(device), allow_factory=arch)
    resources.classifier.quicken()
    plan = EvaluationPlan(
        bundle=opened,
        resources=resources,
        data=data,
        epsilon=shared.customary_epsilon(dataset, epsilon),
        suite=attacks,
        defenses=tuple(defense or ()),
        effort=effort,
        seed=seed,
        command=shlex.join(["mithridate", *sys.argv[1:]]),
    )
    with progress() as report:
        found = run(plan, out / _WORK, progress=report)
    found = dataclasses.replace(found, service=service)
    write_report(found, out)
    if card is not False:
        _write_card(opened, make_card(found), replace=card is True)
    if as_json:
        print_json(json.loads((out / "evaluation.json").read_text()))
    else:
        _print(found)
        note(f"report: {out / 'report.html'}")
    contaminated = any(extra.failed for extra in found.extras)
    if strict and (contaminated or any(one.ruling in ("harmful", "not trustworthy") for one in found.defences)):
        raise typer.Exit(1)


def _write_card(bundle: Bundle, card: Card, *, replace: bool) -> None:
    """A glance with few images must not take the place of what was measured with many."""
    from mithridate.errors import BundleError
    from mithridate.evaluation.card import merge, read_card, weaker, write_card

    try:
        before = read_card(bundle.path, bundle.digest)
    except BundleError:
        before = None
    less = () if before is None or replace else weaker(card, before)
    if less:
        note(f"the bundle keeps its card: this run was weaker ({'; '.join(less)}); --card replaces it")
        return
    fresh = card if before is None else merge(card, before)
    write_card(bundle.path, fresh)
    gone = [entry.name for entry in before.defenses if fresh.defense(entry.name) is None] if before else []
    if gone:
        note(f"no longer on the bundle's card: {', '.join(gone)}")


def _read_load(path: Path, digest: str) -> dict[str, Any]:
    """Of a load test of this very bundle: another's numbers on its report would be taken for its own."""
    from mithridate.errors import InputError
    from mithridate.evaluation.service_load import read_load_summary

    summary = read_load_summary(path)
    tested = summary.service.get("digest")
    if tested != digest:
        raise InputError(f"{path} is of a load test of another bundle, {tested}; this one is {digest}")
    return summary.to_json()


def _print(found: Evaluation) -> None:
    from mithridate.evaluation.findings import Share

    def share(right: tuple[bool, ...]) -> str:
        counted = Share(right=sum(right), n=len(right))
        low, high = counted.interval
        return f"{percent(counted.value)} [{100 * low:.0f}, {100 * high:.0f}]"

    def gates(one: DefenceFindings) -> str:
        failed = [gate.id for gate in one.gates if gate.passed is False]
        return "all passed" if not failed else "failed: " + ", ".join(failed)

    print_table(
        f"{found.images} images, epsilon {found.epsilon}, {found.suite} attacks; worst case image by image",
        ["defence", "clean", "worst case", "over its base", "time", "gates", "verdict"],
        [
            [
                one.name,
                share(one.clean),
                share(one.worst),
                "" if one.gain is None else f"{100 * one.gain.difference:+.1f} points",
                f"x {one.latency_factor:.1f}",
                gates(one),
                one.ruling,
            ]
            for one in found.defences
        ],
    )
    for extra in found.extras:
        if extra.failed:
            note(f"{extra.title}: succeeded, and must not, against {', '.join(extra.failed)}")
    for line in found.notes:
        note(f"made smaller: {line}")
