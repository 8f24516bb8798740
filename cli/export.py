"""Commands that carry results elsewhere and bring others' in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..metrics_dsl.errors import SecateurError
from .options import DEVICE, DTYPE, GROUP, JSON, MODEL, RUN, THREADS, app, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..search.core.candidate import Layer

_OUT = typer.Option("--out", "-o", help="The file or folder to write; it must not exist.", show_default=False)


@app.command(epilog="Example: secateur export runs/a best --to python -o metric.py")
def export(
    run: Annotated[Path, RUN],
    out: Annotated[Path, _OUT],
    to: Annotated[
        str,
        typer.Option(
            help="A candidate: text, json, python, sympy, latex, pruner-zero, llm-compressor, evopress or "
            "masks. A run: csv or optuna.",
            show_default=False,
        ),
    ],
    key: Annotated[
        str, typer.Argument(help="The candidate's key, its beginning, or best.", show_default=False)
    ] = "",
    model: Annotated[str | None, MODEL] = None,
    device: Annotated[str | None, DEVICE] = None,
    dtype: Annotated[str | None, DTYPE] = None,
    threads: Annotated[int | None, THREADS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write a candidate, or a whole run, for other tools.

    The model is loaded for masks alone, as the run had it where no option says otherwise.
    """
    from ..results.export.exporters import EXPORTERS
    from ..results.export.exporters import export as write

    given = {"model": model, "device": device, "dtype": dtype, "threads": threads}
    changes = {name: value for name, value in given.items() if value is not None}
    if changes and to != "masks":
        raise SecateurError(
            f"expected --{next(iter(changes))} with masks alone, which need the model; got {to}"
        )
    masks = _masks(run, key, changes) if to == "masks" else None
    write(run, key, to=to, out=out, masks=masks)
    if as_json:
        print_json({"run": str(run), "key": key, "to": to, "out": str(out)})
    else:
        typer.echo(f"{out}: {EXPORTERS[to].meaning}")


def _masks(run: Path, key: str, changes: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Compute the masks when they are asked for: by then the key is known to be right."""
    from ..results.archive.archive import Archive
    from ..results.export.candidate_record import find
    from ..search.settings import SearchSettings
    from ..workers.calibrate.folder import Calibration
    from ..workers.measure.local_evaluator import LocalEvaluator
    from ..workers.measure.worker import Device

    with Archive(run) as archive:
        record = find(archive, key)
    there = SearchSettings.load(run / "run.toml").model_dump()
    settings = SearchSettings.read({**there, **changes})
    evaluator = LocalEvaluator(
        Calibration(settings.calibration),
        pattern=record.pattern,
        device=Device(settings.device, settings.dtype, settings.threads),
        model=settings.model,
    )
    try:
        yield from evaluator.masks(record.candidate)
    finally:
        evaluator.close()


@app.command("import", epilog="Example: secateur import best_tree.json")
def import_file(
    file: Annotated[
        Path, typer.Argument(help="A tree of Pruner-Zero, or levels of EvoPress.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The candidate to write as JSON; a tree without is printed."),
    ] = None,
    layers: Annotated[
        Path | None, typer.Option(help="The run or calibration folder of the model whose layers these are.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="The metric that goes with levels; wanda if left out.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="The ratio of all layers for a tree, of level 0 for levels.")
    ] = None,
    weights_diff: Annotated[
        float | None, typer.Option(help="Weights that a level removes more; 1,000,000 if left out.")
    ] = None,
    group: Annotated[str, GROUP] = "row",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Read what other searches found: a metric, or a candidate for the layers of a model."""
    from ..metrics_dsl.published import read_metric
    from ..results.export.candidate_json import to_json, write_json
    from ..results.export.candidate_record import CandidateRecord, ExportError
    from ..results.export.evopress import read_levels, to_ratios
    from ..results.export.exporters import EXPORT
    from ..results.export.pruner_zero import read_pruner_zero
    from ..search.core.candidate import Candidate, uniform
    from ..search.core.files import whole
    from ..search.spaces.ratios import sizes, to_columns

    if not file.exists():
        raise ExportError(f"expected a tree of Pruner-Zero or levels of EvoPress, got {file}: not found")
    tree = not file.is_dir() and file.suffix == ".json"
    found = read_pruner_zero(file) if tree else None
    unused: dict[str, Any] = {"metric": metric, "weights-diff": weights_diff} if tree else {}
    if tree and out is None:
        unused |= {"layers": layers, "sparsity": sparsity}
    if extra := [name for name, value in unused.items() if value is not None]:
        raise ExportError(
            f"expected no --{extra[0]} for a tree"
            + ("" if out else " that is printed; give --out to write a candidate")
        )
    if found is not None and out is None:
        print_json({"metric": str(found)}) if as_json else typer.echo(str(found))
        return
    if out is None or layers is None:
        raise ExportError(
            "a candidate has a ratio for each layer: give --layers, a run or calibration, and --out"
        )
    layers_there = _layers(layers)
    if found is not None:
        if sparsity is None:
            raise ExportError("a tree says nothing of ratios: give --sparsity, which all layers get")
        candidate = uniform(found, layers_there, sparsity, group)
    else:
        levels = read_levels(file, sparsity, weights_diff)
        chosen = read_metric(metric or levels.metric or "wanda")
        ratios = to_ratios(levels, layers_there)
        if group == "row":  # whole weights a row, so that rounding each down does not add up
            weights = sizes(layers_there)
            ratios = to_columns(ratios, layers_there, float(weights @ ratios / weights.sum()))
        candidate = Candidate(chosen, ratios, group)
    record = CandidateRecord(candidate, layers_there, provenance={"imported_from": file.name})
    with whole(out, EXPORT) as path:
        write_json(record, path)
    if as_json:
        print_json(to_json(record))
    else:
        typer.echo(
            f"{out}: `{candidate.metric}`, {record.sparsity:.2%} of {len(layers_there)} layers' weights"
        )


def _layers(folder: Path) -> tuple[Layer, ...]:
    from ..results.archive.archive import Archive
    from ..results.export.candidate_record import layers_of
    from ..workers.calibrate.folder import Calibration

    if (folder / "archive.sqlite").is_file():
        with Archive(folder) as archive:
            return layers_of(archive)
    return tuple(Calibration(folder).layers)
