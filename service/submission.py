"""Submissions: what a search needs to run as a job of a cluster, checked and put together."""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..metrics_dsl.plugins import Plugin, use_plugin
from ..search.core.requests import shown
from ..search.settings import SearchSettings
from ..search.toml import SettingsError, read_section

# Where the search of a job finds its workers: the job's driver runs on the head of the cluster itself.
ON_CLUSTER = ("--ray", "auto")
# Settings of `secateur search` beside those of the run: a config may have them too.
BESIDE = (
    "out", "seeds", "ray", "workers", "shards", "gpus_per_worker", "cpus_per_worker", "timeout",
)  # fmt: skip
# What the package is made of, with all folders inside; the root of a clone holds more.
FOLDERS = ("cli", "metrics_dsl", "results", "search", "service", "testing", "workers")
SUFFIXES = (".py", ".json", ".css", ".js", ".typed")


@dataclass(frozen=True)
class Submission:
    """A search to be run as a job.

    Attributes:
        config: The TOML file whose section [search] says what to search.
        out: The run folder, a place on the cluster.
        options: Words that follow on the command line of the search.
        plugins: Files that the search needs, which are sent along.
    """

    config: Path
    out: Path
    options: tuple[str, ...] = ()
    plugins: tuple[Plugin, ...] = ()

    @classmethod
    def read(
        cls,
        config: Path,
        out: Path | None = None,
        options: Sequence[str] = (),
        plugins: Sequence[str | Path] = (),
    ) -> Submission:
        """Return the submission of a config file, checked before anything is sent.

        Raises:
            SettingsError: For settings that a search would refuse, or places that a job would not find.
        """
        section = read_section(config, "search")
        own = {name: value for name, value in section.items() if name not in BESIDE}
        if "calibration" not in own:
            raise SettingsError(
                f"expected the setting calibration in the section [search] of {config}: the folder, as the "
                "cluster sees it"
            )
        places = {"calibration": own["calibration"], "--out": out if out is not None else section.get("out")}
        if places["--out"] is None:
            raise SettingsError(f"expected a run folder: give --out, or the setting out in {config}")
        for name, place in {**places, "model": own.get("model", "")}.items():
            if not isinstance(place, str | Path) or "\0" in str(place):
                raise SettingsError(f"expected a path for {name}, got {shown(place)} in {config}")
        if own.get("model") and Path(own["model"]).exists():  # else the name of a model on the hub
            places["model"] = own["model"]
        for name, place in places.items():
            if not Path(place).is_absolute():
                raise SettingsError(
                    f"expected an absolute path for {name}, got {place}: a job runs in a folder of its own "
                    "on the cluster; name a place that all its nodes see"
                )
        named = own.pop("plugins", ())
        files = [use_plugin(path) for path in plugins or ([named] if isinstance(named, str) else named)]
        SearchSettings.read(own)
        return cls(config, Path(places["--out"]), tuple(options), tuple(files))

    @property
    def entrypoint(self) -> str:
        """The shell command that the job runs in the staged folder, with the cluster's own Python."""
        words = ("python", "-m", "secateur", "search", "--config", self.config.name, "--out", str(self.out))
        # Without a shell in between, the signal to stop reaches the search and its exit code the cluster.
        plugins = [word for place in self._places() for word in ("--plugin", str(place))]
        return f"exec {shlex.join((*words, *ON_CLUSTER, *plugins, *self.options))}"

    def _places(self) -> list[Path]:
        """Return where plugins are in the staged folder: each in one of its own, for names may be alike."""
        return [Path("plugins") / str(i) / plugin.name for i, plugin in enumerate(self.plugins)]

    def stage(self, folder: Path) -> None:
        """Copy what the job needs into an empty or new folder: the package and the config, nothing else."""
        folder.mkdir(exist_ok=True)
        package = Path(__file__).parent.parent
        inside = [path for name in FOLDERS for path in (package / name).rglob("*")]
        for path in sorted((*package.iterdir(), *inside)):
            if path.is_file() and path.suffix in SUFFIXES:
                copy = folder / "secateur" / path.relative_to(package)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        shutil.copyfile(self.config, folder / self.config.name)
        for place, plugin in zip(self._places(), self.plugins, strict=True):
            (folder / place).parent.mkdir(parents=True)
            (folder / place).write_text(plugin.text, encoding="utf-8")
        about = folder / f"secateur-{__version__}.dist-info"  # the copy knows its version as if installed
        about.mkdir()
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: secateur\nVersion: {__version__}\n", encoding="utf-8"
        )

    def new_id(self) -> str:
        """Return a readable name for the job that no other has."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.out.name).strip("-") or "run"
        return f"secateur-{name}-{secrets.token_hex(3)}"
