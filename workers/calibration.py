"""Calibration: one pass of text through the dense model, and one backward when gradients are wanted.

Everything a search needs to know of model and text goes into the calibration folder; searches load the
model once and no text at all.
"""

from __future__ import annotations

import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .model import (
    Batch,
    Decoder,
    ModelError,
    choose_device,
    choose_dtype,
    load_model,
    model_reference,
    oriented,
    save_dense_copy,
    weight_matrix,
    weight_of,
)
from .reconstruction import output_energy
from .statistics import (
    PARTS,
    Calibration,
    CalibrationError,
    block_file,
    token_hash,
    write_manifest,
    write_tokens,
)
from .text import draw_sequences

DAMPING = 0.01  # of the mean diagonal, as in SparseGPT
_TOKENS_A_CALL = 2048


@dataclass(frozen=True)
class Request:
    """What to calibrate on.

    Attributes:
        model: Hub name, folder or ``.gguf`` file.
        text: ``self``, a file or ``hub:NAME``, as for ``draw_sequences``.
        tokens: Tokens of statistics, rounded up to whole sequences, as are the other two parts.
        selection_tokens: Tokens on which a search measures its candidates.
        holdout_tokens: Tokens that only final figures are measured on.
        sequence_length: Tokens a sequence.
        seed: Seed of sampling and order.
        gradients: Whether to compute the leaf ``G``, which takes a backward pass.
        dtype: ``float32`` or ``bfloat16``, the type of the weights; statistics are 32-bit.
        device: ``auto``, ``cpu``, ``cuda``.
        trust_remote_code: Allow code that comes with the model.
    """

    model: str
    text: str = "self"
    tokens: int = 8192
    selection_tokens: int = 2048
    holdout_tokens: int = 4096
    sequence_length: int = 512
    seed: int = 0
    gradients: bool = True
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.sequence_length < 8:
            raise ValueError(f"expected sequences of at least 8 tokens, got {self.sequence_length}")
        for part, count in zip(PARTS, (self.tokens, self.selection_tokens, self.holdout_tokens), strict=True):
            if count < 1:
                raise ValueError(f"expected at least 1 token of {part}, got {count}")

    def sequences(self) -> dict[str, int]:
        """Return the number of sequences of each part."""
        counts = (self.tokens, self.selection_tokens, self.holdout_tokens)
        return {p: -(-n // self.sequence_length) for p, n in zip(PARTS, counts, strict=True)}


def calibrate(request: Request, out: str | Path, tell: Callable[[str], None] = lambda _: None) -> Calibration:
    """Calibrate a model and return the calibration folder, which must not exist before.

    Args:
        request: What to calibrate on.
        out: The folder to write.
        tell: Called with a line on each step.

    Raises:
        ModelError: When the model cannot be loaded or measured.
        TextError: When the text cannot be read or is too short.
        CalibrationError: When the folder exists or statistics are not finite.
    """
    target = Path(out)
    if target.exists():
        raise CalibrationError(f"expected a new folder, got {target}, which exists; choose another --out")
    decoder, tokenizer = _load(request)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        _calibrate(request, decoder, tokenizer, partial, tell)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Calibration(target)


def _load(request: Request) -> tuple[Decoder, Any]:
    model, tokenizer = load_model(
        request.model,
        dtype=choose_dtype(request.dtype),
        device=choose_device(request.device),
        trust_remote_code=request.trust_remote_code,
    )
    decoder = Decoder(model)
    longest = getattr(decoder.model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and request.sequence_length > longest:
        raise ModelError(
            f"expected sequences of at most {longest} tokens, which the model can read, got "
            f"{request.sequence_length}"
        )
    return decoder, tokenizer


def _calibrate(
    request: Request, decoder: Decoder, tokenizer: Any, folder: Path, tell: Callable[[str], None]
) -> None:
    model = decoder.model
    counts = request.sequences()
    total = sum(counts.values())
    if request.text == "self":
        tell(f"the model writes {total} sequences of {request.sequence_length} tokens")
    sequences = draw_sequences(request.text, model, tokenizer, total, request.sequence_length, request.seed)
    if request.text != "self":
        tell(f"read {total} sequences of {request.sequence_length} tokens from {request.text}")
    parts = dict(zip(counts, sequences.split(list(counts.values())), strict=True))
    write_tokens(folder, parts)
    if request.model.endswith(".gguf"):
        tell("keeping a dense copy of the quantised weights")
        save_dense_copy(model, tokenizer, folder / "model")
    gradients: dict[int, Tensor] = {}
    if request.gradients:
        tell(f"gradients of {counts['statistics']} sequences")
        gradients = root_mean_square_gradients(decoder, parts["statistics"])
    tell(f"statistics of {len(decoder.blocks)} blocks, {len(decoder.layers)} linear layers")
    grams = _write_blocks(decoder, parts["statistics"], gradients, folder)
    write_manifest(folder, _describe(request, decoder, parts), decoder.layers, grams)


def _describe(request: Request, decoder: Decoder, parts: dict[str, Tensor]) -> dict[str, Any]:
    text = (
        request.text
        if request.text == "self" or request.text.startswith("hub:")
        else (model_reference(request.text))
    )
    return {
        "model": {
            "source": model_reference(request.model),
            "weights": decoder.fingerprint(),
            "dtype": request.dtype,
            "trust_remote_code": request.trust_remote_code,
            "stays_dense": decoder.passed_over,
        },
        "text": text,
        "seed": request.seed,
        "gradients": request.gradients,
        "parts": {
            name: {"sequences": len(ids), "length": ids.shape[1], "sha256": token_hash(ids)}
            for name, ids in parts.items()
        },
        "versions": {
            "secateur": version("secateur"), "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }  # fmt: skip


def root_mean_square_gradients(decoder: Decoder, ids: Tensor) -> dict[int, Tensor]:
    """Return G of every layer, (rows, columns) in 32-bit floats, by position of the layer.

    The loss of a sequence is its mean next-token loss, the model is in evaluation mode (dropout would
    make G random), and squares are summed over sequences in 32-bit floats (16-bit ones overflow).
    """
    model: Any = decoder.model
    weights = [weight_of(module) for module in decoder.modules]
    sums = [torch.zeros_like(weight_matrix(m), dtype=torch.float32) for m in decoder.modules]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for sequence in ids.split(1):
            on_device = sequence.to(decoder.device)
            model(input_ids=on_device, labels=on_device, use_cache=False).loss.backward()
            for total, weight, module in zip(sums, weights, decoder.modules, strict=True):
                if weight.grad is not None:  # an expert that no token reached has none
                    gradient = oriented(module, weight.grad).float()
                    total.addcmul_(gradient, gradient)
                weight.grad = None
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {i: total.div_(len(ids)).sqrt_().contiguous() for i, total in enumerate(sums)}


class _InputSums:
    """Sums over the tokens of one input tensor that feeds some layers of a block."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.gram = torch.zeros(columns, columns, device=device)
        self.first = torch.zeros(columns, dtype=torch.float64, device=device)
        self.second = torch.zeros_like(self.first)

    def add(self, inputs: Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(x)
        self.gram.addmm_(x.T, x)
        self.first += x.sum(0, dtype=torch.float64)
        self.second += x.double().square_().sum(0)

    def merge(self, other: _InputSums) -> None:
        self.tokens += other.tokens
        self.gram += other.gram
        self.first += other.first
        self.second += other.second

    def finish(self) -> dict[str, Tensor]:
        """Return H (columns, columns) and X, M, V, D (columns,), in 32-bit floats."""
        count = max(self.tokens, 1)
        mean, square = self.first / count, self.second / count
        variance = (square - mean.square()).clamp(min=0) * (count / max(count - 1, 1))
        gram = self.gram / count
        leaves = {"X": square.sqrt(), "M": mean, "V": variance, "D": damped_inverse_diagonal(gram)}
        return {"H": gram, **{name: value.float() for name, value in leaves.items()}}


def damped_inverse_diagonal(gram: Tensor) -> Tensor:
    """Return the diagonal of the inverse of (gram + DAMPING * mean diagonal), (columns,), 64-bit."""
    if not bool(gram.isfinite().all()):
        return torch.full((len(gram),), torch.nan, dtype=torch.float64)  # refused by name, with its block
    damped = gram.double()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal.add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return inverse.diagonal().clone()


class _Observer:
    """Adds up the inputs of a block's layers; layers fed by one tensor share their sums.

    What one tensor feeds is known when the block has run, so tensors are kept until then. A layer that
    shares its input at one time and not at another gets the total of all that it was fed.
    """

    def __init__(self, modules: dict[int, nn.Module]) -> None:
        self._modules = modules
        self._fed: list[tuple[Tensor, set[int]]] = []
        self._sums: dict[frozenset[int], _InputSums] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the layers for one run of the block."""
        hooks = [
            module.register_forward_pre_hook(lambda _m, args, i=index: self._feed(i, args[0]))
            for index, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for tensor, users in self._fed:
            key = frozenset(users)
            if key not in self._sums:
                self._sums[key] = _InputSums(tensor.shape[-1], tensor.device)
            self._sums[key].add(tensor)
        self._fed.clear()

    def _feed(self, index: int, inputs: Tensor) -> None:
        for tensor, users in self._fed:
            if tensor is inputs:
                users.add(index)
                return
        self._fed.append((inputs, {index}))

    def finish(self) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Return the statistics of each set of layers that were fed the same."""
        sharing: dict[tuple[frozenset[int], ...], list[int]] = {}
        for index in self._modules:
            keys = tuple(key for key in self._sums if index in key)
            sharing.setdefault(keys, []).append(index)
        result = []
        for keys, members in sharing.items():
            module = self._modules[members[0]]
            total = _InputSums(weight_matrix(module).shape[1], weight_matrix(module).device)
            for key in keys:
                total.merge(self._sums[key])
            result.append((members, total.finish()))
        return result


def _write_blocks(decoder: Decoder, ids: Tensor, gradients: dict[int, Tensor], folder: Path) -> list[int]:
    """Write each block's statistics; return for each layer the number of its Gram matrix."""
    size = max(1, _TOKENS_A_CALL // ids.shape[1])
    batches: list[Batch] = [decoder.enter(part) for part in ids.split(size)]
    hidden = [batch.hidden for batch in batches]
    grams = [0] * len(decoder.layers)
    for block in range(len(decoder.blocks)):
        indexes = [i for i, layer in enumerate(decoder.layers) if layer.block == block]
        observer = _Observer({i: decoder.modules[i] for i in indexes})
        for number, batch in enumerate(batches):
            with observer.watching():
                hidden[number] = decoder.run_block(block, batch, hidden[number])
        tensors: dict[str, Tensor] = {}
        for number, (members, statistics) in enumerate(observer.finish()):
            tensors |= {f"gram{number}/{name}": value for name, value in statistics.items()}
            for i in members:
                grams[i] = number
                tensors |= _layer_tensors(decoder, i, statistics, gradients.get(i))
        broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
        if broken:
            raise CalibrationError(f"statistics of block {block} are not finite ({broken[0]}); the "
                                   "dense model overflows on this text: try --dtype float32")  # fmt: skip
        stored = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(stored, folder / block_file(block))
    _check_composition(decoder, ids[:1], hidden[0][:1])
    return grams


def _layer_tensors(
    decoder: Decoder, index: int, statistics: dict[str, Tensor], gradient: Tensor | None
) -> dict[str, Tensor]:
    name, module = decoder.layers[index].name, decoder.modules[index]
    weights = weight_matrix(module).float()
    energy = output_energy(weights, statistics["H"])
    square = energy.clone()
    if isinstance(module.bias, Tensor):
        bias = module.bias.detach().double()
        square += 2 * bias * (weights.double() @ statistics["M"].double()) + bias.square()
    tensors = {f"{name}/energy": energy, f"{name}/Y": square.clamp(min=0).sqrt().float()}
    return tensors if gradient is None else {**tensors, f"{name}/G": gradient}


def _check_composition(decoder: Decoder, ids: Tensor, hidden: Tensor) -> None:
    """Check that running block by block gave what the model itself gives."""
    with torch.no_grad():
        expected = decoder.model(input_ids=ids.to(decoder.device), use_cache=False).logits.float()
    _, got = decoder.leave(ids.to(decoder.device), hidden)
    difference = (got.log_softmax(-1) - expected.log_softmax(-1)).abs().mean()
    if not bool(difference < 0.05):
        raise ModelError(
            "expected the blocks run one by one to give the model's own output, got log-probabilities "
            f"that differ by {float(difference):.3g} on average; this architecture passes more between "
            "its blocks than hidden states and cannot be measured"
        )
