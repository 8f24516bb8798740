"""What several commands share: the application, options, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..metrics_dsl.errors import SecateurError
from ..search.core import defaults

if TYPE_CHECKING:
    import pandas

app = typer.Typer(
    help="Search for the rules by which a large language model is pruned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
DIR = typer.Argument(help="A calibration folder.", show_default=False)
RUN = typer.Argument(help="A run folder.", show_default=False)
JSON = typer.Option("--json", help="Print the result as JSON.")
MODEL = typer.Option(help="Load the model from here instead of where it was calibrated.")
DEVICE = typer.Option(help="auto, cpu, cuda or cuda:N.")
DTYPE = typer.Option(help="float32 or bfloat16.")
THREADS = typer.Option(help="CPU threads; 0 uses all cores.")
SPARSITY = typer.Option(
    help=f"Fraction of weights to remove, in [0, 1); {defaults.SPARSITY:g}, or what the pattern says."
)
PATTERN = typer.Option(help="unstructured or N:M (N removed of M), such as 2:4.")
RAY = typer.Option(
    "--ray", help="Measure on Ray workers: local starts them here, auto or an address joins a cluster."
)
WORKERS = typer.Option(help="Workers on Ray, a number or auto: as many as there is room for.")
SHARDS = typer.Option(help="Workers that share one copy of the model.")
GPUS_PER_WORKER = typer.Option(help="GPUs a worker, parts allowed; 1 where the cluster has GPUs.")
CPUS_PER_WORKER = typer.Option(help="CPUs a worker.")
TIMEOUT = typer.Option(help="Seconds after which a worker's call is taken for hung.")
GROUP = typer.Option(help="The weights that compete: row or layer.")


def from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take what the command line leaves out from a TOML file's section of the command's name."""
    if path is not None:
        from ..metrics_dsl.parser import did_you_mean
        from ..search.toml import SettingsError, read_section

        section = read_section(path, str(context.info_name))
        known = {p.name: p for p in context.command.params if p.name not in ("config", "as_json")}
        for name in section:
            if name not in known:
                raise SettingsError(f"unknown setting {name!r} in {path}{did_you_mean(name, known)}")
        context.default_map = {
            name: ",".join(map(str, value)) if isinstance(value, list) else value
            for name, value in section.items()
        }
    return path


CONFIG = typer.Option(
    "--config",
    callback=from_file,
    is_eager=True,
    help="Read options from this TOML file's section.",
)


# Options of workers, as commands and configs name them -> fields of a cluster.
WORKER_OPTIONS = {
    "workers": "workers",
    "shards": "shards",
    "gpus_per_worker": "gpus",
    "cpus_per_worker": "cpus",
    "timeout": "timeout",
}


def read_cluster(address: str | None, given: Mapping[str, Any]) -> Any:
    """Return the cluster that options describe; None without an address.

    Args:
        address: As of ``Cluster``.
        given: Values by name, of which those in ``WORKER_OPTIONS`` are read; None is as good as left out.

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
            fields[field] = int(str(value)) if kind == "a whole number" else float(value)
        except (TypeError, ValueError):
            wanted = f"{kind} or auto" if name == "workers" else kind
            raise SecateurError(f"expected {wanted} for {name.replace('_', '-')}, got {value!r}") from None
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
    typer.echo(json.dumps(value, indent=1))


def note(text: str) -> None:
    """Print a line for people, on standard error."""
    typer.echo(text, err=True)


def print_report(archive: Any, objectives: list[str] | None, as_json: bool) -> None:
    """Print a run's front, baselines and verdict."""
    from ..results.summary.table import report, verdict

    if not as_json:
        typer.echo(report(archive, objectives))
        return
    best = archive.front(objectives)
    rows = archive.frame()
    print_json({
        "run": str(archive.folder), "objectives": best.attrs["objectives"],
        "front": records(best), "baselines": records(rows[rows["baseline"].notna()]),
        "verdict": verdict(rows, best, archive.holdout_parts()),
    })  # fmt: skip


def print_comparison(runs: Any, as_json: bool) -> None:
    """Print a comparison of runs."""
    from ..results.summary.compare import compare, verdicts
    from ..results.summary.table import COMPARED, table

    found = compare(runs)
    if as_json:
        print_json({"searches": records(found), "verdicts": verdicts(found)})
        return
    typer.echo(table(found, COMPARED))
    typer.echo("\n" + "\n".join(verdicts(found)))
