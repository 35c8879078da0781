"""One attack on one service, from data set to results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from attack_client.answers import BundleDescription
from attack_client.black_box import Target, attack_all
from attack_client.cases import Case
from attack_client.client import AsyncClient, Client
from attack_client.load import CLEAN, Outcome, Shot, fire
from attack_client.oracle import Session
from attack_client.own_card import read_own_card
from attack_client.plan import CampaignPlan
from attack_client.results import CampaignResult, count
from attack_client.retry import LONGEST_WAIT_SECONDS, PATIENT, RetryPolicy
from attack_client.transfer import Crafted, craft
from attack_client.workspace import Workspace
from mithridate.errors import InputError, OptionError
from mithridate.images import encode_png

UNDEFENDED = "none"

_NOT_WHEN_REFUSED = RetryPolicy(cap_seconds=LONGEST_WAIT_SECONDS, statuses=frozenset({503}))
"""A refusal concerns all images that are still to be sent: ``fire`` waits for it."""

Progress = Callable[[str, int, int], None]


def run_campaign(plan: CampaignPlan, *, progress: Progress, workspace: Workspace | None = None) -> CampaignResult:
    """Asks the service who it is, makes the examples, sends all of them, attacks it, and counts.

    ``workspace`` keeps each answer as it comes, and knows those from before an interruption; black-box attacks need
    one. Raises InputError where the service does not answer or serves other images than ``plan.data``.
    """
    with Client(plan.url, timeout_seconds=plan.timeout_seconds, retry=PATIENT, api_key=plan.api_key) as client:
        client.wait_until_ready(plan.timeout_seconds)
        service, offered = client.bundle(), client.defenses()
        own_card = read_own_card(client, service.digest)
    _check_service(service, plan)
    defenses = _choose(plan.defenses or (offered.default,), offered.names)
    known = workspace.begin(plan.identity(service, defenses)) if workspace else []
    crafted = _craft(plan, progress)
    if workspace is not None:
        for made in crafted:  # what was sent before must be what is sent now
            workspace.settle(f"examples of {made.attack}", made.digest)
    outcomes = _send(plan, _shots(plan, defenses, crafted), known, workspace, progress, bundle=service.digest)
    kinds = (CLEAN, *plan.attacks)
    return CampaignResult(
        plan=plan,
        service=service,
        defenses=defenses,
        rows=tuple(count(plan.data, outcomes, defense, kind) for kind in kinds for defense in defenses),
        outcomes=tuple(outcomes),
        crafted=tuple(crafted),
        cases=tuple(_ask(plan, service, defenses, workspace, progress)),
        descriptions={entry.name: entry.description for entry in offered.defenses},
        own_card=own_card,
    )


def _craft(plan: CampaignPlan, progress: Progress) -> list[Crafted]:
    crafted: list[Crafted] = []
    if plan.surrogate is None:
        return crafted
    for number, attack in enumerate(plan.attacks):
        progress("attack", number, len(plan.attacks))
        crafted.append(craft(plan.surrogate, plan.data, attack=attack, epsilon=plan.epsilon, seed=plan.seed))
    progress("attack", len(plan.attacks), len(plan.attacks))
    return crafted


def _ask(
    plan: CampaignPlan,
    service: BundleDescription,
    defenses: Sequence[str],
    workspace: Workspace | None,
    progress: Progress,
) -> list[Case]:
    asked = plan.black_box
    if asked is None or not asked.attacks:
        return []
    if workspace is None:
        raise OptionError("black-box attacks keep what they asked: give them a directory to write to")
    with Session(
        plan.url,
        timeout_seconds=plan.timeout_seconds,
        connections=asked.concurrency,
        retry=PATIENT,
        api_key=plan.api_key,
    ) as session:
        target = Target(session=session, service=service, data=plan.data, seed=plan.seed, workspace=workspace)
        return attack_all(asked, target, defenses, progress)


def _send(
    plan: CampaignPlan,
    shots: Sequence[Shot],
    known: Sequence[Outcome],
    workspace: Workspace | None,
    progress: Progress,
    *,
    bundle: str,
) -> list[Outcome]:
    """What came of all ``shots``; those that are ``known`` are not sent again."""
    truth = plan.data.labels
    places = {(shot.image, shot.kind, shot.defense) for shot in shots}
    before = {(o.image, o.kind, o.defense): o for o in known if (o.image, o.kind, o.defense) in places}

    def record(outcome: Outcome) -> None:
        if workspace is not None:
            workspace.record(outcome, int(truth[outcome.image]))

    async def send() -> list[Outcome]:
        async with AsyncClient(
            plan.url, timeout_seconds=plan.timeout_seconds, retry=_NOT_WHEN_REFUSED, api_key=plan.api_key
        ) as client:
            return await fire(
                client,
                [shot for shot in shots if (shot.image, shot.kind, shot.defense) not in before],
                rate=plan.rate,
                seed=plan.seed,
                progress=lambda done, total: progress("send", done, total),
                record=record,
                bundle=bundle,
            )

    return [*before.values(), *asyncio.run(send())]


def _shots(plan: CampaignPlan, defenses: Sequence[str], crafted: Sequence[Crafted]) -> list[Shot]:
    sets = [(CLEAN, plan.data.images), *((c.attack, c.pixels) for c in crafted)]
    return [
        Shot(image=number, kind=kind, defense=defense, content=content)
        for kind, images in sets
        for number, content in enumerate(map(encode_png, images))
        for defense in defenses
    ]


def _check_service(service: BundleDescription, plan: CampaignPlan) -> None:
    if service.image_shape != plan.data.image_shape or service.classes != plan.data.classes:
        raise InputError(
            f"{plan.url} serves {service.image_shape} images of {len(service.classes)} classes "
            f"({', '.join(service.classes[:3])} ...); {plan.data.spec} has {plan.data.image_shape} of "
            f"{len(plan.data.classes)} ({', '.join(plan.data.classes[:3])} ...)"
        )


def _choose(wanted: Sequence[str], offered: Sequence[str]) -> tuple[str, ...]:
    """The base model first, always; then what is asked for."""
    unknown = [name for name in wanted if name not in offered]
    if unknown:
        raise OptionError(f"the service does not offer {unknown[0]!r}; allowed: {', '.join(offered)}")
    if UNDEFENDED not in offered:
        raise OptionError(f"the service does not offer {UNDEFENDED!r}, so there is nothing to compare with")
    return tuple(dict.fromkeys((UNDEFENDED, *wanted)))
