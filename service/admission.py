"""Who is let in: bounded by how many are there, by how much of the engine's time they will take, and by what their key
may use. Turned away is turned away at once, before anything is read, decoded or computed.

It all happens in the event loop's thread, so nothing here is locked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.allowances import Allowance, Allowances, Clock, Spent, whole_seconds
from service.costs import Costs
from service.keys import Caller
from service.problems import Problem, ShedReason
from service.settings import Settings


@dataclass(kw_only=True, eq=False)
class Ticket:
    """One request's place, and what is known of what it wants."""

    allowance: Allowance | None
    estimate: float
    """Seconds of the engine that it is taken to need."""
    defence: str = ""
    images: int = 0
    charged: float = 0.0
    """Seconds, to its key."""
    asked: float | None = None
    """When the engine got it; None before, and again when it has answered."""
    first: float | None = None
    """Since when no other is before it."""


class Admission:
    """The places, the estimates and the allowances of one service.

    A request ``enter``s, has its ``price`` when it is known what it wants, ``ask``s when the engine gets it, has
    ``settle`` when it is answered, and always ``leave``s.
    """

    def __init__(self, settings: Settings, clock: Clock = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._allowances = Allowances(clock=clock)
        self._inside: set[Ticket] = set()
        self._asking: list[Ticket] = []
        self.costs = Costs(clock)
        self.lanes = 1
        """Engines that answer side by side."""
        self.default = ""
        """The defence that a request is taken to want until it has been read."""

    @property
    def in_flight(self) -> int:
        """Requests inside."""
        return len(self._inside)

    @property
    def queued_seconds(self) -> float:
        """Of the engine's time that those inside will take, as far as one can tell."""
        return sum(ticket.estimate for ticket in self._inside) / self.lanes

    def enter(self, caller: Caller) -> Ticket:
        """A place for one request, to be left again however it ends. Raises Problem 429 where there is none."""
        allowance = self._allowances.of(caller.key)
        if allowance is not None and (spent := allowance.spent()):
            raise self._used_up(spent)
        full = self.no_room()
        if full is not None:
            raise full
        if allowance is not None and allowance.requests is not None:
            allowance.requests.take(1.0)
        ticket = Ticket(allowance=allowance, estimate=self.costs.estimate(self.default, 1))
        self._inside.add(ticket)
        return ticket

    def no_room(self, coming: int = 0) -> Problem | None:
        """What whoever comes now is refused with, for those who are there already and ``coming`` others who take their
        places before; None where there is room."""
        waiting = len(self._inside) + coming
        if waiting >= self._settings.queue_size:
            return self._full("queue-full", f"{waiting} requests are waiting already")
        if self.queued_seconds >= self._settings.queue_seconds:
            return self._full("cost", f"what waits already takes about {self.queued_seconds:.1f} s")
        return None

    @contextmanager
    def reading(self, ticket: Ticket) -> Iterator[None]:
        """While a body is still coming it takes nobody's place: what it holds is bytes, which are bounded elsewhere.
        Otherwise as many slow clients as there are places would keep everybody out. Raises Problem 429 where there is
        no place any more when it has come."""
        self._inside.discard(ticket)
        try:
            yield
        finally:
            self._inside.add(ticket)
        if len(self._inside) > self._settings.queue_size:
            raise self._full("queue-full", f"{len(self._inside) - 1} requests are waiting already", besides=ticket)

    @property
    def remaining_seconds(self) -> float:
        """Until those inside are done. A run that has taken longer than it should is taken to be half done."""
        left = self.queued_seconds
        for head in self._asking[:1]:
            ran = self._ran(head)
            left += (ran if ran > head.estimate else -ran) / self.lanes
        return max(0.0, left)

    def price(self, ticket: Ticket, defence: str, images: int, *, seconds_left: float) -> None:
        """What it wants, and the seconds until its deadline. Raises Problem: 429 where that is more than there is room
        or an allowance for, 504 where it would not be done in time even if nobody else were here."""
        ahead, own = self.queued_seconds - ticket.estimate / self.lanes, self.costs.estimate(defence, images)
        least = self.costs.least(defence, images)
        if least > seconds_left:
            detail = f"this takes at least {least:.2g} s, and the deadline is in {max(0.0, seconds_left):.2g} s"
            raise Problem(504, f"{detail}; send fewer images, or allow more time", reason="deadline")
        if len(self._inside) > 1 and ahead + own / self.lanes > self._settings.queue_seconds:  # alone, it may take long
            detail = f"what waits already takes about {ahead:.1f} s, and this about {own:.1f} s more"
            raise self._full("cost", detail, besides=ticket)
        if ticket.allowance is not None and (spent := ticket.allowance.compute_spent(own)):
            raise self._used_up(spent)
        ticket.defence, ticket.images, ticket.estimate = defence, images, own
        self._charge(ticket, own)

    def ask(self, ticket: Ticket) -> None:
        """It is handed to the engine, which begins with whoever was handed over first."""
        ticket.asked = self._clock()
        self._asking.append(ticket)
        self._promote()

    def settle(self, ticket: Ticket, seconds: float, *, images_together: int) -> None:
        """It was answered in a run of ``seconds`` for ``images_together``; of that it is charged its share."""
        self.costs.ran(ticket.defence, images=images_together, seconds=seconds)
        self._charge(ticket, seconds * ticket.images / images_together)
        ticket.asked = None

    def leave(self, ticket: Ticket) -> None:
        """Gives its place back. What it is charged: its share where it was answered, nothing where the engine never
        had it, else the estimate, or what has certainly been spent on it where that is more."""
        if ticket.asked is not None:
            ran = self._ran(ticket)
            self._charge(ticket, max(ran, min(ticket.estimate, self._clock() - ticket.asked)))
            if ran > ticket.estimate:
                self.costs.ran_at_least(ticket.defence, images=ticket.images, seconds=ran)
        elif ticket not in self._asking:
            self._charge(ticket, 0.0)
        self._inside.discard(ticket)
        if ticket in self._asking:
            self._asking.remove(ticket)
        self._promote()

    def _promote(self) -> None:
        if self._asking and self._asking[0].first is None:
            self._asking[0].first = self._clock()

    def _ran(self, ticket: Ticket) -> float:
        """Seconds that the engine has certainly spent on it."""
        return 0.0 if ticket.first is None else self._clock() - ticket.first

    def _charge(self, ticket: Ticket, seconds: float) -> None:
        """Makes ``seconds`` of what was charged before."""
        if ticket.allowance is not None and ticket.allowance.compute is not None:
            ticket.allowance.compute.take(seconds - ticket.charged)
        ticket.charged = seconds

    def _full(self, reason: ShedReason, detail: str, *, besides: Ticket | None = None) -> Problem:
        others = self.remaining_seconds - (0.0 if besides is None else besides.estimate / self.lanes)
        return Problem(429, detail, headers={"Retry-After": whole_seconds(others)}, reason=reason)

    def _used_up(self, spent: Spent) -> Problem:
        wait = whole_seconds(spent.seconds)
        detail = f"this key's allowance of {spent.what} is used up; again in {wait} s"
        return Problem(429, detail, headers={"Retry-After": wait}, reason="allowance")
