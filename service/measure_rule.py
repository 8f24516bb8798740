"""Calibrating a model, and measuring one rule on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.published import read_metric
from ..search.core import defaults
from ..search.core.candidate import STAGES, Candidate
from ..search.core.objectives import look_up
from ..search.core.requests import request_of, takes
from ..search.settings import SearchSettings
from ..search.spaces.allocation import ALLOCATIONS, Dense
from ..workers.calibrate import calibration as calibrating
from ..workers.calibrate.calibration import CalibrationRequest
from ..workers.calibrate.folder import Calibration
from ..workers.measure.local_evaluator import LocalEvaluator
from ..workers.measure.worker import Device


@takes(CalibrationRequest)
def calibrate(
    model: str | Path | CalibrationRequest,
    out: str | Path,
    report: Callable[[str], None] = lambda _text: None,
    **options: Any,
) -> Calibration:
    """Measure a dense model on text once, for all searches to come.

    Args:
        model: Hub name, folder or ``.gguf`` file; or all options, as ``CalibrationRequest``.
        out: The calibration folder to write, which must be new.
        report: Called with a sentence on each step.
        options: What else a ``CalibrationRequest`` has, by name.

    Raises:
        ModelError: When the model cannot be loaded or measured.
        TextError: When the text cannot be read or is too short.
        CalibrationError: When the folder exists or statistics are not finite.
        OSError: When the disk is full or fails.
    """
    return calibrating.calibrate(request_of(CalibrationRequest, model, options), out, report)


def measure(
    calibration: str | Path,
    metric: str,
    *,
    sparsity: float | None = None,
    stage: str = "model",
    part: str = "selection",
    pattern: str = "unstructured",
    group: str = "row",
    allocation: str = "uniform",
    model: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    threads: int = defaults.THREADS,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure one metric and return what was found, by name.

    Args:
        calibration: The calibration folder.
        metric: A metric, or the name of a published one.
        sparsity: Fraction of weights to remove, in [0, 1); the default, or what the pattern says.
        stage: ``screen``, ``layer`` or ``model``.
        part: Tokens of the model stage: ``selection`` or ``holdout``.
        pattern: ``unstructured`` or ``N:M``.
        group: The weights that compete, ``row`` or ``layer``.
        allocation: A published allocation of the sparsity to layers.
        model: Load the model from here instead of where it was calibrated.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32`` or ``bfloat16``.
        threads: CPU threads; 0 uses all cores.
        trust_remote_code: Allow code that comes with the model; no calibration, run or file can say so.

    Raises:
        SecateurError: For options that cannot be used, or a metric that cannot be measured.
    """
    if stage not in STAGES:
        raise SecateurError(f"expected a stage among {', '.join(STAGES)}, got {stage!r}")
    if part not in ("selection", "holdout"):
        raise SecateurError(f"expected the part selection or holdout, got {part!r}")
    if part == "holdout" and stage != "model":
        raise SecateurError(
            f"expected the part holdout with the stage model, got {stage!r}, which runs no tokens"
        )
    expression = read_metric(metric)
    look_up(ALLOCATIONS, allocation, "an allocation")
    settings = SearchSettings.read(
        {"calibration": calibration, "sparsity": sparsity, "pattern": pattern, "group": group,
         "allocation": None if allocation == "uniform" else allocation,
         "model": model, "device": device, "dtype": dtype, "threads": threads}
    )  # fmt: skip
    if not isinstance(settings.sparsity, float):
        raise SecateurError(f"expected one sparsity, got the interval {settings.sparsity}; search over it")
    evaluator = LocalEvaluator(
        Calibration(calibration), pattern=pattern, device=Device(device, dtype, threads), model=model,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    try:
        dense = Dense(evaluator.layers, evaluator.summarise, expression)
        ratios = ALLOCATIONS[allocation].ratios(dense, settings.sparsity)
        candidate = Candidate(expression, ratios, group)
        (found,) = evaluator.measure([candidate], stage, part)  # type: ignore[arg-type]
    finally:
        evaluator.close()
    if found.failure:
        raise SecateurError(f"the metric cannot be measured: {found.failure}")
    return {"metric": str(expression), "key": candidate.key, "group": group, "pattern": pattern,
            "allocation": allocation, "stage": stage, "part": part, **found.values,
            "seconds": found.seconds}  # fmt: skip
