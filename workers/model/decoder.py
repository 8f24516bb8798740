"""Decoders: finding a model's blocks and linear layers, and running it block by block.

Nothing here knows the names of an architecture. Blocks are the module list that holds most linear
weights; what a block is called with is recorded and passed on as it came.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ...search.core.candidate import Layer
from ...search.core.coverage import Coverage, StaysDense
from .block_calls import Batch, BlockCall, find_hidden, hidden_of
from .errors import ModelError
from .weights import BlockWeights, WeightsInMemory

_CONV1D = ("transformers.pytorch_utils", "Conv1D")


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return a linear layer's weight as the module stores it."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def oriented(module: nn.Module, stored: Tensor) -> Tensor:
    """Return a view (rows, columns) = (outputs, inputs) of a tensor that is stored as a module's weight is.

    Linear layers are stored that way; GPT-2's Conv1D is stored transposed. So given a view (rows, columns)
    the function returns the stored form.
    """
    return stored if isinstance(module, nn.Linear) else stored.T


def weight_matrix(module: nn.Module) -> Tensor:
    """Return a linear layer's weight as a view (rows, columns) = (outputs, inputs)."""
    return oriented(module, weight_of(module).detach())


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies its inputs with its weight and does nothing else with it.

    A subclass with a forward of its own may do anything, and so may one that was replaced on the module. A
    weight that is no parameter is computed from others, and one of a tensor class of its own is packed.
    """
    weight = module._parameters.get("weight")
    if weight is None or hasattr(weight, "__tensor_flatten__") or "forward" in module.__dict__:
        return False
    owner = next(each for each in type(module).__mro__ if "forward" in vars(each))
    is_known = owner is nn.Linear or (owner.__module__, owner.__qualname__) == _CONV1D
    return is_known and weight.ndim == 2 and weight.is_floating_point()


class _ReachedError(Exception):
    """Raised to leave a forward pass once the blocks' arguments are known."""


