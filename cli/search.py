"""Commands that measure: calibration, single metrics, searches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..metrics_dsl.errors import SecateurError
from ..search.core import defaults
from ..search.searchers.table import AUTO, batches_help, searchers_help
from .options import (
    CONFIG,
    CPUS_PER_WORKER,
    DEVICE,
    DIR,
    DTYPE,
    GPUS_PER_WORKER,
    GROUP,
    JSON,
    MODEL,
    PATTERN,
    RAY,
    RUN,
    SHARDS,
    SPARSITY,
    THREADS,
    TIMEOUT,
    WORKERS,
    app,
    note,
    print_comparison,
    print_json,
    print_report,
    read_cluster,
)  # fmt: skip


@app.command(epilog="Example: secateur calibrate HuggingFaceTB/SmolLM2-135M --text wiki.txt --out cal")
def calibrate(
    model: Annotated[str, typer.Argument(help="Hub name, folder or .gguf file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The calibration folder to write.", show_default=False)],
    text: Annotated[
        str, typer.Option(help="self, a .txt, .jsonl(.gz) or .parquet file, or hub:NAME.")
    ] = "self",
    tokens: Annotated[int, typer.Option(help="Tokens of statistics.")] = defaults.TOKENS,
    selection_tokens: Annotated[
        int, typer.Option(help="Tokens that candidates are measured on.")
    ] = defaults.SELECTION_TOKENS,
    holdout_tokens: Annotated[
        int, typer.Option(help="Tokens for final figures only.")
    ] = defaults.HOLDOUT_TOKENS,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence.")] = defaults.SEQUENCE_LENGTH,
    seed: Annotated[int, typer.Option(help="Seed of sampling and order.")] = defaults.SEED,
    gradients: Annotated[bool, typer.Option(help="Compute the leaf G (a backward pass).")] = True,
    dtype: Annotated[str, DTYPE] = "float32",
    device: Annotated[str, DEVICE] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    config: Annotated[Path | None, CONFIG] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Measure a dense model on text once, for all searches to come."""
    from ..workers.calibrate.calibration import CalibrationRequest
    from ..workers.calibrate.calibration import calibrate as run_calibration

    request = CalibrationRequest(
        model, text, tokens, selection_tokens, holdout_tokens, sequence_length, seed, gradients,
        dtype, device, trust_remote_code,
    )  # fmt: skip
    calibration = run_calibration(request, out, note)
    parts = calibration.manifest["parts"]
    inputs, as_tokens = calibration.inputs
    if as_json:
        print_json({"calibration": str(out), "layers": len(calibration.layers), "inputs": inputs,
                    "kept_as_tokens": as_tokens, "parts": parts})  # fmt: skip
        return
    weights = sum(layer.size for layer in calibration.layers)
    blocks = len({layer.block for layer in calibration.layers})
    dense = calibration.manifest["model"]["stays_dense"]
    typer.echo(f"{out}: {len(calibration.layers)} linear layers in {blocks} blocks, {weights:,} weights")
    for name, part in parts.items():
        typer.echo(f"  {name}: {part['sequences']} x {part['length']} tokens, sha256 {part['sha256'][:12]}")
    if as_tokens:
        typer.echo(f"  {as_tokens} of {inputs} inputs are kept as tokens, which are fewer than their columns")
    if dense:
        typer.echo(
            f"  not linear layers of their own, stay dense: {', '.join(dense[:3])} ({len(dense)} in all)"
        )


