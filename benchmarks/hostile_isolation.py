"""Whether one client's answers depend on what others send: 10,000 hostile requests beside a victim.

    python -m benchmarks.hostile_isolation [--bundle BUNDLE] [--requests 10000] [--clients 4]

A service with a fixed seed answers the victim's images alone, with every defence and over both protocols, all scores
wanted. Then a fresh one answers them again and again while four hostile clients send attacked images for all defences,
junk, pixel bombs, bodies that are too large and tensors that are none, or leave in the middle; and once more when they
have gone. Every answer must have the class it had alone and scores within 1e-4, and no hostile request may get another
status than its kind allows; else the exit code is 1. The service gets one thread, so that answers are rounded alike.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks import results
from benchmarks.digits import bundle_or_digits
from benchmarks.hostile_requests import DEFENCES, ENDLESS, MAX_BODY, Hostile
from cli.demo import running_service
from cli.output import print_table
from mithridate.attacks import parse_attack
from mithridate.bundle import Bundle
from mithridate.datasets import load_dataset
from mithridate.defenses import Resources
from mithridate.evaluation import percentile
from mithridate.images import encode_png
from mithridate.types import Epsilon

WITHIN = 1e-4
_PROTOCOLS = ("v1", "v2")


def main(
    bundle: Path | None = None,
    dataset: str = "digits[test]",
    requests: int = 10_000,
    clients: int = 4,
    images: int = 10,
    seed: int = 0,
    name: str = "hostile-isolation",
) -> None:
    bundle = bundle_or_digits(bundle)
    opened = Bundle.open(bundle)
    attacked = _attack(opened, dataset, 40 + images)
    clean = [encode_png(image) for image in load_dataset(dataset).images[:images]]
    mine = [*clean[: images // 2], *attacked[images // 2 : images]]
    _configure()
    with running_service(bundle, 0, patience_seconds=600) as url:
        victim = Victim(url, opened.manifest.name, mine)
        quiet = victim.ask()
        victim.ask()  # warm, for the times
        before = victim.times
    with running_service(bundle, 0, patience_seconds=600) as url:
        victim = Victim(url, opened.manifest.name, mine)
        hostile = [Hostile(url, opened.manifest.name, attacked[images:], seed + n) for n in range(clients)]
        started = time.perf_counter()
        sent, during = _beside(victim, hostile, requests)
        seconds = time.perf_counter() - started
        times, victim.times = victim.times, []
        rows = [_compare("beside them", quiet, during), _compare("afterwards", quiet, [victim.ask()])]
    content = {
        "hostile": {
            "requests": sum(sum(found.values()) for found in sent.values()),
            "clients": clients,
            "seconds": seconds,
            "answers": {kind: dict(found) for kind, found in sorted(sent.items())},
            "unexpected": _unexpected(hostile[0], sent),
        },
        "victim": {"images": images, "defenses": list(DEFENCES), "protocols": list(_PROTOCOLS), "rows": rows},
        "victim_ms": {"quiet": _times(before), "beside them": _times(times)},
        "seed": seed,
    }
    _show(results.write(name, content), content)
    if content["hostile"]["unexpected"] or any(row["other_classes"] or row["largest"] > WITHIN for row in rows):
        raise typer.Exit(1)


def _configure() -> None:
    """For the services that are started from here."""
    os.environ["MITHRIDATE_THREADS"] = "1"
    os.environ["MITHRIDATE_SEED"] = "7"
    os.environ["MITHRIDATE_MAX_BODY_BYTES"] = str(MAX_BODY)
    os.environ["MITHRIDATE_OFFER"] = json.dumps([*DEFENCES, ENDLESS])


Answers = dict[tuple[str, str, int], NDArray[np.float64]]
"""Scores of all classes, by protocol, defence and number of the image."""


class Victim:
    """Somebody who only wants to know what is on his images; ``times`` are the seconds that his answers took."""

    def __init__(self, url: str, model: str, files: Sequence[bytes]) -> None:
        self._client = httpx2.Client(base_url=url, timeout=120)
        self._infer = f"/v2/models/{model}/infer"
        self._files = files
        self.times: list[float] = []

    def ask(self) -> Answers:
        """The scores of every image, with every defence, over both protocols."""
        return {
            (protocol, defense, number): self._ask(protocol, file, defense)
            for defense in DEFENCES
            for protocol in _PROTOCOLS
            for number, file in enumerate(self._files)
        }

    def _ask(self, protocol: str, file: bytes, defense: str) -> NDArray[np.float64]:
        started = time.perf_counter()
        scores = self._native(file, defense) if protocol == "v1" else self._tensor(file, defense)
        self.times.append(time.perf_counter() - started)
        return scores

    def _native(self, file: bytes, defense: str) -> NDArray[np.float64]:
        options = {"defense": defense, "top_k": 1000}
        headers = {"Content-Type": "image/png"}
        response = self._client.post("/v1/predict", content=file, headers=headers, params=options)
        response.raise_for_status()
        top = sorted(response.json()["predictions"][0]["top"], key=lambda entry: entry["class_index"])
        return np.array([entry["confidence"] for entry in top])

    def _tensor(self, file: bytes, defense: str) -> NDArray[np.float64]:
        size = {"binary_data_size": 4 + len(file)}
        tensor = {"name": "images", "datatype": "BYTES", "shape": [1], "parameters": size}
        body = {"inputs": [tensor], "outputs": [{"name": "scores"}], "parameters": {"defense": defense}}
        text = json.dumps(body).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        packed = len(file).to_bytes(4, "little") + file
        response = self._client.post(self._infer, content=text + packed, headers=headers)
        response.raise_for_status()
        return np.array(response.json()["outputs"][0]["data"])


def _beside(
    victim: Victim, hostile: Sequence[Hostile], requests: int
) -> tuple[dict[str, Counter[int | str]], list[Answers]]:
    """What the hostile were answered, by kind, and the victim's answers until they had sent all of ``requests``."""
    sent: dict[str, Counter[int | str]] = {}
    lock = threading.Lock()

    def send(client: Hostile, count: int) -> None:
        for _ in range(count):
            kind, status = client.send()
            with lock:
                sent.setdefault(kind, Counter())[status] += 1
        client.close()

    during: list[Answers] = []
    with ThreadPoolExecutor(len(hostile)) as threads, _progress(sent, requests):
        share = [requests // len(hostile) + (n < requests % len(hostile)) for n in range(len(hostile))]
        running = [threads.submit(send, client, count) for client, count in zip(hostile, share, strict=True)]
        while not all(each.done() for each in running):
            during.append(victim.ask())
        for each in running:
            each.result()
    return sent, during


@contextmanager
def _progress(sent: dict[str, Counter[int | str]], requests: int) -> Iterator[None]:
    done = threading.Event()

    def say() -> None:
        while not done.wait(20):
            print(f"{sum(found.total() for found in list(sent.values()))} of {requests}", flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _attack(bundle: Bundle, dataset: str, count: int) -> list[bytes]:
    data = load_dataset(dataset)
    classifier = Resources.load(bundle).classifier
    pixels, labels = torch.from_numpy(data.images[:count]), torch.from_numpy(data.labels[:count])
    pgd = parse_attack("pgd20", epsilon=Epsilon(32))
    found = pgd.run(classifier, pixels, labels, generator=torch.Generator().manual_seed(3))
    return [encode_png(image) for image in found.numpy()]


def _compare(when: str, quiet: Answers, rounds: Sequence[Answers]) -> dict[str, Any]:
    pairs = [(scores, quiet[key]) for answers in rounds for key, scores in answers.items()]
    return {
        "when": when,
        "answers": len(pairs),
        "other_classes": sum(int(found.argmax() != alone.argmax()) for found, alone in pairs),
        "identical": sum(bool((found == alone).all()) for found, alone in pairs),
        "largest": max(float(np.abs(found - alone).max()) for found, alone in pairs),
    }


def _unexpected(client: Hostile, sent: dict[str, Counter[int | str]]) -> dict[str, dict[str, int]]:
    """Statuses that a kind may not get. A connection closed by the service counts only where a body was not refused."""
    found: dict[str, dict[str, int]] = {}
    for kind, answers in sent.items():
        allowed = client.kinds[kind].allowed
        for status, count in answers.items():
            refused_early = 413 in allowed and status in ("WriteError", "ReadError")
            if status not in allowed and not refused_early:
                found.setdefault(kind, {})[str(status)] = count
    return found


def _times(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{share}": 1000 * percentile(seconds, share / 100) for share in (50, 99)}


def _show(path: Path, content: dict[str, Any]) -> None:
    hostile = content["hostile"]
    print_table(
        f"the victim's answers against those it got alone; {path.name}",
        ["when", "answers", "another class", "bit for bit", "largest difference of a score"],
        [
            [*(str(row[key]) for key in ("when", "answers", "other_classes", "identical")), f"{row['largest']:.1e}"]
            for row in content["victim"]["rows"]
        ],
    )
    print(f"{hostile['requests']} hostile requests in {hostile['seconds']:.0f} s; unexpected: {hostile['unexpected']}")


if __name__ == "__main__":
    typer.run(main)
