"""Calibration: one pass of text through the dense model, and one backward when gradients are wanted.

Everything a search needs to know of model and text goes into the calibration folder; searches load the
model once and no text at all. Calibration itself goes block by block and needs the weights of one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...search.core import defaults
from ...search.core.files import Output, tell_left_behind, whole
from ...search.core.requests import (
    LONGEST_SEQUENCE,
    MOST_SEED,
    MOST_TOKENS,
    check_count,
    check_device,
    check_dtype,
)
from ...search.core.versions import library_versions
from ..model.block_calls import Batch, check_arguments
from ..model.checksums import Checksums
from ..model.decoder import Decoder
from ..model.errors import ModelError
from ..model.load import (
    check_length,
    choose_device,
    choose_dtype,
    load_model,
    model_reference,
    save_dense_copy,
)
from ..model.load_blocks import decoder_in_files
from .folder import Calibration, CalibrationError, block_file, gradient_file, token_hash, write_tokens
from .gradients import hidden_states, keep_states, root_mean_square_gradients
from .gram import is_root
from .input_statistics import Observer, observed_outputs
from .manifest import PARTS, Entry, write_manifest
from .text import check_source, draw_sequences

_TOKENS_PER_CALL = 2048
_FOLDER = Output("a new folder", error=CalibrationError)


@dataclass(frozen=True)
class CalibrationRequest:
    """What to calibrate on.

    Attributes:
        model: Hub name, folder or ``.gguf`` file.
        text: ``self``, a file or ``hub:NAME``, as for ``draw_sequences``.
        tokens: Tokens of statistics, rounded up to whole sequences, as are the other two parts.
        selection_tokens: Tokens on which a search measures its candidates.
        holdout_tokens: Tokens that only final figures are measured on.
        sequence_length: Tokens per sequence.
        seed: Seed of sampling and order.
        gradients: Whether to compute the leaf ``G``, which takes a backward pass.
        dtype: ``float32`` or ``bfloat16``, the type of the weights; statistics are 32-bit.
        device: ``auto``, ``cpu``, ``cuda``.
        trust_remote_code: Allow code that comes with the model.
    """

    model: str
    text: str = "self"
    tokens: int = defaults.TOKENS
    selection_tokens: int = defaults.SELECTION_TOKENS
    holdout_tokens: int = defaults.HOLDOUT_TOKENS
    sequence_length: int = defaults.SEQUENCE_LENGTH
    seed: int = defaults.SEED
    gradients: bool = True
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_count("sequences of at least 8 tokens", self.sequence_length, 8, LONGEST_SEQUENCE)
        check_count("a seed of 0 or more", self.seed, 0, MOST_SEED)
        for part, count in zip(PARTS, (self.tokens, self.selection_tokens, self.holdout_tokens), strict=True):
            check_count(f"at least 1 token of {part}", count, 1, MOST_TOKENS)
        check_device(self.device)
        check_dtype(self.dtype)

    def sequences(self) -> dict[str, int]:
        """Return the number of sequences of each part."""
        counts = (self.tokens, self.selection_tokens, self.holdout_tokens)
        return {p: -(-n // self.sequence_length) for p, n in zip(PARTS, counts, strict=True)}


def calibrate(
    request: CalibrationRequest, out: str | Path, report: Callable[[str], None] = lambda _: None
) -> Calibration:
    """Calibrate a model and return the calibration folder, which must not exist before.

    Args:
        request: What to calibrate on.
        out: The folder to write.
        report: Called with a sentence on each step.

    Raises:
        ModelError: When the model cannot be loaded or measured.
        TextError: When the text cannot be read or is too short.
        CalibrationError: When the folder exists or statistics are not finite.
        OSError: When the disk is full or fails.
    """
    tell_left_behind(out, report)
    check_source(request.text)
    with whole(out, _FOLDER) as folder:
        decoder, tokenizer = load_decoder(request, by_block=not whole_because(request))
        folder.mkdir()
        _calibrate(request, decoder, tokenizer, folder, report)
    return Calibration(out)


def whole_because(request: CalibrationRequest) -> str:
    """Return why the whole model has to be in memory at once; empty if its blocks may come one by one."""
    if request.trust_remote_code:
        return "code that comes with the model loads it"
    if request.model.endswith(".gguf"):
        return "transformers converts what its file holds"
    if request.text == "self":
        return "it writes its own text; with --text FILE its blocks can be read one by one"
    return ""


def how_loaded(decoder: Decoder, why: str) -> str:
    """Return where a model's weights are, and why they are all in memory if they are."""
    how = decoder.weights.how
    return how if decoder.weights.in_files else f"{how}: {why or 'transformers converts what its files hold'}"


def load_decoder(request: CalibrationRequest, *, by_block: bool = False) -> tuple[Decoder, Any]:
    """Return the model of a request and its tokenizer.

    Args:
        request: Which model.
        by_block: Leave the weights of its blocks in its files, where these hold them as the model has them.

    Raises:
        ModelError: When the model cannot be loaded or reads no sequences of that length.
    """
    dtype, device = choose_dtype(request.dtype), choose_device(request.device)
    code = request.trust_remote_code
    found = decoder_in_files(request.model, dtype, device, trust_remote_code=code) if by_block else None
    if found is None:
        model, tokenizer = load_model(request.model, dtype=dtype, device=device, trust_remote_code=code)
        found = Decoder(model), tokenizer
    else:
        found[0].weights.check()
    decoder, tokenizer = found
    check_length(decoder.model, request.sequence_length)
    return decoder, tokenizer


