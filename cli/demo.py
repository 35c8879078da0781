"""``mithridate demo``: the whole path, with the commands a user would type."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.output import note, percent, print_table

_EPSILON = "32/255"
_DATASET = "digits"


def demo(
    out: Annotated[Path, typer.Option(help="Where the bundle, an image and the report go")] = Path("build/demo"),
    serve: Annotated[
        bool, typer.Option("--serve", help="Build if needed, then serve until interrupted instead of attacking")
    ] = False,
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one")] = 0,
) -> None:
    """Build a bundle from embedded digits, serve it, ask it, attack it, and print what the defence is worth."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service is stopped with us
    bundle, image = out / "bundle", out / "digit.png"
    out.mkdir(parents=True, exist_ok=True)
    note("1. build: train a small network on handwritten digits, attack its training set, index everything")
    run_command("build", "--dataset", f"{_DATASET}[train]", "--epsilon", _EPSILON, "--out", str(bundle), "--resume")
    _write_digit(image)
    if serve:
        _serve_until_interrupted(bundle, image, port)
        return
    note("2. serve it")
    with running_service(bundle, port) as url:
        note(f"3. predict over HTTP: {url}")
        _ask(url, image)
        note("4. attack it: PGD made on the base model, sent over HTTP")
        report = _fresh(out)
        run_command(
            *("attack", url, "--dataset", f"{_DATASET}[test,:200]", "--bundle", str(bundle), "--epsilon", _EPSILON),
            *("--attack", "pgd20", "--defense", "rmc", "--rate", "40", "--out", str(report), "--json"),
            quiet=True,
        )
    _show(report)


def _show(report: Path) -> None:
    summary = json.loads((report / "summary.json").read_text())
    cells = {(row["defense"], row["kind"]): row for row in summary["rows"]}

    def cell(defense: str, kind: str) -> str:
        row = cells[defense, kind]
        low, high = (100 * bound for bound in row["interval"])
        return f"{percent(row['accuracy'])}  [{low:.1f}, {high:.1f}]"

    rows = [[d, cell(d, "clean"), cell(d, "pgd20"), f"{cells[d, 'clean']['p50_ms']:.1f} ms"] for d in ("none", "rmc")]
    n = summary["rows"][0]["images"]
    print_table(
        f"accuracy on {n} unseen digits, 95 % intervals; PGD-20 at epsilon {_EPSILON}",
        ["defence", "clean", "attacked (static)", "median latency"],
        rows,
    )
    print("Static: the attack was made on the base model, without knowledge of the defence.")
    print("An attacker who knows the defence can do better; see docs/threat-model.md.")
    print(f"report: {report / 'report.html'}")


def run_command(*arguments: str, quiet: bool = False) -> None:
    """Runs a command in a process of its own. Its failure is ours."""
    stdout = subprocess.DEVNULL if quiet else None
    code = subprocess.run([sys.executable, "-m", "cli", *arguments], stdout=stdout, check=False).returncode
    if code:
        raise typer.Exit(code)


def _write_digit(path: Path) -> None:
    from mithridate.datasets import load_dataset
    from mithridate.images import encode_png

    path.write_bytes(encode_png(load_dataset(f"{_DATASET}[test,:1]").images[0]))


def _fresh(out: Path) -> Path:
    """A report directory that is not there yet: earlier reports are kept."""
    number = 1
    while (out / f"report-{number}").exists():
        number += 1
    return out / f"report-{number}"


@contextmanager
def running_service(bundle: Path, port: int, *, patience_seconds: int = 60) -> Iterator[str]:
    """A running service, stopped at the end whatever happens; gives its address."""
    from attack_client.client import Client
    from mithridate.errors import InputError

    chosen = port or _free_port()
    command = [sys.executable, "-m", "cli", "serve", str(bundle), "--port", str(chosen), "--log-level", "warning"]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{chosen}"
    try:
        with Client(url) as client:
            for _ in range(patience_seconds):
                try:
                    client.wait_until_ready(1.0)
                    break
                except InputError:
                    if process.poll() is not None:
                        raise typer.Exit(process.returncode) from None
            else:
                raise InputError(f"the service at {url} did not become ready within {patience_seconds} s")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _ask(url: str, image: Path) -> None:
    from attack_client.client import Client

    with Client(url) as client:
        answer = client.predict(image.read_bytes())
    first = answer.predictions[0]
    steps: Any = (first.adaptation or {}).get("steps")
    total = answer.timings_ms["total"]
    note(f"   {image}: {first.label} ({percent(first.confidence)}), {steps} adaptation steps, {total:.1f} ms")


def _serve_until_interrupted(bundle: Path, image: Path, port: int) -> None:
    chosen = port or 8000
    note(f"2. serving at http://127.0.0.1:{chosen} (Ctrl-C stops it); in another terminal:")
    note(f"   curl --data-binary @{image} -H 'Content-Type: image/png' http://127.0.0.1:{chosen}/v1/predict")
    sys.stderr.flush()
    # Replaces this process: signals reach the service itself.
    os.execv(sys.executable, [sys.executable, "-m", "cli", "serve", str(bundle), "--port", str(chosen)])  # noqa: S606
