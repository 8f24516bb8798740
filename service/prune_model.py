"""Pruning a model by one rule into a folder, and evaluating what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..metrics_dsl.errors import SecateurError
from ..metrics_dsl.order import GROUPS
from ..results.archive.run_folder import RunFolder
from ..results.export.rule_source import Rule, RuleError, ratios_of, read_ratios, read_rule
from ..search.core import defaults
from ..search.core.candidate import Candidate, parse_pattern
from ..search.core.objectives import look_up
from ..search.core.requests import request_of, takes
from ..search.core.versions import library_versions
from ..search.settings import SearchSettings
from ..search.spaces.allocation import ALLOCATIONS, Dense
from ..workers.calibrate.calibration import CalibrationRequest, how_loaded, load_decoder, whole_because
from ..workers.calibrate.folder import Calibration, token_hash
from ..workers.calibrate.text import check_source, draw_sequences
from ..workers.model.decoder import Decoder
from ..workers.model.load import choose_dtype, model_reference, processor_files, stored_dtype
from ..workers.prune import evaluation
from ..workers.prune.checkpoint import Checkpoint, check_new
from ..workers.prune.evaluation import EvaluationRequest
from ..workers.prune.pruning import STATISTICS, PrunedLayer, Pruner
from ..workers.prune.repair import REPAIRS


@dataclass(frozen=True)
class PruneRequest:
    """Which model to prune, by which rule, measured on what.

    Attributes:
        model: Hub name, folder or ``.gguf`` file.
        candidate: A metric, the name of a published one, ``FILE.json`` or ``RUN:KEY``.
        sparsity: Fraction of weights to remove, in [0, 1); 0.5, or what the pattern says, if left out.
        ratios: A published allocation or ``FILE.json`` with a ratio for each layer; uniform if left out.
        group: ``row`` or ``layer``; the candidate's own, or ``row``, if left out.
        pattern: ``unstructured`` or ``N:M``; the candidate's own, or ``unstructured``, if left out.
        text: ``self``, a file or ``hub:NAME``, as for ``draw_sequences``.
        tokens: Tokens of statistics, rounded up to whole sequences.
        sequence_length: Tokens per sequence.
        statistics: ``one-shot``, of the dense model, or ``sequential``, behind pruned blocks.
        repair: A name of ``REPAIRS``.
        seed: Seed of sampling and order.
        dtype: ``float32`` or ``bfloat16``, to compute in and to write; if left out, 32 bits and what the
            model's own files have.
        device: ``auto``, ``cpu``, ``cuda``.
        trust_remote_code: Allow code that comes with the model.
    """

    model: str
    candidate: str = "wanda"
    sparsity: float | None = None
    ratios: str | None = None
    group: str | None = None
    pattern: str | None = None
    text: str = "self"
    tokens: int = defaults.TOKENS
    sequence_length: int = defaults.SEQUENCE_LENGTH
    statistics: str = "one-shot"
    repair: str = "none"
    seed: int = defaults.SEED
    dtype: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        look_up(dict.fromkeys(STATISTICS), self.statistics, "statistics")
        look_up(REPAIRS, self.repair, "a repair")
        counts = parse_pattern(self.pattern or "unstructured")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise SecateurError(f"expected a sparsity in [0, 1), got {self.sparsity:g}")
        if counts and self.sparsity not in (None, counts[0] / counts[1]):
            raise SecateurError(
                f"expected the sparsity {counts[0] / counts[1]:g}, which the pattern {self.pattern} has, got "
                f"{self.sparsity:g}; leave it out"
            )
        if counts and self.ratios not in (None, "uniform"):
            raise SecateurError(
                f"expected uniform ratios for the pattern {self.pattern}, which fixes them, got {self.ratios}"
            )
        if self.group not in (None, *GROUPS):
            raise SecateurError(f"expected the group row or layer, got {self.group!r}")
        if self.ratios is not None and not self.has_ratio_file:
            look_up(ALLOCATIONS, self.ratios, "an allocation")
            if self.ratios == "atp":
                raise SecateurError(
                    "expected an allocation without a number to choose, got 'atp'; search it with --space "
                    "ramp and give RUN:KEY as the candidate"
                )
        if self.has_ratio_file and self.sparsity is not None:
            raise SecateurError(f"expected no sparsity beside {self.ratios}, which has ratios of its own")

    @property
    def has_ratio_file(self) -> bool:
        """Whether ratios are read from a file."""
        return self.ratios is not None and self.ratios.endswith(".json")


@takes(PruneRequest)
def prune(
    model: str | PruneRequest,
    out: str | Path,
    report: Callable[[str], None] = lambda _text: None,
    **options: Any,
) -> dict[str, Any]:
    """Prune a model into a folder that transformers loads; return what its ``secateur.json`` says.

    Args:
        model: Hub name, folder or ``.gguf`` file; or all options, as ``PruneRequest``.
        out: The folder to write, which must be new or empty.
        report: Called with a sentence on each step.
        options: What else a ``PruneRequest`` has, by name.

    Raises:
        SecateurError: When request, rule, model, text or folder do not fit; nothing is written.
        OSError: When the disk is full or fails; nothing is left behind.
    """
    request = request_of(PruneRequest, model, options)
    check_new(out)
    rule = _read(request)
    own = read_ratios(Path(str(request.ratios)).expanduser()) if request.has_ratio_file else None
    check_source(request.text)
    loading = CalibrationRequest(
        request.model, request.text, request.tokens, sequence_length=request.sequence_length,
        seed=request.seed, dtype=request.dtype or "float32", device=request.device,
        trust_remote_code=request.trust_remote_code,
    )  # fmt: skip
    count = loading.sequences()["statistics"]
    why = whole_because(loading)
    decoder, tokenizer = load_decoder(loading, by_block=not why)
    report(how_loaded(decoder, why))
    stored = (
        None if request.dtype else stored_dtype(request.model, trust_remote_code=request.trust_remote_code)
    )
    ratios = None
    if rule.ratios is not None:
        ratios = ratios_of(rule, decoder.layers, rule.source)
    elif own is not None:
        ratios = ratios_of(own, decoder.layers, str(request.ratios))
    _check_run(rule, decoder)
    words = "writing" if request.text == "self" else "reading"
    report(f"{words} {count} sequences of {request.sequence_length} tokens")
    ids = draw_sequences(request.text, decoder.model, tokenizer, count, request.sequence_length, request.seed)
    pruner = Pruner(decoder, ids)
    if ratios is None:
        name = request.ratios or "uniform"
        dense = Dense(decoder.layers, pruner.summarise, rule.metric)
        ratios = ALLOCATIONS[name].ratios(dense, _sparsity(request, rule))
    candidate = Candidate(rule.metric, ratios, rule.group or "row")
    pattern = rule.pattern or "unstructured"
    blocks = len(decoder.blocks)

    with Checkpoint(out, decoder, pattern, stored) as checkpoint:

        def keep(block: int, layers: list[PrunedLayer]) -> list[PrunedLayer]:
            kept, done = checkpoint.add(block, layers), block + 1
            if done % max(1, blocks // 8) == 0 or done == blocks:
                report(f"pruned {done} of {blocks} blocks")
            return kept

        layers = pruner.prune(
            candidate, pattern=pattern, statistics=request.statistics, repair=request.repair, keep=keep
        )
        report(f"writing {out}")
        written = str(stored or choose_dtype(str(request.dtype))).removeprefix("torch.")
        biased = sum(p.shifted for p in layers)
        record = {
            "format": "secateur.pruned", "version": 1,
            "metric": str(rule.metric), "group": candidate.group, "pattern": pattern, "key": candidate.key,
            "candidate": rule.source if rule.ratios is not None else request.candidate,
            "ratios": rule.source if rule.ratios is not None else request.ratios or "uniform",
            "statistics": request.statistics, "repair": request.repair,
            **({"biases_shifted": biased} if request.repair == "bias" else {}),
            "text": {
                "source": model_reference(request.text), "sequences": len(ids),
                "sequence_length": ids.shape[1], "seed": request.seed, "sha256": token_hash(ids),
            },
            "model": {"source": model_reference(request.model), "dtype": written,
                      "weights": decoder.weights.how, "stays_dense": decoder.not_prunable},
            "versions": library_versions("python", "secateur", "torch", "transformers"),
            "layers": [
                {"name": p.layer.name, "block": p.layer.block, "kind": p.layer.kind, "rows": p.layer.rows,
                 "columns": p.layer.columns, "ratio": p.ratio, "zeros": p.zeros,
                 "output_error_of_mask": p.error, "output_error": p.repaired}
                for p in layers
            ],
        }  # fmt: skip
        return checkpoint.finish(
            tokenizer, layers, record, beside=processor_files(request.model),
            trust_remote_code=request.trust_remote_code,
        )  # fmt: skip


def _read(request: PruneRequest) -> Rule:
    """Return the request's rule with its group and pattern complete.

    Raises:
        RuleError: When the request contradicts what the rule has of its own.
    """
    rule = read_rule(request.candidate)
    if rule.ratios is not None:
        extra = [name for name in ("sparsity", "ratios") if getattr(request, name) is not None]
        if extra:
            raise RuleError(
                f"expected no {extra[0]} beside the candidate {rule.source}, which has ratios of its own; "
                f"leave --{extra[0]} out"
            )
        for name in ("group", "pattern"):
            asked, there = getattr(request, name), getattr(rule, name)
            if asked is not None and asked != there:
                raise RuleError(
                    f"expected the {name} {there}, which the candidate {rule.source} has, got {asked}; leave "
                    f"--{name} out"
                )
    return replace(rule, group=rule.group or request.group or "row", pattern=rule.pattern or request.pattern)


def _sparsity(request: PruneRequest, rule: Rule) -> float:
    counts = parse_pattern(rule.pattern or "unstructured")
    if counts:
        return counts[0] / counts[1]
    return defaults.SPARSITY if request.sparsity is None else float(request.sparsity)


def _check_run(rule: Rule, decoder: Decoder) -> None:
    """Check the layers' names against those of the run's calibration, if it is still there.

    Raises:
        RuleError: When the run was on another model.
    """
    if rule.run is None:
        return
    try:
        known = Calibration(SearchSettings.load(RunFolder(rule.run).settings_file).calibration).layers
    except (SecateurError, OSError):  # moved away, or of another release: the number of layers has to do
        return
    named = [[f"{x.name} ({x.rows}, {x.columns})" for x in layers] for layers in (known, decoder.layers)]
    for there, here in zip_longest(*named, fillvalue="no layer"):
        if there != here:
            raise RuleError(
                f"expected the model that {rule.run} was run on, or one with the same layers, got another: "
                f"{there} there, {here} here"
            )


@takes(EvaluationRequest)
def evaluate(
    model: str | EvaluationRequest, report: Callable[[str], None] = lambda _text: None, **options: Any
) -> dict[str, Any]:
    """Return a model's perplexity, KL to the dense model and results of tasks, with all they depend on.

    Args:
        model: Folder, hub name or ``.gguf`` file; or all options, as ``EvaluationRequest``.
        report: Called with a sentence on each step.
        options: What else an ``EvaluationRequest`` has, by name.

    Raises:
        EvaluationError: When it cannot be made.
        ModelError: When a model cannot be loaded.
        TextError: When the text cannot be read or is too short.
    """
    return evaluation.evaluate(request_of(EvaluationRequest, model, options), report)
