"""The oracle over HTTP: a running service, asked in batches, every query counted for its image.

Which answers are bit for bit those of the same defence in this process: those that the service computed in a batch of
the same images (docs/api.md, "Requests that wait together"). One request at a time (``concurrency=1``) on a service
that nobody else uses is never merged with another, so its batches are exactly ``images_a_request`` images, the rest
last. With more at once it stays so as long as two requests do not fit into the service's ``max_batch_images``; what was
merged all the same is counted (``Traffic.merged``), and is rounded otherwise, by at most 1e-4 in a score.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from attack_client.answers import Answer
from attack_client.client import AsyncClient
from attack_client.query_log import QueryLog, Reply, digest
from attack_client.retry import RetryPolicy
from mithridate.attacks.oracle import Answers, Track, answers_from_scores
from mithridate.errors import InputError, MithridateError, OptionError
from mithridate.images import encode_png
from mithridate.types import Pixels

MAX_SCORES = 1000
"""The most classes the service lists."""

IMAGES_A_REQUEST = 64
"""The service's own ceilings by default, on a request and on a batch: two such requests are never merged."""

_T = TypeVar("_T")


class UnansweredError(MithridateError):
    """Queries went out, or would have, and there is no answer: ``queries`` of them. Nothing is made up for them."""

    def __init__(self, queries: int, asked: int, cause: Exception) -> None:
        super().__init__(f"{queries} of {asked} queries have no answer: {cause}")
        self.queries = queries
        self.cause = cause


