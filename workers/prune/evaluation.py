"""Evaluation: what a model, pruned or not, makes of a text, in figures that say how they came about."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ...search.core import defaults
from ...search.core.requests import LONGEST_SEQUENCE, MOST_TOKENS, check_count, check_device, check_dtype
from ...search.core.versions import library_versions
from ..calibrate.documents import TextError
from ..calibrate.folder import token_hash
from ..calibrate.text import check_source, read_ids, vocabulary_of
from ..model.load import check_length, choose_device, choose_dtype, load_model, model_reference

WIKITEXT2 = "hub:Salesforce/wikitext:wikitext-2-raw-v1:test"
_TOKENS_OF_LOGITS = 256  # whose log-probabilities exist at a time


class EvaluationError(SecateurError):
    """An evaluation that cannot be made."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate on what.

    Attributes:
        model: Hub name, folder or ``.gguf`` file.
        text: A file, ``hub:NAME`` or ``wikitext2``, the test part of WikiText-2; empty for no text.
        window: Tokens per window.
        windows: Windows from the beginning of the text; 0 for all.
        against: The dense model to compare with, if any.
        tasks: Names of lm-eval's tasks.
        dtype: ``float32`` or ``bfloat16``.
        device: ``auto``, ``cpu``, ``cuda``.
        trust_remote_code: Allow code that comes with the models.
    """

    model: str
    text: str = "wikitext2"
    window: int = defaults.WINDOW
    windows: int = 0
    against: str | None = None
    tasks: tuple[str, ...] = ()
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_count("windows of at least 2 tokens", self.window, 2, LONGEST_SEQUENCE, EvaluationError)
        check_count("a number of windows, or 0 for all", self.windows, 0, MOST_TOKENS, EvaluationError)
        check_device(self.device, EvaluationError)
        check_dtype(self.dtype, EvaluationError)
        if self.text == "self":
            raise EvaluationError("expected a text that no model wrote, got self; give a file or hub:NAME")
        if not self.text and not self.tasks:
            raise EvaluationError("expected a text or tasks to evaluate on, got neither")
        if not self.text and (self.against or self.windows):
            raise EvaluationError(
                "expected a text for KL to a dense model and for windows, got tasks alone; give --text"
            )


def evaluate(request: EvaluationRequest, report: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Return perplexity, KL to a dense model and results of tasks, with how they were measured.

    Args:
        request: What to evaluate on what.
        report: Called with a sentence on each step.

    Raises:
        ModelError: When a model cannot be loaded.
        TextError: When the text cannot be read or is too short.
        EvaluationError: When the models do not fit each other, or a package is missing.
    """
    harness = _lm_eval() if request.tasks else None
    if request.text:
        check_source(_source(request))
    model, tokenizer = _load(request, request.model)
    result: dict[str, Any] = {"model": model_reference(request.model)}
    if request.text:
        windows, about = read_windows(request, model, tokenizer)
        check_length(model, request.window)
        dense = None
        if request.against is not None:
            dense, other = _load(request, request.against)
            if other.get_vocab() != tokenizer.get_vocab() or vocabulary_of(dense) != vocabulary_of(model):
                raise EvaluationError(
                    f"expected a dense model with the vocabulary of {request.model}, got another one in "
                    f"{request.against}"
                )
            result["against"] = model_reference(request.against)
        report(f"{len(windows)} windows of {request.window} tokens")
        result |= figures(model, windows, dense)
        result["text"] = about
        del dense
    if harness is not None:
        report(f"tasks {', '.join(request.tasks)}")
        result["tasks"] = _run_tasks(harness, request, model, tokenizer)
    names = ("python", "secateur", "torch", "transformers", *(("lm_eval",) if harness is not None else ()))
    result |= {
        "dtype": request.dtype, "device": str(next(model.parameters()).device),
        "versions": library_versions(*names),
    }  # fmt: skip
    return result


