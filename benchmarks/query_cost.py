"""What Square adds to the bare cost of the forward passes that it asks for.

    python -m benchmarks.query_cost BUNDLE DATASET [--budget 100] [--epsilon 8/255] [--threads 1]

*Bare*: the classifier on the same points in the same calls, and nothing else, right before the oracle is asked for
them. All is timed on the processor's clock, and the two in turn, so that neighbours on the machine count for neither.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import typer

from benchmarks import results
from cli.options import load_data, use_threads
from mithridate.attacks.black_box import parse_black_box
from mithridate.attacks.in_process import InProcessOracle
from mithridate.attacks.oracle import Answers, Track
from mithridate.bundle import Bundle
from mithridate.defenses import Resources, build_defence
from mithridate.models import Classifier
from mithridate.types import Epsilon, Pixels, to_images


class _Recorder:
    """Passes on what is asked, after it has timed the classifier on it."""

    def __init__(self, oracle: InProcessOracle, classifier: Classifier, images_a_call: int) -> None:
        self._oracle, self._classifier, self._images_a_call = oracle, classifier, images_a_call
        self.seconds = 0.0
        self.asks = 0

    @property
    def track(self) -> Track:
        return self._oracle.track

    @property
    def classes(self) -> int:
        return self._oracle.classes

    def ask(self, rows: torch.Tensor, pixels: Pixels) -> Answers:
        start = time.process_time()
        with torch.no_grad():
            for part in pixels.split(self._images_a_call):
                self._classifier(to_images(part))
        self.seconds += time.process_time() - start
        self.asks += 1
        return self._oracle.ask(rows, pixels)


def main(
    bundle: Path,
    dataset: str,
    epsilon: str = "8/255",
    attack: str = "square",
    budget: int = 100,
    images_a_call: int = 200,
    data_root: Path | None = None,
    threads: int | None = None,
    name: str = "query-cost",
) -> None:
    use_threads(threads)
    opened = Bundle.open(bundle)
    resources = Resources.load(opened)
    data = load_data(dataset, data_root=data_root, download=False, image_size=None, split="test")
    pixels, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    chosen = parse_black_box(attack, epsilon=Epsilon.parse(epsilon))
    oracle = _Recorder(
        InProcessOracle(
            build_defence("none", resources),
            classes=len(data.classes),
            track=chosen.track,
            images_a_call=images_a_call,
        ),
        resources.classifier,
        images_a_call,
    )
    oracle.ask(torch.arange(len(pixels)), pixels)  # the first pass of a process takes longer
    oracle.seconds, oracle.asks = 0.0, 0
    start = time.process_time()
    result = chosen.run(oracle, pixels, labels, seed=0, budget=budget)
    bare = oracle.seconds
    whole = time.process_time() - start - bare
    content = {
        "bundle": opened.digest,
        "dataset": data.spec,
        "images": len(data),
        "attack": chosen.name,
        "epsilon": epsilon,
        "budget": budget,
        "queries": int(result.queries.sum()),
        "asks": oracle.asks,
        "seconds": whole,
        "bare_seconds": bare,
        "factor": whole / bare,
    }
    path = results.write(name, content)
    print(f"{chosen.name}: {whole:.1f} s, bare {bare:.1f} s, factor {whole / bare:.3f}; {path.name}")


if __name__ == "__main__":
    typer.run(main)
