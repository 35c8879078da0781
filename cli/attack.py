"""``mithridate attack``."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, TextIO

import typer

from cli import options as shared
from cli.output import note, percent, print_json, print_table, progress


def attack(
    url: Annotated[str, typer.Argument(help="The service, as http://127.0.0.1:8000")],
    dataset: shared.DatasetOption,
    out: Annotated[Path, typer.Option(help="Where to write the report: a directory that does not exist yet")],
    model: Annotated[
        Path | None, typer.Option(help="The model the attacker holds: weights (.safetensors) or a bundle")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="The same, for a bundle")] = None,
    arch: shared.ArchOption = None,
    attack: Annotated[list[str] | None, typer.Option(help="pgdN or fgsm; repeat (default: pgd20)")] = None,
    epsilon: shared.EpsilonOption = None,
    defense: Annotated[
        list[str] | None, typer.Option(help="Compare these with none; repeat (default: the service's own)")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second, whether or not they are answered in time")] = 50.0,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer")] = 60.0,
    image_size: shared.ImageSizeOption = None,
    data_root: shared.DataRootOption = None,
    download: shared.DownloadOption = False,
    threads: shared.ThreadsOption = None,
    seed: shared.SeedOption = 0,
    as_json: shared.JsonOption = False,
) -> None:
    """Send images, clean and attacked, to a running service, and report what it gets right and how fast.

    The examples are made on a model the attacker holds (static transfer): a first look, not a verdict.
    """
    from attack_client.campaign import OUTCOMES, CampaignPlan, outcome_line, run_campaign, write_results
    from attack_client.load import Outcome
    from attack_client.report import write_html
    from attack_client.transfer import load_surrogate
    from mithridate.errors import OptionError

    source = model or bundle
    if source is None or (model and bundle):
        raise OptionError("give one model that the attacker holds: --model FILE or --bundle DIR")
    if out.exists():
        raise OptionError(f"{out} exists already; choose another name or remove it first")
    shared.use_threads(threads)
    shared.allow_local_code(arch)
    radius = shared.customary_epsilon(dataset, epsilon)
    data = shared.load_data(dataset, data_root=data_root, download=download, image_size=image_size, split="test")
    plan = CampaignPlan(
        url=url,
        data=data,
        surrogate=load_surrogate(source, data, arch=arch),
        attacks=tuple(dict.fromkeys(attack or ["pgd20"])),
        epsilon=radius,
        rate=rate,
        defenses=tuple(defense or ()),
        seed=seed,
        timeout_seconds=timeout,
        command=shlex.join(["mithridate", *sys.argv[1:]]),
    )
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise OptionError(f"cannot write to {out}: {error.strerror}") from error
    try:
        with progress() as report, ExitStack() as files:
            opened: list[TextIO] = []

            def record(outcome: Outcome) -> None:
                if not opened:  # not before there is something to keep
                    opened.append(files.enter_context((out / OUTCOMES).open("w")))
                opened[0].write(outcome_line(plan, outcome))

            result = run_campaign(plan, progress=report, record=record)
        write_results(result, out)
        write_html(result, out / "report.html")
    except BaseException:
        if any(out.iterdir()):
            note(f"not finished; what was measured so far is in {out / OUTCOMES}")
        else:
            out.rmdir()
        raise
    if as_json:
        print_json(result.summary())
        return
    rows = [
        [
            f"{row.kind} / {row.defense}",
            percent(row.accuracy),
            f"{100 * row.interval.low:.1f} - {100 * row.interval.high:.1f}",
            str(row.images),
            str(sum(row.errors.values())),
            *(f"{value:.1f}" for value in (row.p50_ms, row.p95_ms, row.p99_ms)),
        ]
        for row in result.rows
    ]
    print_table(
        f"{url}: {', '.join(plan.attacks)} at epsilon {radius}, static transfer, {rate:g} requests/s",
        ["images / defence", "accuracy", "95 % interval", "n", "errors", "p50 ms", "p95 ms", "p99 ms"],
        rows,
    )
    note("Static transfer: the attacker does not know the defence. One who does can do better.")
    note(f"report: {out / 'report.html'}")
