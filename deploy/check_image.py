"""Builds an image and uses it as docker-compose.yml does: confined, not root, on a file system that is read-only.

    deploy/check_image.py [cpu|cuda] [--base IMAGE] [--own-pip] [--skip-build] [--build-option=OPTION ...]

It builds a bundle in the image, twice (the second must find it finished), starts the service, waits until the image's
own health check passes, has digits classified, sends SIGTERM, and wants exit code 0. With docker or podman where an
engine answers; else with buildah, as root: the same image and settings, entered with unshare and chroot. That way
needs no engine, but it does not test the engine's own part (cgroup limits, published ports, the health check's timing).
Both images run on the CPU here, for which the `cuda` one gets MITHRIDATE_DEVICE=cpu: that it is complete, starts and
answers is checked; that it uses a GPU is not.
"""
# ruff: noqa: S603, T201

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
USER = 10001
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"  # where Debian has them
NAME = f"mithridate-check-{os.getpid()}"
BUILD = ("build", "--dataset", "digits[train]", "--epsilon", "32/255", "--out", "/data/bundle", "--resume")
BUILD_LIMIT_S = 3600  # for a machine that others keep busy; alone it is minutes
READY_LIMIT_S = 300
STOP_LIMIT_S = 40

SETTINGS = {"MITHRIDATE_DEVICE": "cpu", "MITHRIDATE_INSECURE_NO_KEYS": "true"}

PROBE = """
import http.client, json, os
import opentelemetry.exporter.otlp.proto.http.trace_exporter  # MITHRIDATE_OTEL=true has to work in a container
from mithridate.datasets import load_dataset
from mithridate.images import encode_png

assert os.getuid() == 10001, os.getuid()
service = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
data = load_dataset("digits[test,:20]")
right, slowest = 0, 0.0
for image, label in zip(data.images, data.labels, strict=True):
    service.request("POST", "/v1/predict", encode_png(image), {"Content-Type": "image/png"})
    response = service.getresponse()
    answer = json.load(response)
    assert response.status == 200, answer
    right += answer["predictions"][0]["class_index"] == int(label)
    slowest = max(slowest, answer["timings_ms"]["total"])
assert right >= 15, f"only {right} of 20 digits right"
print(f"{right} of 20 digits right, the slowest in {slowest:.1f} ms")
"""

CONFINEMENT = """
import os

def status_of(process):
    return dict(line.split(":\\t", 1) for line in open(f"/proc/{process}/status").read().splitlines())

status = status_of(1)
assert status["Name"].startswith(("python", "mithridate")), status["Name"]
assert status["Uid"].split() == ["10001"] * 4, status["Uid"]
assert int(status["CapBnd"], 16) == 0 and status["NoNewPrivs"] == "1", status
for path in ("/written", "/opt/venv/written", "/data/written"):
    try:
        open(path, "w").close()
    except OSError:
        continue
    raise AssertionError(f"{path} could be written")
open("/tmp/written", "w").close()
found = [status_of(process) for process in os.listdir("/proc") if process.isdecimal() and int(process) != os.getpid()]
peaks = [int(process["VmHWM"].split()[0]) >> 10 for process in found if "VmHWM" in process]
print(f"process 1 is {status['Name']}; {sum(peaks)} MiB at most in {len(peaks)} processes; only /tmp can be written")
"""


class Machine(ABC):
    """Something that builds the image and runs it."""

    def __init__(self, tag: str, data: Path | None) -> None:
        self.tag = tag
        self.data = data

    @abstractmethod
    def build(self, target: str, options: Sequence[str]) -> None:
        """Builds the image."""

    @abstractmethod
    def size(self) -> int:
        """Bytes of the image, unpacked."""

    @abstractmethod
    def run(self, *arguments: str) -> int:
        """Runs the image to its end with /data writable; returns the exit code."""

    @abstractmethod
    def start(self) -> None:
        """Starts the image's own command with /data read-only."""

    @abstractmethod
    def inside(self, *command: str) -> int:
        """Runs a command beside the started one."""

    @abstractmethod
    def health_check(self) -> list[str]:
        """The command that the image declares as its health check."""

    @abstractmethod
    def running(self) -> bool:
        """Whether what was started still runs."""

    @abstractmethod
    def stop(self) -> int:
        """Sends SIGTERM to process 1 and returns its exit code."""

    @abstractmethod
    def close(self) -> None:
        """Removes what this run made, but for the image."""


