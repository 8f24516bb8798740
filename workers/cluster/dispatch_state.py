"""What the dispatcher knows of its teams and of the calls that they have."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

STARTS = 3  # failed starts in a row after which a team is not asked again
_PAUSE = 0.5  # seconds until a team that died is asked again; without, the loop would spin


class Team(Protocol):
    """Actors that answer calls together.

    Attributes:
        name: Where they are, as people read it.
        depth: Calls that it works on at a time, and one that has come meanwhile.
    """

    name: str
    depth: int

    def prepare(self) -> Any:
        """Return a reference to the team's name, which is there once it can answer calls."""

    def forget(self) -> None:
        """Drop what it keeps between calls and can have again."""

    def renew(self) -> None:
        """End the actors and make new ones."""

    def stop(self) -> None:
        """End the actors."""


@dataclass(eq=False)
class Call:
    """Items that one team is asked to answer together.

    Attributes:
        items: Their numbers.
        attempts: How often they have been handed to a team.
        deaths: How many of these attempts ended with the team's death.
        alone: Whether a team works on nothing else beside it. So it is after a death: if the team dies
            again, this call is known to be the cause.
    """

    items: list[int]
    attempts: int = 0
    deaths: int = 0
    alone: bool = False


@dataclass(eq=False)
class TeamSlot:
    """A team and what it is doing. Times are those of ``time.monotonic``.

    Attributes:
        team: The team.
        is_ready: Whether it has started and takes calls.
        asked: The reference that says when it has started, while it is starting.
        since: When what is waited for now began: the start, or else the work on the oldest call in flight.
        again: When to start it, while it is neither ready nor starting.
        failed: How many starts in a row have failed.
        flight: The calls that it has, the oldest first, each with the reference to its answer.
    """

    team: Any
    is_ready: bool = False
    asked: Any = None
    since: float = 0.0
    again: float = 0.0
    failed: int = 0
    flight: list[tuple[Any, Call]] = field(default_factory=list)

    def has_room(self, call: Call, depth: int) -> bool:
        """Whether a call may be handed to it, of which it has ``depth`` already."""
        if not self.is_ready or len(self.flight) != depth or depth >= self.team.depth:
            return False
        return not (call.alone and depth) and not any(other.alone for _, other in self.flight)

    def remove(self, call: Call) -> None:
        """Take a call out of flight; the time of the next begins."""
        self.flight = [pair for pair in self.flight if pair[1] is not call]
        self.since = time.monotonic()

    def leave(self, *, renew: bool = False) -> None:
        """Go away for a while, the longer the more starts have failed; for good after some."""
        pause = _PAUSE * 2**self.failed if self.failed < STARTS else math.inf
        self.is_ready, self.asked, self.again = False, None, time.monotonic() + pause
        if renew:
            self.team.renew()


def halves(call: Call) -> list[Call]:
    """Return two calls of half of the items each."""
    middle = len(call.items) // 2
    parts = (call.items[:middle], call.items[middle:])
    return [Call(items, call.attempts, call.deaths, call.alone) for items in parts]
