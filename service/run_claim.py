"""Claiming a run folder: that it is this very run's, its saved settings, and what a run notes of itself."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.plugins import lacking, notes
from ..results.archive.archive import Archive
from ..results.archive.database import ArchiveError, BeginningError, beside, lock
from ..results.archive.run_folder import SETTINGS, RunFolder
from ..search.core.budget import Budget
from ..search.core.files import OF_A_RUN, Output, is_partial, whole
from ..search.core.requests import shown
from ..search.core.versions import library_versions
from ..search.settings import SearchSettings
from ..search.toml import SettingsError
from ..workers.calibrate.folder import Calibration

_SETTINGS = Output(
    "a place for a run's settings", replaces=lambda file: b"[search]" in file.read(4096), of_a_run=True
)
# What may change when a run is continued: how long it goes on, and where things are.
CONTINUED = ("budget", "calibration", "model", "plugins")
_WHERE = ("device", "threads", "reuse")  # what a run is measured with, which is no part of what it is


def same_run(settings: SearchSettings, other: SearchSettings) -> dict[str, str]:
    """Return what tells two settings apart, by name; nothing where both are of one run.

    Plugins are told apart by their hashes, which the archive notes, wherever their files are.
    """
    mine, there = (each.model_dump(mode="json") for each in (settings, other))
    names = [name for name in mine if name != "plugins" and mine[name] != there[name]]
    return {name: f"{name} = {there[name]!r} there, {mine[name]!r} here" for name in names}


def check_folder(settings: SearchSettings, run: RunFolder, *, is_resumed: bool = False) -> None:
    """Refuse a folder that holds something else than this very run, or that is being written.

    Args:
        settings: The settings of the run.
        run: The folder.
        is_resumed: Whether settings may differ, as ``CONTINUED`` says.

    Raises:
        SettingsError: For another run, other files, or a folder that cannot be written.
        ArchiveError: When another process is writing it.
    """
    folder = run.path
    Archive.check_folder(folder)
    if run.settings_file.is_file() and not is_resumed:
        changed = same_run(settings, SearchSettings.load(run.settings_file))
        if changed and has_measured(run):
            words = ["secateur", "resume", str(folder)]
            if {*changed} <= {*CONTINUED}:
                given = {name: getattr(settings, name) for name in changed}
                words += [w for n, v in given.items() if v is not None for w in (f"--{n}", str(v))]
            raise SettingsError(
                f"{folder} holds a run with another configuration ({'; '.join(changed.values())}); choose "
                f"another --out, or continue that run with `{shlex.join(words)}`"
            )
    if run.has_archive:
        with contextlib.suppress(BeginningError), Archive(folder) as archive:
            archive.check()
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        raise SettingsError(f"expected a folder that can be written for --out, got {folder}")
    has_others = folder.exists() and not all(map(is_partial, folder.iterdir()))
    if has_others and not run.settings_file.is_file():
        raise SettingsError(f"expected a new or empty run folder, got {folder} with other files in it")


def has_measured(run: RunFolder) -> bool:
    """Whether a folder's archive holds any measurement."""
    if not run.has_archive:
        return False
    with contextlib.suppress(BeginningError), Archive(run.path) as archive:
        return bool(archive.rows("SELECT 1 FROM measurements LIMIT 1"))
    return False


def save(settings: SearchSettings, run: RunFolder) -> None:
    """Write the settings, of a new run before anything else: a folder that has them can be resumed."""
    path = run.settings_file
    if path.is_file() and SearchSettings.load(path) == settings:
        return
    if run.has_archive and not has_measured(run):  # left by a run that measured nothing, under other settings
        with lock(run.lock_file):  # nobody writes it
            for place in (run.archive_file, *beside(run.archive_file)):
                place.unlink(missing_ok=True)
    with whole(path, _SETTINGS, run.path) as place:
        place.write_text(settings.to_toml(), encoding="utf-8")


