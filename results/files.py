"""Output files: written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ..metrics_dsl.errors import SecateurError


def replace_file(path: str | Path, content: bytes) -> Path:
    """Write a file in one step: whoever opens it meanwhile sees the old content or the new.

    Of a link the file that it leads to is replaced, and the link stays.

    Raises:
        SecateurError: When there is something else than a file.
    """
    path = Path(path)
    check_file(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_file(path: str | Path) -> None:
    """Refuse a path that cannot become a file, before work is spent on its content.

    Raises:
        SecateurError: When it is a folder, a device or a pipe.
    """
    if Path(path).is_dir():
        raise SecateurError(f"expected a file to write, got the folder {path}; name a file in it")
    if Path(path).exists() and not Path(path).is_file():
        raise SecateurError(f"expected a file to write, got {path}, which is none; name another")
