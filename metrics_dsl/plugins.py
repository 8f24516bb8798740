"""Plugins: rows that others add to the package's tables, from a file or from installed packages.

A plugin is a Python file with a list ``SECATEUR`` of rows, whose types say which tables they are for. An
installed package names its rows as entry points, in one group a table. A file runs when somebody asks for it
and never because an archive names it; what crosses a process border is its text. A name that has been added
keeps its meaning for the life of the process, so whatever was worked out from the tables stays right.
"""

from __future__ import annotations

import functools
import linecache
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from .errors import SecateurError

ROWS = "SECATEUR"  # the list in a plugin's file
MOST_BYTES = 1 << 18  # of a plugin's file: it travels to every worker
_PLACE = re.compile(r"<(.+) [0-9a-f]{8}>")  # what tracebacks call a plugin's file
_NAME = re.compile(r"[A-Za-z0-9][\w+.-]*", re.ASCII)
Row = TypeVar("Row")
Result = TypeVar("Result")
# Checks a row that somebody adds, given where it is from, and returns the row that the table keeps.
Admit = Callable[[Any, str], Any]


class PluginError(SecateurError):
    """A plugin that cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Plugin:
    """A Python file that adds rows to tables.

    Attributes:
        name: Its file name.
        text: Its source.
    """

    name: str
    text: str = field(repr=False)

    @cached_property
    def sha256(self) -> str:
        """Hash of the source."""
        import hashlib  # takes a while, and most processes have no plugin

        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def place(self) -> str:
        """What tracebacks call the file."""
        return f"<{self.name} {self.sha256[:8]}>"


@dataclass(frozen=True)
class _OpenTable:
    """A table that others may add rows to.

    Attributes:
        rows: The table, by name.
        kind: The type of its rows.
        word: What a row is, with its article.
        group: The entry points of installed packages.
        admit: Checks a row, given where it is from, and returns the row that is kept.
    """

    rows: dict[str, Any]
    kind: type
    word: str
    group: str
    admit: Admit


@dataclass(frozen=True)
class _Origin:
    """Where added rows are from: for people, and as runs note it."""

    title: str
    note: Mapping[str, str]


_tables: list[_OpenTable] = []  # in the order of import: what rows may refer to comes first
_origins: dict[tuple[str, str], _Origin] = {}  # group and name of an added row
_used: dict[str, Plugin] = {}
_filled: set[str] = set()  # groups whose entry points are in their tables


def open_table(
    rows: dict[str, Row],
    kind: type[Row],
    word: str,
    group: str,
    admit: Callable[[Row, str], Row] = lambda row, _origin: row,
) -> None:
    """Let others add rows to a table: called by its owner once the table is made.

    Args:
        rows: The table, by name.
        kind: The type of its rows, which have a ``name``.
        word: What a row is, such as ``an operator``.
        group: The group of entry points, without ``secateur.``.
        admit: Checks a row that somebody adds, given where it is from, and returns the row that is kept.
    """
    _tables.append(_OpenTable(rows, kind, word, f"secateur.{group}", admit))


# Files ------------------------------------------------------------------------------------------


def read_plugin(path: str | Path) -> Plugin:
    """Return the plugin in a file, without running it.

    Raises:
        PluginError: When it is no readable Python file of at most 256 KiB.
    """
    place = Path(os.path.expanduser(path))  # as it is where nobody knows a home folder
    if place.suffix != ".py" or not place.is_file():
        raise PluginError(f"expected a plugin as a Python file such as rules.py, got {place.absolute()}")
    try:
        with place.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or "unknown").lower()
        raise PluginError(f"the plugin {path} cannot be read: {reason}") from None
    if len(content) > MOST_BYTES:
        raise PluginError(f"expected a plugin of at most {MOST_BYTES // 1024} KiB, got more in {path}")
    try:
        return Plugin(place.name, content.decode())
    except UnicodeDecodeError as error:
        raise PluginError(
            f"expected a plugin in UTF-8, got another byte at {error.start} of {path}"
        ) from None


def use(plugin: Plugin) -> None:
    """Run a plugin, once a process, and add all its rows to their tables, or none.

    Raises:
        PluginError: When it fails, has no rows or has one that cannot be added.
    """
    if plugin.sha256 in _used:
        return
    origin = _Origin(f"the plugin {plugin.name}", {"name": plugin.name, "sha256": plugin.sha256})
    _add(_executed(plugin), origin)
    _used[plugin.sha256] = plugin


def use_plugin(path: str | Path) -> Plugin:
    """Read a plugin, use it in this process and return it.

    Raises:
        PluginError: When it cannot be read, fails, or has rows that cannot be added.
    """
    plugin = read_plugin(path)
    use(plugin)
    return plugin


def used() -> tuple[Plugin, ...]:
    """Return the plugins in use, in the order in which they were."""
    return tuple(_used.values())


def _executed(plugin: Plugin) -> Sequence[Any]:
    """Return a plugin's rows."""
    module = ModuleType(f"secateur_plugin_{plugin.sha256[:16]}")
    module.__file__ = plugin.place
    # A module that is known by its name can hold dataclasses, and tracebacks show its lines.
    sys.modules[module.__name__] = module
    linecache.cache[plugin.place] = (len(plugin.text), None, plugin.text.splitlines(True), plugin.place)
    try:
        code = compile(plugin.text.removeprefix("\ufeff"), plugin.place, "exec")
        exec(code, module.__dict__)  # noqa: S102 (whoever called named this file)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise PluginError(f"the plugin {plugin.name} fails{_at(error)}: {_reason(error)}") from error
    rows = getattr(module, ROWS, None)
    if not isinstance(rows, list | tuple) or not rows:
        got = "none" if rows is None else f"{type(rows).__name__} {rows!r}"[:80]
        raise PluginError(f"expected a list {ROWS} of rows in the plugin {plugin.name}, got {got}")
    return rows