def read_windows(request: EvaluationRequest, model: Any, tokenizer: Any) -> tuple[Tensor, dict[str, Any]]:
    """Return a text's windows (windows, tokens), one after the other, and the fingerprint of their making.

    The whole text is tokenised at once, with what the tokenizer itself puts at its beginning; tokens that do
    not fill a last window are left out. This is how the pruning literature measures WikiText-2.

    Raises:
        TextError: When the text cannot be read or is too short.
    """
    source = _source(request)
    ids = read_ids(source, model, tokenizer)
    available = len(ids) // request.window
    count = request.windows or available
    if not 0 < count <= available:
        raise TextError(
            f"expected at least {max(count, 1) * request.window} tokens, {max(count, 1)} windows of "
            f"{request.window}, got {len(ids)} from {request.text}; ask for fewer or shorter windows"
        )
    windows = torch.tensor(ids[: count * request.window]).reshape(count, request.window)
    one = not source.startswith("hub:") and source.lower().removesuffix(".gz").endswith(".txt")
    return windows, {
        "source": source if source.startswith("hub:") else model_reference(source),
        "sha256": token_hash(windows), "windows": count, "window": request.window,
        "tokens_of_text": len(ids),
        "documents": "one file, as it is" if one else "joined by an empty line",
        "bos": bool(ids) and ids[0] == tokenizer.bos_token_id,
    }  # fmt: skip


def _source(request: EvaluationRequest) -> str:
    return WIKITEXT2 if request.text == "wikitext2" else request.text


@torch.no_grad()
def figures(model: Any, windows: Tensor, dense: Any = None) -> dict[str, Any]:
    """Return perplexity, and KL of the dense model's distributions from the model's, nats per token.

    Perplexity is exp of the mean negative log-likelihood of every token of a window but its first. KL is a
    mean over all positions of the windows.

    Args:
        model: A transformers model.
        windows: Token ids, (windows, tokens).
        dense: The model to compare with, if any; its perplexity is found too.

    Raises:
        EvaluationError: When logits are not finite.
    """
    surprise = divergence = of_dense = 0.0
    for window in windows.split(1):
        logits = _logits(model, window)
        expected = None if dense is None else _logits(dense, window)
        targets = window[0, 1:].to(logits.device)
        for start in range(0, window.shape[1], _TOKENS_OF_LOGITS):
            end = start + _TOKENS_OF_LOGITS
            got = logits[start:end].float().log_softmax(-1)
            after = targets[start:end, None]
            surprise -= float(got[: len(after)].gather(1, after).sum(dtype=torch.float64))
            if expected is not None:
                true = expected[start:end].float().log_softmax(-1)
                of_dense -= float(true[: len(after)].gather(1, after).sum(dtype=torch.float64))
                divergence += float((true.exp() * (true - got)).sum(dtype=torch.float64))
    if not math.isfinite(surprise + divergence + of_dense):
        raise EvaluationError("the model's output is not finite on this text; try --dtype float32")
    predicted = windows.numel() - len(windows)
    found = {"perplexity": _exp(surprise / predicted), "negative_log_likelihood": surprise / predicted}
    if dense is not None:
        found["dense_perplexity"] = _exp(of_dense / predicted)
        found["kl"] = max(divergence / windows.numel(), 0.0)  # rounding may reach below 0
    return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _logits(model: Any, window: Tensor) -> Tensor:
    ids = window.to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _load(request: EvaluationRequest, source: str) -> tuple[Any, Any]:
    return load_model(
        source,
        dtype=choose_dtype(request.dtype),
        device=choose_device(request.device),
        trust_remote_code=request.trust_remote_code,
    )


def _lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
    except ImportError:
        raise EvaluationError(
            "tasks need the package lm-eval: pip install 'secateur[evaluate]', or leave --tasks out"
        ) from None
    return lm_eval


def _run_tasks(lm_eval: Any, request: EvaluationRequest, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return lm-eval's figures by task.

    Raises:
        EvaluationError: With its reason, when lm-eval knows no such task or cannot have its data.
    """
    try:
        adapter = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer)
        found = lm_eval.simple_evaluate(model=adapter, tasks=list(request.tasks), bootstrap_iters=0)
    except Exception as error:  # whatever a server, a loader or a task raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise EvaluationError(f"lm-eval cannot run {', '.join(request.tasks)}: {reason}") from error
    results: dict[str, Any] = found["results"]
    result = {}
    for task, values in results.items():
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        how = {"version": found.get("versions", {}).get(task), "shots": found.get("n-shot", {}).get(task)}
        result[task] = {**numbers, **{name: value for name, value in how.items() if value is not None}}
    return result
