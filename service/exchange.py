"""Rules and runs in the forms of other tools: written, and read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.expression import Expression
from ..metrics_dsl.published import read_metric
from ..results.archive.archive import Archive
from ..results.archive.run_folder import HasFolder, RunFolder, folder_of
from ..results.export.candidate_json import write_json
from ..results.export.candidate_record import CandidateRecord, ExportError, find, layers_of
from ..results.export.evopress import read_levels, to_ratios
from ..results.export.exporters import EXPORT
from ..results.export.exporters import export as write
from ..results.export.pruner_zero import read_pruner_zero
from ..search.core.candidate import Candidate, Layer, uniform
from ..search.core.files import whole
from ..search.settings import SearchSettings
from ..search.spaces.ratios import sizes, to_columns
from .run_claim import find_calibration

if TYPE_CHECKING:
    from torch import Tensor

_OF_THE_MODEL = ("model", "device", "dtype", "threads", "trust_remote_code")


def export(
    run: str | Path | HasFolder,
    key: str = "",
    *,
    to: str,
    out: str | Path,
    force: bool = False,
    **options: Any,
) -> Path:
    """Write a run, or one of its candidates, in another form, and return its path.

    The model is loaded for masks alone, as the run had it where no option says otherwise.

    Args:
        run: A run folder, or a run.
        key: The candidate's key, the beginning of it, its published name, or ``best``; empty for what is
            of the whole run.
        to: A name of ``EXPORTERS``.
        out: The file or folder to write, which must not exist.
        force: Replace a file that is there, unless it is of a run or a calibration.
        options: For masks alone: ``model``, ``device``, ``dtype`` and ``threads``, as in ``SearchSettings``,
            and ``trust_remote_code``, to allow code that comes with the model.

    Raises:
        ExportError: When the form cannot represent the candidate, or ``out`` exists; nothing is written.
        SecateurError: For an unknown form or option.
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in chosen if name not in _OF_THE_MODEL]:
        raise SecateurError(f"expected options among {', '.join(_OF_THE_MODEL)}, got {unknown[0]!r}")
    if chosen and to != "masks":
        raise SecateurError(f"expected {next(iter(chosen))} with masks alone, which need the model; got {to}")
    folder = folder_of(run)
    masks = _masks(folder, key, chosen) if to == "masks" else None
    return write(folder, key, to=to, out=out, masks=masks, force=force)


def _masks(folder: Path, key: str, changes: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Compute the masks when they are asked for: by then the key is known to be right."""
    from ..workers.measure.local_evaluator import LocalEvaluator
    from ..workers.measure.worker import Device

    with Archive(folder) as archive:
        record = find(archive, key)
    code = changes.pop("trust_remote_code", False)
    there = SearchSettings.load(RunFolder(folder).settings_file).model_dump()
    settings = SearchSettings.read({**there, **changes})
    evaluator = LocalEvaluator(
        find_calibration(settings, folder),
        pattern=record.pattern,
        device=Device(settings.device, settings.dtype, settings.threads),
        model=settings.model,
        trust_remote_code=code,
    )
    try:
        yield from evaluator.masks(record.candidate)
    finally:
        evaluator.close()


def import_rule(
    file: str | Path,
    out: str | Path | None = None,
    *,
    layers: str | Path | None = None,
    metric: str | None = None,
    sparsity: float | None = None,
    weights_diff: float | None = None,
    group: str = "row",
    force: bool = False,
) -> Expression | CandidateRecord:
    """Read what another search found: a metric, or a candidate for the layers of a model.

    Args:
        file: A tree of Pruner-Zero, or levels of EvoPress.
        out: The candidate's JSON file to write; a tree without is only read.
        layers: The run or calibration folder of the model whose layers these are.
        metric: The metric that goes with levels; theirs, or Wanda's, if left out.
        sparsity: The ratio of all layers for a tree, of level 0 for levels.
        weights_diff: Weights that a level removes more.
        group: The weights that compete, ``row`` or ``layer``.
        force: Replace a file that is there, unless it is of a run or a calibration.

    Returns:
        The metric of a tree without ``out``, else what was written.

    Raises:
        ExportError: For a file that is neither, or options that do not go with it; nothing is written.
    """
    file = Path(file)
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
        return found
    if out is None or layers is None:
        raise ExportError(
            "a candidate has a ratio for each layer: give --layers, a run or calibration, and --out"
        )
    layers_there = _layers(Path(layers))
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
    with whole(out, replace(EXPORT, force=force)) as path:
        write_json(record, path)
    return record


def _layers(folder: Path) -> tuple[Layer, ...]:
    if RunFolder(folder).has_archive:
        with Archive(folder) as archive:
            return layers_of(archive)
    from ..workers.calibrate.folder import Calibration

    return tuple(Calibration(folder).layers)
