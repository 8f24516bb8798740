"""The store: every measurement and every trial of a run, in one SQLite file that survives anything.

Two tables. ``measurements`` holds what a stage found out about a candidate, written as soon as it is
known; ``trials`` holds one row a candidate in the order told, written a batch at a time. A search that
was killed is resumed by running it again: what the first table knows is not measured twice, what the
second holds is written once. One process writes, any number read, also while it writes.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.expression import Expression
from ...metrics_dsl.parser import parse
from ...search.core.candidate import Candidate, Measurement, Part, Stage, Trial
from . import stored
from .counts import Counts
from .database import (
    ArchiveError,
    Opened,
    check_tables,
    check_to_write,
    check_unlocked,
    connect,
    connect_to_read,
    lock,
)
from .run_folder import RunFolder, explained

_MEASURED = '"values", seconds, failure, fingerprint, tokens, worker, attempts'
_NUMBERS = "layer_errors, parts, sensitivities"


_READS_TRIALS = re.compile(r"\b(FROM|JOIN) trials\b")
_ERRORS = (sqlite3.Error, UnicodeDecodeError, OverflowError)  # messages quote what is damaged
_NOT_OF_THE_FILE = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY,
)  # fmt: skip


class Store:
    """The SQLite file in a run folder: what is written and read of it, without pandas.

    Args:
        folder: The run folder.
        write: Open for writing, which makes the file if needed and locks out other writers.

    Raises:
        ArchiveError: When there is no archive, it cannot be read, or another process is writing it.
    """

    def __init__(self, folder: str | Path, *, write: bool = False) -> None:
        place = RunFolder(Path(folder))
        self.folder = place.path
        self._path = place.archive_file
        self._lock: IO[str] | None = None
        # Values of objectives that are no column, by what a row says of its trial.
        self.worked_out: dict[str, dict[tuple[Any, ...], float | None]] = {}
        self._is_checked = False
        self._is_reading = False
        try:
            if write:
                check_to_write(self._path, place.lock_file, stored.TABLES)  # before anything is made
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = lock(place.lock_file)
                self._opened = connect(self._path, stored.TABLES)
            elif not place.has_archive:
                raise place.missing()
            else:
                self._opened = self._open()
        except _ERRORS as error:
            self._unlock()
            raise _explained(self._path, error) from None
        except BaseException:
            self._unlock()
            raise

    @staticmethod
    def check_folder(folder: Path) -> None:
        """Check that a run folder's archive, which need not be there, can be written; nothing is written.

        Raises:
            ArchiveError: When another process is writing it, or it is none of ours.
        """
        place = RunFolder(folder)
        check_unlocked(place.lock_file)
        try:
            check_to_write(place.archive_file, place.lock_file, stored.TABLES)
        except _ERRORS as error:
            raise _explained(place.archive_file, error) from None

    @property
    def _db(self) -> sqlite3.Connection:
        return self._opened.db

    def _open(self) -> Opened:
        """Open the file for reading."""
        place = RunFolder(self.folder)
        opened = connect_to_read(self._path, place.lock_file)
        try:
            if not check_tables(opened.db, self._path, stored.TABLES):
                raise place.beginning()
        except BaseException:
            opened.db.close()
            raise
        self._is_checked = False
        return opened

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let other writers in."""
        if self._lock is not None:  # as much as readers let pass, so that the file alone has all of it
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA busy_timeout = 100")
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
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
                max(t.candidate.ratios, default=None), t.measurement.stage, *stored.figures(t.measurement),
            )
            for t in trials
        ]  # fmt: skip
        layers = [
            (t.candidate.key, stored.blob(t.candidate.ratios), *stored.numbers(t.measurement)) for t in trials
        ]
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
        rows = [(c.key, m.stage, part, tokens, *stored.figures(m), *stored.numbers(m)) for c, m in measured]
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
        """Return a fact about the run.

        Raises:
            ArchiveError: When it is of another form than it was kept in.
        """
        rows = self.rows("SELECT value FROM facts WHERE name = ?", (name,))
        return stored.fact(name, rows[0][0], f"the fact {name} in {self._path}") if rows else default

    def recall(self, key: str, stage: Stage, part: Part, tokens: int = 0) -> Measurement | None:
        """Return what a stage found out about a candidate, if it has been measured."""
        rows = self.rows(
            f"SELECT {_MEASURED}, {_NUMBERS} FROM measurements "
            "WHERE key = ? AND stage = ? AND part = ? AND of_tokens = ?",
            (key, stage, part, tokens),
        )
        return stored.measurement(stage, rows[0], self._what(key)) if rows else None

    def trials(self, after: int = 0) -> list[Trial]:
        """Return all trials in the order told, or those that came after so many.

        Raises:
            SecateurError: For a metric that cannot be read, such as one of a plugin that is not in use.
        """
        rows = self.rows(
            f'SELECT key, metric, ratios, "group", status, alias_of, stage, {_MEASURED}, {_NUMBERS} '
            "FROM trials LEFT JOIN by_layer USING (key) WHERE number > ? ORDER BY number",
            (after,),
        )
        return [
            Trial(
                self._candidate(key, metric, ratios, group),
                stored.measurement(stage, rest, self._what(key)),
                status,
                alias_of,
            )
            for key, metric, ratios, group, status, alias_of, stage, *rest in rows
        ]

    def numbers(self, columns: Sequence[str], keys: Sequence[str]) -> list[tuple[tuple[float, ...], ...]]:
        """Return numbers of each layer of some candidates, in their order: a tuple a column of ``by_layer``.

        Raises:
            ArchiveError: When they are missing or are none.
        """
        found = {}
        for some in (keys[i : i + 500] for i in range(0, len(keys), 500)):
            places = ", ".join("?" * len(some))
            query = f"SELECT key, {', '.join(columns)} FROM by_layer WHERE key IN ({places})"
            found.update({key: blobs for key, *blobs in self.rows(query, some)})
        if missing := next((key for key in keys if key not in found), None):
            raise ArchiveError(f"expected numbers for {self._what(missing)}, got none")
        result = [tuple(stored.floats(blob, self._what(key)) for blob in found[key]) for key in keys]
        if "ratios" in columns:
            place = list(columns).index("ratios")
            for key, row in zip(keys, result, strict=True):
                if not all(0 <= ratio < 1 for ratio in row[place]):
                    raise ArchiveError(f"expected ratios in [0, 1) for {self._what(key)}, got others")
        return result

    def counts(self) -> Counts:
        """Return what became of the candidates told so far."""
        return Counts.of(
            self.rows("SELECT stage, status, alias_of != '', count(*) FROM trials GROUP BY 1, 2, 3")
        )

    def candidate(self, key: str) -> Candidate:
        """Return the candidate of a key.

        Raises:
            KeyError: When there is none.
            SecateurError: For one that cannot be read.
        """
        query = 'SELECT metric, ratios, "group" FROM trials LEFT JOIN by_layer USING (key) WHERE key = ?'
        for metric, ratios, group in self.rows(query, (key,)):
            return self._candidate(key, metric, ratios, group)
        raise KeyError(key)

    def _candidate(self, key: str, metric: str, ratios: Any, group: str) -> Candidate:
        """Return a candidate as it was told: its key is a hash of all that it is."""
        what = self._what(key)
        expression, numbers = self.metric(metric), stored.floats(ratios, what)
        try:
            found = Candidate(expression, numbers, group)
        except SecateurError as error:
            raise ArchiveError(f"{what} cannot be read: {error}") from None
        if found.key != key:
            raise ArchiveError(f"expected {what} as its key says, got another; the file is damaged")
        return found

    def _what(self, key: str) -> str:
        return f"candidate {str(key)[:20]!r} in {self._path}"

    def metric(self, text: str) -> Expression:
        """Return a metric of the run.

        Raises:
            SecateurError: When it cannot be read; it says which plugin the run needs.
        """
        try:
            return parse(text)
        except SecateurError as error:
            said = explained(self.folder, self.fact("plugins", []), error)
            if said is error:
                said = ArchiveError(f"the metric {text[:60]!r} in {self._path} cannot be read: {error}")
            raise said from None

    def check(self) -> None:
        """Read all there is, so that what is damaged is known before more is written.

        Raises:
            SecateurError: For the first that cannot be read.
        """
        with self.reading():
            for (name,) in self.rows("SELECT name FROM facts"):
                self.fact(name)
            self.trials()
            query = f"SELECT key, stage, part, {_MEASURED}, {_NUMBERS} FROM measurements"
            try:
                for key, stage, part, *row in self._db.execute(query):
                    if not all(isinstance(cell, str) for cell in (key, stage, part)):
                        raise ArchiveError(f"expected texts for {self._what(key)}, got others")
                    stored.measurement(stage, row, self._what(key))
            except _ERRORS as error:
                raise _explained(self._path, error) from None

    @property
    def objectives(self) -> list[str]:
        """Names of what the run minimises."""
        return list(self.fact("objectives", ["kl", "size"]))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Read several times from one state of the run, whatever is written meanwhile.

        Raises:
            ArchiveError: When a writer came while it was read as one that nobody writes.
        """
        if self._lock is not None or self._is_reading:
            yield
            return
        self._refresh()
        self._db.execute("BEGIN")
        self._is_reading = True
        try:
            yield
        finally:
            self._is_reading = False
            self._db.execute("ROLLBACK")
        if not (self._opened.is_fixed or self._opened.is_current(self._path)):
            raise ArchiveError(f"{self._path} began to be written while it was read; read it again")

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of an SQL query; each ``?`` in it stands for a value.

        Raises:
            ArchiveError: When the file is damaged.
        """
        if self._lock is not None or self._is_reading:
            return self._rows(query, values)
        with self.reading():
            return self._rows(query, values)

    def _rows(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        try:
            if not self._is_checked and _READS_TRIALS.search(query):
                for number, column in self._db.execute(stored.wrong_trials()):
                    raise ArchiveError(
                        f"the column {column} of candidate {number!r} in {self._path} holds what no run "
                        "writes there; the file is damaged"
                    )
                self._is_checked = True
            return self._db.execute(query, values).fetchall()
        except _ERRORS as error:
            raise _explained(self._path, error) from None

    def _refresh(self) -> None:
        """Open the file anew where it has changed and this would not see it."""
        if self._opened.is_current(self._path):
            return
        try:
            opened = self._open()
        except _ERRORS as error:
            raise _explained(self._path, error) from None
        self._db.close()
        self._opened = opened

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


def _explained(path: Path, error: Exception) -> Exception:
    """Return what is wrong with a file; what a disk or a lock does to it stays what it is."""
    if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in _NOT_OF_THE_FILE:
        return error
    return ArchiveError(f"{path} is not an archive, or is damaged: {error}")
