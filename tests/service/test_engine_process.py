"""The engine in a process of its own: what its death, a client's leaving and the end of the service do."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from process_helpers import cpu_seconds, engine_pids, is_alive, mapped_bytes
from service_helpers import (
    SLOW,
    ServerProcess,
    assert_same,
    check_problem,
    in_flight,
    post,
    post_json,
    predictions,
    wait_ready,
    wait_until,
)
from starlette.testclient import TestClient

from mithridate.datasets import LabelledImages
from mithridate.errors import OptionError
from service import ceilings, engine_worker, loading
from service import engine as thread_engine
from service.batching import EngineStoppedError
from service.engine_process import _NEEDED, ProcessEngine, _Child
from service.settings import Settings, load_settings
from service.wire import encode

LONG = "rmc:scope=all,neighbors=512,epochs=10,patience=1000"


@pytest.fixture(scope="module")
def server(digits_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The last test that uses it ends it."""
    log = tmp_path_factory.mktemp("server") / "log"
    flags: dict[str, Any] = {"threads": 1, "isolation": None, "offer": ["none", "rmc", SLOW, LONG]}
    server = ServerProcess(log, bundle=digits_bundle, drain_seconds=1, **flags)
    try:
        wait_ready(server.client)
        yield server
    finally:
        server.close()


def rest_of(pid: int, *, seconds: float = 0.5) -> float:
    """What a process computes in that time."""
    before = cpu_seconds(pid)
    time.sleep(seconds)
    return cpu_seconds(pid) - before


def test_the_service_goes_before_its_engine_where_both_want_a_processor(server: ServerProcess) -> None:
    (engine,) = engine_pids(server)
    least = min(19, os.getpriority(os.PRIO_PROCESS, server.process.pid) + 5)
    assert os.getpriority(os.PRIO_PROCESS, engine) == least
    # Priorities are among those of a session; a group of its own is enough for Ctrl-C to pass by.
    assert os.getsid(engine) == os.getsid(server.process.pid)
    assert os.getpgid(engine) == engine


