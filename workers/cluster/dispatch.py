"""Dispatch: calls handed to teams of Ray actors, repeated elsewhere when a team dies, answered once each.

A team is what can answer a call alone: one actor, or several that hold a model together. Ray itself
repeats nothing here: only who counts the attempts can tell a call that kills workers from one that was
there when a worker died.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ray
from ray import exceptions

from ...search.core.candidate import Failure
from ..measure.worker import WorkerError
from .dispatch_state import STARTS, Call, Team, TeamSlot, halves

DEATHS = 2  # times that a call may take a worker with it before it is given up
_LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,
    exceptions.OutOfDiskError,
    exceptions.ObjectLostError,
    exceptions.ObjectStoreFullError,
    exceptions.RaySystemError,
    exceptions.RpcError,
    exceptions.TaskCancelledError,
)
_ASKED_SECONDS = 5.0
_TICK = 0.5  # seconds after which the clock is looked at though nothing has happened
_LOADING = 2.0  # seconds after which a start that failed had begun to load


class Exhausted(Failure):
    """An answer that says that a call needs more memory than the device has."""


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


Outcome = Answer | Call  # what came of a call: an answer, or a call to hand out again


class Dispatcher:
    """Hands calls to teams.

    Args:
        teams: Who answers.
        timeout: Seconds after which a call is taken for hung and its team is made anew.
        patience: Seconds to wait while there is no team at all.
        report: Called with a sentence when a team is lost.
    """

    def __init__(
        self,
        teams: Sequence[Team],
        *,
        timeout: float,
        patience: float,
        report: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._slots = [TeamSlot(team) for team in teams]
        self._timeout = timeout
        self._patience = patience
        self._report = report
        self._seen = 0.0  # when there was a team last
        self._had_one = self._has_answered = False
        self._largest = 1 << 30  # items that a device had memory for

    @property
    def ready(self) -> list[Any]:
        """The teams that can answer calls now."""
        return [slot.team for slot in self._slots if slot.is_ready]

    def wait(self, count: int = 1) -> None:
        """Wait for some teams; others join when they are ready.

        Raises:
            WorkerError: When none comes.
        """
        self._seen = time.monotonic()
        while len(self.ready) < count:
            self._step()

    def run(self, begin: Callable[[Any, list[int]], Any], count: int, size: int = 1) -> Iterator[Answer]:
        """Yield the answers of items 0 to ``count`` - 1 as they come.

        Args:
            begin: Hands a list of items to a team and returns a reference to the answer.
            count: How many items there are.
            size: Items per call.

        Raises:
            WorkerError: When all teams are lost and none comes back.
        """
        everything = list(range(count))
        queue = deque(Call(everything[i : i + size]) for i in range(0, count, size))
        self._seen = time.monotonic()
        try:
            while queue or any(slot.flight for slot in self._slots):
                self._hand_out(queue, begin)
                outcomes = self._step()
                again = [outcome for outcome in outcomes if isinstance(outcome, Call)]
                queue.extendleft(reversed(again))
                yield from (outcome for outcome in outcomes if isinstance(outcome, Answer))
        except exceptions.RayError as error:  # of no team, but of the cluster
            raise WorkerError(
                f"the cluster cannot be used: {reason_of(error)}; what was measured is kept, resume the run"
            ) from None
        finally:
            for slot in self._slots:  # after an interrupt nobody waits for what is in flight
                slot.flight.clear()

    def ask(self, begin: Callable[[Any], list[Any]]) -> list[Any]:
        """Return what the teams that are ready answer at once; nothing if one does not."""
        asked = [reference for slot in self._slots if slot.is_ready for reference in begin(slot.team)]
        try:
            return list(ray.get(asked, timeout=_ASKED_SECONDS))
        except (exceptions.RayError, TimeoutError):
            return []

    def stop(self) -> None:
        """End all teams."""
        for slot in self._slots:
            slot.team.stop()

    def _hand_out(self, queue: deque[Call], begin: Callable[[Any, list[int]], Any]) -> None:
        for depth in range(max((slot.team.depth for slot in self._slots), default=0)):
            for slot in self._slots:  # one call each before anyone has two
                while queue and len(queue[0].items) > self._largest:
                    queue.extendleft(reversed(halves(queue.popleft())))
                if queue and slot.has_room(queue[0], depth):
                    call = queue.popleft()
                    call.attempts += 1
                    slot.since = time.monotonic() if depth == 0 else slot.since
                    slot.flight.append((begin(slot.team, call.items), call))

    def _step(self) -> list[Outcome]:
        """Wait until something happens and return what came of it."""
        now = time.monotonic()
        for slot in self._slots:
            if not slot.is_ready and slot.asked is None and now >= slot.again:
                slot.asked, slot.since = slot.team.prepare(), now
        waiting = [slot.asked for slot in self._slots if slot.asked is not None]
        waiting += [reference for slot in self._slots for reference, _ in slot.flight]
        ready: list[Any] = []
        if waiting:
            ready, _ = ray.wait(waiting, num_returns=1, timeout=_TICK)
        else:
            time.sleep(_TICK / 5)
        if ready and len(waiting) > 1:
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        found = set(ready)
        outcomes: list[Outcome] = []
        for slot in self._slots:
            if slot.asked is not None and slot.asked in found:
                self._greet(slot)
            for reference, call in [pair for pair in slot.flight if pair[0] in found]:
                if (reference, call) in slot.flight:  # else its team has been lost meanwhile
                    outcomes += self._collect(slot, reference, call)
            if slot.flight and time.monotonic() - slot.since > self._timeout:
                outcomes += self._give_up_waiting(slot)
        self._check_patience()
        return outcomes

    def _greet(self, slot: TeamSlot) -> None:
        """Take in a team that says it is ready, or ask it again later.

        Raises:
            WorkerError: When it cannot be ready, and no other has been.
        """
        try:
            slot.team.name = str(ray.get(slot.asked))
        except exceptions.RayError as error:
            cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
            is_away = isinstance(cause, _LOST) and not getattr(cause, "actor_init_failed", False)
            if not is_away or time.monotonic() - slot.since > _LOADING:  # else it may wait for its node
                # What has worked may work again, however often its process or node is lost.
                slot.failed += not is_away or not self._had_one
                self._report(f"a worker could not start: {reason_of(error)}")
            others = any(other.failed < STARTS for other in self._slots)
            if not self._had_one and (not is_away or not others):
                hint = "" if not is_away else "; workers may lack memory, choose fewer --workers"
                raise WorkerError(f"workers cannot start: {reason_of(error)}{hint}") from None
            slot.leave(renew=isinstance(cause, exceptions.ActorDiedError))
        else:
            slot.is_ready, slot.asked, slot.failed = True, None, 0
            self._had_one = True

    def _collect(self, slot: TeamSlot, reference: Any, call: Call) -> Sequence[Outcome]:
        try:
            value = ray.get(reference)
        except exceptions.RayError as error:
            return self._lose(slot, error, call)
        return self._take(slot, call, value)

    def _take(self, slot: TeamSlot, call: Call, value: Any) -> Sequence[Outcome]:
        slot.remove(call)
        if not isinstance(value, Exhausted):
            self._has_answered = True
            return [Answer(call.items, value, "", call.attempts, slot.team.name)]
        slot.team.forget()  # what it keeps may be this very answer
        if len(call.items) == 1:
            return [Answer(call.items, None, value.reason, call.attempts, slot.team.name)]
        self._largest = min(self._largest, len(call.items) // 2)
        return halves(call)

    def _lose(self, slot: TeamSlot, error: Exception, guilty: Call) -> list[Outcome]:
        """Take back the calls of a team that died or failed; the guilty one, which said so, may be why.

        A process that raised something unforeseen, such as an error of its GPU, is not trusted any more.
        """
        cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
        has_died = isinstance(cause, (*_LOST, TimeoutError))
        reason = reason_of(error) if has_died else f"the worker raised {reason_of(error)}"
        name = slot.team.name
        self._report(f"worker {name} is lost ({reason}); what it was measuring is measured elsewhere")
        outcomes: list[Outcome] = []
        others = []
        for reference, call in list(slot.flight):
            if call is guilty:
                continue
            try:  # it may have answered this one before it died
                value = ray.get(reference, timeout=0)
            except (exceptions.RayError, TimeoutError):
                others.append(call)
            else:
                outcomes += self._take(slot, call, value)
        slot.flight.clear()
        if isinstance(cause, OSError) and not has_died:  # its own disk or network, not a candidate's doing
            slot.failed += 1
            others.append(guilty)
        else:
            outcomes += self._blame(guilty, reason, name)
        slot.leave(renew=not has_died or isinstance(cause, TimeoutError))
        for call in others:
            call.alone = True
        return outcomes + others

    def _give_up_waiting(self, slot: TeamSlot) -> list[Outcome]:
        """Make anew a team whose first call takes too long.

        Raises:
            WorkerError: When such a call is given up and none has ever been answered.
        """
        error = TimeoutError(f"no answer within the time-out of {self._timeout:g} seconds")
        outcomes = self._lose(slot, error, slot.flight[0][1])
        is_given_up = any(isinstance(outcome, Answer) and outcome.failure for outcome in outcomes)
        if is_given_up and not self._has_answered:
            raise WorkerError(f"{error}, twice, and none to any call so far; choose a longer --timeout")
        return outcomes

    def _blame(self, call: Call, reason: str, name: str) -> Sequence[Outcome]:
        """Try a call again by itself, each of its items, unless it has had its tries."""
        call.deaths += 1
        if len(call.items) == 1 and call.deaths >= DEATHS:
            failure = f"given up after {call.attempts} attempts, the last of which ended so: {reason}"
            return [Answer(call.items, None, failure, call.attempts, name)]
        return [Call([item], call.attempts, call.deaths, alone=True) for item in call.items]

    def _check_patience(self) -> None:
        now = time.monotonic()
        if self.ready:
            self._seen = now
        elif now - self._seen > self._patience or all(slot.failed >= STARTS for slot in self._slots):
            raise WorkerError(
                f"expected workers within {self._patience:g} seconds, got none of {len(self._slots)}: the "
                "cluster may lack the CPUs, GPUs or memory they ask for; what was measured is kept, resume "
                "the run when there are workers"
            )


def reason_of(error: BaseException) -> str:
    """Return what an error of Ray's says, in a line."""
    cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
    # The reason of an actor that could not be made stands at the end of a traceback.
    text = lines[-1] if getattr(cause, "actor_init_failed", False) else lines[0]
    if isinstance(cause, (ValueError, TimeoutError)):
        return text[:400]
    return f"{type(cause).__name__}: {text}"[:400].rstrip(": ")
