"""Headers of GGUF files, walked through before a library believes the sizes that they state.

The format is described in ggml's repository (docs/gguf.md): a magic number, a version, two counts, then
named values and tensors.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

from ...metrics_dsl.errors import SecateurError
from ...search.core.reading import check_file

_VERSIONS = (2, 3)
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value, by its type
_TEXT, _ARRAY = 8, 9
_MOST = 1 << 20  # named values, and tensors
_DEEPEST = 4  # arrays of arrays
_MOST_DIMENSIONS = 8


def check_gguf(path: Path, error: type[SecateurError]) -> None:
    """Check that a file is GGUF and holds as much as its header says.

    Raises:
        SecateurError: As ``error``.
    """
    check_file(path, "a .gguf file", error)
    try:
        with path.open("rb") as file:
            wrong = _Walk(file, path.stat().st_size).wrong()
    except OSError as problem:
        raise error(f"expected a .gguf file, got {path}: {problem.strerror}") from None
    if wrong:
        raise error(f"expected a .gguf file, got {path}, {wrong}; bring it here again")


class _DamagedError(Exception):
    """Raised where a header says what cannot be."""


class _Walk:
    """One walk through a header.

    Args:
        file: Open for reading bytes.
        size: How many bytes it has.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self._size = size

    def wrong(self) -> str:
        """Return what is wrong with the file in words that follow on its name; nothing for a good one."""
        try:
            if self._file.read(4) != b"GGUF":
                return "which does not begin as one"
            if (version := self._number("I")) not in _VERSIONS:
                return f"of version {version}"
            tensors, values = self._count(), self._count()
            for _ in range(values):
                self._skip(self._number("Q"))
                self._value(self._number("I"), 0)
            for _ in range(tensors):
                self._skip(self._number("Q"))
                if (dimensions := self._number("I")) > _MOST_DIMENSIONS:
                    return f"with a tensor of {dimensions} dimensions"
                self._skip(8 * dimensions + 4)
                if self._number("Q") > self._size:
                    return "which ends before its last tensor"
        except _DamagedError as error:
            return str(error)
        return ""

    def _number(self, form: str) -> int:
        content = self._file.read(struct.calcsize(form))
        if len(content) < struct.calcsize(form):
            raise _DamagedError("which ends within its header")
        (found,) = struct.unpack(f"<{form}", content)
        return int(found)

    def _count(self) -> int:
        if (found := self._number("Q")) > _MOST:
            raise _DamagedError(f"whose header counts {found:,} entries")
        return found

    def _skip(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise _DamagedError("which ends within its header")
        self._file.seek(count, 1)

    def _value(self, kind: int, depth: int) -> None:
        if kind in _BYTES:
            self._skip(_BYTES[kind])
        elif kind == _TEXT:
            self._skip(self._number("Q"))
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, count = self._number("I"), self._number("Q")
            if inner in _BYTES:
                self._skip(count * _BYTES[inner])
                return
            if count > self._size:  # each entry takes more than a byte
                raise _DamagedError("which ends within its header")
            for _ in range(count):
                self._value(inner, depth + 1)
        else:
            raise _DamagedError(f"with a value of the type {kind}")
