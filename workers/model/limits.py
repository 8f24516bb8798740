"""Limits: the numbers of a configuration that no model has, refused before memory or time is taken."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from torch import Tensor, nn

from ...search.core.reading import Given
from .errors import ModelError

_MOST_BLOCKS = 1000
_MOST_PARTS = 10_000
_LARGEST = 1 << 31  # of any size or count
_MOST_PARAMETERS = 10**14
_BLOCKS = re.compile(r"(layers?|depth|block_count|n(um)?_blocks)$")
_PARTS = re.compile(r"labels|experts|codebooks|modules")  # transformers makes an object of each
# No sizes of a tensor. Of tokens of a text "no limit" is written as a very large number.
_UNBOUNDED = re.compile(r"position|length|seq|window|context|token|seed|max_len|truncat|theta|param|flops")


def check_numbers(given: Given) -> None:
    """Check that no number of a configuration is beyond all models; such take hours or terabytes to refuse.

    Raises:
        ModelError: When one is.
    """
    for name, member in given.members().items():
        value = member.value
        if isinstance(value, dict):
            check_numbers(member)
        elif isinstance(value, int) and not isinstance(value, bool):
            if _BLOCKS.search(name) and value > _MOST_BLOCKS:
                raise member.refused(f"at most {_MOST_BLOCKS:,} blocks")
            if _PARTS.search(name) and value > _MOST_PARTS:
                raise member.refused(f"at most {_MOST_PARTS:,}")
            if abs(value) >= _LARGEST and not _UNBOUNDED.search(name):
                raise member.refused(f"a size below {_LARGEST:,}")


def check_size(model: nn.Module, source: str) -> None:
    """Check that a model has no more parameters than any that could be planned for.

    Raises:
        ModelError: When it has.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MOST_PARAMETERS:
        raise ModelError(
            f"expected a model of at most {_MOST_PARAMETERS:.0e} parameters, got {source} with {count:.0e}"
        )


def check_memory(tensors: Iterable[Tensor], source: str) -> None:
    """Check that this machine could hold some tensors at once.

    Raises:
        ModelError: When it could not, whatever else runs.
    """
    needed = sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ModelError(
            f"expected a model that this machine can hold, got {source}, which needs {needed / 2**30:,.1f} "
            f"GiB of {there / 2**30:,.1f} GiB; use a larger machine"
        )
