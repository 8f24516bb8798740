"""The error above all that a user can cause."""

from __future__ import annotations


class SecateurError(ValueError):
    """What a user can mend: the message says what was expected, what came and what to do.

    Every error that the package raises on purpose is one. Anything else that leaves it, but for errors of
    the disk and of SQLite, is a bug of the package.
    """


class MetricError(SecateurError):
    """A metric that cannot be read or cannot score weights; the message says what to change."""