class Session:
    """Connections to one service, for oracles that are asked in turn from ordinary code."""

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 60.0,
        connections: int = 16,
        retry: RetryPolicy | None = None,
        api_key: str | None = None,
    ) -> None:
        self._runner = asyncio.Runner()
        self.client = AsyncClient(
            url, timeout_seconds=timeout_seconds, connections=connections, retry=retry, api_key=api_key
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Gives back the connections."""
        self._runner.run(self.client.close())
        self._runner.close()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Waits for it."""
        return self._runner.run(work)


@dataclass
class Traffic:
    """What an oracle sent. ``seconds``: of each request, from when it was sent first to its answer, on a monotonic
    clock. ``recalled``: requests answered from the log, so not sent now. ``merged``: requests that the service answered
    together with others."""

    requests: int = 0
    recalled: int = 0
    retries: int = 0
    merged: int = 0
    seconds: list[float] = field(default_factory=list)


class HttpOracle:
    """A defence behind a service, as an ``Oracle``.

    On the track ``scores`` an answer lists every class; on ``labels`` only ``class_index`` is read. An abstaining
    defence's label is its best guess on both, as the service shows it to everybody; which queries were abstained on is
    counted in ``abstained``.

    ``asked``, ``retried``, ``abstained`` int64 ``[images]``: queries of each image that were answered, of those the
    ones that had to be sent again, and the ones that the defence abstained on. ``image_seconds`` float64 ``[images]``:
    each image's share of the time of its requests. ``sent`` int64 ``[images]`` counts now, without what the log knew.
    """

    def __init__(
        self,
        session: Session,
        *,
        defense: str,
        track: Track,
        classes: int,
        images: int,
        images_a_request: int = IMAGES_A_REQUEST,
        concurrency: int = 1,
        log: QueryLog | None = None,
        bundle: str | None = None,
    ) -> None:
        if track == "scores" and classes > MAX_SCORES:
            raise OptionError(
                f"the service lists at most {MAX_SCORES} classes, this bundle has {classes}: attack its labels"
            )
        if images_a_request < 1 or concurrency < 1:
            raise OptionError(f"{images_a_request} images a request, {concurrency} at once: allowed: from 1")
        self._session, self._log, self._bundle = session, log, bundle
        self._defense, self._track, self._classes = defense, track, classes
        self._images_a_request, self._concurrency = images_a_request, concurrency
        self._about = f"{defense} {track} {bundle}"
        self._number = 0
        self.asked, self.sent, self.retried, self.abstained = torch.zeros(4, images, dtype=torch.int64).unbind()
        self.image_seconds = torch.zeros(images, dtype=torch.float64)
        self.traffic = Traffic()

    @property
    def track(self) -> Track:
        return self._track

    @property
    def classes(self) -> int:
        return self._classes

    def ask(self, rows: torch.Tensor, pixels: Pixels) -> Answers:
        """As ``Oracle.ask``. Raises UnansweredError for what has no answer; the answers to the rest are in the log."""
        parts = [answers for _, answers in self.ask_in_parts(rows, pixels)]
        if not parts:
            return answers_from_scores(torch.zeros(0, self._classes), self._track)
        return Answers(
            labels=torch.cat([part.labels for part in parts]),
            scores=torch.cat([part.scores for part in parts if part.scores is not None])
            if self._track == "scores"
            else None,
        )

    def ask_in_parts(self, rows: torch.Tensor, pixels: Pixels) -> Iterator[tuple[torch.Tensor, Answers]]:
        """As ``PartwiseOracle.ask_in_parts``: one part a request, in order, ``concurrency`` of them under way."""
        for places, reply in self.replies(rows, pixels):
            yield places, Answers(labels=reply.labels, scores=reply.scores)

    def replies(self, rows: torch.Tensor, pixels: Pixels) -> Iterator[tuple[torch.Tensor, Reply]]:
        """The same, with all that came with each answer."""
        if len(rows) != len(pixels) or pixels.dtype != torch.uint8:
            raise ValueError(f"{len(rows)} rows for {pixels.dtype} pixels {list(pixels.shape)}")
        rows, pixels = rows.cpu(), pixels.cpu()
        parts = [places for places in torch.arange(len(rows)).split(self._images_a_request) if len(places)]
        done = 0
        for start in range(0, len(parts), self._concurrency):
            wave = parts[start : start + self._concurrency]
            replies = self._session.run(self._answer_together([(rows[part], pixels[part]) for part in wave]))
            failure = None
            for places, reply in zip(wave, replies, strict=True):
                if isinstance(reply, MithridateError):
                    failure = failure or reply
                else:
                    done += len(places)
                    yield places, reply
            if failure is not None:
                raise UnansweredError(len(rows) - done, len(rows), failure) from failure

    async def _answer_together(self, wave: Sequence[tuple[torch.Tensor, Pixels]]) -> list[Reply | MithridateError]:
        """All of them, each its reply or its error: that one fails must not lose the answers to the others."""

        async def one(number: int, rows: torch.Tensor, pixels: Pixels) -> Reply | MithridateError:
            try:
                return await self._answer(number, rows, pixels)
            except MithridateError as error:
                return error

        first, self._number = self._number, self._number + len(wave)
        return await asyncio.gather(*(one(first + number, *part) for number, part in enumerate(wave)))

    async def _answer(self, number: int, rows: torch.Tensor, pixels: Pixels) -> Reply:
        name = digest(rows, pixels, about=self._about)
        reply = self._log.recall(number, name) if self._log is not None else None
        known = reply is not None
        if reply is None:
            reply = await self._send(pixels)
            if self._log is not None:
                self._log.keep(number, name, reply)
        self._count(rows, reply, known=known)
        return reply

    async def _send(self, pixels: Pixels) -> Reply:
        files = [encode_png(image) for image in pixels.numpy()]
        retries = 0

        def retry() -> None:
            nonlocal retries
            retries += 1

        started = time.perf_counter()
        answer = await self._session.client.predict(
            files, defense=self._defense, top_k=self._classes if self._track == "scores" else 1, on_retry=retry
        )
        seconds = time.perf_counter() - started
        labels, scores, abstained = self._read(answer, len(files))
        company = 0 if answer.batch is None else answer.batch.requests - 1
        return Reply(
            labels=labels, scores=scores, abstained=abstained, seconds=seconds, retries=retries, company=company
        )

    def _read(self, answer: Answer, count: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The answer as tensors. Raises InputError for one that is not to what was asked."""
        given = answer.predictions
        if len(given) != count:
            raise InputError(f"the service gave {len(given)} answers for {count} images")
        if self._bundle is not None and answer.bundle.get("digest") != self._bundle:
            raise InputError(f"the service now answers from another bundle, {answer.bundle.get('digest')}")
        labels = torch.tensor([image.class_index for image in given], dtype=torch.int64)
        abstained = torch.tensor([image.abstained for image in given])
        if int(labels.min()) < 0 or int(labels.max()) >= self._classes:
            raise InputError(f"the service named class {int(labels.max())} of {self._classes}")
        if self._track == "labels":
            return labels, None, abstained
        scores = torch.full((count, self._classes), torch.nan, dtype=torch.float64)
        for row, image in enumerate(given):
            for scored in image.top:
                if 0 <= scored.class_index < self._classes:
                    scores[row, scored.class_index] = scored.confidence
        if bool(scores.isnan().any()):
            raise InputError(f"the service does not give a score for each of {self._classes} classes")
        return labels, scores, abstained

    def _count(self, rows: torch.Tensor, reply: Reply, *, known: bool) -> None:
        ones = torch.ones_like(rows)
        self.asked.index_add_(0, rows, ones)
        self.abstained.index_add_(0, rows, reply.abstained.long())
        if reply.retries:
            self.retried.index_add_(0, rows, ones)
        if not known:
            self.sent.index_add_(0, rows, ones)
        share = torch.full((len(rows),), reply.seconds / len(rows), dtype=torch.float64)
        self.image_seconds.index_add_(0, rows, share)
        self.traffic.requests += 1
        self.traffic.recalled += known
        self.traffic.retries += reply.retries
        self.traffic.merged += reply.company > 0
        self.traffic.seconds.append(reply.seconds)