class Engine(Machine):
    """Docker or Podman."""

    def __init__(self, program: str, tag: str, data: Path | None) -> None:
        super().__init__(tag, data)
        self.program = program
        self._volume = f"{NAME if data is None else data}:/data"
        self._confined = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--pids-limit=512"]
        self._confined += ["--tmpfs=/tmp:size=256m,mode=1777", "--memory=4g"]
        self._confined += [f"--env={name}={value}" for name, value in SETTINGS.items()]

    def build(self, target: str, options: Sequence[str]) -> None:
        docker_format = ["--format=docker"] if self.program == "podman" else []  # OCI's has no health check
        _do(self.program, "build", *docker_format, f"--target={target}", f"--tag={self.tag}", *options, str(ROOT))

    def size(self) -> int:
        return int(_read(self.program, "image", "inspect", "--format={{.Size}}", self.tag))

    def run(self, *arguments: str) -> int:
        volume = f"--volume={self._volume}"
        command = [self.program, "run", "--rm", "--network=none", *self._confined, volume, self.tag, *arguments]
        return subprocess.run(command, timeout=BUILD_LIMIT_S, check=False).returncode

    def start(self) -> None:
        volume = f"--volume={self._volume}:ro"
        _do(self.program, "run", "--detach", f"--name={NAME}", *self._confined, volume, self.tag)

    def inside(self, *command: str) -> int:
        return subprocess.run([self.program, "exec", NAME, *command], check=False).returncode

    def health_check(self) -> list[str]:
        found = json.loads(_read(self.program, "image", "inspect", self.tag))[0]
        declared = found["Config"].get("Healthcheck") or found["Healthcheck"]  # where Docker and Podman have it
        return list(declared["Test"][1:])

    def running(self) -> bool:
        return _read(self.program, "inspect", "--format={{.State.Running}}", NAME) == "true"

    def stop(self) -> int:
        _do(self.program, "stop", f"--time={STOP_LIMIT_S}", NAME)
        return int(_read(self.program, "inspect", "--format={{.State.ExitCode}}", NAME))

    def close(self) -> None:
        for command in (["rm", "--force", NAME], ["volume", "rm", "--force", NAME]):
            subprocess.run([self.program, *command], check=False, capture_output=True)


class Chroot(Machine):
    """Buildah, and namespaces made by hand."""

    # $1 is the image's root, $2 what becomes /data, $3 how; then the command. exec all the way: it is process 1.
    ENTER = """
        set -e
        mount --make-rprivate /
        mount --bind "$1" "$1"
        mount --bind "$2" "$1/data"
        mount -o remount,bind,"$3" "$1/data"
        mount -t proc proc "$1/proc"
        mount --rbind /dev "$1/dev"
        mount -t tmpfs -o size=256m,mode=1777 tmpfs "$1/tmp"
        mount -o remount,bind,ro "$1"
        root=$1; shift 3
        exec env --ignore-environment "$(command -v chroot)" "$root" /usr/bin/env --chdir=/tmp "$@"
    """
    CONFINED = (
        "/usr/bin/setpriv",
        f"--reuid={USER}",
        f"--regid={USER}",
        "--clear-groups",
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--no-new-privs",
    )

    def __init__(self, tag: str, data: Path | None) -> None:
        super().__init__(tag, data)
        self._base = ["buildah", "--storage-driver=vfs"]
        self._container = self._root = ""
        self._data = data or Path(tempfile.mkdtemp(prefix="mithridate-check-"))
        os.chown(self._data, USER, USER)
        self._process: subprocess.Popen[bytes] | None = None

    def build(self, target: str, options: Sequence[str]) -> None:
        command = [*self._base, "bud", "--isolation=chroot", "--format=docker"]
        _do(*command, f"--target={target}", f"--tag={self.tag}", *options, str(ROOT))

    def size(self) -> int:
        entries = (entry.lstat() for entry in Path(self._mounted()).rglob("*"))
        return sum(entry.st_size for entry in entries if not stat.S_ISDIR(entry.st_mode))

    def run(self, *arguments: str) -> int:
        process = self._enter(self._config()["Entrypoint"] + list(arguments), "rw")
        return process.wait(timeout=BUILD_LIMIT_S)

    def start(self) -> None:
        config = self._config()
        self._process = self._enter(config["Entrypoint"] + config["Cmd"], "ro")

    def inside(self, *command: str) -> int:
        enter = ["nsenter", f"--target={self._inner()}", "--mount", "--pid", "--root"]
        outer = [*enter, "/usr/bin/env", "-i", "--chdir=/tmp", *self._config()["Env"], *self.CONFINED, *command]
        return subprocess.run(outer, check=False).returncode

    def health_check(self) -> list[str]:
        return list(self._config()["Healthcheck"]["Test"][1:])

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> int:
        assert self._process is not None
        os.kill(self._inner(), signal.SIGTERM)
        return self._process.wait(timeout=STOP_LIMIT_S)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with suppress(OSError, IndexError):  # not unshare: with it gone, what it started would go on
                os.kill(self._inner(), signal.SIGKILL)
            self._process.kill()
            self._process.wait()
        if self._container:
            subprocess.run([*self._base, "rm", self._container], check=False, capture_output=True)
        if self.data is None:
            shutil.rmtree(self._data)

    def _enter(self, command: Sequence[str], data: str) -> subprocess.Popen[bytes]:
        unshare = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", self.ENTER, "enter"]
        settings = [*self._config()["Env"], *(f"{name}={value}" for name, value in SETTINGS.items()), *self.CONFINED]
        return subprocess.Popen([*unshare, self._mounted(), str(self._data), data, *settings, *command])

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(_read(*self._base, "inspect", "--type=image", self.tag))["Docker"]["config"]
        return config

    def _mounted(self) -> str:
        if not self._root:
            self._container = _read(*self._base, "from", self.tag)
            self._root = _read(*self._base, "mount", self._container)
        return self._root

    def _inner(self) -> int:
        """Process 1 of the namespace, by its number out here."""
        assert self._process is not None
        return int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--base", help="the base image (deploy/make_base.py makes one)")
    parser.add_argument("--own-pip", action="store_true", help="build with this machine's pip index and certificates")
    parser.add_argument("--skip-build", action="store_true", help="use the image that is there")
    parser.add_argument("--data", type=Path, help="a folder to be /data, and to keep: a second image uses its bundle")
    parser.add_argument("--build-option", action="append", default=[], help="passed to the build; repeat")
    arguments = parser.parse_args()
    if arguments.data is not None and not arguments.data.is_dir():
        sys.exit(f"failed: there is no folder {arguments.data}")
    machine = _machine(f"mithridate:{arguments.target}", arguments.data and arguments.data.resolve())
    try:
        if not arguments.skip_build:
            with _timed("image built"):
                machine.build(arguments.target, _build_options(arguments))
        print(f"-- {machine.size() / 1e9:.2f} GB unpacked", flush=True)
        _check(machine)
    finally:
        machine.close()


