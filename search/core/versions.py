"""Versions of the libraries that figures depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def library_versions(*names: str) -> dict[str, str]:
    """Return versions by name, also of ``python``; what is not installed is left out."""
    found = {}
    for name in names:
        try:
            found[name] = platform.python_version() if name == "python" else version(name)
        except PackageNotFoundError:
            continue
    return found
