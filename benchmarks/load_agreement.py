"""Whether the load generator agrees with independent tools, on the same service, in turns.

    python -m benchmarks.load_agreement [--bundle BUNDLE --image FILE]

Needs wrk and hey (Debian packages of these names). Without a bundle, the digits one of ``make demo`` is built and its
first test image sent. Three comparisons, for ``GET /livez`` and for ``POST /v1/predict`` with the base model:

- closed loop against ``hey -c N -z T``: both keep N connections busy; both give every single time;
- closed loop against ``wrk -c N -d T``: wrk adds the requests which it thinks a stall kept it from sending (each time t
  above twice the mean interval i of a connection counts again as t - i, t - 2i ...), and shows only the result. The
  same is done to our times before the two are compared;
- set rate against ``hey -c 1 -q R``: one connection each. hey counts from when it sent, so ours do too here.

Each is made twice: in turns, beginning with another tool each round, and both tools at once, so that whatever else the
machine does meets both alike (then each has as many connections, or as high a rate). The numbers are medians over the
rounds, and so is the ratio of ours to theirs in the same round. The service gets one thread, so that a core is left.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import typer

from attack_client.generator import Connections, Payload, Shooting, Traffic, closed_loop, open_loop
from attack_client.load_statistics import summarise
from attack_client.wire import Target
from benchmarks import results
from benchmarks.digits import bundle_or_digits, image_or_digit
from cli.demo import running_service
from cli.output import print_table
from mithridate.evaluation import percentile

_WITHIN = {"p50": 0.10, "p99": 0.25}
_TYPE = "application/octet-stream"
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}

Found = dict[str, float]
"""``p50`` and ``p99`` in milliseconds, and answers a second."""


def main(
    bundle: Path | None = None,
    image: Path | None = None,
    rounds: int = 5,
    seconds: float = 4.0,
    connections: int = 4,
    rate: float = 100.0,
    name: str = "load-agreement",
) -> None:
    for tool in ("wrk", "hey"):
        if shutil.which(tool) is None:
            raise SystemExit(f"error: {tool} is not installed")
    bundle = bundle_or_digits(bundle)
    content = image_or_digit(image)
    os.environ.setdefault("MITHRIDATE_THREADS", "1")
    rows: list[dict[str, Any]] = []
    with running_service(bundle, 0) as url, tempfile.TemporaryDirectory() as directory:
        target = Target.parse(url)
        for what in (_Livez(target), _Predict(target, content, Path(directory))):
            what.closed(connections, 1.0)  # warm
            rows += _compare(what, rounds, seconds, connections, rate)
        held = [_held(_Livez(target), each, seconds) for each in (50.0, 200.0, 1000.0)]
    versions = {"wrk": _version("wrk"), "hey": _version("hey")}
    settings = {"rounds": rounds, "seconds": seconds, "connections": connections, "rate": rate}
    path = results.write(name, {"tools": versions, **settings, "agreement": rows, "held": held})
    _show(path, rows, held)


class _Livez:
    """``GET /livez``: hardly any work."""

    words = "GET /livez"

    def __init__(self, target: Target) -> None:
        self.target = target
        self.url = f"{target.url}/livez"
        self.request = target.get("/livez")
        self.hey: tuple[str, ...] = ()
        self.wrk: tuple[str, ...] = ()

    def closed(self, connections: int, seconds: float) -> Shooting:
        return closed_loop(_connections(self.target, connections), _traffic(self.request), seconds=seconds)

    def opened(self, rate: float, seconds: float, connections: int = 1) -> Shooting:
        there = _connections(self.target, connections)
        return open_loop(there, _traffic(self.request), rate=rate, seconds=seconds)


class _Predict(_Livez):
    """``POST /v1/predict`` with one image, answered by the base model."""

    words = "POST /v1/predict"

    def __init__(self, target: Target, image: bytes, directory: Path) -> None:
        super().__init__(target)
        self.url = f"{target.url}/v1/predict?defense=none"
        self.request = target.predict(image, defense="none")
        (directory / "image").write_bytes(image)
        (directory / "post.lua").write_text(
            f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "{_TYPE}"\n'
            f'wrk.body = io.open("{directory / "image"}", "rb"):read("*a")\n'
        )
        self.hey = ("-m", "POST", "-T", _TYPE, "-D", str(directory / "image"))
        self.wrk = ("-s", str(directory / "post.lua"))


def _compare(what: _Livez, rounds: int, seconds: float, connections: int, rate: float) -> list[dict[str, Any]]:
    duration = f"{seconds:g}s"
    hey = ("hey", "-o", "csv", "-z", duration, *what.hey)

    def closed() -> list[float]:
        return _milliseconds(what.closed(connections, seconds))

    def opened() -> list[float]:
        return _milliseconds(what.opened(rate, seconds))

    def hey_closed() -> Found:
        return _hey([*hey, "-c", str(connections), what.url], seconds)

    def hey_opened() -> Found:
        return _hey([*hey, "-c", "1", "-q", f"{rate:g}", what.url], seconds)

    def wrk() -> Found:
        return _wrk(["wrk", "-t1", f"-c{connections}", f"-d{duration}", "--latency", *what.wrk, what.url])

    def like_wrk(times: Sequence[float]) -> Found:
        return _percentiles(_as_wrk(times, seconds, connections), seconds, len(times))

    def plainly(times: Sequence[float]) -> Found:
        return _percentiles(times, seconds)

    ours = {"closed": closed, "rate": opened}
    pairs = {
        "closed, hey": ("closed", hey_closed, plainly),
        "closed, wrk": ("closed", wrk, like_wrk),
        f"{rate:g} a second, hey": ("rate", hey_opened, plainly),
    }
    alone: list[Callable[[], Any]] = [*ours.values(), *(theirs for _, theirs, _ in pairs.values())]
    found: list[dict[str, tuple[Found, Found]]] = []
    for number in range(rounds):
        turn = number % len(alone)
        got = {run: run() for run in alone[turn:] + alone[:turn]}
        one = {
            f"{name}, in turns": (view(got[ours[mine]]), got[theirs]) for name, (mine, theirs, view) in pairs.items()
        }
        for name, (mine, theirs, view) in pairs.items():
            with ThreadPoolExecutor(1) as beside:
                other = beside.submit(theirs)
                times = ours[mine]()
                one[f"{name}, at once"] = (view(times), other.result())
        found.append(one)
    return [_row(what.words, name, [one[name] for one in found]) for name in found[0]]


def _row(target: str, comparison: str, pairs: Sequence[tuple[Found, Found]]) -> dict[str, Any]:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    row: dict[str, Any] = {"target": target, "comparison": comparison, "agrees": True}
    for key in ("p50", "p99", "rps"):
        ratios = [ours[key] / theirs[key] for ours, theirs in pairs]
        row[key] = {
            "ours": median([ours[key] for ours, _ in pairs]),
            "theirs": median([theirs[key] for _, theirs in pairs]),
            "ratio": median(ratios),
            "ratios": [round(ratio, 4) for ratio in ratios],
        }
        row["agrees"] &= key not in _WITHIN or abs(row[key]["ratio"] - 1) <= _WITHIN[key]
    return row


def _held(what: _Livez, rate: float, seconds: float) -> dict[str, Any]:
    shooting = what.opened(rate, seconds, connections=16)
    step = summarise(
        shooting.samples,
        set_rate=rate,
        clients=None,
        seconds=seconds,
        objective_ms=1000,
        cpu_share=shooting.cpu_share,
        seed=0,
    )
    lag = step.generator
    return {
        "rate": rate,
        "deviation": step.rate_deviation,
        "late_p50": lag.p50,
        "late_p99": lag.p99,
        "cpu_share": lag.cpu_share,
    }


def _connections(target: Target, count: int) -> Connections:
    return Connections(target=target, count=count, timeout_seconds=30)


def _traffic(request: bytes) -> Traffic:
    return Traffic(clean=(Payload("clean", 0, request),))


def _milliseconds(shooting: Shooting) -> list[float]:
    """From when each was sent."""
    failed = [sample.error for sample in shooting.samples if sample.error]
    if failed:
        raise SystemExit(f"error: {len(failed)} requests of ours failed, the first with {failed[0]}")
    return [1000 * (s.done - (s.due if s.sent is None else s.sent)) for s in shooting.samples]


def _percentiles(times: Sequence[float], seconds: float, answered: int | None = None) -> Found:
    rps = (len(times) if answered is None else answered) / seconds
    return {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99), "rps": rps}


def _as_wrk(times: Sequence[float], seconds: float, connections: int) -> list[float]:
    """With the times that wrk makes up."""
    interval = 1000 * seconds / (len(times) / connections)
    more: list[float] = []
    for time in times:
        left = time - interval
        while time >= 2 * interval and left > interval:
            more.append(left)
            left -= interval
    return [*times, *more]


def _hey(command: Sequence[str], seconds: float) -> Found:
    lines = csv.DictReader(io.StringIO(_output(command)))
    rows = [(float(line["response-time"]), line["status-code"]) for line in lines]
    if any(status != "200" for _, status in rows) or not rows:
        raise SystemExit("error: hey got other answers than 200")
    return _percentiles([1000 * value for value, _ in rows], seconds)


def _wrk(command: Sequence[str]) -> Found:
    text = _output(command)
    if "Non-2xx" in text or "Socket errors" in text:
        raise SystemExit(f"error: wrk got errors:\n{text}")
    found = {
        f"p{share}": float(value) * _UNITS[unit]
        for share, value, unit in re.findall(r"(\d+)%\s+([\d.]+)(us|ms|s|m)\n", text)
    }
    rps = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert rps is not None
    return {"p50": found["p50"], "p99": found["p99"], "rps": float(rps[1])}


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _version(tool: str) -> str:
    """As the package manager says, where there is one."""
    if shutil.which("dpkg-query") is None:
        return "unknown"
    return _output(["dpkg-query", "-W", "-f", "${Version}", tool])


def _show(path: Path, rows: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> None:
    print_table(
        f"ours against theirs, ms from when a request was sent; {path.name}",
        ["", "p50 ours", "theirs", "ratio", "p99 ours", "theirs", "ratio", "req/s ratio", "agrees"],
        [
            [
                f"{row['target']}, {row['comparison']}",
                *(f"{row[key][what]:.3g}" for key in ("p50", "p99") for what in ("ours", "theirs", "ratio")),
                f"{row['rps']['ratio']:.2f}",
                "yes" if row["agrees"] else "no",
            ]
            for row in rows
        ],
    )
    for one in held:
        print(f"{one['rate']:g}/s held to {100 * one['deviation']:+.3f} %, late by {one['late_p50']:.2f} ms at p50")


if __name__ == "__main__":
    typer.run(main)
