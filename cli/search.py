"""Commands that measure: calibration, single metrics, searches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..search.core import defaults
from ..search.searchers.table import AUTO, batches_help, searchers_help
from .options import (
    CODE,
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
    PLUGINS,
    RAY,
    RUN,
    SEED,
    SEQUENCE_LENGTH,
    SHARDS,
    SPARSITY,
    TEXT,
    THREADS,
    TIMEOUT,
    TOKENS,
    WORKERS,
    command,
    how_to_prune,
    next_step,
    print_comparison,
    print_json,
    print_run,
    read_cluster,
    rule_of,
    spelled,
    unused,
)  # fmt: skip
from .sections import HOW, PREPARE, SEARCH, SEARCHED, USUAL
from .terminal import interrupted, report_step, show

if TYPE_CHECKING:
    from ..service.run import Run
    from ..service.runs import Runs
    from ..service.search_run import Listener


@command(PREPARE, example="secateur calibrate HuggingFaceTB/SmolLM2-135M --text wiki.txt --out cal")
def calibrate(
    model: Annotated[str, typer.Argument(help="Hub name, folder or .gguf file.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The calibration folder to write.", show_default=False, rich_help_panel=USUAL
        ),
    ],
    text: Annotated[str, TEXT] = "self",
    tokens: Annotated[int, TOKENS] = defaults.TOKENS,
    selection_tokens: Annotated[
        int, typer.Option(help="Tokens that candidates are measured on.", rich_help_panel=USUAL)
    ] = defaults.SELECTION_TOKENS,
    holdout_tokens: Annotated[
        int, typer.Option(help="Tokens for final figures only.", rich_help_panel=USUAL)
    ] = defaults.HOLDOUT_TOKENS,
    sequence_length: Annotated[int, SEQUENCE_LENGTH] = defaults.SEQUENCE_LENGTH,
    seed: Annotated[int, SEED] = defaults.SEED,
    gradients: Annotated[
        bool, typer.Option(help="Compute the leaf G (a backward pass).", rich_help_panel=HOW)
    ] = True,
    dtype: Annotated[str, DTYPE] = "float32",
    device: Annotated[str, DEVICE] = "auto",
    trust_remote_code: Annotated[bool, CODE] = False,
    config: Annotated[Path | None, CONFIG] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Measure a dense model on text, once for all searches."""
    from ..service.measure_rule import calibrate as run

    calibration = run(
        model, out, report_step, text=text, tokens=tokens, selection_tokens=selection_tokens,
        holdout_tokens=holdout_tokens, sequence_length=sequence_length, seed=seed, gradients=gradients,
        dtype=dtype, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    parts = calibration.manifest["parts"]
    inputs, as_tokens = calibration.inputs
    covered = calibration.coverage
    assert covered is not None  # only older releases wrote none
    if as_json:
        print_json({"calibration": str(out), "layers": len(calibration.layers), "inputs": inputs,
                    "kept_as_tokens": as_tokens, "parts": parts, **covered.record()})  # fmt: skip
        return
    weights = sum(layer.size for layer in calibration.layers)
    blocks = len({layer.block for layer in calibration.layers})
    show(f"{out}: {len(calibration.layers)} linear layers in {blocks} blocks, {weights:,} weights")
    for name, part in parts.items():
        show(f"  {name}: {part['sequences']} x {part['length']} tokens, sha256 {part['sha256'][:12]}")
    if as_tokens:
        show(f"  {as_tokens} of {inputs} inputs are kept as tokens, which are fewer than their columns")
    show(f"  sparsity is counted over {covered.in_words}")
    for kind, why in covered.reasons().items():
        show(f"    {kind} {why}")
    more = _allowing(trust_remote_code)
    next_step("search", out, "--sparsity", 0.6, "--out", unused(Path("runs/a")), *more)


def _allowing(code: bool) -> tuple[str, ...]:
    """Return the words that a next command needs, where code comes with the model."""
    return ("--trust-remote-code",) if code else ()


@command(SEARCH, example='secateur measure cal "abs(W) * X" --sparsity 0.6 --stage model')
def measure(
    calibration: Annotated[Path, DIR],
    metric: Annotated[
        str, typer.Argument(help="A metric, or the name of a published one.", show_default=False)
    ],
    sparsity: Annotated[float | None, SPARSITY] = None,
    stage: Annotated[str, typer.Option(help="screen, layer or model.", rich_help_panel=HOW)] = "model",
    part: Annotated[
        str, typer.Option(help="Tokens of the model stage: selection or holdout.", rich_help_panel=HOW)
    ] = "selection",
    pattern: Annotated[str, PATTERN] = "unstructured",
    group: Annotated[str, GROUP] = "row",
    allocation: Annotated[
        str, typer.Option(help="How the ratios differ, as a paper has it.", rich_help_panel=SEARCHED)
    ] = "uniform",
    model: Annotated[str | None, MODEL] = None,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "float32",
    threads: Annotated[int, THREADS] = defaults.THREADS,
    trust_remote_code: Annotated[bool, CODE] = False,
    config: Annotated[Path | None, CONFIG] = None,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Measure one metric."""
    from ..service.measure_rule import measure as run

    result = run(
        calibration, metric, sparsity=sparsity, stage=stage, part=part, pattern=pattern, group=group,
        allocation=allocation, model=model, device=device, dtype=dtype, threads=threads,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        show(f"{name:12} {value:.6g}" if isinstance(value, float) else f"{name:12} {value}")
    share = sparsity if sparsity is not None else f"{result['sparsity']:.2g}"
    more = _allowing(trust_remote_code)
    next_step("search", calibration, "--sparsity", share, "--out", unused(Path("runs/a")), *more)


@command(SEARCH, example="secateur search cal --sparsity 0.6 --objectives kl,size --budget 200 --out runs/a")
def search(
    calibration: Annotated[Path, DIR],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The run folder to write.", show_default=False, rich_help_panel=USUAL
        ),
    ],
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Fraction of weights to remove, or an interval such as 0.3:0.75.", rich_help_panel=USUAL
        ),
    ] = None,
    space: Annotated[
        str,
        typer.Option(
            help="Metrics: tree or meta. Ratios: curve, block, layer, feature, ramp, owl, dlp, dsa or alpha. "
            "Both: tree+curve.",
            rich_help_panel=USUAL,
        ),
    ] = "tree",
    searcher: Annotated[str, typer.Option(help=searchers_help(), rich_help_panel=USUAL)] = AUTO,
    objectives: Annotated[
        str | None,
        typer.Option(help="What to minimise, such as kl,size; chosen if left out.", rich_help_panel=USUAL),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="Candidates (400), tokens (2Mtokens) or seconds of measuring (1800s).",
            rich_help_panel=USUAL,
        ),
    ] = str(defaults.BUDGET),
    metric: Annotated[
        str | None,
        typer.Option(
            help="The metric whose ratios are searched; wanda if left out.", rich_help_panel=SEARCHED
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="The published ratios whose metric is searched; uniform if left out.",
            rich_help_panel=SEARCHED,
        ),
    ] = None,
    pattern: Annotated[str, PATTERN] = "unstructured",
    group: Annotated[str, GROUP] = "row",
    max_size: Annotated[
        int, typer.Option(help="Most nodes of a metric.", rich_help_panel=SEARCHED)
    ] = defaults.MAX_SIZE,
    operators: Annotated[
        str | None,
        typer.Option(help="What metrics may be made of, such as add,mul,sqrt.", rich_help_panel=SEARCHED),
    ] = None,
    leaves: Annotated[
        str | None, typer.Option(help="The leaves they may use, such as W,X.", rich_help_panel=SEARCHED)
    ] = None,
    start_from: Annotated[
        list[str] | None,
        typer.Option(
            help="A metric, FILE.json, RUN:KEY or a run whose front to begin with; may be repeated.",
            rich_help_panel=SEARCHED,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the searcher.", rich_help_panel=HOW)] = defaults.SEED,
    seeds: Annotated[
        int,
        typer.Option(help="Runs with seeds from --seed on, in folders of their own.", rich_help_panel=HOW),
    ] = 1,
    batch: Annotated[int | None, typer.Option(help=batches_help(), rich_help_panel=HOW)] = None,
    promote: Annotated[
        float,
        typer.Option(help="Share of a batch that passes the screen, and each rung.", rich_help_panel=HOW),
    ] = defaults.PROMOTE,
    rungs: Annotated[
        str | None,
        typer.Option(
            help="Tokens to race on before all, such as 256,1024, or none; chosen if left out.",
            rich_help_panel=HOW,
        ),
    ] = None,
    sensitivity: Annotated[
        int | None,
        typer.Option(
            help="Tokens on which a batch's best tells how KL changes with each ratio; 0: none.",
            rich_help_panel=HOW,
        ),
    ] = None,
    phase: Annotated[
        int,
        typer.Option(
            help="Vary metrics and ratios in turn for so many batches; 0: both.", rich_help_panel=HOW
        ),
    ] = 0,
    stage: Annotated[
        str, typer.Option(help="The stage that decides: screen, layer or model.", rich_help_panel=HOW)
    ] = "model",
    seeding: Annotated[
        bool, typer.Option(help="Start the searcher from published rules.", rich_help_panel=HOW)
    ] = True,
    reuse: Annotated[
        bool,
        typer.Option(help="Keep hidden states for candidates that begin alike.", rich_help_panel=HOW),
    ] = True,
    model: Annotated[str | None, MODEL] = None,
    device: Annotated[str, DEVICE] = "auto",
    dtype: Annotated[str, DTYPE] = "float32",
    threads: Annotated[int, THREADS] = defaults.THREADS,
    trust_remote_code: Annotated[bool, CODE] = False,
    ray: Annotated[str | None, RAY] = None,
    workers: Annotated[str, WORKERS] = "auto",
    shards: Annotated[int, SHARDS] = defaults.SHARDS,
    gpus_per_worker: Annotated[float | None, GPUS_PER_WORKER] = None,
    cpus_per_worker: Annotated[float, CPUS_PER_WORKER] = defaults.CPUS_PER_WORKER,
    timeout: Annotated[float, TIMEOUT] = defaults.TIMEOUT,
    config: Annotated[Path | None, CONFIG] = None,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Search pruning metrics, layerwise ratios or both.

    It measures on a calibrated model. A run that was interrupted goes on when it is started again.
    """
    from ..search.settings import SearchSettings
    from ..service.run import run_search
    from ..service.runs import run_seeds

    settings = SearchSettings.read({
        "calibration": calibration, "searcher": searcher, "space": space, "metric": metric,
        "allocation": allocation, "sparsity": sparsity, "pattern": pattern, "group": group,
        "objectives": objectives, "budget": budget, "seed": seed, "batch": batch, "promote": promote,
        "rungs": rungs, "sensitivity": sensitivity, "phase": phase, "stage": stage, "seeding": seeding,
        "max_size": max_size, "operators": operators, "leaves": leaves, "start_from": start_from or None,
        "plugins": plugins or None, "reuse": reuse, "model": model, "device": device, "dtype": dtype,
        "threads": threads,
    })  # fmt: skip
    cluster = read_cluster(ray, {
        "workers": workers, "shards": shards, "gpus_per_worker": gpus_per_worker,
        "cpus_per_worker": cpus_per_worker, "timeout": timeout,
    })  # fmt: skip
    where = (*(("--ray", ray) if ray else ()), *_allowing(trust_remote_code))
    code = trust_remote_code

    def start(listener: Listener) -> Run | Runs:
        if seeds == 1:
            return run_search(settings, out, listener, cluster, trust_remote_code=code)
        return run_seeds(settings, out, seeds, listener, cluster, trust_remote_code=code)

    _follow(start, out, as_json, where)


@command(SEARCH, example="secateur resume runs/a --budget 400")
def resume(
    run: Annotated[Path, RUN],
    budget: Annotated[
        str | None,
        typer.Option(
            help="How long the whole run is to be, finished or not; as it was begun if left out.",
            rich_help_panel=USUAL,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Where the calibration folder is now, if it was moved.", rich_help_panel=USUAL),
    ] = None,
    model: Annotated[str | None, MODEL] = None,
    trust_remote_code: Annotated[bool, CODE] = False,
    ray: Annotated[str | None, RAY] = None,
    workers: Annotated[str, WORKERS] = "auto",
    shards: Annotated[int, SHARDS] = defaults.SHARDS,
    gpus_per_worker: Annotated[float | None, GPUS_PER_WORKER] = None,
    cpus_per_worker: Annotated[float, CPUS_PER_WORKER] = defaults.CPUS_PER_WORKER,
    timeout: Annotated[float, TIMEOUT] = defaults.TIMEOUT,
    plugins: Annotated[list[Path] | None, PLUGINS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Continue a run that was interrupted, or make it longer.

    Nothing is measured twice, and workers may be others than before.
    """
    from ..service.runs import resume as go_on

    cluster = read_cluster(ray, {
        "workers": workers, "shards": shards, "gpus_per_worker": gpus_per_worker,
        "cpus_per_worker": cpus_per_worker, "timeout": timeout,
    })  # fmt: skip
    where = (*(("--ray", ray) if ray else ()), *_allowing(trust_remote_code))
    changes: dict[str, Any] = {"budget": budget, "calibration": calibration, "model": model,
                               "plugins": plugins or (), "trust_remote_code": trust_remote_code}  # fmt: skip
    _follow(lambda listener: go_on(run, listener, cluster, **changes), run, as_json, where)


# Running ---------------------------------------------------------------------------------------


def _follow(
    start: Callable[[Any], Run | Runs], out: Path, as_json: bool, where: tuple[str, ...] = ()
) -> None:
    """Show how a run goes, and what came of it."""
    from ..results.archive.run_folder import RunFolder
    from ..results.terminal.progress import Progress
    from ..search.core.budget import Budget
    from ..service.run import Run
    from ..service.search_run import Listener

    progress = Progress(report_step)
    listener = Listener(progress.report, progress.step, progress.batch)
    listener.begin = lambda settings: progress.begin(Budget.parse(settings.budget))
    try:
        found = start(listener)
    except KeyboardInterrupt:
        progress.stop()
        folder = RunFolder(out)
        if not (folder.is_run or folder.seeds):
            raise typer.Exit(interrupted("interrupted before anything was measured")) from None
        how = "resume all seeds" if folder.seeds else "continue with"
        kept = f"interrupted; what was measured is kept, {how}: {spelled('resume', out, *where)}"
        raise typer.Exit(interrupted(kept)) from None
    finally:
        progress.stop()
    if isinstance(found, Run):
        print_run(found, None, as_json)
        if not as_json:
            next_step("report", out, "-o", Path(f"{out.name}.html"))
            next_step("prune", *how_to_prune(out), "--candidate", f"{out}:{rule_of(out)}")
        return
    print_comparison(found, as_json)
    if not as_json:
        next_step("front", found.runs[0].folder)
