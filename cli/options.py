"""What several commands share: the application, options, and how results are printed."""

from __future__ import annotations

import inspect
import itertools
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ..metrics_dsl.errors import SecateurError
from ..search.core import defaults
from ..search.core.requests import shown
from .sections import CLUSTER, HOW, MACHINE, SEARCHED, USUAL, Grouped, Sectioned
from .terminal import say, show

if TYPE_CHECKING:
    import pandas

    from ..service.run import Run
    from ..service.runs import Runs
    from ..workers.cluster.settings import Cluster

F = TypeVar("F", bound=Callable[..., Any])

app = typer.Typer(
    cls=Grouped,
    help="Search for the rules by which a large language model is pruned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
DIR = typer.Argument(help="A calibration folder.", show_default=False)
RUN = typer.Argument(help="A run folder.", show_default=False)
FORCE = typer.Option(
    "--force", help="Replace a file that is there, whatever it is; never one of a run or calibration."
)
JSON = typer.Option("--json", help="Print the result as JSON.")
MODEL = typer.Option(
    help="Load the model from here instead of where it was calibrated.", rich_help_panel=MACHINE
)
DEVICE = typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=MACHINE)
DTYPE = typer.Option(help="float32 or bfloat16.", rich_help_panel=MACHINE)
THREADS = typer.Option(help="CPU threads; 0 uses all cores.", rich_help_panel=MACHINE)
CODE = typer.Option(help="Run code that comes with the model.", rich_help_panel=MACHINE)
SPARSITY = typer.Option(
    help=f"Fraction of weights to remove, in [0, 1); {defaults.SPARSITY:g}, or what the pattern says.",
    rich_help_panel=USUAL,
)
PATTERN = typer.Option(help="unstructured or N:M (N removed of M), such as 2:4.", rich_help_panel=SEARCHED)
GROUP = typer.Option(help="The weights that compete: row or layer.", rich_help_panel=SEARCHED)
SEED = typer.Option(help="Seed of sampling and order.", rich_help_panel=HOW)
TEXT = typer.Option(help="self, a .txt, .jsonl(.gz) or .parquet file, or hub:NAME.", rich_help_panel=USUAL)
TOKENS = typer.Option(help="Tokens of statistics.", rich_help_panel=USUAL)
SEQUENCE_LENGTH = typer.Option(help="Tokens per sequence.", rich_help_panel=USUAL)
RAY = typer.Option(
    "--ray",
    help="Measure on Ray workers: local starts them here, auto or an address joins a cluster.",
    rich_help_panel=CLUSTER,
)
WORKERS = typer.Option(
    help="Workers on Ray, a number or auto: as many as there is room for.", rich_help_panel=CLUSTER
)
SHARDS = typer.Option(help="Workers that share one copy of the model.", rich_help_panel=CLUSTER)
GPUS_PER_WORKER = typer.Option(
    help="GPUs per worker, parts allowed; 1 where the cluster has GPUs.", rich_help_panel=CLUSTER
)
CPUS_PER_WORKER = typer.Option(help="CPUs per worker.", rich_help_panel=CLUSTER)
TIMEOUT = typer.Option(help="Seconds after which a worker's call is taken for hung.", rich_help_panel=CLUSTER)


def command(group: str, name: str | None = None, *, example: str) -> Callable[[F], F]:
    """Return what makes a function a command of a group, with an example at the end of its help."""
    return app.command(name, cls=Sectioned, rich_help_panel=group, epilog=f"Example: {example}")


def from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take what the command line leaves out from the section of a TOML file that has the command's name."""
    if path is not None and not context.resilient_parsing:
        from ..metrics_dsl.parser import did_you_mean
        from ..search.toml import SettingsError, read_section

        section = read_section(path, str(context.info_name))
        known = {p.name: p for p in context.command.params if p.name not in ("config", "as_json")}
        for name in section:
            if name not in known:
                raise SettingsError(f"unknown setting {name!r} in {path}{did_you_mean(name, known)}")
        context.default_map = {name: _given(known[name], value) for name, value in section.items()}
    return path


def _given(parameter: Any, value: Any) -> Any:
    """Return a value of TOML as an option takes it: a list is repeated, or one text with commas."""
    if parameter.multiple:
        return value if isinstance(value, list) else [value]
    return ",".join(map(str, value)) if isinstance(value, list) else value


_plugins: list[Path] = []  # of this command, which the next one needs too


def use_plugins(context: typer.Context, paths: list[Path] | None) -> list[Path]:
    """Use the plugins that were named, before anything else is read; not while a shell completes a line."""
    if context.resilient_parsing:
        return []
    from ..metrics_dsl.plugins import use_plugin

    for path in paths or ():
        use_plugin(path)
    _plugins[:] = paths or []
    return paths or []