class Decoder:
    """A causal language model seen as embedding, blocks and head.

    Attributes:
        model: The transformers model.
        prefix: The name of its decoder blocks in it.
        blocks: Its decoder blocks.
        weights: Where their weights are.
        held: The blocks whose weights are here; None for all.
        layers: The prunable layers in model order.
        modules: The layers' modules, in the same order.
        stays_dense: Parameters inside blocks, of two or more dimensions, that are no prunable layer's.

    Raises:
        ModelError: When there are no decoder blocks with linear layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.prefix, self.blocks = _find_blocks(model)
        self.weights: BlockWeights = WeightsInMemory()
        self.layers: list[Layer] = []
        self.modules: list[nn.Module] = []
        shared = self._shared()
        pruned: set[int] = set()
        for index, block in enumerate(self.blocks):
            for name, module in block.named_modules():
                # A tied weight belongs to several modules: pruning it here would prune it there.
                if _is_linear(module) and id(weight_of(module)) not in shared:
                    rows, columns = weight_matrix(module).shape
                    kind = name.rpartition(".")[2] or "linear"
                    full = f"{self.prefix}.{index}.{name}".rstrip(".")
                    self.layers.append(Layer(full, index, kind, rows, columns))
                    self.modules.append(module)
                    pruned.add(id(weight_of(module)))
        if not self.layers:
            raise ModelError("expected linear layers of their own in the decoder blocks, found none")
        self.stays_dense = [
            StaysDense(f"{self.prefix}.{name}", tuple(p.shape), self._why_dense(name, id(p) in shared))
            for name, p in self.blocks.named_parameters()
            if p.ndim >= 2 and id(p) not in pruned
        ]
        self.held: range | None = None
        self._tuples: list[int] | None = None  # length of each block's output tuple, 0 for a tensor

    @property
    def coverage(self) -> Coverage:
        """Which part of the blocks' weights is prunable, and what stays dense."""
        prunable = sum(layer.size for layer in self.layers)
        rest = sum(one.weights for one in self.stays_dense)
        return Coverage(prunable, prunable + rest, tuple(self.stays_dense))

    def leave_dense(self, reasons: Mapping[str, str]) -> None:
        """Have some layers be none, which moves those behind them up.

        Args:
            reasons: Why they stay dense, by name of the layer, as ``StaysDense`` has it.

        Raises:
            ModelError: When no layer remains.
        """
        pairs = list(zip(self.layers, self.modules, strict=True))
        self.stays_dense += [
            StaysDense(f"{layer.name}.weight", tuple(weight_of(module).shape), reasons[layer.name])
            for layer, module in pairs
            if layer.name in reasons
        ]
        kept = [pair for pair in pairs if pair[0].name not in reasons]
        if not kept:
            name, why = next(iter(reasons.items()))
            raise ModelError(f"expected linear layers that can be pruned, got none: {name} {why}")
        self.layers, self.modules = [layer for layer, _ in kept], [module for _, module in kept]

    @property
    def device(self) -> torch.device:
        """Where the model's weights are, or are put."""
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return weight_of(embedding).device

    def fingerprints(self) -> list[str]:
        """Return a hash of each layer's name, shape and some weights; none of what is not held."""
        return [
            self.fingerprint(i) if self.held is None or layer.block in self.held else ""
            for i, layer in enumerate(self.layers)
        ]

    def fingerprint(self, index: int) -> str:
        """Return a hash of a layer's name, shape and some weights."""
        layer = self.layers[index]
        flat = weight_of(self.modules[index]).detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)].bfloat16().float().cpu()  # alike in both types
        described = f"{layer.name} {layer.rows} {layer.columns}".encode()
        return hashlib.sha256(described + some.numpy().tobytes()).hexdigest()

    @torch.no_grad()
    def enter(self, ids: Tensor) -> Batch:
        """Return sequences (sequences, tokens) ready to run through the blocks one by one."""
        ids = ids.to(self.device)
        calls: list[BlockCall] = []

        def record(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls.append(BlockCall(args, kwargs, find_hidden(args, kwargs)))
                if index + 1 == len(self.blocks):
                    raise _ReachedError
                return self._wrap(index, hidden_of(calls[-1]))

            return forward

        self._learn_outputs(ids)
        with self._patched(record), suppress(_ReachedError):
            self.model(input_ids=ids, use_cache=False)
        return Batch(ids, hidden_of(calls[0]), calls)

    @torch.no_grad()
    def run_block(self, index: int, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the hidden states (sequences, tokens, width) after a block."""
        args, kwargs = batch.calls[index].with_hidden(hidden)
        output = self.blocks[index](*args, **kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def run_block_with(self, index: int, batch: Batch, hidden: Tensor, weights: dict[int, Tensor]) -> Tensor:
        """Return what ``run_block`` does with other weights (rows, columns), differentiable in them."""
        names = {id(module): name for name, module in self.blocks[index].named_modules()}
        own = {
            f"{names[id(self.modules[i])]}.weight".removeprefix("."): oriented(self.modules[i], weight)
            for i, weight in weights.items()
        }
        args, kwargs = batch.calls[index].with_hidden(hidden)
        output = torch.func.functional_call(self.blocks[index], own, args, kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def leave(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what follows the last block: (final hidden states, logits), in 32-bit floats.

        The model's own forward runs with its blocks replaced, so that norms, scaling and capping of
        logits are the model's. Final hidden states are what the output embedding is given.
        """
        final: list[Tensor] = []
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _module, args: final.append(args[0]))
        try:
            with self._giving(hidden):
                logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        return final[0].float(), logits.float()

    def loss(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the model's own mean next-token loss for hidden states after the last block."""
        with self._giving(hidden):
            loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    @contextmanager
    def with_weights(self, weights: dict[int, Tensor]) -> Iterator[None]:
        """Run with other weights (rows, columns) for some layers, by index; the dense ones return."""
        dense = {index: weight_of(self.modules[index]).data for index in weights}
        try:
            for index, weight in weights.items():
                module = self.modules[index]
                weight_of(module).data = oriented(module, weight)
            yield
        finally:
            for index, weight in dense.items():
                weight_of(self.modules[index]).data = weight

    def _shared(self) -> set[int]:
        """Return the identities of parameters that several modules have, or modules of several blocks."""
        owners = Counter(
            id(p) for module in self.model.modules() for p in module._parameters.values() if p is not None
        )
        users = Counter(id(p) for block in self.blocks for p in block.parameters())
        return {parameter for counts in (owners, users) for parameter, n in counts.items() if n > 1}

    def _why_dense(self, name: str, is_shared: bool) -> str:
        """Return why a parameter of the blocks stays dense from the outset."""
        if is_shared:
            return "is shared by several modules"
        module = self.blocks.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            return f"belongs to {type(module).__name__} with a forward or weights of its own kind"
        return f"belongs to {type(module).__name__}, which is no linear layer"

    def _giving(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Have the last block return given hidden states, and no other block do anything."""
        last = len(self.blocks) - 1

        def skip(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                own = (
                    hidden if index == last else hidden_of(BlockCall(args, kwargs, find_hidden(args, kwargs)))
                )
                return self._wrap(index, own)

            return forward

        return self._patched(skip)

    def _wrap(self, index: int, hidden: Tensor) -> Any:
        """Return hidden states in the form in which a block returns them."""
        assert self._tuples is not None
        length = self._tuples[index]
        return (hidden, *(None,) * (length - 1)) if length else hidden

    def _learn_outputs(self, ids: Tensor) -> None:
        if self._tuples is not None:
            return
        if self.held is not None:
            self._tuples = [self._length_of_output(ids)] * len(self.blocks)
            return
        lengths: list[int] = []
        hooks = [
            block.register_forward_hook(
                lambda _m, _a, out: lengths.append(len(out) if isinstance(out, tuple) else 0)
            )
            for block in self.blocks
        ]
        try:
            self.model(input_ids=ids[:1, :8], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if len(lengths) != len(self.blocks):
            raise ModelError(
                f"expected each of the {len(self.blocks)} blocks to run once a pass, got "
                f"{len(lengths)} runs; this architecture cannot be measured block by block"
            )
        self._tuples = lengths

    def _length_of_output(self, ids: Tensor) -> int:
        """Return the length of the first held block's output tuple, 0 for a tensor."""
        assert self.held is not None
        calls: list[BlockCall] = []

        def reach(_index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls.append(BlockCall(args, kwargs, find_hidden(args, kwargs)))
                raise _ReachedError

            return forward

        with self._patched(reach), suppress(_ReachedError):
            self.model(input_ids=ids[:1, :8], use_cache=False)
        output = self.blocks[self.held.start](*calls[0].args, **calls[0].kwargs)
        return len(output) if isinstance(output, tuple) else 0

    @contextmanager
    def _patched(self, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Replace the blocks' forward functions for a while."""
        before = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for index, block in enumerate(self.blocks):
                block.forward = make(index)
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = forward


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the module list that holds the most linear weights."""
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(weight_matrix(m).numel() for m in module.modules() if _is_linear(m))
            if size and (best is None or size > best[0]):  # an outer list comes before inner ones
                best = (size, name, module)
    if best is None:
        raise ModelError(
            f"expected a decoder with a list of blocks of linear layers, got {type(model).__name__} "
            "without one"
        )
    return best[1], best[2]
