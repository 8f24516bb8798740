"""Run folders: whose they are, what a run notes of itself, and its saved settings."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..results.archive.archive import Archive
from ..results.archive.database import ArchiveError
from ..search.settings import SearchSettings
from ..search.toml import SettingsError
from ..workers.calibrate.folder import Calibration


def check_folder(settings: SearchSettings, folder: Path) -> None:
    """Refuse a folder that holds something else than this very run, or that is being written."""
    path = folder / "run.toml"
    if (folder / "archive.sqlite").is_file():
        Archive(folder, write=True).close()
    if path.is_file():
        there = SearchSettings.load(path)
        mine = settings.model_dump(mode="json")
        other = there.model_dump(mode="json")
        changed = [
            f"{name} = {other[name]!r} there, {mine[name]!r} here"
            for name in mine
            if mine[name] != other[name]
        ]
        if changed and _has_measured(folder):
            raise SettingsError(
                f"{folder} holds a run with another configuration ({'; '.join(changed)}); choose "
                f"another --out, or continue that run with `secateur resume {folder}`"
            )
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        raise SettingsError(f"expected a folder that can be written for --out, got {folder}")
    if not path.is_file() and folder.exists() and any(p.name != "run.partial" for p in folder.iterdir()):
        raise SettingsError(f"expected a new or empty run folder, got {folder} with other files in it")


def _has_measured(folder: Path) -> bool:
    if not (folder / "archive.sqlite").is_file():
        return False
    with Archive(folder) as archive:
        return bool(archive.rows("SELECT 1 FROM measurements LIMIT 1"))


def claim(
    archive: Archive,
    settings: SearchSettings,
    calibration: Calibration,
    accelerator: str,
    line: Callable[[str], None],
) -> None:
    """Bind the archive to settings and calibration."""
    facts = {name: calibration.manifest[name] for name in ("parts", "gradients", "layers")}
    facts["weights"] = calibration.manifest["model"]["weights"]
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if archive.fact("calibration", identity) != identity:
        raise ArchiveError(
            f"{archive.folder} was measured on another calibration than {calibration.folder}; its "
            "figures cannot be continued: choose another --out"
        )
    names = ("secateur", "torch", "transformers", "numpy", "deap", "pymoo", "optuna", "moocore")
    versions = {name: version(name) for name in names}
    began = archive.fact("versions", versions)
    changed = [
        f"{name} {began[name]}, now {versions[name]}"
        for name in versions
        if began.get(name) != versions[name]
    ]
    if changed:
        line(f"the run was begun with other versions and may take another course: {'; '.join(changed)}")
    archive.keep(
        layers=[asdict(layer) for layer in calibration.layers],
        card=_card(calibration, accelerator),
        calibration=identity,
        objectives=list(settings.objectives),
        pattern=settings.pattern,
        versions=began,
    )


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


def save(settings: SearchSettings, folder: Path) -> None:
    """Write the settings before anything else: a folder that has them can be resumed."""
    path = folder / "run.toml"
    if not path.is_file() or SearchSettings.load(path) != settings:
        # ``check_folder`` let other settings be replaced only where nothing had been measured with them.
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("archive.sqlite*"):
            file.unlink()
        partial = path.with_suffix(".partial")
        partial.write_text(settings.to_toml(), "utf-8")
        partial.replace(path)