def _calibrate(
    request: CalibrationRequest, decoder: Decoder, tokenizer: Any, folder: Path, report: Callable[[str], None]
) -> None:
    model = decoder.model
    counts = request.sequences()
    total = sum(counts.values())
    if request.text == "self":
        report(f"the model writes {total} sequences of {request.sequence_length} tokens")
    sequences = draw_sequences(request.text, model, tokenizer, total, request.sequence_length, request.seed)
    if request.text != "self":
        report(f"read {total} sequences of {request.sequence_length} tokens from {request.text}")
    report(f"the model is {how_loaded(decoder, whole_because(request))}")
    parts = dict(zip(counts, sequences.split(list(counts.values())), strict=True))
    write_tokens(folder, parts)
    if request.model.endswith(".gguf"):
        report("keeping a dense copy of the quantised weights")
        save_dense_copy(model, tokenizer, folder / "model")
    ids = parts["statistics"]
    batches = [decoder.enter(part) for part in ids.split(max(1, _TOKENS_PER_CALL // ids.shape[1]))]
    check_arguments(batches[0])
    room = hidden_states(folder, decoder, ids, batches[0].hidden) if request.gradients else nullcontext()
    with room as states:
        report(f"statistics of {len(decoder.blocks)} blocks, {len(decoder.layers)} linear layers")
        entries = _write_statistics(decoder, batches, states, folder)
        if states is not None:
            report(f"gradients of {counts['statistics']} sequences")
            _write_gradients(decoder, ids, states, folder)
    if warning := decoder.coverage.warning:
        report(warning)
    write_manifest(folder, _describe(request, decoder, entries, parts), decoder.layers, entries)


def _describe(
    request: CalibrationRequest, decoder: Decoder, entries: list[Entry], parts: dict[str, Tensor]
) -> dict[str, Any]:
    text = (
        request.text
        if request.text == "self" or request.text.startswith("hub:")
        else (model_reference(request.text))
    )
    return {
        "model": {
            "source": model_reference(request.model),
            "weights": hashlib.sha256("".join(entry.weights for entry in entries).encode()).hexdigest(),
            "dtype": request.dtype,
            "trust_remote_code": request.trust_remote_code,
            "blocks": len(decoder.blocks),
            **decoder.coverage.record(),
        },
        "checksums": asdict(Checksums.of(decoder)),
        "text": text,
        "seed": request.seed,
        "gradients": request.gradients,
        "parts": {
            name: {"sequences": len(ids), "length": ids.shape[1], "sha256": token_hash(ids)}
            for name, ids in parts.items()
        },
        "versions": library_versions("secateur", "python", "torch", "transformers"),
    }  # fmt: skip


def _write_statistics(
    decoder: Decoder, batches: list[Batch], states: Tensor | None, folder: Path
) -> list[Entry]:
    """Write each block's statistics, and the hidden states around it into ``states``.

    Layers whose inputs are not known are none from then on.

    Returns:
        What the manifest says of each layer.
    """
    hidden = [batch.hidden for batch in batches]
    entries: dict[str, Entry] = {}
    unknown: dict[str, str] = {}
    for block in range(len(decoder.blocks)):
        if states is not None:
            keep_states(states, block, hidden)
        own = [i for i, layer in enumerate(decoder.layers) if layer.block == block]
        observer = Observer({i: decoder.modules[i] for i in own})
        tensors: dict[str, Tensor] = {}
        with decoder.weights.of(block):
            for number, batch in enumerate(batches):
                with observer.watching():
                    hidden[number] = decoder.run_block(block, batch, hidden[number])
            why = observer.unknown()
            unknown |= {decoder.layers[i].name: reason for i, reason in why.items()}
            for number, (members, statistics) in enumerate(observer.finish(without=why)):
                tensors |= {f"gram{number}/{name}": value for name, value in statistics.items()}
                gram = statistics["H"]
                for i in members:
                    name = decoder.layers[i].name
                    energy, size = observed_outputs(decoder.modules[i], statistics)
                    tensors |= {f"{name}/energy": energy, f"{name}/Y": size}
                    kept = len(gram) if is_root(gram) else None
                    entries[name] = Entry(number, kept, decoder.fingerprint(i))
        _save(tensors, folder / block_file(block), f"statistics of block {block}")
    if states is not None:
        keep_states(states, len(decoder.blocks), hidden)
    check_composition(decoder, batches[0].ids[:1], hidden[0][:1])
    decoder.leave_dense(unknown)
    return [entries[layer.name] for layer in decoder.layers]


def _write_gradients(decoder: Decoder, ids: Tensor, states: Tensor, folder: Path) -> None:
    for block, gradients in root_mean_square_gradients(decoder, ids, states):
        tensors = {f"{decoder.layers[i].name}/G": gradient for i, gradient in gradients.items()}
        _save(tensors, folder / gradient_file(block), f"gradients of block {block}")
        del gradients, tensors  # before the next block's come


def _save(tensors: dict[str, Tensor], path: Path, what: str) -> None:
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        raise CalibrationError(
            f"{what} are not finite ({broken[0]}); the dense model overflows on this text: "
            "try --dtype float32"
        )
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)


def check_composition(decoder: Decoder, ids: Tensor, hidden: Tensor) -> None:
    """Check that running block by block gave what the model itself gives.

    Args:
        decoder: The dense model.
        ids: Some sequences, (sequences, tokens).
        hidden: Their hidden states after the last block, (sequences, tokens, width).

    Raises:
        ModelError: When it did not.
    """
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
