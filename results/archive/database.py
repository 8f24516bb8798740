"""Database files: opened for many readers and one writer at a time."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from ...metrics_dsl.errors import SecateurError
from ...metrics_dsl.plugins import lacking

_BETWEEN_MACHINES = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "afs")


class ArchiveError(SecateurError):
    """An archive that is missing, of another version, or open in another writer."""


class BeginningError(ArchiveError):
    """A run that has written nothing yet."""


def connect(path: Path, tables: str, *, write: bool) -> sqlite3.Connection:
    """Open a database; one that is written is made with its tables if it is not there."""
    if write:
        new = not path.exists()
        db = sqlite3.connect(path, timeout=30, isolation_level=None)
        # Readers work on while a transaction is written. That takes memory that all of them share; where a
        # file system cannot give it, or would to one machine alone, the slower journal serves.
        is_shared = is_between_machines(path)
        if is_shared or db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            db.execute("PRAGMA journal_mode = TRUNCATE")
        db.execute("PRAGMA synchronous = FULL")
        if new or not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.executescript(f"BEGIN;{tables}COMMIT;")
        return db
    address = path.resolve().as_uri()
    try:
        db = sqlite3.connect(f"{address}?mode=ro", uri=True, timeout=30)
        db.execute("SELECT count(*) FROM sqlite_master")
    except sqlite3.OperationalError:  # a read-only folder has no place for the shared memory
        db = sqlite3.connect(f"{address}?immutable=1", uri=True, timeout=30)
    return db


def is_between_machines(path: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether a path is on a file system that several machines may see; False where it is not known."""
    place = path.resolve()
    try:
        text = mounts.read_text(encoding="utf-8", errors="surrogateescape")
        lines = [line.split() for line in text.splitlines()]
    except OSError:
        return False
    kinds = {Path(point.replace("\\040", " ")): kind for _, point, kind, *_ in lines}
    kind = next((kinds[folder] for folder in (place, *place.parents) if folder in kinds), "")
    return kind in _BETWEEN_MACHINES or kind.startswith("fuse.")


def lock(path: Path) -> IO[str]:
    """Lock out other writers by a file in the run folder; the lock ends with the process, however it ends.

    Raises:
        ArchiveError: When another process holds it.
    """
    file = path.open("a+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ArchiveError(
            f"{path.parent} is being written by {owner}; wait for it to end or choose another --out"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def is_left(path: Path) -> bool:
    """Whether the process that locked a run last is known to be gone; of other machines nothing is known."""
    try:
        found = re.fullmatch(r"process (\d+) on (.+)", path.read_text(encoding="utf-8"))
        if found is None or found[2] != socket.gethostname():
            return False
        os.kill(int(found[1]), 0)  # signal 0 only asks
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


def explained(folder: Path, noted: Iterable[Mapping[str, str]], error: SecateurError) -> SecateurError:
    """Return what is wrong with reading a run, worded by the plugins that it notes and this process lacks."""
    found = lacking(noted)
    return ArchiveError(f"{folder} was made with {found} ({error})") if found else error