# Installed packages -----------------------------------------------------------------------------


def fill(*tables: Mapping[str, Any]) -> None:
    """Add what installed packages have for some tables, once a process; other mappings stay as they are.

    Called where a name is not known and where all of a table is wanted, and not when a table is made: by
    then a package whose rows are for several tables could not yet import what it needs.

    Raises:
        PluginError: When a package's entry point fails or gives no rows of the table.
    """
    for table in [t for t in _tables if any(t.rows is wanted for wanted in tables)]:
        if table.group not in _filled:
            _filled.add(table.group)  # before: a package may ask for names of ours while it is imported
            try:
                _fill(table)
            except BaseException:
                _filled.discard(table.group)
                raise


@functools.cache
def _entry_points() -> Any:  # of another type in every release of Python
    """Return those of all installed packages, which take a hundredth of a second to look through."""
    from importlib.metadata import entry_points

    return entry_points()


def _fill(table: _OpenTable) -> None:
    for point in sorted(_entry_points().select(group=table.group), key=lambda p: (p.name, p.value)):
        name, version = (point.dist.name, point.dist.version) if point.dist else (point.value, "")
        origin = _Origin(f"the package {name}", {"name": name, "version": version})
        entry = f"the entry point {point.name} = {point.value} in {table.group}"
        try:
            found = point.load()
        except Exception as error:
            raise PluginError(
                f"{origin.title} cannot be used: {entry} fails{_at(error)}: {_reason(error)}; mend or "
                "uninstall it"
            ) from error
        rows = found if isinstance(found, list | tuple) else [found]
        if other := [row for row in rows if not isinstance(row, table.kind)]:
            raise PluginError(
                f"{origin.title} cannot be used: expected {entry} to give {table.word} as "
                f"{table.kind.__name__}, got {type(other[0]).__name__}; mend or uninstall it"
            )
        _add(rows, origin)


# Rows -------------------------------------------------------------------------------------------


def _add(rows: Iterable[Any], origin: _Origin) -> None:
    """Add rows to their tables, what others may refer to first; all or none."""
    placed = sorted(((_table_of(row, origin), row) for row in rows), key=lambda pair: _tables.index(pair[0]))
    done: list[tuple[_OpenTable, str]] = []
    try:
        for table, row in placed:
            _check_name(table, row.name, origin)
            try:
                table.rows[row.name] = table.admit(row, origin.title)
            except SecateurError as error:
                raise PluginError(f"{origin.title} cannot be used: {error}") from None
            done.append((table, row.name))
            _origins[table.group, row.name] = origin
    except BaseException:
        for table, name in done:
            del table.rows[name], _origins[table.group, name]
        raise


