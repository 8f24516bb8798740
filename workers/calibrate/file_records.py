"""File records: size and SHA-256 of files as they were written, and whether they still are so."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from ...metrics_dsl.errors import SecateurError
from ...search.core.reading import Given, check_file

# SHA-256 by path and state of a file: what has been read once in this process is not read again.
_known: dict[tuple[str | int, ...], str] = {}


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was written: its size in bytes and the SHA-256 of its content."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Return the record of a file."""
        return cls(path.stat().st_size, _sha256(path))

    @classmethod
    def read(cls, given: Given) -> FileRecord:
        """Return what a manifest says of a file."""
        return cls(given.field("bytes").count(), given.field("sha256").text())

    def check_size(self, path: Path, error: type[SecateurError]) -> None:
        """Check that there is a file of that size, which opens nothing.

        Raises:
            SecateurError: As ``error``.
        """
        check_file(path, "a file that calibration wrote", error)
        if (size := path.stat().st_size) != self.bytes:
            raise error(f"expected {self.bytes:,} bytes in {path}, as calibration wrote it, got {size:,}")

    def check(self, path: Path, error: type[SecateurError]) -> None:
        """Check that a file is what it was; it is read once in a process as long as nobody writes it.

        Raises:
            SecateurError: As ``error``.
        """
        self.check_size(path, error)
        status = os.stat(path)
        state = (str(path.absolute()), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
                 status.st_ctime_ns)  # fmt: skip
        if state not in _known:
            _known[state] = _sha256(path)
        if _known[state] != self.sha256:
            raise error(f"expected {path} as calibration wrote it, got other content of the same size")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