def test_answers_that_come_together_leave_turns_to_others_between(
    digits_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []

    async def main() -> None:
        engine, passed = ProcessEngine(load_settings(bundle=digits_bundle)), 0
        monkeypatch.setattr(engine, "_hear", lambda message, child: turns.append(passed))
        reader, process = asyncio.StreamReader(), SimpleNamespace(poll=lambda: 0, pid=1)
        reader.feed_data(20 * b"".join(encode({"type": "answer"})))
        reader.feed_eof()
        loaded = asyncio.get_running_loop().create_future()
        loaded.set_result({})
        child = _Child(process=process, reader=reader, writer=None, loaded=loaded)  # type: ignore[arg-type]
        listening = asyncio.create_task(engine._listen(child))
        while not listening.done():
            passed += 1
            await asyncio.sleep(0)

    asyncio.run(main())
    assert len(turns) == 20
    assert all(later > earlier for earlier, later in pairwise(turns))


@pytest.mark.parametrize("defense", ["none", "rmc"])
def test_another_process_answers_the_same(
    server: ServerProcess, client: TestClient, clean: list[bytes], adversarial: list[bytes], defense: str
) -> None:
    files = [*clean[:3], *adversarial[:3]]
    options: dict[str, Any] = {"defense": defense, "explain": True, "top_k": 10}
    assert_same(
        predictions(post_json(server.client, files, **options)), predictions(post_json(client, files, **options))
    )
    assert server.client.get("/v1/bundle").json() == client.get("/v1/bundle").json()
    assert engine_pids(server)[0] != server.process.pid


def test_errors_arrive_as_what_they_are(server: ServerProcess, clean: list[bytes]) -> None:
    check_problem(post(server.client, clean[0], defense="nonsense"), 422, "did you mean")
    check_problem(post(server.client, clean[0], deadline_ms=0.001), 504, "deadline")


def test_a_client_that_leaves_takes_its_work_along(server: ServerProcess, clean: list[bytes]) -> None:
    """Measured where it was done, in the engine's process: it stops computing, while there is nothing else to do."""
    (engine,) = engine_pids(server)[:1]
    with httpx2.Client(base_url=server.url, timeout=1) as impatient, pytest.raises(httpx2.ReadTimeout):
        post(impatient, clean[0], defense=SLOW)
    wait_until(lambda: in_flight(server.client) == 0, seconds=2)
    assert rest_of(engine) < 0.1


def test_a_deadline_ends_the_work_too(server: ServerProcess, clean: list[bytes]) -> None:
    (engine,) = engine_pids(server)[:1]
    before = cpu_seconds(engine)
    check_problem(post(server.client, clean[0], defense=SLOW, deadline_ms=1000), 504, "deadline")
    assert cpu_seconds(engine) - before > 0.1, "it worked for it until then"
    wait_until(lambda: in_flight(server.client) == 0, seconds=2)
    assert rest_of(engine) < 0.1


def test_no_accepted_request_is_lost_when_the_service_ends(server: ServerProcess, clean: list[bytes]) -> None:
    """Clients go elsewhere when /readyz says so; until then, and whatever runs, everything is answered."""
    stop, statuses = threading.Event(), []

    def keep_asking(number: int) -> None:
        while not stop.is_set():
            statuses.append(
                httpx2.post(
                    f"{server.url}/v1/predict",
                    params={"defense": ("rmc", "none")[number % 2]},
                    content=clean[number],
                    headers={"Content-Type": "image/png"},
                    timeout=60,
                ).status_code
            )

    with ThreadPoolExecutor(5) as threads:
        asking = [threads.submit(keep_asking, number) for number in range(4)]
        wait_until(lambda: len(statuses) >= 8)
        server.terminate()
        long = threads.submit(post, server.client, clean[0], defense=LONG)
        while server.client.get("/readyz").status_code == 200:
            time.sleep(0.01)
        stop.set()
        for one in asking:
            one.result()
        assert predictions(long.result())[0]["adaptation"]["steps"] > 0
    assert set(statuses) == {200}
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log
    wait_until(lambda: not any(map(is_alive, engine_pids(server))), seconds=5)


def test_a_killed_engine_ends_the_service_at_once(digits_bundle: Path, tmp_path: Path, clean: list[bytes]) -> None:
    server = ServerProcess(
        tmp_path / "log",
        bundle=digits_bundle,
        threads=1,
        isolation="process",
        devices="cpu,cpu",
        offer=["none", SLOW],
        defense="none",
        drain_timeout_s=1,
    )
    with contextlib.closing(server), ThreadPoolExecutor(4) as threads:
        wait_ready(server.client)
        engines = engine_pids(server)
        assert len(engines) == 2
        idle = [cpu_seconds(pid) for pid in engines]
        asked = [threads.submit(post, server.client, clean[n], defense=SLOW) for n in range(4)]
        wait_until(lambda: all(cpu_seconds(pid) > before + 0.2 for pid, before in zip(engines, idle, strict=True)))
        os.kill(engines[0], signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: sum(one.done() for one in asked) >= 2, seconds=5)
        assert time.monotonic() - killed < 1
        with contextlib.suppress(httpx2.TransportError):
            check_problem(server.client.get("/readyz"), 503)
        assert server.process.wait(20) not in (0, -signal.SIGKILL)
        refused = [one.result() for one in asked if one.exception() is None and one.result().status_code == 503]
        assert len(refused) >= 2
        for response in refused:
            check_problem(response, 503, "stopped")
            assert response.headers["retry-after"] == "1"
        last = server.log.splitlines()[-1]
        assert last.startswith("service.server.BrokenServiceError: ")
        assert (
            f"the engine has stopped: EngineDiedError: the engine process ({engines[0]}) was killed by SIGKILL" in last
        )
        wait_until(lambda: not is_alive(engines[1]), seconds=5)


def test_an_engine_process_that_hangs_ends_the_service(digits_bundle: Path, clean: list[bytes], tmp_path: Path) -> None:
    """A stopped process neither answers nor dies: what it was asked is 504, and soon nothing claims to be ready."""
    server = ServerProcess(
        tmp_path / "log",
        bundle=digits_bundle,
        threads=1,
        isolation="process",
        offer=["none"],
        defense="none",
        deadline_ms=500,
        engine_hang_s=1.5,
        drain_timeout_s=1,
    )
    with contextlib.closing(server):
        wait_ready(server.client)
        (engine,) = engine_pids(server)
        for _ in range(3):  # an engine that is idle, or answers, does not hang
            assert post(server.client, clean[0]).status_code == 200
            time.sleep(1)
        os.kill(engine, signal.SIGSTOP)
        stopped = time.monotonic()
        check_problem(post(server.client, clean[0]), 504, "deadline")
        assert server.client.get("/readyz").status_code == 200  # a long step is no death
        assert server.process.wait(20) not in (0, -signal.SIGKILL)
        assert 2 <= time.monotonic() - stopped < 10
        last = server.log.splitlines()[-1]
        assert last.startswith("service.server.BrokenServiceError: ")
        assert f"the engine process ({engine}) hangs: 1 requests are unanswered 1.5 s after their deadlines" in last
        wait_until(lambda: not is_alive(engine), seconds=5)


def make_engine(bundle: Path, **flags: Any) -> ProcessEngine:
    return ProcessEngine(load_settings(**{"bundle": bundle, "defense": "none", "offer": [SLOW], "threads": 1, **flags}))


def test_an_engine_process_ends_with_its_service_and_out_of_memory_ends_it(
    digits_bundle: Path, digits_test: LabelledImages
) -> None:
    """Two ends of two processes that are loaded side by side. When a service is killed, the kernel closes its socket;
    the engine is in the middle of an adaptation, and nobody tells it anything else."""

    async def orphan() -> None:
        engine = make_engine(digits_bundle)
        loaded = await engine.load()
        asking = asyncio.create_task(ask(engine, loaded.defences[SLOW], digits_test.images[:1]))
        pid = engine.process_id
        assert pid is not None
        before = cpu_seconds(pid)
        await asyncio.to_thread(wait_until, lambda: cpu_seconds(pid) > before + 0.1)
        assert engine._child is not None
        engine._child.writer.transport.abort()
        await asyncio.to_thread(wait_until, lambda: not is_alive(pid), seconds=5)
        with pytest.raises(EngineStoppedError):
            await asking
        await engine.end()

    async def short_of_memory() -> None:
        engine = make_engine(digits_bundle)
        loaded = await engine.load()
        died: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        engine.on_death = died.set_result
        pid = engine.process_id
        assert pid is not None
        mapped = mapped_bytes(pid)
        resource.prlimit(pid, resource.RLIMIT_AS, (mapped + 2**24, mapped + 2**24))
        many = np.repeat(digits_test.images[:100], 400, axis=0)
        with pytest.raises(EngineStoppedError):
            await ask(engine, loaded.defences["none"], many)
        assert "OutOfMemory: out of memory" in str(await died)
        assert engine.loaded is None
        await engine.end()

    async def both() -> None:
        await asyncio.gather(orphan(), short_of_memory())

    asyncio.run(both())


async def ask(engine: ProcessEngine, defence: Any, pixels: Any) -> None:
    await engine.predict(defence, pixels, deadline=time.monotonic() + 60, cancelled=threading.Event())


def test_a_process_that_cannot_load_says_why_and_leaves_nothing_behind(digits_bundle: Path) -> None:
    async def main() -> None:
        wrong = make_engine(digits_bundle, defense="rmcc")
        left = make_engine(digits_bundle)
        loading = asyncio.create_task(left.load())
        with pytest.raises(OptionError, match="did you mean 'rmc'"):
            await wrong.load()
        loading.cancel()  # the service is stopped while it loads
        await asyncio.wait([loading])
        for engine in (wrong, left):
            await engine.end()
            assert engine.loaded is None
            assert engine.process_id is None or not is_alive(engine.process_id)

    asyncio.run(main())


def test_every_setting_that_an_engine_looks_at_is_sent_to_its_process() -> None:
    """One that is not sent has its default there: a ceiling of neighbours would be none."""
    read = set(ceilings._SETTINGS.values())
    for module in (ceilings, thread_engine, engine_worker, loading):
        read |= set(re.findall(r"\bsettings\.(\w+)", inspect.getsource(module)))
    assert read & set(Settings.model_fields) <= set(_NEEDED)
    assert {"bundle", "threads", "max_neighbors"} <= read, "this test looks in the right places"
