"""Input statistics: Gram matrices and moments of what enters the layers of a dense model."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model.decoder import weight_matrix
from .gram import is_root, output_energy

# Why a layer has no statistics and stays dense, as words that follow on its name.
NEVER_CALLED = "is not called: its weight is used directly, or no token of the text reaches it"
NO_TOKEN = "is reached by no token of the text"
ALL_ZERO = "gets inputs that are all 0 on the text"
DAMPING = 0.01  # of the mean diagonal, as in SparseGPT


class _InputSums:
    """Sums over the tokens of one input tensor that feeds some layers of a block.

    Tokens are kept as they are until there are as many as columns; then they become a Gram matrix. Without
    ``grams`` they become neither.
    """

    def __init__(self, columns: int, device: torch.device, *, grams: bool = True) -> None:
        self._grams = grams
        self.tokens = 0
        self.first = torch.zeros(columns, dtype=torch.float64, device=device)
        self.second = torch.zeros_like(self.first)
        self.kept: list[Tensor] = []
        self.gram: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(x)
        self.first += x.sum(0, dtype=torch.float64)
        self.second += x.double().square_().sum(0)
        if self._grams:
            self._keep([x])

    def merge(self, other: _InputSums) -> None:
        self.tokens += other.tokens
        self.first += other.first
        self.second += other.second
        self._keep(other.kept, other.gram)

    def _keep(self, pieces: list[Tensor], gram: Tensor | None = None) -> None:
        self.kept += pieces
        columns = len(self.first)
        if self.tokens < columns:
            return
        if self.gram is None:
            self.gram = torch.zeros(columns, columns, device=self.first.device)
        for x in self.kept:
            self.gram.addmm_(x.T, x)
        self.kept.clear()
        if gram is not None:
            self.gram += gram

    def finish(self, *, inverse: bool) -> dict[str, Tensor]:
        """Return H (columns, columns) and X, M, V and, of the inverse, D (columns,), in 32-bit floats.

        Where tokens are fewer than columns H is its root, (tokens, columns).
        """
        count = max(self.tokens, 1)
        mean, square = self.first / count, self.second / count
        variance = (square - mean.square()).clamp(min=0) * (count / max(count - 1, 1))
        if self.gram is not None:
            gram = self.gram / count
        else:
            none = torch.zeros(0, len(mean), device=mean.device)
            gram = torch.cat([none, *self.kept]) / count**0.5
        leaves = {"X": square.sqrt(), "M": mean, "V": variance}
        if inverse:
            leaves["D"] = damped_inverse_diagonal(gram)
        return {"H": gram, **{name: value.float() for name, value in leaves.items()}}


def observed_outputs(module: nn.Module, statistics: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the energy of a layer's outputs without bias in 64-bit and Y in 32-bit floats, (rows,) each."""
    weights = weight_matrix(module).float()
    energy = output_energy(weights, statistics["H"])
    square = energy.clone()
    if isinstance(module.bias, Tensor):
        bias = module.bias.detach().double()
        square += 2 * bias * (weights.double() @ statistics["M"].double()) + bias.square()
    return energy, square.clamp(min=0).sqrt().float()


def damped_inverse_diagonal(gram: Tensor) -> Tensor:
    """Return the diagonal of the inverse of (gram + DAMPING * mean diagonal), (columns,), 64-bit.

    Of a root R (tokens, columns) it is that of R'R + d, at the cost of a matrix (tokens, tokens): by the
    identity of Woodbury the inverse is (1 - R' (R R' + d)^-1 R) / d.
    """
    columns = gram.shape[1]
    if not bool(gram.isfinite().all()):
        return torch.full((columns,), torch.nan, dtype=torch.float64)  # refused by name, with its block
    exact = gram.double()
    root = is_root(gram)
    mean = (exact.square().sum() if root else exact.diagonal().sum()) / columns
    damping = DAMPING * mean if mean > 0 else torch.ones_like(mean)
    damped = exact @ exact.T if root else exact
    damped.diagonal().add_(damping)
    factor = torch.linalg.cholesky(damped)
    if root:
        solved: Tensor = torch.linalg.solve_triangular(factor, exact, upper=False)
        diagonal: Tensor = (1 - solved.square_().sum(0)) / damping
        return diagonal
    return torch.cholesky_inverse(factor).diagonal().clone()


class Observer:
    """Adds up the inputs of a block's layers; layers fed by one tensor share their sums.

    What one tensor feeds is known when the block has run, so tensors are kept until then. A layer that
    shares its input at one time and not at another gets the total of all that it was fed.

    Args:
        modules: The layers, by any number.
        grams: Whether statistics are wanted; else there is only what is ``unknown``.
    """

    def __init__(self, modules: dict[int, nn.Module], *, grams: bool = True) -> None:
        self._modules = modules
        self._grams = grams
        self._fed: list[tuple[Tensor, set[int]]] = []
        self._sums: dict[frozenset[int], _InputSums] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the layers for one run of the block."""
        hooks = [
            module.register_forward_pre_hook(self._feeding(index), with_kwargs=True)
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
                self._sums[key] = _InputSums(tensor.shape[-1], tensor.device, grams=self._grams)
            self._sums[key].add(tensor)
        self._fed.clear()

    def _feeding(self, index: int) -> Callable[..., None]:
        def feed(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(named.values()))
            for tensor, users in self._fed:
                if tensor is inputs:
                    users.add(index)
                    return
            self._fed.append((inputs, {index}))

        return feed

    def finish(
        self, *, inverse: bool = True, without: Container[int] = ()
    ) -> list[tuple[list[int], dict[str, Tensor]]]:
        """Return the statistics of each set of layers that were fed the same.

        Args:
            inverse: Whether there is D, which takes longer than all else.
            without: Layers to leave out.
        """
        sharing: dict[tuple[frozenset[int], ...], list[int]] = {}
        for index in self._modules:
            keys = tuple(key for key in self._sums if index in key)
            if index not in without:
                sharing.setdefault(keys, []).append(index)
        result = []
        for keys, members in sharing.items():
            module = self._modules[members[0]]
            total = _InputSums(weight_matrix(module).shape[1], weight_matrix(module).device)
            for key in keys:
                total.merge(self._sums[key])
            result.append((members, total.finish(inverse=inverse)))
        return result

    @property
    def uncalled(self) -> set[int]:
        """The layers whose forward did not run."""
        return set(self._modules).difference(*self._sums)

    def unknown(self) -> dict[int, str]:
        """Return the layers whose inputs are not known, and why: whatever a metric gave them says nothing."""
        found = dict.fromkeys(self.uncalled, NEVER_CALLED)
        for index in self._modules.keys() - found.keys():
            sums = [each for key, each in self._sums.items() if index in key]
            if not any(each.tokens for each in sums):
                found[index] = NO_TOKEN
            elif not any(bool(each.second.any()) for each in sums):
                found[index] = ALL_ZERO
        return found