PLUGINS = typer.Option(
    "--plugin",
    callback=use_plugins,
    is_eager=True,
    help="A Python file that adds searchers, objectives, operators and so on; may be repeated.",
    rich_help_panel=SEARCHED,
)
CONFIG = typer.Option(
    "--config",
    callback=from_file,
    is_eager=True,
    help="Read options from this TOML file's section.",
    rich_help_panel=USUAL,
)


# Options of workers, as commands and configs name them -> fields of a cluster.
WORKER_OPTIONS = {
    "workers": "workers",
    "shards": "shards",
    "gpus_per_worker": "gpus",
    "cpus_per_worker": "cpus",
    "timeout": "timeout",
}


def read_cluster(address: str | None, given: Mapping[str, Any]) -> Cluster | None:
    """Return the cluster that options describe; None without an address.

    Args:
        address: As of ``Cluster``.
        given: All options of a command by name. Those named in ``WORKER_OPTIONS`` are read; one that is None
            was not given.

    Raises:
        SecateurError: For options that do not fit, or that need an address.
    """
    from ..workers.cluster.settings import Cluster

    fields: dict[str, Any] = {}
    for name, field in WORKER_OPTIONS.items():
        value = given.get(name)
        if value is None or (name == "workers" and value == "auto"):
            continue
        kind = "a whole number" if field in ("workers", "shards") else "a number"
        try:
            if isinstance(value, str) and not value.isascii():  # digits of other scripts
                raise ValueError
            fields[field] = int(str(value)) if kind == "a whole number" else float(value)
        except (TypeError, ValueError, OverflowError):
            wanted = f"{kind} or auto" if name == "workers" else kind
            given_as = name.replace("_", "-")
            raise SecateurError(f"expected {wanted} for {given_as}, got {shown(value)}") from None
    found = Cluster("local" if address is None else address, **fields)
    if address is None and found != Cluster("local"):
        raise SecateurError("expected --ray local, auto or an address with options of workers, got none")
    return None if address is None else found


def records(rows: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return rows as what JSON can hold; what is missing is null."""
    found: list[dict[str, Any]] = json.loads(rows.to_json(orient="records", double_precision=15))
    return found


def print_json(value: Any) -> None:
    """Print a result for other programs."""
    show(json.dumps(value, indent=1))


def spelled(*words: object) -> str:
    """Return a command to type, with the plugins of this one where it takes any."""
    names = {c.name or getattr(c.callback, "__name__", ""): c.callback for c in app.registered_commands}
    takes = "plugins" in inspect.signature(names[str(words[0])] or spelled).parameters
    plugins = [word for path in _plugins for word in ("--plugin", path)] if takes else []
    # A path that looks like an option is no longer one with its folder before it.
    typed = [
        f"./{w}" if isinstance(w, Path) and str(w).startswith("-") else str(w) for w in (*words, *plugins)
    ]
    return f"secateur {shlex.join(typed)}"


def next_step(*words: object) -> None:
    """Name the command that follows on this one, on standard error."""
    say(f"next: {spelled(*words)}")


def unused(place: Path) -> Path:
    """Return a place to write to, or the first with a number that is free."""
    numbered = (place.with_name(f"{place.name}{n}") for n in itertools.count(2))
    return next(p for p in itertools.chain((place,), numbered) if not p.exists())


def how_to_prune(run: Path) -> list[object]:
    """Return the words that prune the model of a run, where it is known; its text needs no words."""
    from ..service.run import Run

    with Run(run).archive() as archive:
        card = archive.fact("card", {})
    return [card.get("model", "MODEL"), "-o", unused(Path("pruned"))]


def rule_of(run: Path) -> str:
    """Return the key of the rule that a next step is about: the best, over sparsities one of the front."""
    from ..service.run import Run

    found = Run(run)
    if "density" not in found.objectives:
        return "best"
    front = found.front()
    return str(front["key"].iloc[len(front) // 2])[:8] if len(front) else "KEY"


def print_run(run: Run, objectives: list[str] | None, as_json: bool) -> None:
    """Print a run's front, baselines and verdict."""
    from ..results.summary.table import report, verdict

    with run.archive() as archive, archive.reading():
        if not as_json:
            show(report(archive, objectives))
            return
        best = archive.front(objectives)
        rows = archive.frame()
        print_json({
            "run": str(run.folder), "objectives": best.attrs["objectives"],
            "front": records(best), "baselines": records(rows[rows["baseline"].notna()]),
            "verdict": verdict(rows, best, archive.holdout_parts()),
            **(archive.coverage.record() if archive.coverage else {}),
        })  # fmt: skip


def print_comparison(runs: list[Path] | Runs, as_json: bool) -> None:
    """Print a comparison of runs."""
    from ..results.summary.table import COMPARED, table
    from ..service.reporting import compare

    found = compare(runs)
    if as_json:
        print_json({"searches": records(found), "verdicts": found.attrs["verdicts"]})
        return
    show(table(found, COMPARED))
    show("\n" + "\n".join(found.attrs["verdicts"]))