def _build_options(arguments: argparse.Namespace) -> list[str]:
    options: list[str] = list(arguments.build_option)
    if arguments.base:
        options.append(f"--build-arg=BASE={arguments.base}")
    return options + (_own_pip() if arguments.own_pip else [])


def _own_pip() -> list[str]:
    """Build options that give the build this machine's indices and certificates; neither reaches an image.

    Indices and wheels in folders of this machine are left out: there is nothing of them inside.
    """
    lines = _read(sys.executable, "-m", "pip", "config", "list").splitlines()
    settings = {name.rpartition(".")[2]: value.strip("'") for name, value in (line.split("=", 1) for line in lines)}
    options = []
    for name in ("index-url", "extra-index-url"):
        addresses = [word for word in settings.get(name, "").replace("\\n", " ").split() if word.startswith("http")]
        if addresses:
            options.append(f"--build-arg=PIP_{name.upper().replace('-', '_')}={' '.join(addresses)}")
    if "cert" in settings:  # mounted over the base's own while the build runs
        options.append(f"--volume={settings['cert']}:{CERTIFICATES}:ro")
        options.append(f"--build-arg=PIP_CERT={CERTIFICATES}")
    return options


def _check(machine: Machine) -> None:
    for text in ("bundle built", "bundle found finished"):
        with _timed(text):
            _want(machine.run(*BUILD), 0, text)
    with _timed("service ready"):
        machine.start()
        _wait_until_ready(machine)
    with _timed("process 1 confined"):
        _want(machine.inside("python", "-c", CONFINEMENT), 0, "confinement")
    with _timed("images classified"):
        _want(machine.inside("python", "-c", PROBE), 0, "classification")
    with _timed("service stopped by SIGTERM with exit code 0"):
        _want(machine.stop(), 0, "exit code after SIGTERM")


def _wait_until_ready(machine: Machine) -> None:
    probe, deadline = machine.health_check(), time.monotonic() + READY_LIMIT_S
    quiet = ("sh", "-c", f"{shlex.join(probe)} 2>/dev/null")
    while machine.inside(*quiet) != 0:
        if not machine.running():
            sys.exit("failed: the service ended before it was ready")
        if time.monotonic() > deadline:
            sys.exit(f"failed: the service was not ready within {READY_LIMIT_S} s")
        time.sleep(0.5)


def _machine(tag: str, data: Path | None) -> Machine:
    for program in ("docker", "podman"):
        if shutil.which(program) and not subprocess.run([program, "info"], check=False, capture_output=True).returncode:
            return Engine(program, tag, data)
    if not shutil.which("buildah"):
        sys.exit("no container engine answers, and there is no buildah: install one of docker, podman, buildah")
    if os.getuid() != 0:
        sys.exit("buildah without an engine needs root here")
    return Chroot(tag, data)


@contextmanager
def _timed(text: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"-- {text}: {time.monotonic() - start:.1f} s", flush=True)


def _want(seen: int, wanted: int, what: str) -> None:
    if seen != wanted:
        sys.exit(f"failed: {what}: {seen}, not {wanted}")


def _do(*command: str) -> None:
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"failed: {shlex.join(command)}")


def _read(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
