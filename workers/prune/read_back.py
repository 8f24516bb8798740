"""Reading back: a written model opened as its user opens it, and a sample of its logits compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.errors import ModelError
from ..model.load import load_model
from ..model.load_blocks import decoder_in_files

_TOKENS = 16  # spread over the vocabulary


class Sample:
    """A few tokens that go through a model's blocks as each is pruned, so that no two blocks need be there.

    Args:
        decoder: The model, not pruned yet.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        embedding: Any = decoder.model.get_input_embeddings()  # type: ignore[operator]
        self._dtype: torch.dtype = embedding.weight.dtype
        rows = embedding.weight.shape[0]
        self._ids = torch.linspace(0, rows - 1, min(_TOKENS, rows)).long()[None]
        self._batch = decoder.enter(self._ids)
        self._hidden = self._batch.hidden

    def run(self, block: int) -> None:
        """Run a block as it is now, after those before it."""
        self._hidden = self._decoder.run_block(block, self._batch, self._hidden)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Return the logits behind the last block, (1, tokens, vocabulary), on the CPU."""
        return self._decoder.leave(self._batch.ids, self._hidden)[1].cpu()

    @torch.no_grad()
    def compare(
        self, folder: Path, expected: Tensor, written: torch.dtype, *, trust_remote_code: bool
    ) -> dict[str, Any]:
        """Load a folder as its user does, on the CPU, and return how its logits differ from those expected.

        It is read block by block where its files allow; elsewhere the model in memory, which is not needed
        any more, gives up its weights first, so that no two copies are held.

        Args:
            folder: What was written.
            expected: What ``logits`` returned before.
            written: The type of the weights in the folder.
            trust_remote_code: Allow code that comes with the model.

        Raises:
            ModelError: When the folder does not load, or is another model.
        """
        found = decoder_in_files(
            str(folder), self._dtype, torch.device("cpu"), trust_remote_code=trust_remote_code
        )
        if found is not None:
            model: Any = found[0].model
            how = found[0].weights.how
        else:
            self._decoder.model.to("meta")
            model, _ = load_model(str(folder), dtype=self._dtype, trust_remote_code=trust_remote_code)
            how = "held in memory"
        got = model(input_ids=self._ids, use_cache=False).logits.float()
        difference = float((got.log_softmax(-1) - expected.log_softmax(-1)).abs().mean())
        # Half of the digits of the coarser type: rounding stays far below, another weight does not.
        bound = math.sqrt(max(torch.finfo(self._dtype).eps, torch.finfo(written).eps))
        if not difference <= bound:
            raise ModelError(
                "expected the written model to give the pruned model's output, got log-probabilities that "
                f"differ by {difference:.3g} on average"
            )
        return {"tokens": self._ids.numel(), "difference": difference, "model": how}
