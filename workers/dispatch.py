"""Dispatch: calls handed to teams of Ray actors, repeated elsewhere when a team dies, answered once each.

A team is what can answer a call alone: one actor, or several that hold a model together. Ray itself
repeats nothing here: only who counts the attempts can tell a call that kills workers from one that was
there when a worker died.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import ray
from ray import exceptions

from .worker import WorkerError

IN_FLIGHT = 2  # calls a team has at a time: while it works on one, the next has come
DEATHS = 2  # times that a call may take a worker with it before it is given up
_LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,
    exceptions.ObjectLostError,
    exceptions.RaySystemError,
    exceptions.TaskCancelledError,
)
_PAUSE = 0.5  # seconds until a team that died is asked again; without, the loop would spin


class Exhausted(NamedTuple):
    """An answer that says that a call needs more memory than the device has."""

    reason: str


class Answer(NamedTuple):
    """What came of some items.

    Attributes:
        items: Their positions.
        value: What the call returned; None if it was given up.
        failure: Why it was given up, else empty.
        attempts: How often it was handed out.
        name: The team that had it last.
    """

    items: list[int]
    value: Any
    failure: str
    attempts: int
    name: str


class Team(Protocol):
    """Actors that answer calls together.

    Attributes:
        name: Where they are, as people read it.
    """

    name: str

    def prepare(self) -> Any:
        """Return a reference to the team's name, which is there once it can answer calls."""

    def renew(self) -> None:
        """End the actors and make new ones."""

    def stop(self) -> None:
        """End the actors."""


@dataclass(eq=False)
class _Call:
    items: list[int]
    attempts: int = 0
    deaths: int = 0
    alone: bool = False  # after a death nothing else is in flight beside it, so that the next is its doing


@dataclass(eq=False)
class _Seat:
    """A team and what it is doing."""

    team: Any
    is_ready: bool = False
    asked: Any = None  # the reference that says when it is ready
    again: float = 0.0  # when to ask it
    flight: list[tuple[Any, _Call]] = field(default_factory=list)
    since: float = 0.0  # when the first call in flight came to be the first

    def has_room(self, call: _Call, depth: int) -> bool:
        """Whether a call may be handed to it, of which it has ``depth`` already."""
        if not self.is_ready or len(self.flight) != depth or (call.alone and depth):
            return False
        return not any(other.alone for _, other in self.flight)

    def leave(self, wait: float) -> None:
        """Go away for some seconds."""
        self.is_ready, self.asked, self.again = False, None, time.monotonic() + wait


