"""``mithridate attack``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options as shared
from cli.attack_output import print_result
from cli.output import note, print_json, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attack_client.transfer import Surrogate
    from mithridate.attacks.oracle import Track
    from mithridate.datasets import LabelledImages


def attack(
    url: Annotated[str, typer.Argument(help="The service, as http://127.0.0.1:8000")],
    dataset: shared.DatasetOption,
    out: Annotated[Path, typer.Option(help="Where to write the report: a directory that does not exist yet")],
    model: Annotated[
        Path | None, typer.Option(help="The model the attacker holds: weights (.safetensors) or a bundle")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="The same, for a bundle")] = None,
    arch: shared.ArchOption = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="pgdN or fgsm, made on the attacker's model and sent; or square, simba, nes, boundary, hopskipjump, "
            "rays, noise, which ask the service; repeat (default: pgd20)"
        ),
    ] = None,
    epsilon: shared.EpsilonOption = None,
    defense: Annotated[
        list[str] | None, typer.Option(help="Compare these with none; repeat (default: the service's own)")
    ] = None,
    queries: Annotated[int, typer.Option(help="The most that a black-box attack asks for an image")] = 1000,
    track: Annotated[
        str | None, typer.Option(help="What the service shows: scores or labels (default: the least an attack needs)")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Black-box requests at once; 1 on an idle service gives the same answers every time")
    ] = 1,
    images_a_request: Annotated[int, typer.Option(help="Black-box queries in one request")] = 64,
    scorings: Annotated[int, typer.Option(help="How often to send a final example where answers are random")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out; what was answered is not asked again")] = (
        False
    ),
    fail_under: Annotated[
        float | None, typer.Option(help="Exit with 1 where a defence keeps less accuracy than this, in percent")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second, whether or not they are answered in time")] = 50.0,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer")] = 60.0,
    api_key_env: shared.ApiKeyOption = None,
    image_size: shared.ImageSizeOption = None,
    data_root: shared.DataRootOption = None,
    download: shared.DownloadOption = False,
    threads: shared.ThreadsOption = None,
    seed: shared.SeedOption = 0,
    as_json: shared.JsonOption = False,
) -> None:
    """Send images, clean and attacked, to a running service, and report what it gets right and how fast.

    Two attackers: one makes examples on a model of its own (static transfer), one asks the service itself (black box).
    """
    from attack_client.black_box import BlackBoxPlan
    from attack_client.campaign import run_campaign
    from attack_client.junit import JUNIT, judge, write_junit
    from attack_client.plan import CampaignPlan
    from attack_client.report import write_html
    from attack_client.results import write_results
    from attack_client.workspace import Workspace
    from mithridate.errors import OptionError

    key = shared.api_key(api_key_env)
    transfer, asking = _sort(attack or ["pgd20"])
    source = model or bundle
    if (model and bundle) or (transfer and source is None):
        raise OptionError(
            "give one model that the attacker holds, --model FILE or --bundle DIR; attacks that need none ask the "
            "service itself, as --attack square does"
        )
    if source and not transfer:
        raise OptionError(f"{asking[0]} asks the service and uses no model; leave {source} out, or add --attack pgd20")
    if fail_under is not None and not 0 <= fail_under <= 100:
        raise OptionError(f"fail-under {fail_under:g} is out of range; allowed: 0 to 100 percent")
    shown = _track(track)
    if out.exists() and not resume:  # before the work of loading anything
        raise OptionError(f"{out} exists already; choose another name, remove it first, or go on with --resume")
    shared.use_threads(threads)
    shared.allow_local_code(arch)
    radius = shared.customary_epsilon(dataset, epsilon)
    box = BlackBoxPlan(
        attacks=asking,
        epsilon=radius,
        queries=queries,
        track=shown,
        concurrency=concurrency,
        images_a_request=images_a_request,
        scorings=scorings,
    )
    data = shared.load_data(dataset, data_root=data_root, download=download, image_size=image_size, split="test")
    plan = CampaignPlan(
        url=url,
        data=data,
        surrogate=_surrogate(source, data, arch),
        attacks=transfer,
        black_box=box if asking else None,
        epsilon=radius,
        rate=rate,
        defenses=tuple(defense or ()),
        seed=seed,
        timeout_seconds=timeout,
        command=shlex.join(["mithridate", *sys.argv[1:]]),
        api_key=key,
    )
    workspace = Workspace(out, resume=resume)
    try:
        with progress() as report:
            result = run_campaign(plan, progress=report, workspace=workspace)
        workspace.close()
        write_results(result, out)
        verdicts = judge(result, fail_under=fail_under, judged=defense or result.defenses[1:] or result.defenses)
        write_junit(verdicts, out / JUNIT)
        write_html(result, out / "report.html")
    except BaseException:
        workspace.close()
        if not workspace.discard_if_empty():
            note(
                f"not finished; what was measured so far is in {out / 'outcomes.jsonl'} and beside it: --resume goes on"
            )
        raise
    if as_json:
        print_json(result.summary())
    else:
        print_result(result)
        note(f"report: {out / 'report.html'}")
    bad = [verdict for verdict in verdicts if verdict.error is not None or verdict.failure is not None]
    for verdict in bad:
        note(f"{verdict.attack} on {verdict.defense}: {verdict.error or verdict.failure}")
    if bad:
        raise typer.Exit(1)


def _sort(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The attacks that are made on a model, and those that ask. Raises OptionError for an unknown one."""
    from mithridate.attacks import parse_attack
    from mithridate.attacks.black_box import BLACK_BOX
    from mithridate.errors import OptionError
    from mithridate.types import Epsilon

    transfer, asking = [], []
    for name in dict.fromkeys(names):
        head, colon, options = name.partition(":")
        head = "random-noise" if head == "noise" else head
        if head in BLACK_BOX:
            asking.append(head + colon + options)
            continue
        try:
            parse_attack(name, epsilon=Epsilon(1))
        except OptionError as error:
            raise OptionError(f"{error}, or one that asks the service: {', '.join(BLACK_BOX)}") from error
        transfer.append(name)
    return tuple(transfer), tuple(asking)


def _track(name: str | None) -> Track | None:
    from mithridate.errors import OptionError

    if name is None:
        return None
    if name == "scores":
        return "scores"
    if name == "labels":
        return "labels"
    raise OptionError(f"track {name!r} is none; allowed: scores, labels")


def _surrogate(source: Path | None, data: LabelledImages, arch: str | None) -> Surrogate | None:
    from attack_client.transfer import load_surrogate

    return None if source is None else load_surrogate(source, data, arch=arch)
