"""Database files: opened for many readers and one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import shutil
import socket
import sqlite3
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...metrics_dsl.errors import SecateurError
from ...search.core.files import is_between_machines
from ...search.core.scratch import scratch

_TRIES = 5
_MOST_BYTES = 1 << 26  # of one value, numbers of millions of layers, or of a database that is read whole
_JOURNAL = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"  # what SQLite's journals begin with, and end with after a name
_LONGEST = 400  # characters of what a lock says
_OWNER = re.compile(r"process (\d+) on (.+)")


class ArchiveError(SecateurError):
    """An archive that is missing, of another version, or open in another writer."""


class BeginningError(ArchiveError):
    """A run that has written nothing yet."""


@dataclass
class Opened:
    """A database that is open for reading or writing.

    Attributes:
        db: The connection.
        state: That of its files, by which is known whether it still sees what is written; empty where it does
            whatever happens.
        is_whole: Whether ``state`` is of all that is written, for it sees nothing later; else of which file
            readers and writers share.
        is_fixed: Whether it goes on to see what it was opened on, however that changes.
    """

    db: sqlite3.Connection
    state: tuple[object, ...] = ()
    is_whole: bool = False
    is_fixed: bool = False

    def is_current(self, path: Path) -> bool:
        """Whether it sees what is in a database now."""
        return not self.state or self.state == (state_of(path) if self.is_whole else shared_files_state(path))


def beside(path: Path) -> list[Path]:
    """Return the files that SQLite may have beside a database: what is not in it yet, or not gone from it."""
    return [path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal")]


def state_of(path: Path) -> tuple[object, ...]:
    """Return what changes with whatever is written to a database."""
    wal, _, journal = beside(path)
    return tuple(
        (found.st_ino, found.st_size, found.st_mtime_ns) if (found := _stat(place)) else None
        for place in (path, wal, journal)
    )


def shared_files_state(path: Path) -> tuple[object, ...]:
    """Return what changes when readers and writers no longer share the files that they did."""
    return tuple(found.st_ino if (found := _stat(place)) else None for place in (path, beside(path)[0]))


def check_to_write(path: Path, lock_file: Path, tables: str) -> None:
    """Check that a file can be written as a database of ours, before anything is written.

    Raises:
        ArchiveError: When it holds anything else, or one of its files is a link or shared with others.
    """
    check_own(path)
    if _stat(path):
        with contextlib.closing(connect_to_read(path, lock_file).db) as db:
            check_tables(db, path, tables, is_written=True)


def connect(path: Path, tables: str) -> Opened:
    """Open a database for writing; it is made with its tables if it is not there or empty."""
    db = sqlite3.connect(path, timeout=30, isolation_level=None)
    try:
        _limit(db)
        # Readers work on while a transaction is written. That takes memory that all of them share; where a
        # file system cannot give it, or would to one machine alone, the slower journal serves.
        is_shared = is_between_machines(path)
        if is_shared or db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            db.execute("PRAGMA journal_mode = TRUNCATE")
        db.execute("PRAGMA synchronous = FULL")
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.executescript(f"BEGIN;{tables}COMMIT;")
    except BaseException:
        db.close()
        raise
    return Opened(db)


def connect_to_read(path: Path, lock_file: Path) -> Opened:
    """Open a database for reading, and leave nothing beside it.

    SQLite makes files for readers and writers to agree by, and cannot remove them again when it may only
    read. So a database that nobody writes is read into memory, or if it is large opened as one that does not
    change; and copied where a writer was killed, for then some of it stands in the file beside.

    Args:
        path: The file.
        lock_file: The file that who writes it holds.

    Raises:
        ArchiveError: When it changes again and again, and cannot be read as it does.
    """
    for _ in range(_TRIES):
        is_live = is_locked(lock_file)
        state = state_of(path)
        wal = _stat(beside(path)[0])
        is_shared = not _is_wal(path) or (
            is_live and wal is not None
        )  # a writer has it open, or none ever will
        if is_shared:
            with contextlib.suppress(sqlite3.OperationalError):
                return Opened(_reader(path, "mode=ro"), shared_files_state(path))
        # From here on nobody writes, or the folder has no place for what readers and writers share.
        is_fixed = True
        if is_shared or (wal and wal.st_size):
            db = _copied(path)
        elif path.stat().st_size <= _MOST_BYTES:
            db = _in_memory(path)
        else:
            db, is_fixed = _reader(path, "immutable=1"), False
        if state_of(path) == state and (is_live or not is_locked(lock_file)):
            return Opened(db, state, is_whole=True, is_fixed=is_fixed)
        db.close()
    raise ArchiveError(f"{path} is being written and cannot be read meanwhile; try again in a moment")


def _reader(path: Path, how: str) -> sqlite3.Connection:
    address = f"{path.resolve().as_uri()}?{how}"
    return _reading(sqlite3.connect(address, uri=True, timeout=30, isolation_level=None))


def _in_memory(path: Path) -> sqlite3.Connection:
    content = bytearray(path.read_bytes())
    content[18:20] = b"\1\1"  # with no file beside it
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.deserialize(bytes(content))
    return _reading(db)


def _copied(path: Path) -> sqlite3.Connection:
    """Open a copy, of which nothing is left either: once it is open it needs no name."""
    with scratch() as folder:
        copy = folder / path.name
        places = [place for place in (path, *beside(path)[::2]) if place.is_file()]
        if sum(place.stat().st_size for place in places) > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(folder))
        for place in places:
            shutil.copyfile(place, copy.with_name(place.name))
        _check_journal(copy)
        # Takes over what stands beside it.
        return _reading(sqlite3.connect(copy, isolation_level=None), "PRAGMA journal_mode = DELETE")


def _check_journal(path: Path) -> None:
    """Check that a journal left beside a database names no other file.

    One of several databases that were written at once ends with the name of a file that they share, which
    SQLite removes once it has undone what it must: any file that somebody writes there. None of ours does.

    Raises:
        ArchiveError: When it does.
    """
    journal = beside(path)[2]
    if not journal.is_file():
        return
    with journal.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(_JOURNAL)))
        if file.read() == _JOURNAL:
            no = f"expected a journal of the archive alone, got {journal.name}"
            raise ArchiveError(f"{no}, which names a file that would be removed; move it away")


def _reading(db: sqlite3.Connection, first: str = "") -> sqlite3.Connection:
    """Return a connection that can only read, or close it where it cannot."""
    try:
        _limit(db)
        db.execute(first).fetchall()
        db.execute("PRAGMA query_only = ON")
        db.execute("SELECT count(*) FROM sqlite_master")
    except BaseException:
        db.close()
        raise
    return db


def _limit(db: sqlite3.Connection) -> None:
    """Have SQLite take little for granted: a file may be somebody else's, or damaged."""
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES)
    db.execute("PRAGMA cell_size_check = ON")