class Dispatcher:
    """Hands calls to teams.

    Args:
        teams: Who answers.
        timeout: Seconds after which a call is taken for hung and its team is made anew.
        patience: Seconds to wait while there is no team at all.
        note: Called with a sentence when a team is lost.
    """

    def __init__(
        self,
        teams: Sequence[Team],
        *,
        timeout: float,
        patience: float,
        note: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._seats = [_Seat(team) for team in teams]
        self._timeout = timeout
        self._patience = patience
        self._note = note
        self._seen = 0.0  # when there was a team last
        self._largest = 1 << 30  # items that a device had memory for

    def wait(self, count: int = 1) -> None:
        """Wait for some teams; others join when they are ready.

        Raises:
            WorkerError: When none comes.
        """
        self._seen = time.monotonic()
        while sum(seat.is_ready for seat in self._seats) < count:
            self._step([])

    def run(self, begin: Callable[[Any, list[int]], Any], count: int, size: int = 1) -> Iterator[Answer]:
        """Yield the answers of items 0 to ``count`` - 1 as they come.

        Args:
            begin: Hands a list of items to a team and returns a reference to the answer.
            count: How many items there are.
            size: Items a call.

        Raises:
            WorkerError: When all teams are lost and none comes back.
        """
        everything = list(range(count))
        queue = deque(_Call(everything[i : i + size]) for i in range(0, count, size))
        self._seen = time.monotonic()
        try:
            while queue or any(seat.flight for seat in self._seats):
                self._hand_out(queue, begin)
                lost: list[_Call] = []
                yield from self._step(lost)
                queue.extendleft(reversed(lost))
        finally:
            for seat in self._seats:  # after an interrupt nobody waits for what is in flight
                seat.flight.clear()

    def stop(self) -> None:
        """End all teams."""
        for seat in self._seats:
            seat.team.stop()

    def _hand_out(self, queue: deque[_Call], begin: Callable[[Any, list[int]], Any]) -> None:
        for depth in range(IN_FLIGHT):  # one call each before anyone has two
            for seat in self._seats:
                if queue and len(queue[0].items) > self._largest:
                    queue.extendleft(reversed(_halves(queue.popleft())))
                if queue and seat.has_room(queue[0], depth):
                    call = queue.popleft()
                    call.attempts += 1
                    seat.since = time.monotonic() if depth == 0 else seat.since
                    seat.flight.append((begin(seat.team, call.items), call))

    def _step(self, lost: list[_Call]) -> list[Answer]:
        """Wait until something happens; return answers and add the calls to repeat to ``lost``."""
        now = time.monotonic()
        for seat in self._seats:
            if not seat.is_ready and seat.asked is None and now >= seat.again:
                seat.asked = seat.team.prepare()
        waiting = [seat.asked for seat in self._seats if seat.asked is not None]
        waiting += [reference for seat in self._seats for reference, _ in seat.flight]
        ready: list[Any] = []
        if waiting:
            ready, _ = ray.wait(waiting, num_returns=1, timeout=_PAUSE)
        else:
            time.sleep(_PAUSE / 5)
        if ready and len(waiting) > 1:
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        found, answers = set(ready), []
        for seat in self._seats:
            if seat.asked is not None and seat.asked in found:
                self._greet(seat)
            for reference, call in [pair for pair in seat.flight if pair[0] in found]:
                if (reference, call) in seat.flight:  # else its team has been lost meanwhile
                    answers += self._collect(seat, reference, call, lost)
            if seat.flight and time.monotonic() - seat.since > self._timeout:
                answers += self._lose(seat, f"no answer within {self._timeout:g} seconds", lost)
                seat.team.renew()
        self._check_patience()
        return answers

    def _greet(self, seat: _Seat) -> None:
        """Take in a team that says it is ready, or wait for it again."""
        try:
            seat.team.name = str(ray.get(seat.asked))
        except exceptions.ActorDiedError as error:
            if error.actor_init_failed:
                last = str(error).strip().rpartition("\n")[2]  # of a traceback, which says why
                raise WorkerError(f"workers cannot be started: {last}") from None
            seat.leave(_PAUSE)
            seat.team.renew()
        except _LOST:
            seat.leave(_PAUSE)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, _LOST):
                seat.leave(_PAUSE)
            else:
                raise WorkerError(reason_of(error)) from None
        else:
            seat.is_ready, seat.asked = True, None

    def _collect(self, seat: _Seat, reference: Any, call: _Call, lost: list[_Call]) -> list[Answer]:
        try:
            value = ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, _LOST):  # of an actor that this one waited for
                return self._lose(seat, reason_of(error.cause), lost)
            if isinstance(error.cause, OSError):  # a disk or a file, which no other candidate would find
                raise WorkerError(f"the worker {seat.team.name} failed: {reason_of(error)}") from None
            seat.flight.remove((reference, call))
            return self._blame(call, f"the worker raised {reason_of(error)}", seat.team.name, lost)
        except _LOST as error:
            return self._lose(seat, reason_of(error), lost)
        seat.flight.remove((reference, call))
        seat.since = time.monotonic()
        if not isinstance(value, Exhausted):
            return [Answer(call.items, value, "", call.attempts, seat.team.name)]
        if len(call.items) == 1:
            return [Answer(call.items, None, value.reason, call.attempts, seat.team.name)]
        self._largest = min(self._largest, len(call.items) // 2)
        lost += _halves(call)
        return []

    def _lose(self, seat: _Seat, reason: str, lost: list[_Call]) -> list[Answer]:
        """Take back the calls of a team that died: what it was working on may be why."""
        self._note(f"worker {seat.team.name} is lost ({reason}); what it was measuring is measured elsewhere")
        answers: list[Answer] = []
        calls = []
        for reference, call in seat.flight:
            try:  # it may have answered this one before it died
                value = ray.get(reference, timeout=0)
            except (exceptions.RayError, TimeoutError):
                calls.append(call)
            else:
                answers.append(Answer(call.items, value, "", call.attempts, seat.team.name))
        seat.flight.clear()
        seat.leave(_PAUSE)
        for call in calls[:1]:
            answers += self._blame(call, reason, seat.team.name, lost)
        for call in calls[1:]:
            call.alone = True
            lost.append(call)
        return answers

    def _blame(self, call: _Call, reason: str, name: str, lost: list[_Call]) -> list[Answer]:
        """Try a call again by itself, each of its items, unless it has had its tries."""
        call.deaths += 1
        if len(call.items) == 1 and call.deaths >= DEATHS:
            failure = f"given up after {call.attempts} attempts, the last of which ended so: {reason}"
            return [Answer(call.items, None, failure, call.attempts, name)]
        lost += [_Call([item], call.attempts, call.deaths, alone=True) for item in call.items]
        return []

    def _check_patience(self) -> None:
        now = time.monotonic()
        if any(seat.is_ready for seat in self._seats):
            self._seen = now
        elif now - self._seen > self._patience:
            raise WorkerError(
                f"expected workers within {self._patience:g} seconds, got none of {len(self._seats)}: the "
                "cluster may lack the CPUs or GPUs they ask for; what was measured is kept, resume the run "
                "when there are workers"
            )


def reason_of(error: BaseException) -> str:
    """Return what an error of Ray's says, in a line."""
    cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(cause).__name__}: {text}"[:300].rstrip(": ")


def _halves(call: _Call) -> list[_Call]:
    middle = len(call.items) // 2
    return [_Call(items, call.attempts, call.deaths) for items in (call.items[:middle], call.items[middle:])]
