"""Temporary folders that end with their owner, however it ends: the next to make one removes what is left."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "secateur-"
_NAME = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")
_BEGUN = 60.0  # seconds within which a folder that was made has been locked
_LOCK = "owner.lock"  # locked while the owner lives; the lock ends with the process, however it ends


@contextmanager
def scratch(place: str | Path | None = None) -> Iterator[Path]:
    """Give a temporary folder of this user alone, which is removed afterwards; it holds a lock, nothing else.

    Args:
        place: The folder to make it in; the system's own if left out.

    Raises:
        OSError: When there is no room for it.
    """
    sweep(place)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    try:
        # It has its name once it is locked: nobody takes it for one that was left.
        lock = (folder / f".{_LOCK}").open("w", encoding="utf-8")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / f".{_LOCK}").rename(folder / _LOCK)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(place: str | Path | None = None) -> None:
    """Remove temporary folders whose owners are gone: this user's, made here, and locked by nobody."""
    parent = Path(tempfile.gettempdir() if place is None else place)
    try:
        names = [name for name in os.listdir(parent) if _NAME.fullmatch(name)]
    except OSError:
        return
    for name in names:
        _remove_if_left(parent / name)


def _remove_if_left(folder: Path) -> None:
    try:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return
        if not (folder / _LOCK).exists() and time.time() - found.st_mtime > _BEGUN:
            _remove_if_hardly_begun(folder)
            return
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # another's, gone already, or without a lock: no folder of ours
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _end_who_writes_in(folder)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its owner lives
    finally:
        os.close(handle)


def _end_who_writes_in(folder: Path) -> None:
    """End what a dead owner has left running, such as a Ray of its own: it would make the folder anew."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_mine = process.stat().st_uid == os.geteuid() and int(process.name) != os.getpid()
            if is_mine and any(_is_written_in(file, folder) for file in (process / "fd").iterdir()):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # it has ended, or is another's
            continue


def _is_written_in(file: Path, folder: Path) -> bool:
    """Whether an open file of a process lies in a folder, and is open for writing."""
    if not os.readlink(file).startswith(f"{folder}/"):
        return False
    said = (file.parent.with_name("fdinfo") / file.name).read_text(encoding="utf-8")
    (flags,) = [int(line.split()[1], 8) for line in said.splitlines() if line.startswith("flags:")]
    return flags & os.O_ACCMODE != os.O_RDONLY


def _remove_if_hardly_begun(folder: Path) -> None:
    """Remove a folder whose owner ended between making it and locking it: it holds nothing else."""
    lock = folder / f".{_LOCK}"
    if lock.is_file() and not lock.is_symlink() and lock.stat().st_size == 0:
        lock.unlink()
    folder.rmdir()  # which fails where anything is in it
