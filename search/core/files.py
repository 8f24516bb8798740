"""Files and folders written whole or not at all, and never over what is not ours."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...metrics_dsl.errors import SecateurError

_BETWEEN_MACHINES = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "afs")
_PARTIAL = re.compile(r"\.([^/\\]+)\.[0-9a-f]{8}\.partial")


# The files of a run folder, its settings and archive first: no output ever takes their place.
OF_A_RUN = (
    "run.toml", "archive.sqlite", "archive.sqlite-wal", "archive.sqlite-shm", "archive.sqlite-journal",
    "writer.lock",
)  # fmt: skip
# What tells a run folder: any of these. What tells a calibration folder: all of these.
_RUNS, _CALIBRATIONS = OF_A_RUN[:2], ("manifest.json", "tokens.safetensors")


@dataclass(frozen=True)
class Output:
    """What is to be written, and what may be in its place before.

    Attributes:
        expected: What the place has to be, as it is said of one that will not do.
        replaces: Whether an open file is an earlier one of the same kind, known by a mark that it bears,
            which gives way; none does if left out.
        force: Whether any ordinary file gives way, but none of a run or a calibration; None where that
            cannot be asked for.
        over_empty: Whether it may take the place of an empty folder.
        makes_parents: Whether the folders above it are made.
        is_lasting: Whether the disk has all of it before it has its name.
        of_a_run: Whether it is one of a run folder's own files, whose names no other output takes.
        error: What is raised when the place will not do.
    """

    expected: str = "a new file or folder"
    replaces: Callable[[BinaryIO], bool] | None = None
    over_empty: bool = False
    makes_parents: bool = True
    is_lasting: bool = False
    of_a_run: bool = False
    error: type[SecateurError] = SecateurError
    force: bool | None = None


def check_name(path: str | Path, expected: str, error: type[SecateurError] = SecateurError) -> None:
    """Check that a path can be written down in files and pages, which are in UTF-8.

    Raises:
        SecateurError: As ``error``, when it has bytes that are no text.
    """
    text = os.fsdecode(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise error(f"expected {expected}, got {text!r}, whose name is not in UTF-8; rename it") from None


def expanded(path: str | Path, error: type[SecateurError] = SecateurError) -> Path:
    """Return a path that somebody gave us, in which ``~`` and ``~user`` are home folders.

    Raises:
        SecateurError: As ``error``, when nobody knows that folder, or no path can be so.
    """
    check_name(path, "a path", error)
    if "\0" in str(path):
        raise error("expected a path, got one with a character of the code 0")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(
            f"expected a path, got {path}, whose home folder nobody knows; write the folder out, or "
            f"./{path} for one of that name here"
        ) from None


@contextmanager
def whole(path: str | Path, output: Output, run: Path | None = None) -> Iterator[Path]:
    """Give a path beside another to write a file or folder to, which gets its name if all goes well.

    Else nothing is left, whatever was there before stays, and folders that were made for it go. What is
    written has the rights of any new file, which some libraries do not give. Of a link that may give way what
    it leads to is replaced, and the link stays.

    Args:
        path: Where it is to be.
        output: What it is.
        run: The run folder that is written about, whose links may be someone else's: none leads out of it.

    Raises:
        SecateurError: When the place will not do, as ``output.error``; nothing has been written then.
        OSError: When the disk is full or fails.
    """
    target = check_place(path, output, run)
    made = [place for place in target.parents if not place.exists()]
    if made and not output.makes_parents:
        raise output.error(f"expected a place in a folder that exists, got {path}; make its folder first")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)  # fails now, before there is work to lose, where it would then
        rights = stat.S_IMODE(partial.stat().st_mode)
        partial.unlink()
        yield partial
        for place in (*partial.rglob("*"), partial):
            if place.is_file() and stat.S_IMODE(place.stat().st_mode) != rights:
                place.chmod(rights)
            if output.is_lasting:
                to_disk(place)
        check_place(path, output, run)  # writing takes its time, and others write too
        partial.replace(target)
    except BaseException:
        _remove(partial)
        for place in made:
            with suppress(OSError):  # someone else put something there
                place.rmdir()
        raise
    if output.is_lasting:
        to_disk(target.parent)


def check_place(path: str | Path, output: Output, run: Path | None = None) -> Path:
    """Return where an output goes, links followed, before work is spent on it.

    Raises:
        SecateurError: When the place will not do, as ``output.error``.
    """
    check_name(path, output.expected, output.error)
    no = f"expected {output.expected}, got"
    target = expanded(path, output.error).absolute()
    if target.exists() and not (target.is_file() or target.is_dir()):  # a pipe has a name that leads nowhere
        raise output.error(f"{no} {path}, which is none; name another")
    if run is not None and (link := _way_out(target, run)):
        raise output.error(f"{no} {path}, but {link} leads out of the run folder; remove that link")
    if output.of_a_run and target.is_symlink():
        raise output.error(f"{no} {path}, which is a link; remove it")
    place = Path(os.path.realpath(target))
    if not output.of_a_run and (owner := _owner(place, overwritten=False)):
        raise output.error(f"{no} {path}, which is a file of the {owner}; name another")
    if output.replaces or output.over_empty or output.force:
        target = place
    if not os.path.lexists(target) or (output.over_empty and target.is_dir() and not any(target.iterdir())):
        return target
    or_force = " or replace it with --force" if output.force is False else ""
    if not (output.replaces or output.force):
        raise output.error(f"{no} {path}, which exists; choose another --out{or_force}")
    if target.is_dir():
        raise output.error(f"{no} the folder {path}; name a file in it")
    if not target.is_file():  # a link to itself
        raise output.error(f"{no} {path}, which is none; name another")
    if not _is_earlier(target, output):
        if not output.force:
            raise output.error(f"{no} {path}, which holds something else; name another{or_force}")
        if owner := _owner(place, overwritten=True):
            raise output.error(f"{no} {path}, which is a file of the {owner}; name another")
    return target


def holds_run(folder: Path) -> bool:
    """Whether a folder has the settings or the archive of a run, or a link by such a name."""
    return any(os.path.lexists(folder / name) for name in _RUNS)


def holds_calibration(folder: Path) -> bool:
    """Whether a folder has what every calibration has."""
    return all((folder / name).is_file() for name in _CALIBRATIONS)


def _owner(place: Path, *, overwritten: bool) -> str:
    """Return which run or calibration a place belongs to; empty if to none.

    All of a calibration is its own, and of a run folder the names of a run's files; of what would be
    overwritten, whatever lies in either, however deep.
    """
    for folder in place.parents if overwritten else (place.parent,):
        if (overwritten or place.name in OF_A_RUN) and holds_run(folder):
            return f"run in {folder}"
        if holds_calibration(folder):
            return f"calibration in {folder}"
    return ""


def _is_earlier(target: Path, output: Output) -> bool:
    """Whether a file is empty, or an earlier output of its kind."""
    # Not to wait for who writes to a pipe that has taken the file's place.
    with open(os.open(target, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        is_known = output.replaces is not None and stat.S_ISREG(found.st_mode)
        return is_known and (not found.st_size or bool(output.replaces and output.replaces(file)))


def tell_left_behind(path: str | Path, report: Callable[[str], None]) -> None:
    """Report what writers that were killed have left beside a path."""
    for left in left_behind(path):
        report(f"{left} was left by a command that was killed and can be removed, unless one is running")


def left_behind(path: str | Path) -> list[Path]:
    """Return what writers that were killed, or that still write, have beside a path."""
    place = Path(path).absolute()
    if not place.parent.is_dir():
        return []
    return sorted(other for other in place.parent.iterdir() if named(other.name) == place.name != other.name)


def named(text: str) -> str:
    """Return a path or a name in which what is still being written has the name that it is to have."""
    return _PARTIAL.sub(r"\1", text)


def is_partial(path: Path) -> bool:
    """Whether a path is of what is still being written, or was when its writer was killed."""
    return _PARTIAL.fullmatch(path.name) is not None


def to_disk(path: Path) -> None:
    """Wait until the disk has what was written to a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def _way_out(path: Path, folder: Path) -> Path | None:
    """Return the link that lies in a folder, is on the way to a path, and leads out of the folder."""
    inside = os.path.realpath(folder)
    for place in (path, *path.parents):
        ends = map(Path, map(os.path.realpath, (place.parent, place)))
        if [end.is_relative_to(inside) for end in ends] == [True, False]:
            return place
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
