"""The store: every measurement and every trial of a run, in one SQLite file that survives anything.

Two tables. ``measurements`` holds what a stage found out about a candidate, written as soon as it is
known; ``trials`` holds one row a candidate in the order told, written a batch at a time. A search that
was killed is resumed by running it again: what the first table knows is not measured twice, what the
second holds is written once. One process writes, any number read, also while it writes.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression
from ...metrics_dsl.parser import parse
from ...search.core.candidate import Candidate, Measurement, Part, Stage, Trial
from .counts import Counts
from .database import ArchiveError, connect, explained, lock
from .run_folder import RunFolder

SCHEMA = 5
# What tables and fronts read stands in rows of some 300 bytes; the numbers of each layer, ten times as long,
# stand apart, so that a hundred thousand candidates are read in a second.
FIGURES = ("kl", "kl_rung", "layer_error", "model_error", "perplexity", "sparsity")
_STORED = ", ".join(
    f"{name} REAL GENERATED ALWAYS AS (json_extract(\"values\", '$.{name}')) STORED" for name in FIGURES
)
_TABLES = f"""
PRAGMA user_version = {SCHEMA};
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE measurements (
    key TEXT NOT NULL, stage TEXT NOT NULL, part TEXT NOT NULL, of_tokens INTEGER NOT NULL,
    "values" TEXT NOT NULL, seconds REAL NOT NULL, failure TEXT NOT NULL, fingerprint TEXT NOT NULL,
    tokens INTEGER NOT NULL, worker TEXT NOT NULL, attempts INTEGER NOT NULL,
    layer_errors BLOB NOT NULL, parts BLOB NOT NULL, sensitivities BLOB NOT NULL,
    PRIMARY KEY (key, stage, part, of_tokens));
CREATE INDEX holdout ON measurements (key) WHERE part = 'holdout';
CREATE TABLE trials (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, status TEXT NOT NULL, alias_of TEXT NOT NULL,
    metric TEXT NOT NULL, "group" TEXT NOT NULL, size INTEGER NOT NULL, ratio_min REAL, ratio_max REAL,
    stage TEXT NOT NULL, "values" TEXT NOT NULL, seconds REAL NOT NULL, failure TEXT NOT NULL,
    fingerprint TEXT NOT NULL, tokens INTEGER NOT NULL, worker TEXT NOT NULL, attempts INTEGER NOT NULL,
    {_STORED});
CREATE TABLE by_layer (
    key TEXT PRIMARY KEY, ratios BLOB NOT NULL, layer_errors BLOB NOT NULL, parts BLOB NOT NULL,
    sensitivities BLOB NOT NULL);
