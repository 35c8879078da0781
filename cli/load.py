"""``mithridate load``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options as shared
from cli.output import note, percent, print_json, print_table, progress

if TYPE_CHECKING:
    from attack_client.generator import Sample
    from attack_client.load_plan import Files, LoadPlan
    from mithridate.evaluation.service_load import LoadSummary

_PERCENTILES = {"p50": "p50", "p95": "p95", "p99": "p99", "p999": "p99.9"}
"""As they are called in a summary and by people."""


def load(
    url: Annotated[str, typer.Argument(help="The service, as http://127.0.0.1:8000")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write summary, samples and report: a directory that is not there yet")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Images to send, as in digits[test,:64]")] = None,
    images: Annotated[list[Path] | None, typer.Option(help="Or image files, sent as they are; repeat")] = None,
    rate: Annotated[
        str | None, typer.Option(help="Requests a second (default: 50); several, as 10,20,40, look for the knee")
    ] = None,
    ramp: Annotated[bool, typer.Option("--ramp", help="Double the rate until the service saturates; find the knee")] = (
        False
    ),
    clients: Annotated[
        int | None, typer.Option(help="Instead of a rate: so many clients that each wait for their answer")
    ] = None,
    poisson: Annotated[bool, typer.Option("--poisson", help="Random arrivals, not evenly spaced ones")] = False,
    duration: Annotated[float, typer.Option(help="Seconds for each rate")] = 10.0,
    warmup: Annotated[float, typer.Option(help="Seconds before that which do not count")] = 1.0,
    objective_ms: Annotated[float, typer.Option(help="An answer within this time is a good one")] = 250.0,
    connections: Annotated[int, typer.Option(help="Open at once, at most (open model)")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer, from when it was due")] = 10.0,
    attack: Annotated[str | None, typer.Option(help="Send adversarial images too: pgdN or fgsm")] = None,
    adversarial_share: Annotated[float, typer.Option(help="Share of the requests that is adversarial")] = 0.5,
    model: Annotated[Path | None, typer.Option(help="The model the attacker holds: weights or a bundle")] = None,
    bundle: Annotated[Path | None, typer.Option(help="The same, for a bundle")] = None,
    arch: shared.ArchOption = None,
    epsilon: shared.EpsilonOption = None,
    defense: Annotated[str | None, typer.Option(help="The defence to ask for (default: the service's own)")] = None,
    api_key_env: shared.ApiKeyOption = None,
    image_size: shared.ImageSizeOption = None,
    data_root: shared.DataRootOption = None,
    download: shared.DownloadOption = False,
    threads: shared.ThreadsOption = None,
    seed: shared.SeedOption = 0,
    as_json: shared.JsonOption = False,
) -> None:
    """Load a running service at a set rate, and report how long its users would wait.

    Exit code 1: nothing was answered, or not even the lowest rate was sustained.
    """
    from attack_client.load_plan import LoadPlan, from_dataset, from_files
    from attack_client.transfer import check_radius, craft, load_surrogate
    from mithridate.errors import OptionError

    if bool(dataset) == bool(images):
        raise OptionError("say what to send: either --dataset SPEC or --images FILE")
    if attack is None and (model or bundle):
        raise OptionError("a model to attack needs an --attack, as in pgd20")
    if attack is not None and (images or bool(model) == bool(bundle)):
        raise OptionError("--attack needs a --dataset and one model that the attacker holds: --model or --bundle")
    if out is not None and out.exists():
        raise OptionError(f"{out} exists already; choose another name or remove it first")
    if clients is not None and rate is not None:
        raise OptionError("give either --rate (open model) or --clients (closed model)")
    radius = shared.customary_epsilon(dataset, epsilon) if dataset and attack else None
    if radius is not None:
        check_radius(radius)

    key = shared.api_key(api_key_env)
    plan = LoadPlan(
        url=url,
        rates=() if clients is not None else shared.numbers("--rate", rate) or (50.0,),
        clients=clients,
        ramp=ramp,
        poisson=poisson,
        seconds=duration,
        warmup_seconds=warmup,
        objective_ms=objective_ms,
        connections=connections,
        timeout_seconds=timeout,
        adversarial_share=adversarial_share,
        defense=defense,
        seed=seed,
        command=shlex.join(["mithridate", *sys.argv[1:]]),
        api_key=key,
    )
    if images:
        files = from_files(images)
    else:
        assert dataset is not None
        shared.use_threads(threads)
        shared.allow_local_code(arch)
        data = shared.load_data(dataset, data_root=data_root, download=download, image_size=image_size, split="test")
        if attack is None or radius is None:
            files = from_dataset(data)
        else:
            source = model or bundle
            assert source is not None
            surrogate = load_surrogate(source, data, arch=arch)
            note(f"making adversarial copies of {len(data)} images with {attack}")
            crafted = craft(surrogate, data, attack=attack, epsilon=radius, seed=seed)
            files = from_dataset(data, crafted, surrogate=surrogate.source)
    summary = _run(plan, files, out)
    if as_json:
        print_json(summary.to_json())
    else:
        _print(summary)
        if out is not None:
            note(f"report: {out / 'report.html'}")
    failed = summary.knee.sustained is None if summary.knee else summary.steps[0].sustained is False
    if failed or not any(step.answered for step in summary.steps):
        raise typer.Exit(1)


def _run(plan: LoadPlan, files: Files, out: Path | None) -> LoadSummary:
    """Runs the test; with ``out``, each step's samples are kept as it ends."""
    from attack_client.load_report import write_load_html
    from attack_client.load_test import SAMPLES, run_load_test, sample_line
    from attack_client.results import write_whole
    from mithridate.errors import OptionError

    if out is None:
        with progress() as report:
            return run_load_test(plan, files, progress=report)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise OptionError(f"cannot write to {out}: {error.strerror}") from error

    def record(step: int, samples: Sequence[Sample]) -> None:
        with (out / SAMPLES).open("a") as lines:
            lines.writelines(sample_line(step, sample) for sample in samples)

    try:
        with progress() as report:
            summary = run_load_test(plan, files, progress=report, record=record)
        write_whole(out / "summary.json", json.dumps(summary.to_json(), indent=1) + "\n")
        write_load_html(summary, out / "report.html")
    except BaseException:
        if any(out.iterdir()):
            note(f"not finished; the steps measured so far are in {out / SAMPLES}")
        else:
            out.rmdir()
        raise
    return summary