def _table_of(row: Any, origin: _Origin) -> _OpenTable:
    for table in _tables:
        if isinstance(row, table.kind):
            return table
    known = ", ".join(table.kind.__name__ for table in _tables)
    raise PluginError(
        f"{origin.title} cannot be used: expected rows of {known}, got {type(row).__name__} {row!r}"[:300]
    )


def _check_name(table: _OpenTable, name: object, origin: _Origin) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PluginError(
            f"{origin.title} cannot be used: expected a name such as mine for {table.word}, got {name!r}"
        )
    if name in table.rows:
        other = _origins.get((table.group, name))
        owner = other.title if other else "the package secateur itself"
        again = other is not None and other.title == origin.title
        raise PluginError(
            f"{origin.title} cannot be used: expected a name that is free for {table.word}, got {name!r}, "
            f"which {owner} has{'; a changed file needs a new process' if again else ''}"
        )


def guarded(
    function: Callable[..., Result],
    what: str,
    error: type[SecateurError] = PluginError,
    passing: type[Exception] | tuple[type[Exception], ...] = SecateurError,
) -> Callable[..., Result]:
    """Return a function of somebody else's whose failures are one sentence with file and line.

    Args:
        function: The function of a row.
        what: Whose it is, for the sentence.
        error: What is raised.
        passing: What the function may raise on purpose, which is left as it is.
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Result:
        try:
            return function(*args, **options)
        except passing:
            raise
        except (Exception, SystemExit) as failure:
            if isinstance(failure, MemoryError) or type(failure).__name__ == "OutOfMemoryError":
                raise  # torch's: who called frees memory and tries again
            raise error(f"{what} fails{_at(failure)}: {_reason(failure)}") from failure

    return call


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _at(error: BaseException) -> str:
    """Return the last place in somebody else's code that an error went through."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" in line {error.lineno}"
    from traceback import extract_tb

    own = str(Path(__file__).parent.parent)
    frames = [f for f in extract_tb(error.__traceback__) if not f.filename.startswith((own, "<frozen "))]
    for frame in reversed(frames):
        if plugin := _PLACE.fullmatch(frame.filename):
            return f" in line {frame.lineno} of {plugin[1]}"
    return f" in line {frames[-1].lineno} of {frames[-1].filename}" if frames else ""


# What runs and exports note -----------------------------------------------------------------------


def origin_of(table: Mapping[str, Any], name: str) -> str:
    """Return who added a row, such as ``the plugin rules.py``; empty for the package's own."""
    groups = [t.group for t in _tables if t.rows is table]
    found = [_origins[group, name] for group in groups if (group, name) in _origins]
    return found[0].title if found else ""


def notes(words: Iterable[str] | None = None) -> list[dict[str, str]]:
    """Return what a run or an export notes of whoever has added rows: name and hash, or version.

    Args:
        words: Operators and leaves of a metric, to have only what that needs.
    """
    language = ("secateur.operators", "secateur.leaves")
    wanted = set(_origins) if words is None else {(group, word) for word in words for group in language}
    found = [origin.note for key, origin in _origins.items() if key in wanted]
    return [dict(note) for i, note in enumerate(found) if note not in found[:i]]


def missing(noted: Iterable[Mapping[str, str]]) -> list[str]:
    """Return which of the noted plugins and packages this process does not use as they were noted."""
    wanted = list(noted)
    if any("version" in note for note in wanted):  # installed ones may not have been asked for yet
        fill(*(table.rows for table in _tables))
    here = notes()
    return [
        f"the plugin {n['name']} (sha256 {n['sha256'][:12]})" if "sha256" in n
        else f"the package {n['name']} {n.get('version', '')}"
        for n in wanted if dict(n) not in here
    ]  # fmt: skip


def lacking(noted: Iterable[Mapping[str, str]]) -> str:
    """Return what is missing of the noted plugins and what to do about it; empty if nothing is."""
    noted = list(noted)
    found = missing(noted)
    if not found:
        return ""
    verb = "is" if len(found) == 1 else "are"
    here = {plugin.name: plugin.sha256 for plugin in used()}
    if changed := [n["name"] for n in noted if n["name"] in here and n.get("sha256") != here[n["name"]]]:
        return (
            f"{' and '.join(found)}, and the file {changed[0]} in use here is another one (sha256 "
            f"{here[changed[0]][:12]}); give the file that it was made with"
        )
    return (
        f"{' and '.join(found)}, which {verb} not in use here; give --plugin FILE.py, or call "
        "secateur.use_plugin, before it is read"
    )
