"""Which queries lie close to earlier ones of the same client, by the base model's embedding.

Attacks that only see answers ask about one image many times, a little changed each time: their queries lie closer
together than images that were taken apart. Chen, Carlini, Wagner: Stateful Detection of Black-Box Adversarial Attacks
(SPAI 2020) look at distances to a client's recent queries in the same way. It tells an operator something and changes
no answer: whoever knows of it gets around it (docs/watching.md).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_SAMPLED = 256
"""Exemplars whose nearest other one is looked for."""

_FIRST_ROWS = 32
"""A client that comes once does not get room for a thousand."""

_CLIENT_BYTES = 4096
"""What a client takes beside its embeddings: an upper bound."""

_RATED = 100
"""A client's latest queries that its rate is taken over."""

_IDENTICAL = 1e-10
"""Squared distance, relative to the squared length: what another batch size rounds differently, 1e-6 of the length,
is below it, and one pixel that is moved by 1/255 far above."""


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What is near in a bundle's embedding: squared distances below ``near``. ``centre`` float32 ``[D]`` is taken off
    all embeddings, so that float32 loses nothing to what they have in common."""

    centre: NDArray[np.float32]
    near: float

    @classmethod
    def of(cls, embeddings: NDArray[np.float32], *, window: int, fraction: float) -> Yardstick:
        """From the clean exemplars ``[E, D]``: ``fraction`` squared times the median squared distance from one of them
        to the nearest of ``window`` others, as many as a client's queries are compared with."""
        draw = np.random.default_rng(0)
        chosen = np.sort(draw.choice(len(embeddings), min(len(embeddings), window + 1), replace=False))
        rows = np.array(embeddings[chosen], dtype=np.float32)
        centre = rows.mean(0)
        rows -= centre
        probes = draw.permutation(len(rows))[:_SAMPLED]
        squared = _squared_distances(rows[probes], rows)
        squared[np.arange(len(probes)), probes] = np.inf
        nearest = squared.min(1)
        median = float(np.median(nearest[np.isfinite(nearest)])) if np.isfinite(nearest).any() else 0.0
        return cls(centre=centre, near=fraction**2 * max(0.0, median))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one request: how many queries were ``compared``, were ``near`` an earlier one, or ``identical`` to it; and
    of the client's latest queries the ``rate`` that was near, over ``rated`` of them."""

    compared: int
    near: int
    identical: int
    rate: float
    rated: int


@dataclass(kw_only=True, eq=False)
class _Client:
    rows: NDArray[np.float32]
    count: int = 0
    """Ever written; the latest ``len(rows)`` are there once the ring is full."""
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=_RATED))
    seen_at: float = 0.0

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + _CLIENT_BYTES


class RecentQueries:
    """The latest ``window`` embeddings of each client, ``max_bytes`` in all: the client that was silent for longest is
    forgotten first. Not for several threads at once."""

    def __init__(self, yardstick: Yardstick, *, window: int, max_bytes: int) -> None:
        row_bytes = yardstick.centre.nbytes
        self._window = max(1, min(window, (max_bytes - _CLIENT_BYTES) // row_bytes))  # one client has to fit, too
        self._yardstick, self._max_bytes = yardstick, max_bytes
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        """How many clients are remembered."""
        return len(self._clients)

    def add(self, client: str, embeddings: NDArray[np.float32], *, now: float) -> Seen:
        """Compares ``embeddings`` ``[N, D]`` with the client's earlier ones, each also with those before it, and
        remembers them. ``now``: ``time.monotonic()``. What is not finite is left out."""
        points = embeddings - self._yardstick.centre
        points = points[np.isfinite(points).all(1)]
        mine = self._find(client, points.shape[1])
        mine.seen_at = now
        nearest = self._nearest(mine, points)
        identical = nearest <= _IDENTICAL * np.square(points, dtype=np.float64).sum(1)
        near = (nearest < self._yardstick.near) & ~identical
        # Asking the same again tells an attacker nothing and is what clients do that retry: it is not rated.
        mine.recent.extend(near[~identical].tolist())
        self._remember(mine, points)
        self._forget()
        return Seen(
            compared=len(points),
            near=int(near.sum()),
            identical=int(identical.sum()),
            rate=sum(mine.recent) / max(1, len(mine.recent)),
            rated=len(mine.recent),
        )

    def highest_rate(self, *, since: float, at_least: int) -> float:
        """Of the clients heard of after ``since`` (``time.monotonic()``) that have ``at_least`` so many rated ones."""
        rates = [
            sum(client.recent) / len(client.recent)
            for client in self._clients.values()
            if client.seen_at > since and len(client.recent) >= at_least
        ]
        return max(rates, default=0.0)

    def _find(self, client: str, dimension: int) -> _Client:
        if client not in self._clients:
            made = _Client(rows=np.empty((min(_FIRST_ROWS, self._window), dimension), dtype=np.float32))
            self._clients[client] = made
            self.nbytes += made.nbytes
        self._clients.move_to_end(client)
        return self._clients[client]

    @staticmethod
    def _nearest(client: _Client, points: NDArray[np.float32]) -> NDArray[np.float64]:
        """``[N]``: squared distance to the nearest earlier one; infinite for the first."""
        known = client.rows[: min(client.count, len(client.rows))]
        others = np.concatenate([known, points]) if len(points) > 1 else known
        if not len(others):
            return np.full(len(points), np.inf)
        squared = _squared_distances(points, others)
        if len(points) > 1:
            squared[:, len(known) :][np.triu_indices(len(points))] = np.inf
        best = squared.argmin(1)
        # Which one it is, float32 tells; how far it is, next to nothing, is computed again.
        exact = np.square(points.astype(np.float64) - others[best]).sum(1)
        return np.where(np.isfinite(squared[np.arange(len(points)), best]), exact, np.inf)

    def _remember(self, client: _Client, points: NDArray[np.float32]) -> None:
        points = points[-self._window :]
        wanted = min(self._window, client.count + len(points))
        if wanted > len(client.rows):
            size = min(self._window, max(wanted, 2 * len(client.rows)))
            grown = np.empty((size, client.rows.shape[1]), dtype=np.float32)
            grown[: client.count] = client.rows[: client.count]  # before it is full, all lie in order
            self.nbytes += grown.nbytes - client.rows.nbytes
            client.rows = grown
        places = (client.count + np.arange(len(points))) % len(client.rows)
        client.rows[places] = points
        client.count += len(points)

    def _forget(self) -> None:
        while self.nbytes > self._max_bytes and len(self._clients) > 1:
            _, gone = self._clients.popitem(last=False)
            self.nbytes -= gone.nbytes


def _squared_distances(points: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[N, M]``."""
    lengths = np.vecdot(points, points)[:, None] + np.vecdot(others, others)
    return np.asarray(lengths - 2 * points @ others.T)