def _say_what_is_missing(summary: LoadSummary) -> None:
    """One line, of the step that would take longest: what holds for it is enough for the others."""
    from attack_client.load_statistics import ENOUGH_BEYOND, seconds_needed

    step = max(summary.steps, key=lambda step: max(seconds_needed(step).values(), default=0))
    if needed := seconds_needed(step):
        at = f"{step.set_rate:.4g}/s" if step.set_rate else f"{step.clients} clients"
        durations = ", ".join(f"{_PERCENTILES[name]} {seconds}" for name, seconds in needed.items())
        note(f'"-": fewer than {ENOUGH_BEYOND} samples beyond; --duration that is long enough at {at}: {durations}')


def _print(summary: LoadSummary) -> None:
    from attack_client.load_report import milliseconds, representative

    how = "closed model" if summary.arrivals is None else f"open model, {summary.arrivals} arrivals"
    rows = [
        [
            f"{step.set_rate:.4g}" if step.set_rate else f"{step.clients} clients",
            "" if step.rate_deviation is None else f"{100 * step.rate_deviation:+.2f} %",
            f"{step.answered_rate:.4g}",
            percent(step.goodput_share),
            *(milliseconds(getattr(step.latency, name)) for name in _PERCENTILES),
            str(step.latency.beyond_p999),
            str(sum(step.errors.values())),
            milliseconds(step.generator.p99),
        ]
        for step in summary.steps
    ]
    print_table(
        f"{summary.url}: {summary.service['defense']}, {how}, objective {summary.objective_ms:g} ms",
        ["set/s", "held", "answered/s", "in time", "p50 ms", "p95", "p99", "p99.9", "beyond", "errors", "late p99"],
        rows,
    )
    for step in summary.steps:
        if step.errors:
            name = f"{step.set_rate:.4g}/s" if step.set_rate else f"{step.clients} clients"
            note(f"errors at {name}: {', '.join(f'{kind} {count}' for kind, count in step.errors.items())}")
    _say_what_is_missing(summary)
    shown = representative(summary)
    for name, ratio in shown.adversarial_to_clean.items():
        note(f"adversarial / clean at {name}: {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}, 95 %)")
    for line in (*summary.notes, *((summary.knee.words,) if summary.knee else ())):
        note(line)