def _is_wal(path: Path) -> bool:
    """Whether what is written to a database first goes to a file beside it; its header says so."""
    with path.open("rb") as file:
        return file.read(20)[18:] == b"\2\2"


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def check_own(path: Path) -> None:
    """Check that the files of a database that is written are its folder's own, as far as they are there.

    Raises:
        ArchiveError: For a link, which may lead to someone else's, a file with a second name, what is no
            file, or a journal that names another.
    """
    _check_journal(path)
    for place in (path, *beside(path)):
        try:
            found = place.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(found.st_mode):
            what = "a link" if stat.S_ISLNK(found.st_mode) else "no file"
            raise ArchiveError(f"expected a file of the run, got {place}, which is {what}; remove it")
        if found.st_nlink > 1:
            raise ArchiveError(
                f"expected a file of the run alone, got {place}, which has {found.st_nlink} names (hard "
                f"links); put a copy in its place"
            )


def check_tables(db: sqlite3.Connection, path: Path, tables: str, *, is_written: bool = False) -> bool:
    """Check that a database has our tables, just as we make them, and return whether it has any yet.

    Args:
        db: Open for reading.
        path: Its file.
        tables: What makes them.
        is_written: Whether it is going to be written, so that it may have no others either.

    Raises:
        ArchiveError: When they are others, such as a view, or have a trigger: SQLite runs what these say.
    """
    wanted, version = _made_by(tables)
    found, own = _tables(db), db.execute("PRAGMA user_version").fetchone()[0]
    if not found and not own:
        return False
    if not wanted.keys() & found.keys():
        raise ArchiveError(f"expected an archive, got {path}, a database of another program; name another")
    if own != version:
        raise ArchiveError(
            f"expected an archive of version {version}, got version {own} in {path}; "
            f"{'write to a new run folder' if is_written else 'read it with the release that wrote it'}"
        )
    odd = [name for name in wanted if found.get(name) != wanted[name]]
    odd += [name for name in found if name not in wanted and (is_written or found[name][0] in wanted)]
    if odd:
        raise ArchiveError(
            f"expected the tables of an archive, got another {odd[0]!r} or none in {path}; it was changed by "
            "another program"
        )
    return True


