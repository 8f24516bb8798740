"""GGUF: a file's header, looked through before anything believes what it says of sizes."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from torch import nn

from ...search.core.reading import Given, check_file
from .errors import ModelError
from .limits import check_numbers

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32
_STRETCHED = ("gpt-oss",)  # families whose rope.scaling transformers reads
_NEEDED = ("block_count", "embedding_length")


def check_gguf(path: Path) -> int:
    """Check that a file's header fits the file, and describes a model; return how many weights it holds.

    Raises:
        ModelError: When it does not.
    """
    check_file(path, "a .gguf file", ModelError)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Header(content, path).check()
    except ModelError:
        raise
    except (OSError, ValueError) as problem:  # mmap has no empty files
        raise ModelError(f"expected a .gguf file, got {path}: {problem}") from None


def check_all_read(model: nn.Module, path: Path) -> None:
    """Check that a model holds all weights of its file: transformers leaves out what it does not know.

    Such are biases that a family seldom has, and how Llama 3.1 stretches its positions (``rope_freqs``).

    Raises:
        ModelError: When it does not.
    """
    there = check_gguf(path)
    own = sum({id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}.values())
    if there > own:
        raise ModelError(
            f"expected a .gguf file of which transformers reads all, got {path}, where it leaves out "
            f"{there - own:,} of {there:,} weights; give the model that it was made from"
        )


class _Header:
    """A header, read from its beginning to its end."""

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self._content = content
        self._path = path
        self._at = 0
        self._weights = 0

    def check(self) -> int:
        if self._content[:4] != b"GGUF":
            raise self._refused("which does not begin with GGUF")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise self._refused(f"whose version is {version}, not 2 or 3")
        tensors, entries = int(self._number("<Q")), int(self._number("<Q"))
        values = {}
        for _ in range(self._count(entries, 13)):
            name = self._text()
            values[name] = self._value(int(self._number("<I")))
        check_numbers(Given(values, str(self._path), ModelError))
        family = values.get("general.architecture")
        for name in _NEEDED:
            if f"{family}.{name}" not in values:
                raise self._refused(f"which lacks {family}.{name}")
        scaling = values.get(f"{family}.rope.scaling.type", "none")
        if scaling != "none" and family not in _STRETCHED:
            raise self._refused(
                f"whose positions are stretched ({scaling}), which transformers does not read from one; give "
                "the model that it was made from"
            )
        ends = [self._tensor() for _ in range(self._count(tensors, 24))]
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise self._refused(f"whose alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        if ends and start + max(ends) > len(self._content):
            raise self._refused(
                f"which has {len(self._content)} bytes where its tensors end at {start + max(ends)}; bring "
                "it here again"
            )
        return self._weights

    def _tensor(self) -> int:
        """Return where a tensor ends, counted from where the first begins."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text()
        count = int(self._number("<I"))
        if count > _MOST_DIMENSIONS:
            raise self._refused(f"with {count} dimensions of {name!r}")
        size = math.prod(int(self._number("<Q")) for _ in range(count))
        self._weights += size
        kind, offset = int(self._number("<I")), int(self._number("<Q"))
        if kind not in {*GGMLQuantizationType}:
            raise self._refused(f"with {name!r} of the unknown type {kind}")
        values, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return offset + -(-size // values) * width

    def _value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            raise self._refused(f"with a value of the unknown kind {kind}")
        inner, count = int(self._number("<I")), int(self._number("<Q"))
        if inner in _SCALARS:
            self._skip(struct.calcsize(_SCALARS[inner]) * count)
        elif inner == _TEXT:
            for _ in range(self._count(count, 8)):
                self._skip(int(self._number("<Q")))
        else:
            raise self._refused(f"with a list of values of the kind {inner}")
        return None  # lists are of the tokenizer, which reads them itself

    def _text(self) -> str:
        size = int(self._number("<Q"))
        start = self._at
        self._skip(size)
        return self._content[start : self._at].decode("utf-8", "replace")

    def _number(self, kind: str) -> int | float:
        start = self._at
        self._skip(struct.calcsize(kind))
        found: int | float = struct.unpack_from(kind, self._content, start)[0]
        return found

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._content):
            raise self._refused("which ends within its header; bring it here again")

    def _count(self, count: int, least: int) -> int:
        """Return how many of something follow, of so many bytes at least, which must be there."""
        if count * least > len(self._content) - self._at:
            raise self._refused(f"whose header promises {count:,} entries, more than there is room for")
        return count

    def _refused(self, what: str) -> ModelError:
        return ModelError(f"expected a .gguf file, got {self._path}, {what}")
