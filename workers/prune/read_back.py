"""Written models read back as their user will read them, and run on a sample of text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...metrics_dsl.errors import SecateurError
from ..model.decoder import Decoder
from ..model.load import load_model
from ..model.load_blocks import decoder_in_files
from ..model.source import ModelError

# How far log-probabilities may lie apart, in nats a token and word on the mean. The same weights in the same
# type give the same numbers; a type that is written with fewer digits rounds each weight.
_SAME, _ROUNDED = 1e-4, 0.1


class CheckpointError(SecateurError):
    """A folder that cannot be written, or that does not hold what was meant."""


class Sample:
    """A few tokens that go through a model as it is pruned, block by block, and through the written one.

    Args:
        decoder: The model, not pruned yet.
        ids: Token ids, (1, tokens).
    """

    def __init__(self, decoder: Decoder, ids: Tensor) -> None:
        self._decoder = decoder
        self._batch = decoder.enter(ids)
        self._hidden = self._batch.hidden
        self._dtype = self._hidden.dtype
        self._is_rounded = False

    @torch.no_grad()
    def go_through(self, block: int) -> None:
        """Run a pruned block, whose weights are in memory and stay in their type."""
        module = self._decoder.blocks[block]
        written = {tensor.dtype for tensor in module.parameters()} - {self._dtype}
        if not written:
            self._hidden = self._decoder.run_block(block, self._batch, self._hidden)
            return
        self._is_rounded = True
        (dtype,) = written
        module.to(self._dtype)  # holds each number of a shorter type, so that nothing is lost on the way back
        self._hidden = self._decoder.run_block(block, self._batch, self._hidden)
        module.to(dtype)

    @torch.no_grad()
    def log_probabilities(self) -> Tensor:
        """Return what the pruned model says of the sample, (1, tokens, vocabulary)."""
        return self._decoder.leave(self._batch.ids, self._hidden)[1].log_softmax(-1)

    @torch.no_grad()
    def difference(self, folder: Path, expected: Tensor, *, trusts: bool) -> float:
        """Return by how much a written model says something else, in nats on the mean.

        Blocks are read one by one where the model was.

        Args:
            folder: Where it was written.
            expected: What the pruned model says.
            trusts: Whether code that comes with the model may run.

        Raises:
            CheckpointError: When it lacks a weight or has one more, or says something else.
        """
        device = self._decoder.device
        try:
            found = None if trusts else decoder_in_files(str(folder), self._dtype, device)
            if found is None:
                model, _ = load_model(str(folder), dtype=self._dtype, device=device, trust_remote_code=trusts)
                found = Decoder(model), None
        except ModelError as error:
            raise CheckpointError(f"the model was not written as it can be read: {error}") from None
        decoder, _ = found
        batch = decoder.enter(self._batch.ids)
        hidden = batch.hidden
        for block in range(len(decoder.blocks)):
            hidden = decoder.run_block(block, batch, hidden)
        said = decoder.leave(batch.ids, hidden)[1].log_softmax(-1)
        differ = float((said - expected).abs().mean())
        most = _ROUNDED if self._is_rounded else _SAME
        if not differ <= most:  # nan is none
            raise CheckpointError(
                f"expected the written model to say what the pruned one says, within {most:g} nats, got "
                f"{differ:g}: it was not written as it is in memory"
            )
        return differ