"""
_MEASURED = '"values", seconds, failure, fingerprint, tokens, worker, attempts'
_NUMBERS = "layer_errors, parts, sensitivities"


class Store:
    """The SQLite file in a run folder: what is written and read of it, without pandas.

    Args:
        folder: The run folder.
        write: Open for writing, which makes the file if needed and locks out other writers.

    Raises:
        ArchiveError: When there is no archive, it cannot be read, or another process is writing it.
    """

    def __init__(self, folder: str | Path, *, write: bool = False) -> None:
        self.folder = Path(folder)
        place = RunFolder(self.folder)
        self._path = place.archive_file
        self._lock: IO[str] | None = None
        # Values of objectives that are no column, by what a row says of its trial.
        self.worked_out: dict[str, dict[tuple[Any, ...], float | None]] = {}
        if write:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(place.lock_file)
        elif not place.has_archive:
            raise place.missing()
        try:
            self._db = connect(self._path, _TABLES, write=write)
            self._check_version(write)
        except sqlite3.DatabaseError as error:
            self._unlock()
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise ArchiveError(f"{self._path} is not an archive: {error}") from None
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let other writers in."""
        self._db.close()
        self._unlock()

    # Writing ------------------------------------------------------------------------------------

    def add(self, trials: Sequence[Trial], keep_first: int | None = None, **facts: Any) -> None:
        """Append trials in order, in one transaction; those already there stay as they are.

        Args:
            trials: What to append.
            keep_first: Drop the trials after the first so many before; their measurements stay.
            facts: Kept in the same transaction.
        """
        rows = [
            (
                t.candidate.key, t.status, t.alias_of, str(t.candidate.metric), t.candidate.group,
                t.candidate.metric.size, min(t.candidate.ratios, default=None),
                max(t.candidate.ratios, default=None), t.measurement.stage, *_figures(t.measurement),
            )
            for t in trials
        ]  # fmt: skip
        layers = [(t.candidate.key, _floats(t.candidate.ratios), *_numbers(t.measurement)) for t in trials]
        with self._transaction():
            if keep_first is not None:
                later = "SELECT key FROM trials WHERE number > ?"
                self._db.execute(f"DELETE FROM by_layer WHERE key IN ({later})", (keep_first,))
                self._db.execute("DELETE FROM trials WHERE number > ?", (keep_first,))
            self._db.executemany(
                'INSERT OR IGNORE INTO trials (key, status, alias_of, metric, "group", size, ratio_min, '
                f"ratio_max, stage, {_MEASURED}) VALUES ({', '.join('?' * 16)})",
                rows,
            )
            self._db.executemany("INSERT OR IGNORE INTO by_layer VALUES (?, ?, ?, ?, ?)", layers)
            self._keep(facts)

    def record(self, measured: Iterable[tuple[Candidate, Measurement]], part: Part, tokens: int = 0) -> None:
        """Keep what was just measured on ``tokens`` tokens of a part, 0 being all, in one transaction."""
        rows = [(c.key, m.stage, part, tokens, *_figures(m), *_numbers(m)) for c, m in measured]
        with self._transaction():
            self._db.executemany(f"INSERT OR IGNORE INTO measurements VALUES ({', '.join('?' * 14)})", rows)

    def keep(self, **facts: Any) -> None:
        """Keep facts about the run, as JSON, replacing those of the same name."""
        with self._transaction():
            self._keep(facts)

    def _keep(self, facts: Mapping[str, Any]) -> None:
        rows = [(name, json.dumps(value)) for name, value in facts.items()]
        self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)

    # Reading ------------------------------------------------------------------------------------

    def fact(self, name: str, default: Any = None) -> Any:
        """Return a fact about the run."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def recall(self, key: str, stage: Stage, part: Part, tokens: int = 0) -> Measurement | None:
        """Return what a stage found out about a candidate, if it has been measured."""
        row = self._db.execute(
            f"SELECT {_MEASURED}, {_NUMBERS} FROM measurements "
            "WHERE key = ? AND stage = ? AND part = ? AND of_tokens = ?",
            (key, stage, part, tokens),
        ).fetchone()
        return None if row is None else _measurement(stage, row)

    def trials(self, after: int = 0) -> list[Trial]:
        """Return all trials in the order told, or those that came after so many.

        Raises:
            SecateurError: For a metric that cannot be read, such as one of a plugin that is not in use.
        """
        rows = self._db.execute(
            f'SELECT metric, ratios, "group", status, alias_of, stage, {_MEASURED}, {_NUMBERS} '
            "FROM trials JOIN by_layer USING (key) WHERE number > ? ORDER BY number",
            (after,),
        )
        return [
            Trial(
                Candidate(self.metric(metric), tuple(array("d", ratios)), group),
                _measurement(stage, rest),
                status,
                alias_of,
            )
            for metric, ratios, group, status, alias_of, stage, *rest in rows
        ]

    def counts(self) -> Counts:
        """Return what became of the candidates told so far."""
        return Counts.of(
            self.rows("SELECT stage, status, alias_of != '', count(*) FROM trials GROUP BY 1, 2, 3")
        )

    def candidate(self, key: str) -> Candidate:
        """Return the candidate of a key.

        Raises:
            KeyError: When there is none.
            SecateurError: For a metric that cannot be read.
        """
        query = 'SELECT metric, ratios, "group" FROM trials JOIN by_layer USING (key) WHERE key = ?'
        for metric, ratios, group in self.rows(query, (key,)):
            return Candidate(self.metric(metric), tuple(array("d", ratios)), group)
        raise KeyError(key)

    def metric(self, text: str) -> Expression:
        """Return a metric of the run.

        Raises:
            SecateurError: When it cannot be read; it says which plugin the run needs.
        """
        try:
            return parse(text)
        except SecateurError as error:
            raise explained(self.folder, self.fact("plugins", []), error) from None

    @property
    def objectives(self) -> list[str]:
        """Names of what the run minimises."""
        return list(self.fact("objectives", ["kl", "size"]))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Read several times from one state of the run, whatever is written meanwhile."""
        if self._lock is not None or self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("ROLLBACK")

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of an SQL query; each ``?`` in it stands for a value."""
        return self._db.execute(query, values).fetchall()

    # Files --------------------------------------------------------------------------------------

    def _check_version(self, write: bool) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not write:
            raise RunFolder(self.folder).beginning()
        if version != SCHEMA:
            raise ArchiveError(
                f"expected an archive of version {SCHEMA}, got version {version} in {self._path}; "
                f"{'write to a new run folder' if write else 'read it with the release that wrote it'}"
            )

    @contextlib.contextmanager
    def _transaction(self) -> Any:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # a full disk has ended it already
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _floats(values: Sequence[float]) -> bytes:
    return array("d", values).tobytes()


def _figures(m: Measurement) -> tuple[Any, ...]:
    values = json.dumps(dict(m.values), allow_nan=False)
    return values, m.seconds, m.failure, m.fingerprint, m.tokens, m.worker, m.attempts


def _numbers(m: Measurement) -> tuple[bytes, ...]:
    return _floats(m.layer_errors), _floats(m.parts), _floats(m.sensitivities)


def _measurement(stage: Stage, row: Sequence[Any]) -> Measurement:
    text, seconds, failure, fingerprint, tokens, worker, attempts, *blobs = row
    values: Mapping[str, float] = json.loads(text)
    errors, parts, sensitivities = (tuple(array("d", numbers)) for numbers in blobs)
    return Measurement(
        stage, errors, values, seconds, failure, fingerprint, tokens, parts, sensitivities, worker, attempts
    )