def identity_of(calibration: Calibration) -> str:
    """Return the hash of what a calibration holds: of which model, on which tokens."""
    facts = {name: calibration.manifest[name] for name in ("parts", "gradients", "layers")}
    facts["weights"] = calibration.manifest["model"]["weights"]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def removed_if_it_fails(runs: Iterable[RunFolder]) -> Iterator[None]:
    """Remove what a start of runs makes, files and folders, if it fails and no run has measured anything.

    Nothing goes that was there before, or that is not ours. What a user interrupts stays, to be resumed.
    """
    before = {run: {name for name in OF_A_RUN if os.path.lexists(run.path / name)} for run in runs}
    folders = {place for run in before for place in (run.path.absolute(), *run.path.absolute().parents)}
    new = sorted((place for place in folders if not os.path.lexists(place)), key=lambda p: -len(p.parts))
    try:
        yield
    except Exception:
        with contextlib.suppress(SecateurError, OSError, sqlite3.Error):
            if not any(map(has_measured, before)):
                for run, there in before.items():
                    _remove(run, set(OF_A_RUN) - there)
                for place in new:
                    with contextlib.suppress(OSError):  # somebody else put something there
                        place.rmdir()
        raise


def _remove(run: RunFolder, names: set[str]) -> None:
    """Remove files of a run, unless another process writes it."""
    if any(os.path.lexists(run.path / name) for name in names):
        with lock(run.lock_file):
            for name in names:
                (run.path / name).unlink(missing_ok=True)


def check_calibration(archive: Archive, calibration: Calibration) -> str:
    """Return the hash of what a calibration holds, which must be what the archive was measured on.

    Raises:
        ArchiveError: When it is another one.
    """
    identity = identity_of(calibration)
    if archive.fact("calibration", identity) != identity:
        raise ArchiveError(
            f"{archive.folder} was measured on another calibration than {calibration.folder}; its "
            "figures cannot be continued: give --calibration with the folder that it was measured on, or "
            "choose another --out"
        )
    return identity


def claim(
    archive: Archive,
    settings: SearchSettings,
    calibration: Calibration,
    accelerator: str,
    report: Callable[[str], None],
) -> None:
    """Bind the archive to settings and calibration.

    Raises:
        ArchiveError: When it was measured on another calibration, known by its hashes, or under other
            settings.
    """
    identity = check_calibration(archive, calibration)
    dumped = settings.model_dump(mode="json")
    own = {name: value for name, value in dumped.items() if name not in (*CONTINUED, *_WHERE)}
    for name, value in archive.fact("settings", own).items():
        if own.get(name) != value:
            raise ArchiveError(
                f"expected {name} = {shown(value)} in {archive.folder / SETTINGS}, as the run was begun, got "
                f"{shown(own.get(name))}; put it back, or search into another --out"
            )
    check_plugins(archive)
    versions = library_versions(
        "secateur", "torch", "transformers", "numpy", "deap", "pymoo", "optuna", "moocore"
    )
    began = archive.fact("versions", versions)
    changed = [
        f"{name} {began.get(name, 'missing')}, now {versions.get(name, 'missing')}"
        for name in began | versions
        if began.get(name) != versions.get(name)
    ]
    if changed:
        report(f"the run was begun with other versions and may take another course: {'; '.join(changed)}")
    archive.keep(
        layers=[asdict(layer) for layer in calibration.layers],
        card=_card(calibration, accelerator),
        coverage=calibration.coverage.record() if calibration.coverage else {},
        calibration=identity,
        objectives=list(settings.objectives),
        pattern=settings.pattern,
        settings=own,
        plugins=archive.fact("plugins", notes()),
        versions=began,
        has_ended=False,
    )


