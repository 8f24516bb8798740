"""References: what the dense model does with some tokens, to compare pruned models with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.block_calls import Batch
from ..model.decoder import Decoder

# Tokens that go through a block at a time: more spill out of a CPU's caches, fewer starve a GPU.
TOKENS_PER_CALL = {"cpu": 1024, "cuda": 8192}
# Tokens whose logits exist at a time; over a whole vocabulary they are the largest tensors of all.
TOKENS_OF_LOGITS = {"cpu": 128, "cuda": 1024}
# Dense log-probabilities are kept up to this size and computed again for each candidate beyond it.
PROBABILITY_BYTES = 1 << 30


@torch.no_grad()
def batches_of(decoder: Decoder, ids: Tensor) -> list[Batch]:
    """Return token ids (sequences, tokens) as batches of the size that suits the device."""
    size = max(1, TOKENS_PER_CALL.get(decoder.device.type, 1024) // ids.shape[1])
    return [decoder.enter(part) for part in ids.split(size)]


class _Dense:
    """What the dense model does with a piece of a sequence, ids (1, tokens).

    The divergence from p to q is sum p (z_p - z_q) + log-normaliser of q - log-normaliser of p, z being
    logits: only p has to be kept of the dense model, and nothing as large as it is made for a pruned
    one. Where keeping p would take too much memory it follows from the last hidden states again.
    """

    def __init__(
        self, decoder: Decoder, ids: Tensor, following: Tensor, hidden: Tensor, *, keep: bool
    ) -> None:
        self._ids = ids
        self._following = following  # (1, tokens), or one fewer at the end of a sequence
        self._hidden = hidden
        self._final, logits = decoder.leave(ids, hidden)
        self._normaliser = logits.logsumexp(-1)
        probabilities = (logits - self._normaliser[..., None]).exp_()
        self._expected = torch.linalg.vecdot(probabilities, logits)
        self._kept = probabilities if keep else None

    def compare(self, decoder: Decoder, hidden: Tensor) -> dict[str, float]:
        """Return sums over the tokens: divergence, negative log-likelihood, error and energy."""
        final, logits = decoder.leave(self._ids, hidden)
        normaliser, divergence = self._divergence(decoder, logits)
        count = self._following.shape[1]
        chosen = logits[:, :count].gather(-1, self._following[..., None])[..., 0]
        return {
            "divergence": float(divergence.sum()),
            "surprise": float((normaliser[:, :count] - chosen).double().sum()),
            "error": float((final - self._final).double().square().sum()),
            "energy": float(self._final.double().square().sum()),
        }

    def gradient(self, decoder: Decoder, hidden: Tensor) -> Tensor:
        """Return the gradient of the sum of divergences by the hidden states, (1, tokens, width)."""
        with torch.enable_grad():
            states = hidden.detach().requires_grad_(True)
            _, logits = decoder.leave(self._ids, states)
            _, divergence = self._divergence(decoder, logits)
            (found,) = torch.autograd.grad(divergence.sum(), states)
        return found

    def _divergence(self, decoder: Decoder, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits' log-normalisers and the divergence from the dense model, (1, tokens)."""
        normaliser = logits.logsumexp(-1)
        got = torch.linalg.vecdot(self._probabilities(decoder), logits)
        return normaliser, (self._expected - got).double() + (normaliser - self._normaliser).double()

    @torch.no_grad()
    def _probabilities(self, decoder: Decoder) -> Tensor:
        if self._kept is not None:
            return self._kept
        _, logits = decoder.leave(self._ids, self._hidden)
        return (logits - self._normaliser[..., None]).exp_()


class DenseReference:
    """Some tokens with the dense model's outputs, to compare pruned models with.

    Args:
        decoder: The dense model.
        batches: The tokens, from ``batches_of``.
        left: What leaves the last block of the dense model, a batch each.
        kept_bytes: Room for the dense model's probabilities; what finds none is computed again.
    """

    @torch.no_grad()
    def __init__(
        self,
        decoder: Decoder,
        batches: Sequence[Batch],
        left: Sequence[Tensor],
        kept_bytes: int = PROBABILITY_BYTES,
    ) -> None:
        self._piece = TOKENS_OF_LOGITS.get(decoder.device.type, 128)
        self._pieces: list[_Dense] = []
        vocabulary = decoder.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        room = kept_bytes // (4 * vocabulary)
        for batch, states in zip(batches, left, strict=True):
            for sequence, state in zip(batch.ids.split(1), states.split(1), strict=True):
                following = sequence[:, 1:].split(self._piece, 1)
                pieces = sequence.split(self._piece, 1), self._split(state)
                for i, (piece, hidden) in enumerate(zip(*pieces, strict=True)):
                    room -= piece.numel()
                    after = following[i] if i < len(following) else sequence[:, :0]
                    self._pieces.append(_Dense(decoder, piece, after, hidden, keep=room >= 0))
        self.tokens = sum(batch.ids.numel() for batch in batches)
        self._sequence = batches[0].ids.shape[1]
        self._predicted = self.tokens - self.tokens // self._sequence

    def _split(self, state: Tensor) -> tuple[Tensor, ...]:
        pieces: tuple[Tensor, ...] = state.split(self._piece, 1)
        return pieces

    def gradients(self, decoder: Decoder, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of kl by a pruned model's hidden states after the last block, one a batch."""
        pieces = iter(self._pieces)
        found = []
        for states in hidden:
            rows = [
                torch.cat([next(pieces).gradient(decoder, piece) for piece in self._split(state)], 1)
                for state in states.split(1)
            ]
            found.append(torch.cat(rows).div_(self.tokens))
        return found

    @torch.no_grad()
    def compare(
        self, decoder: Decoder, hidden: Sequence[Tensor]
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Return a pruned model's kl, perplexity and model_error, and the kl of each sequence."""
        total: Counter[str] = Counter()
        parts: list[float] = []
        pieces = iter(self._pieces)
        for state in (state for states in hidden for state in states.split(1)):
            divergence = 0.0
            for piece in self._split(state):
                found = next(pieces).compare(decoder, piece)
                divergence += found["divergence"]
                for name, value in found.items():
                    total[name] += value  # type: ignore[assignment]
            parts.append(max(divergence / self._sequence, 0.0))
        surprise = total["surprise"] / max(self._predicted, 1)
        values = {
            "kl": max(total["divergence"] / self.tokens, 0.0),  # rounding may reach below 0
            "perplexity": math.exp(surprise) if surprise < 700 else math.inf,
            "model_error": total["error"] / total["energy"] if total["energy"] else 0.0,
        }
        return values, tuple(parts)