@functools.cache
def _made_by(tables: str) -> tuple[dict[str, tuple[str, str]], int]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(tables)
        return _tables(db), db.execute("PRAGMA user_version").fetchone()[0]


def _tables(db: sqlite3.Connection) -> dict[str, tuple[str, str]]:
    """Return what a database is made of but for what SQLite adds itself: name -> (of which table, text)."""
    rows = db.execute("SELECT name, tbl_name, type, sql FROM sqlite_master")
    return {
        name: (of, " ".join(str(sql).split()))
        for name, of, kind, sql in rows
        if not (kind in ("table", "index") and str(name).startswith("sqlite_"))
    }


def lock(path: Path) -> IO[str]:
    """Lock out other writers by a file in the run folder; the lock ends with the process, however it ends.

    Raises:
        ArchiveError: When another process holds it, or what is there is no such file; it stays as it is.
    """
    file = _opened(path, os.O_RDWR | os.O_CREAT)
    try:
        owner = file.read(_LONGEST)
        found = os.fstat(file.fileno())
        if not (_OWNER.fullmatch(owner) or (not found.st_size and found.st_nlink == 1)):
            raise ArchiveError(
                f"expected the file that locks the run, got {path}, which holds something else; move it away"
            )
        for left in range(_TRIES, 0, -1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if left == 1:
                    raise ArchiveError(
                        f"{path.parent} is being written by {owner or 'another process'}; wait for it to end "
                        "or choose another --out"
                    ) from None
                time.sleep(0.02)  # who reads asks for a moment whether anybody writes
        file.seek(0)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def check_unlocked(path: Path) -> None:
    """Check that no process writes a run, without writing anything oneself.

    Raises:
        ArchiveError: When one does, or its lock is no such file.
    """
    if is_locked(path):
        with _opened(path, os.O_RDONLY) as file:
            owner = file.read(_LONGEST) or "another process"
        raise ArchiveError(
            f"{path.parent} is being written by {owner}; wait for it to end or choose another --out"
        )


def is_locked(path: Path) -> bool:
    """Whether a process writes a run."""
    try:
        with _opened(path, os.O_RDONLY) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except ArchiveError:  # what is no file holds nobody up
        return False
    except OSError:  # another user's: it may be
        return True
    return False


def is_left(path: Path) -> bool:
    """Whether the process that locked a run last is known to be gone; of other machines nothing is known."""
    try:
        with _opened(path, os.O_RDONLY) as file:
            found = _OWNER.fullmatch(file.read(_LONGEST))
        if found is None or found[2] != socket.gethostname():
            return False
        os.kill(int(found[1]), 0)  # signal 0 only asks
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


def _opened(path: Path, flags: int) -> IO[str]:
    """Open a lock's file, following no link and waiting for nobody.

    Raises:
        ArchiveError: When it is a link, or no file.
    """
    no = f"expected the file that locks the run, got {path}, which is"
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        what = {errno.ELOOP: "a link", errno.EISDIR: "a folder", errno.ENXIO: "no file"}.get(error.errno or 0)
        if what:
            raise ArchiveError(f"{no} {what}; remove it") from None
        raise
    mode = "r+" if flags & os.O_RDWR else "r"
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ArchiveError(f"{no} no file; remove it")
    return open(handle, mode, encoding="utf-8", errors="replace")
