"""Pages: HTML and SVG elements whose text is always escaped, and the one file around them."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from typing import Any

_EMPTY = ("input", "link", "meta")  # elements that have no end tag


class Markup(str):
    """Text that is HTML already; all other text is escaped when it enters an element."""


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element; ``class_`` stands for the attribute ``class``, ``data_of`` for ``data-of``.

    An attribute that is None or False is left out, one that is True has no value.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{escape(str(value), quote=True)}"')
    start = f"<{' '.join(parts)}>"
    return Markup(start if name in _EMPTY else f"{start}{joined(*children)}</{name}>")


def joined(*children: object) -> Markup:
    """Return children one after the other; None is left out."""
    return Markup(
        "".join(
            c if isinstance(c, Markup) else escape(str(c), quote=False) for c in children if c is not None
        )
    )


def document(title: str, body: Markup, data: Any) -> str:
    """Return a page that needs nothing but itself: style, script and data are inside.

    Its security policy allows this very style and script and no connection at all, so that nothing in a
    run, a metric or the name of a folder, can become code or call anywhere.
    """
    style, script = (
        files(__package__).joinpath(name).read_text("utf-8") for name in ("report.css", "report.js")
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    head = joined(
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="generator", content="secateur"),
        element("link", rel="icon", href="data:,"),  # else a browser asks the server for one
        element("title", title),
        element("style", Markup(style)),
    )
    # A script element ends at the first "</script", wherever it stands; JSON can do without "<".
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    inside = joined(
        body,
        element("script", Markup(text), type="application/json", id="run-data"),
        element("script", Markup(script)),
    )
    page = element("html", element("head", head), element("body", inside), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
