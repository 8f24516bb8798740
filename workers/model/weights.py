"""Weights: where those of a decoder's blocks are, all in memory or in files from which one block is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .errors import ModelError


class BlockWeights(Protocol):
    """Where the weights of a decoder's blocks are.

    Attributes:
        how: The same in words.
        in_files: Whether a block's weights are in memory only while someone asks for them.
    """

    how: str
    in_files: bool

    def of(self, block: int) -> AbstractContextManager[None]:
        """Have a block's weights in memory; what is changed in them may be forgotten afterwards."""

    def keep(self, blocks: range) -> None:
        """Have some blocks' weights in memory from now on."""

    def check(self) -> None:
        """Check that all of them are finite, before work begins that would come to them late."""


class WeightsInMemory:
    """The weights of all blocks are in memory all the time."""

    how = "held in memory"
    in_files = False

    @contextmanager
    def of(self, block: int) -> Iterator[None]:
        """Do nothing: the weights are there."""
        yield

    def keep(self, blocks: range) -> None:
        """Do nothing: the weights are there."""

    def check(self) -> None:
        """Do nothing: weights are checked when they are loaded."""


class WeightFiles:
    """Tensors in safetensors files, read by name.

    Attributes:
        shapes: The shape of each tensor by name.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._states = {path: _state(path) for path in paths}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                    self._paths[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def find(self, name: str, shape: Sequence[int], prefix: str) -> str | None:
        """Return the name, or that without a prefix, which has a tensor of that shape; None if none has."""
        names = (name, name.removeprefix(f"{prefix}."))
        return next((there for there in names if self.shapes.get(there) == tuple(shape)), None)

    def stored(self, name: str) -> Tensor:
        """Return a tensor as a view of its file.

        Raises:
            ModelError: When somebody has written the file since the others were read.
        """
        path = self._paths[name]
        if _state(path) != self._states[path]:
            raise ModelError(
                f"expected a model that nobody writes meanwhile, got {path}, which has changed; start again"
            )
        # Opened for each tensor: an open file keeps all pages in memory that were ever read through it.
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor of its own memory.

        Raises:
            ModelError: When it is not finite.
        """
        tensor = self.stored(name).to(device=device, dtype=dtype, copy=True)
        self._check(name, tensor)
        return tensor

    def check(self, name: str) -> None:
        """Check a tensor as it stands in its file.

        Raises:
            ModelError: When it is not finite.
        """
        self._check(name, self.stored(name))

    def _check(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() and not all(bool(bound.isfinite()) for bound in torch.aminmax(tensor)):
            raise ModelError(
                f"expected finite weights, got some that are not in {name} of {self._paths[name].parent}; "
                "bring the model here again"
            )


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what changes with a file's content; None where there is none any more."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class WeightsInFiles:
    """The weights of a block are read when it runs, or when someone asks for it, and released again.

    Args:
        blocks: The blocks, without weights.
        prefix: Their name in the model.
        files: The model's files.
        names: The name in the files of each of the model's tensors.
        device: Where weights are put.
    """

    how = "read block by block"
    in_files = True

    def __init__(
        self,
        blocks: nn.ModuleList,
        prefix: str,
        files: WeightFiles,
        names: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self._blocks = blocks
        self._prefix = prefix
        self._files = files
        self._names = names
        self._device = device
        self._present: int | None = None
        self._kept = range(0)
        for index, block in enumerate(blocks):
            block.forward = self._reading(index, block.forward)

    @contextmanager
    def of(self, block: int) -> Iterator[None]:
        """Have a block's weights in memory; changes to them are forgotten afterwards."""
        if block == self._present or block in self._kept:
            yield
            return
        module, before = self._blocks[block], self._present
        empty = module.state_dict()
        module.load_state_dict(self._read(block, empty), assign=True)
        self._present = block
        try:
            yield
        finally:
            self._present = before
            module.load_state_dict(empty, assign=True)

    def keep(self, blocks: range) -> None:
        """Have some blocks' weights in memory from now on."""
        for block in blocks:
            module = self._blocks[block]
            module.load_state_dict(self._read(block, module.state_dict()), assign=True)
        self._kept = blocks

    def check(self) -> None:
        """Read all blocks' weights once, one at a time.

        Raises:
            ModelError: When some are not finite.
        """
        for name in self._names.values():
            self._files.check(name)

    def _read(self, block: int, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {name: self._names[f"{self._prefix}.{block}.{name}"] for name in empty}
        return {
            name: self._files.read(there, empty[name].dtype, self._device) for name, there in names.items()
        }

    def _reading(self, block: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def read_and_run(*args: Any, **kwargs: Any) -> Any:
            with self.of(block):
                return forward(*args, **kwargs)

        return read_and_run


def fill(
    model: nn.Module, blocks: nn.ModuleList, prefix: str, files: WeightFiles, device: torch.device
) -> WeightsInFiles | None:
    """Give an empty model the weights outside its blocks; return those of the blocks, read when they run.

    Args:
        model: A model whose parameters are on the meta device.
        blocks: Its blocks.
        prefix: Their name in the model.
        files: The model's files.
        device: Where weights are put.

    Returns:
        None, and the model as it was, unless the files hold every tensor under the name and in the shape that
        it has in the model. Of what they hold otherwise transformers makes the model's tensors.

    Raises:
        ModelError: When weights are not finite.
    """
    base = str(getattr(model, "base_model_prefix", ""))
    names: dict[str, str] = {}
    tied: dict[int, list[str]] = {}  # the names of one tensor
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
        there = files.find(name, tensor.shape, base)
        if there is not None:
            names[name] = there
    read: dict[int, Tensor] = {}
    for key, own in tied.items():
        stored = list(dict.fromkeys(names[name] for name in own if name in names))
        if any(name.startswith(f"{prefix}.") for name in own):
            if len(own) > 1 or not stored:
                return None
            continue
        found = [files.read(there, state[own[0]].dtype, device) for there in stored]
        if not found or not all(torch.equal(found[0], other) for other in found[1:]):
            return None  # not there, or tied by the configuration and different in the files
        read[key] = nn.Parameter(found[0], False) if isinstance(state[own[0]], nn.Parameter) else found[0]
    for module in model.modules():
        own_tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own_tensors:
            for name, value in tensors.items():
                if value is not None and (id(value) in read or not value.is_meta):
                    tensors[name] = read.get(id(value), value).to(device)
    return WeightsInFiles(blocks, prefix, files, names, device)
