"""One load test of one service: from a plan to a summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from attack_client.client import Client
from attack_client.generator import Connections, Payload, Sample, Shooting, Traffic, closed_loop, open_loop
from attack_client.load_plan import MAX_RATE, MAX_REQUESTS, Files, LoadPlan, check_requests
from attack_client.load_statistics import summarise
from attack_client.ramp import find_knee
from attack_client.wire import Target
from mithridate.errors import InputError, OptionError
from mithridate.evaluation.environment import environment
from mithridate.evaluation.service_load import CLEAN, Knee, LoadStep, LoadSummary

SAMPLES = "samples.jsonl"

Record = Callable[[int, Sequence[Sample]], None]
Progress = Callable[[str, int, int], None]


def run_load_test(
    plan: LoadPlan,
    files: Files,
    *,
    progress: Progress = lambda phase, done, total: None,
    record: Record = lambda step, samples: None,
) -> LoadSummary:
    """Asks the service who it is, sends one image as a trial, then loads it.

    ``record`` is given each step's samples as it ends, so that an interruption loses only the step it hits. Raises
    InputError where the service does not answer or serves other images, ServiceError where it refuses the trial.
    """
    service = _introduce(plan, files)
    traffic = _traffic(plan, files)
    steps: list[LoadStep] = []
    knee: Knee | None = None

    def measure(rate: float | None) -> LoadStep:
        if rate is not None:
            check_requests(plan, rate)
        shooting = _shoot(plan, traffic, rate, len(steps), progress)
        record(len(steps), shooting.samples)
        steps.append(_step(plan, shooting, rate))
        return steps[-1]

    if plan.clients is not None:
        measure(None)
    elif plan.ramp or len(plan.rates) > 1:
        ceiling = min(MAX_RATE, MAX_REQUESTS / (plan.warmup_seconds + plan.seconds))
        knee = find_knee(measure, plan.rates, doubling=plan.ramp, ceiling=ceiling)[1]
    else:
        measure(plan.rates[0])
    return LoadSummary(
        command=plan.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        url=plan.url,
        service=service,
        traffic=files.described | ({"adversarial_share": plan.adversarial_share} if files.adversarial else {}),
        model="closed" if plan.clients else "open",
        arrivals=None if plan.clients else "poisson" if plan.poisson else "constant",
        objective_ms=plan.objective_ms,
        connections=plan.clients or plan.connections,
        timeout_seconds=plan.timeout_seconds,
        warmup_seconds=plan.warmup_seconds,
        seed=plan.seed,
        environment={key: str(value) for key, value in environment().items()},
        steps=tuple(steps),
        knee=knee,
        notes=tuple(_notes(plan, steps)),
    )


def sample_line(step: int, sample: Sample) -> str:
    """One line of ``samples.jsonl``; milliseconds, ``due_ms`` below 0 in the warm-up."""
    started = sample.taken if sample.sent is None else sample.sent
    times = {
        "due_ms": sample.due,
        "late_ms": sample.taken - sample.due,
        "waited_ms": started - sample.taken,
        "latency_ms": sample.done - sample.due,
    }
    rounded = {name: round(1000 * value, 3) for name, value in times.items()}
    what = {"step": step, "kind": sample.kind, "image": sample.image, "status": sample.status or None}
    return json.dumps({**what, **rounded, "error": sample.error}) + "\n"


def _introduce(plan: LoadPlan, files: Files) -> dict[str, str]:
    with Client(plan.url, timeout_seconds=plan.timeout_seconds, api_key=plan.api_key) as client:
        service, offered = client.bundle(), client.defenses()
        if plan.defense is not None and plan.defense not in offered.names:
            raise OptionError(f"the service does not offer {plan.defense!r}; allowed: {', '.join(offered.names)}")
        if files.image_shape is not None and files.image_shape != service.image_shape:
            raise InputError(
                f"{plan.url} serves {service.image_shape} images; {files.described['source']} has {files.image_shape}"
            )
        client.predict(files.clean[0], defense=plan.defense)
    defense = plan.defense or offered.default
    return {"name": service.name, "digest": service.digest, "arch": service.arch, "defense": defense}


def _traffic(plan: LoadPlan, files: Files) -> Traffic:
    target = Target.parse(plan.url, api_key=plan.api_key)

    def payloads(kind: str, contents: Sequence[bytes]) -> tuple[Payload, ...]:
        return tuple(
            Payload(kind, number, target.predict(content, defense=plan.defense))
            for number, content in enumerate(contents)
        )

    adversarial = payloads(files.attack, files.adversarial)
    return Traffic(
        clean=payloads(CLEAN, files.clean),
        adversarial=adversarial,
        share=plan.adversarial_share if adversarial else 0.0,
    )


def _shoot(plan: LoadPlan, traffic: Traffic, rate: float | None, number: int, progress: Progress) -> Shooting:
    name = f"{plan.clients} clients" if rate is None else f"{rate:.4g}/s"
    connections = Connections(
        target=Target.parse(plan.url, api_key=plan.api_key),
        count=plan.clients or plan.connections,
        timeout_seconds=plan.timeout_seconds,
    )

    def report(done: int, total: int) -> None:
        progress(f"{number + 1}: {name}", done, total)

    if rate is None:
        return closed_loop(
            connections,
            traffic,
            seconds=plan.seconds,
            warmup_seconds=plan.warmup_seconds,
            most=MAX_REQUESTS,
            seed=plan.seed,
            progress=report,
        )
    return open_loop(
        connections,
        traffic,
        rate=rate,
        seconds=plan.seconds,
        warmup_seconds=plan.warmup_seconds,
        poisson=plan.poisson,
        seed=plan.seed + number,
        progress=report,
    )


def _step(plan: LoadPlan, shooting: Shooting, rate: float | None) -> LoadStep:
    return summarise(
        shooting.samples,
        set_rate=rate,
        clients=plan.clients,
        seconds=plan.seconds,
        objective_ms=plan.objective_ms,
        cpu_share=shooting.cpu_share,
        seed=plan.seed,
    )


def _notes(plan: LoadPlan, steps: Sequence[LoadStep]) -> list[str]:
    notes = []
    for step in steps:
        at = f"At {step.set_rate:.4g} requests/s" if step.set_rate else f"With {step.clients} clients"
        if step.generator.limited:
            notes.append(f"{at} the generator, not only the service, was measured: {step.generator.why}.")
        if step.set_rate and step.sustained and step.waited_share > 0.05:
            notes.append(
                f"{at} {100 * step.waited_share:.0f} % of the requests waited for one of {plan.connections} "
                "connections; more of them would show more of what the service can do."
            )
    if plan.clients is not None:
        notes.append("Closed model: clients wait for slow answers, so these latencies say nothing about users.")
    return notes
