"""Pruning a model by one rule into a folder, and evaluating what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from ..search.core.files import tell_left_behind
from ..search.core.objectives import look_up
from ..search.core.reading import Given
from ..search.core.requests import check_device, check_dtype, request_of, takes
from ..search.core.versions import library_versions
from ..search.settings import SearchSettings
from ..search.spaces.allocation import ALLOCATIONS, Dense
from ..workers.calibrate.calibration import CalibrationRequest, how_loaded, load_decoder, whole_because
from ..workers.calibrate.folder import Calibration, token_hash
from ..workers.model.decoder import Decoder
from ..workers.model.load import choose_dtype, model_reference, processor_files, stored_dtype
from ..workers.prune import evaluation
from ..workers.prune.checkpoint import Checkpoint, check_new
from ..workers.prune.evaluation import EvaluationRequest
from ..workers.prune.pruning import STATISTICS, PrunedLayer, Pruner
from ..workers.prune.repair import REPAIRS
from ..workers.prune.tokens import PruningTokens
from .run_claim import calibrated_on

_FEW = 0.02  # of the weights: ratios are rounded, and a few weights are zeros in any model


@dataclass(frozen=True)
class PruneRequest:
    """Which model to prune, by which rule, measured on what.

    Attributes:
        model: Hub name, folder or ``.gguf`` file.
        candidate: A metric, the name of a published one, ``FILE.json`` or ``RUN:KEY``.
        sparsity: Fraction of weights to remove, in [0, 1): takes the candidate's metric alone, with its group
            and pattern. The candidate's own ratios if left out; without any 0.5, or what the pattern says.
        ratios: A published allocation or ``FILE.json`` with a ratio for each layer, which takes the metric
            alone too; the candidate's own, or uniform, if left out.
        group: ``row`` or ``layer``; the candidate's own, or ``row``, if left out.
        pattern: ``unstructured`` or ``N:M``; the candidate's own, or ``unstructured``, if left out.
        text: ``self``, a file or ``hub:NAME``, as for ``draw_sequences``; if left out, what the candidate's
            run was calibrated on, or ``self`` for one of no run. So are the next two and the seed.
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
    text: str | None = None
    tokens: int | None = None
    sequence_length: int | None = None
    statistics: str = "one-shot"
    repair: str = "none"
    seed: int | None = None
    dtype: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        look_up(dict.fromkeys(STATISTICS), self.statistics, "statistics")
        look_up(REPAIRS, self.repair, "a repair")
        check_device(self.device)
        if self.dtype is not None:
            check_dtype(self.dtype)
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
    tell_left_behind(out, report)
    rule = _read(request)
    own = read_ratios(str(request.ratios)) if request.has_ratio_file else None
    tokens = _tokens(request, rule)
    loading = CalibrationRequest(
        request.model, "self" if tokens.is_written else "text", sequence_length=tokens.length,
        dtype=request.dtype or "float32", device=request.device, trust_remote_code=request.trust_remote_code,
    )  # fmt: skip
    tokens.check()
    report(f"loading {request.model}")
    why = whole_because(loading)
    decoder, tokenizer = load_decoder(loading, by_block=not why)
    report(how_loaded(decoder, why))
    stored = (
        None if request.dtype else stored_dtype(request.model, trust_remote_code=request.trust_remote_code)
    )
    given, source = (rule, rule.source) if own is None else (own, str(request.ratios))
    named = dict.fromkeys((rule.names or ()) if own is None else own)
    if not named.keys() <= {layer.name for layer in decoder.layers}:
        ratios_of(given, decoder.layers, source)  # says which layer this model lacks
    _check_run(rule, decoder)
    if other := tokens.other_in(decoder):
        report(f"warning: {request.model} has other {other} than when {rule.run} measured it")
    ids = tokens.draw(decoder, tokenizer, report)
    pruner = Pruner(decoder, ids)
    if own is not None or rule.ratios is not None:
        _choose_layers(list(named), rule, decoder, source)
        ratios = ratios_of(given, decoder.layers, source)
    else:
        name = request.ratios or "uniform"
        dense = Dense(decoder.layers, pruner.summarise, rule.metric)
        ratios = ALLOCATIONS[name].ratios(dense, _sparsity(request, rule))
    if warning := decoder.coverage.warning:
        report(warning)
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
        asked, weights = (sum(p.ratio * p.layer.size for p in layers), sum(p.layer.size for p in layers))
        if (zeros := sum(p.zeros for p in layers)) - asked > _FEW * weights:
            report(
                f"warning: {zeros / weights:.2%} of the weights are zeros, where {asked / weights:.2%} was "
                f"asked for: {request.model} had zeros before"
            )
        report(f"writing {out}")
        written = str(stored or choose_dtype(str(request.dtype))).removeprefix("torch.")
        biased = sum(p.shifted for p in layers)
        record = {
            "format": "secateur.pruned", "version": 1,
            "metric": str(rule.metric), "group": candidate.group, "pattern": pattern, "key": candidate.key,
            "candidate": request.candidate if rule.source == "metric" else rule.source,
            "ratios": rule.source if rule.ratios is not None else request.ratios or "uniform",
            "statistics": request.statistics, "repair": request.repair,
            **({"biases_shifted": biased} if request.repair == "bias" else {}),
            "text": {
                "source": model_reference(tokens.source), "sequences": len(ids),
                "sequence_length": ids.shape[1], "seed": tokens.seed, "sha256": token_hash(ids),
            },
            "model": {"source": model_reference(request.model), "dtype": written,
                      "weights": decoder.weights.how, **decoder.coverage.record()},
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
    """Return the request's rule with its group and pattern complete; of one whose metric is taken no ratios.

    Raises:
        RuleError: When the request contradicts what the rule has of its own.
    """
    rule = read_rule(request.candidate)
    for name in ("group", "pattern"):
        asked, there = getattr(request, name), getattr(rule, name)
        if None not in (asked, there) and asked != there:
            raise RuleError(
                f"expected the {name} {there}, which the candidate {rule.source} has, got {asked}; leave "
                f"--{name} out"
            )
    group, pattern = rule.group or request.group or "row", rule.pattern or request.pattern
    replace(request, pattern=pattern)  # which checks sparsity and ratios against it
    counts = parse_pattern(pattern or "unstructured")
    has_sparsity = request.sparsity is not None or bool(counts)
    is_taken = request.sparsity is not None or request.ratios is not None
    if counts and not is_taken and (other := {*(rule.ratios or ())} - {counts[0] / counts[1]}):
        raise RuleError(
            f"expected the ratio {counts[0] / counts[1]:g} alone, which the pattern {pattern} of the "
            f"candidate {rule.source} has, got {min(other):g} too; --sparsity takes its metric alone"
        )
    if rule.ratios is None or not is_taken:
        return replace(rule, group=group, pattern=pattern)
    if not has_sparsity and rule.uniform is None and not request.has_ratio_file:
        raise RuleError(
            f"expected a sparsity beside the ratios {request.ratios}, got none, and the candidate "
            f"{rule.source} has different ones for its layers; give --sparsity"
        )
    return replace(rule, group=group, pattern=pattern, ratios=None, names=None)


def _tokens(request: PruneRequest, rule: Rule) -> PruningTokens:
    """Return what to prune on: what is said, and for the rest what the rule's run was calibrated on.

    Raises:
        SecateurError: When the run's calibration is needed for a text, and is not what it was.
    """
    text, count, length, seed = "self", defaults.TOKENS, defaults.SEQUENCE_LENGTH, defaults.SEED
    calibration, is_same = None, False
    if rule.run is not None:
        try:
            settings, calibration = calibrated_on(rule.run)
            noted = Given(calibration.manifest, str(calibration.folder), RuleError)
            sequences, length = calibration.shape("statistics")
            count = sequences * length
            text, seed = noted.field("text").text(), noted.field("seed").count()
            its = (calibration.model_source, noted.field("model").field("source").text(), settings.model)
            is_same = model_reference(request.model) in {model_reference(source) for source in its if source}
        except (SecateurError, OSError) as error:
            if request.text is None:
                raise RuleError(f"the text that {rule.run} was calibrated on is not known: {error}") from None
    asked = CalibrationRequest(
        request.model,
        request.text or text,
        count if request.tokens is None else request.tokens,
        sequence_length=length if request.sequence_length is None else request.sequence_length,
        seed=seed if request.seed is None else request.seed,
    )
    return PruningTokens(
        asked.text, asked.sequences()["statistics"], asked.sequence_length, asked.seed,
        calibration if request.text is None else None, is_same,
    )  # fmt: skip


def _sparsity(request: PruneRequest, rule: Rule) -> float:
    if counts := parse_pattern(rule.pattern or "unstructured"):
        return counts[0] / counts[1]
    said = (request.sparsity, rule.uniform, defaults.SPARSITY)
    return next(float(sparsity) for sparsity in said if sparsity is not None)


def _choose_layers(named: Sequence[str], rule: Rule, decoder: Decoder, source: str) -> None:
    """Have the layers be those that a rule has ratios for, where its run left others of them dense.

    Raises:
        RuleError: When the text tells nothing of one of the rule's layers.
    """
    here = {layer.name for layer in decoder.layers}
    unknown = [name for name in named if name not in here]
    if unknown:
        why = next(one.why for one in decoder.stays_dense if one.name == f"{unknown[0]}.weight")
        raise RuleError(
            f"expected text that tells what enters each layer of {source}, got {unknown[0]}, which {why} "
            f"({len(unknown)} of {len(named)} layers); give more --tokens or another --text"
        )
    others = [layer.name for layer in decoder.layers if named and layer.name not in set(named)]
    decoder.leave_dense(
        {name: f"has no ratio in {source}" for name in others if f"{name}.weight" in rule.stays_dense}
    )


def _check_run(rule: Rule, decoder: Decoder) -> None:
    """Check the layers' names against those of the run's calibration, if it is still there.

    Raises:
        RuleError: When the run was on another model.
    """
    if rule.run is None or rule.ratios is None or rule.uniform is not None:
        return
    try:
        known = Calibration(SearchSettings.load(RunFolder(rule.run).settings_file).calibration).layers
    except (SecateurError, OSError):  # moved away, or of another release: the number of layers has to do
        return
    names = {layer.name for layer in known}
    own = [layer for layer in decoder.layers if layer.name in names]
    described = [[f"{x.name} ({x.rows}, {x.columns})" for x in layers] for layers in (known, own)]
    for there, here in zip_longest(*described, fillvalue="no layer"):
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