def check_plugins(archive: Archive) -> None:
    """Refuse to go on with a run without the very plugins that it was begun with, or with more of them.

    What is added to the tables changes what is drawn from them, and so the course of a search.

    Raises:
        ArchiveError: When one is not in use, another file of its name is, or one is that the run was begun
            without.
    """
    noted = archive.fact("plugins")
    if noted is None:  # nothing has been claimed yet
        return
    if found := lacking(noted):
        raise ArchiveError(f"{archive.folder} was made with {found}")
    if more := [note["name"] for note in notes() if note not in noted]:
        raise ArchiveError(
            f"{archive.folder} was begun without {' and '.join(more)}, which would change its course; "
            "continue it in a process without"
        )


def continued(run: RunFolder, **changes: Any) -> SearchSettings:
    """Return the settings of a run with what is changed of ``CONTINUED``; what is None stays.

    Raises:
        SettingsError: For a change that cannot be made, such as a budget of another unit.
        ArchiveError: When the folder holds no settings.
    """
    if not run.settings_file.is_file():
        raise ArchiveError(
            f"expected a run folder, got {run.path} without {run.settings_file.name}; see `secateur search`"
        )
    if run.has_archive:
        with contextlib.suppress(BeginningError), Archive(run.path) as archive:
            check_plugins(archive)  # its settings cannot be read without them
    there = SearchSettings.load(run.settings_file)
    chosen = {name: value for name, value in changes.items() if value is not None}
    if not chosen:
        return there
    settings = SearchSettings.read({**there.model_dump(), **chosen})
    now, then = Budget.parse(settings.budget), Budget.parse(there.budget)
    spent = _spent(run, now)
    if now.unit != then.unit or now.amount < min(spent, then.amount):
        raise SettingsError(
            f"expected a budget in {then.unit} that is no less than what the run has spent"
            f"{f', {spent:,.0f}' if now.unit == then.unit else ''}, got {now.in_words}; that of "
            f"{run.path} is {then.in_words}"
        )
    return settings


def _spent(run: RunFolder, budget: Budget) -> float:
    """Return what a run has spent so far, in a budget's unit; aliases cost nothing."""
    if not run.has_archive:
        return 0.0
    what = "count(*)" if budget.unit == "candidates" else f"coalesce(sum({budget.unit}), 0)"
    with contextlib.suppress(BeginningError), Archive(run.path) as archive:
        return float(archive.rows(f"SELECT {what} FROM trials WHERE alias_of = ''")[0][0])
    return 0.0


def find_calibration(settings: SearchSettings, run: Path) -> Calibration:
    """Return the calibration of a run, or say which option names the place it was moved to.

    Raises:
        CalibrationError: When it is not a calibration folder.
        SettingsError: When it is not where the run has it.
    """
    if not settings.calibration.exists():
        raise SettingsError(
            f"expected the calibration of {run} in {settings.calibration}, which does not exist; if it was "
            f"moved, give its place with --calibration DIR (`secateur resume {run} --calibration DIR`)"
        )
    return Calibration(settings.calibration)


def calibrated_on(run: Path) -> tuple[SearchSettings, Calibration]:
    """Return the settings of a run and the calibration that it was measured on.

    Raises:
        SecateurError: When that is not where the run has it any more, or is another by now.
    """
    settings = SearchSettings.load(RunFolder(run).settings_file)
    if not settings.calibration.exists():
        raise SettingsError(
            f"expected its calibration in {settings.calibration}, got nothing there; give --text FILE"
        )
    calibration = Calibration(settings.calibration)
    with Archive(run) as archive:
        identity = identity_of(calibration)
        if archive.fact("calibration", identity) != identity:
            raise ArchiveError(
                f"expected the calibration that it was measured on in {calibration.folder}, got another; "
                "give --text FILE"
            )
    return settings, calibration


def _card(calibration: Calibration, accelerator: str) -> dict[str, Any]:
    """Return what a reader of figures has to know of where they come from."""
    manifest = calibration.manifest
    return {
        "model": manifest["model"]["source"],
        "weights": manifest["model"]["weights"],
        "text": manifest["text"],
        "parts": manifest["parts"],
        "calibrated_with": manifest["versions"],
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "accelerator": accelerator,
    }