@app.command(epilog='Example: secateur measure cal "abs(W) * X" --sparsity 0.6 --stage model')
def measure(
    folder: Annotated[Path, DIR],
    metric: Annotated[
        str, typer.Argument(help="A metric, or the name of a published one.", show_default=False)
    ],
    sparsity: Annotated[float | None, SPARSITY] = None,
    stage: Annotated[str, typer.Option(help="screen, layer or model.")] = "model",
    part: Annotated[str, typer.Option(help="Tokens of the model stage: selection or holdout.")] = "selection",
    pattern: Annotated[str, PATTERN] = "unstructured",
    group: Annotated[str, GROUP] = "row",
    allocation: Annotated[str, typer.Option(help="How the ratios differ, as a paper has it.")] = "uniform",
    model: Annotated[str | None, MODEL] = None,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "float32",
    threads: Annotated[int, THREADS] = defaults.THREADS,
    config: Annotated[Path | None, CONFIG] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Measure one metric."""
    from ..metrics_dsl.published import read_metric
    from ..search.core.candidate import STAGES, Candidate
    from ..search.settings import SearchSettings
    from ..search.spaces.allocation import ALLOCATIONS, Dense

    if stage not in STAGES:
        raise SecateurError(f"expected a stage among {', '.join(STAGES)}, got {stage!r}")
    if part not in ("selection", "holdout"):
        raise SecateurError(f"expected the part selection or holdout, got {part!r}")
    if part == "holdout" and stage != "model":
        raise SecateurError(
            f"expected the part holdout with the stage model, got {stage!r}, which runs no tokens"
        )
    expression = read_metric(metric)
    settings = SearchSettings.read(
        {"calibration": folder, "sparsity": sparsity, "pattern": pattern, "group": group,
         "allocation": None if allocation == "uniform" else allocation,
         "model": model, "device": device, "dtype": dtype, "threads": threads}
    )  # fmt: skip
    from ..workers.calibrate.folder import Calibration
    from ..workers.measure.local_evaluator import LocalEvaluator
    from ..workers.measure.worker import Device

    evaluator = LocalEvaluator(
        Calibration(folder), pattern=pattern, device=Device(device, dtype, threads), model=model
    )
    assert isinstance(settings.sparsity, float)
    dense = Dense(evaluator.layers, evaluator.summarise, expression)
    (ratios,) = ALLOCATIONS[allocation].variants(dense, settings.sparsity).values()
    candidate = Candidate(expression, ratios, group)
    (found,) = evaluator.measure([candidate], stage, part)  # type: ignore[arg-type]
    evaluator.close()
    if found.failure:
        raise SecateurError(f"the metric cannot be measured: {found.failure}")
    result = {"metric": str(expression), "key": candidate.key, "group": group, "pattern": pattern,
              "allocation": allocation, "stage": stage, "part": part, **found.values,
              "seconds": found.seconds}  # fmt: skip
    if as_json:
        print_json(result)
    else:
        for name, value in result.items():
            typer.echo(f"{name:12} {value:.6g}" if isinstance(value, float) else f"{name:12} {value}")


@app.command(
    epilog="Example: secateur search cal --sparsity 0.6 --objectives kl,size --budget 200 --out runs/a"
)
def search(
    calibration: Annotated[Path, DIR],
    out: Annotated[Path, typer.Option(help="The run folder to write.", show_default=False)],
    searcher: Annotated[str, typer.Option(help=searchers_help())] = AUTO,
    space: Annotated[
        str,
        typer.Option(
            help="Metrics: tree or meta. Ratios: curve, block, layer, feature, ramp, owl, dlp, dsa or alpha. "
            "Both: tree+curve."
        ),
    ] = "tree",
    metric: Annotated[
        str | None, typer.Option(help="The metric whose ratios are searched; wanda if left out.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="The published ratios whose metric is searched; uniform if left out.")
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Fraction of weights to remove, or an interval such as 0.3:0.75.")
    ] = None,
    pattern: Annotated[str, PATTERN] = "unstructured",
    group: Annotated[str, GROUP] = "row",
    objectives: Annotated[
        str | None, typer.Option(help="What to minimise, such as kl,size; chosen if left out.")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Candidates (400), tokens (2Mtokens) or seconds of measuring (1800s).")
    ] = str(defaults.BUDGET),
    seed: Annotated[int, typer.Option(help="Seed of the searcher.")] = defaults.SEED,
    seeds: Annotated[int, typer.Option(help="Runs with seeds from --seed on, in folders of their own.")] = 1,
    batch: Annotated[int | None, typer.Option(help=batches_help())] = None,
    promote: Annotated[
        float, typer.Option(help="Share of a batch that passes the screen, and each rung.")
    ] = defaults.PROMOTE,
    rungs: Annotated[
        str | None,
        typer.Option(help="Tokens to race on before all, such as 256,1024, or none; chosen if left out."),
    ] = None,
    sensitivity: Annotated[
        int | None,
        typer.Option(help="Tokens on which a batch's best tells how KL changes with each ratio; 0: none."),
    ] = None,
    phase: Annotated[
        int, typer.Option(help="Vary metrics and ratios in turn for so many batches; 0: both.")
    ] = 0,
    stage: Annotated[str, typer.Option(help="The stage that decides: screen, layer or model.")] = "model",
    seeding: Annotated[bool, typer.Option(help="Start the searcher from published rules.")] = True,
    max_size: Annotated[int, typer.Option(help="Most nodes of a metric.")] = defaults.MAX_SIZE,
    reuse: Annotated[bool, typer.Option(help="Keep hidden states for candidates that begin alike.")] = True,
    model: Annotated[str | None, MODEL] = None,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "float32",
    threads: Annotated[int, THREADS] = defaults.THREADS,
    ray: Annotated[str | None, RAY] = None,
    workers: Annotated[str, WORKERS] = "auto",
    shards: Annotated[int, SHARDS] = defaults.SHARDS,
    gpus_per_worker: Annotated[float | None, GPUS_PER_WORKER] = None,
    cpus_per_worker: Annotated[float, CPUS_PER_WORKER] = defaults.CPUS_PER_WORKER,
    timeout: Annotated[float, TIMEOUT] = defaults.TIMEOUT,
    config: Annotated[Path | None, CONFIG] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Search pruning metrics, layerwise ratios or both on a calibrated model."""
    from ..search.settings import SearchSettings

    given = dict(locals())
    settings = SearchSettings.read({name: given[name] for name in SearchSettings.model_fields})
    cluster = read_cluster(ray, given)
    from ..service import search_run

    where = f" --ray {ray}" if ray else ""
    if seeds == 1:
        _run(lambda listener: search_run.run_search(settings, out, listener, cluster), out, as_json, where)
    else:
        _run(
            lambda listener: search_run.run_seeds(settings, out, seeds, listener, cluster),
            out,
            as_json,
            where,
        )


@app.command(epilog="Example: secateur resume runs/a")
def resume(
    run: Annotated[Path, RUN],
    ray: Annotated[str | None, RAY] = None,
    workers: Annotated[str, WORKERS] = "auto",
    shards: Annotated[int, SHARDS] = defaults.SHARDS,
    gpus_per_worker: Annotated[float | None, GPUS_PER_WORKER] = None,
    cpus_per_worker: Annotated[float, CPUS_PER_WORKER] = defaults.CPUS_PER_WORKER,
    timeout: Annotated[float, TIMEOUT] = defaults.TIMEOUT,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Continue a run that was interrupted, wherever it was measured before."""
    cluster = read_cluster(ray, locals())
    from ..service import search_run

    where = f" --ray {ray}" if ray else ""
    _run(lambda listener: search_run.resume(run, listener, cluster), run, as_json, where)


# Running ---------------------------------------------------------------------------------------


def _run(start: Callable[[Any], Any], out: Path, as_json: bool, where: str = "") -> None:
    from ..results.terminal.progress import Progress
    from ..search.core.budget import Budget
    from ..service.search_run import Listener

    progress = Progress(note)
    listener = Listener(progress.line, progress.step, progress.batch)
    listener.begin = lambda settings: progress.begin(Budget.parse(settings.budget))
    try:
        archive = start(listener)
    except KeyboardInterrupt:
        progress.stop()
        begun = [
            path.parent for path in (out / "run.toml", *sorted(out.glob("seed-*/run.toml"))) if path.is_file()
        ]
        if begun and begun[-1] == out:
            note(f"interrupted; what was measured is kept, continue with: secateur resume {out}{where}")
        elif begun:
            note(f"interrupted; what was measured is kept, resume all seeds: secateur resume {out}{where}")
        else:
            note("interrupted before anything was measured")
        raise typer.Exit(130) from None
    finally:
        progress.stop()
    if isinstance(archive, list):
        print_comparison(archive, as_json)
        return
    with archive:
        print_report(archive, None, as_json)
