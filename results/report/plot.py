"""Plots: single pictures of a run as SVG, PNG or PDF, for papers and slides."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ...metrics_dsl.errors import SecateurError
from ...search.core.files import Output, whole
from ...search.core.objectives import OBJECTIVES, look_up
from ..archive.archive import Archive
from ..summary.overview import Overview
from .svg import axis, depth_ticks, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_MARK = "secateur plot"  # where a picture says what made it, by which an earlier one is known
_END = 1 << 16  # bytes at the beginning of a PNG file, or at the end of a PDF file, that hold what it says


def _is_svg(file: BinaryIO) -> bool:
    head = rb"<\?xml [^<>]*>\s*<!DOCTYPE svg [^<>]*>\s*<svg [^<>]*>\s*<metadata>.*?<dc:creator>"
    mark = rb"\s*<cc:Agent>\s*<dc:title>" + _MARK.encode() + rb"</dc:title>"
    return re.match(head + mark, file.read(4096), re.DOTALL) is not None


def _is_png(file: BinaryIO) -> bool:
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return False
    # Texts stand before the picture.
    while file.tell() < _END and len(start := file.read(8)) == 8 and start[4:] != b"IDAT":
        size = int.from_bytes(start[:4], "big")
        if start[4:] == b"tEXt" and file.read(min(size, 64)) == b"Software\0" + _MARK.encode():
            return True
        file.seek(size - (min(size, 64) if start[4:] == b"tEXt" else 0) + 4, io.SEEK_CUR)
    return False


def _is_pdf(file: BinaryIO) -> bool:
    if file.read(5) != b"%PDF-":
        return False
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _END))
    end = file.read(_END)
    # A thesis may have our picture in it, with all that this says of itself; the last word is the thesis's.
    trailers = re.findall(rb"trailer\s*<<[^<>]*/Info (\d+) 0 R", end)
    said = re.search(rb"\n%b 0 obj\s*<<([^<>]*)>>" % trailers[-1], end) if trailers else None
    return said is not None and b"/Creator (%b)" % _MARK.encode() in said[1]


@dataclass(frozen=True)
class Picture:
    """A form that a picture can have.

    Attributes:
        output: What it is, and how an earlier one is known.
        metadata: What it says of itself; the date is left out, for it is another each time.
    """

    output: Output
    metadata: Mapping[str, str | None]


PICTURES = {  # by suffix
    ".svg": Picture(
        Output("a file to write, new or an earlier SVG picture", replaces=_is_svg),
        {"Creator": _MARK, "Date": None},
    ),
    ".png": Picture(
        Output("a file to write, new or an earlier PNG picture", replaces=_is_png), {"Software": _MARK}
    ),
    ".pdf": Picture(
        Output("a file to write, new or an earlier PDF picture", replaces=_is_pdf),
        {"Creator": _MARK, "CreationDate": None},
    ),
}
# Of Okabe and Ito's palette, which people tell apart whatever colours they see; marks differ in shape too.
_FOUND, _PUBLISHED, _OTHER = "#0072B2", "#D55E00", "#8A8A8A"


def write_plot(archive: Archive, kind: str, path: str | Path, *, force: bool = False) -> Path:
    """Write one picture of a run, the same bytes every time, replacing an earlier one in one step.

    Args:
        archive: Open for reading.
        kind: One of ``PLOTS``.
        path: The file; its suffix says which of ``PICTURES`` it becomes.
        force: Take the place of any file that is of no run or calibration.

    Raises:
        SecateurError: For an unknown kind or suffix, a path that cannot become a file or holds another,
            or when the run has nothing to draw yet.
    """
    look_up(PLOTS, kind, "a kind of plot")
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURES:
        raise SecateurError(f"expected a file that ends in {', '.join(PICTURES)}, got {path}")
    with whole(path, replace(PICTURES[suffix].output, force=force), archive.folder) as place:
        with archive.reading():
            content = _drawn(Overview(archive), kind, suffix)
        place.write_bytes(content)
    return Path(path).resolve()


def draw(archive: Archive, kind: str, axes: Axes | None = None) -> Axes:
    """Draw one picture of a run on matplotlib's axes, by default those of a new figure of pyplot.

    Raises:
        SecateurError: For an unknown kind, or when the run has nothing to draw yet.
    """
    look_up(PLOTS, kind, "a kind of plot")
    view = Overview(archive)
    _check(view)
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.figure(figsize=_size(kind), layout="constrained").add_subplot()
    PLOTS[kind](view, axes)
    return axes


def _size(kind: str) -> tuple[float, float]:
    """Return width and height of a picture in inches."""
    return (7.2, 2.9) if kind == "ratios" else (5.2, 3.6)


def _check(view: Overview) -> None:
    if view.front.empty:
        raise SecateurError(
            f"expected candidates with {' and '.join(view.objectives)} to plot, got none in {view.folder}"
        )


def _drawn(view: Overview, kind: str, suffix: str) -> bytes:
    _check(view)
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    # Without these two, names in the file are random and its date is now.
    with rc_context({"svg.hashsalt": "secateur", "font.size": 9}):
        figure = Figure(figsize=_size(kind), layout="constrained")
        PLOTS[kind](view, figure.subplots())
        content = io.BytesIO()
        with warnings.catch_warnings():  # a letter that the font lacks, say, in the name of a layer
            warnings.simplefilter("ignore")
            figure.savefig(content, format=suffix[1:], dpi=200, metadata=dict(PICTURES[suffix].metadata))
    if suffix != ".svg":
        return content.getvalue()
    # Comments repeat each text as it is in the archive, beside its outlines.
    return re.sub(rb"<!--.*?-->", b"", content.getvalue(), flags=re.DOTALL)


def _front(view: Overview, axes: Axes) -> None:
    up, *others = view.objectives
    rows = view.decided.assign(number=view.decided.index + 1)
    across = others[0] if others else "number"
    legend: list[
        tuple[tuple[Line2D, ...], str]
    ] = []  # marks, one on the other as in the picture, and meaning

    def dots(rows: pd.DataFrame, meaning: str, shape: str, *line: Line2D, **look: Any) -> None:
        if len(rows):
            legend.append(((*line, *axes.plot(rows[across], rows[up], shape, **look)), meaning))

    is_published = rows.index.isin(view.baselines.index)
    is_front = rows.index.isin(view.front.index)
    dots(rows[~is_published & ~is_front], "found", "o", color=_OTHER, ms=3, alpha=0.6)
    dots(rows[is_published & ~is_front], "published", "D", mfc="none", color=_PUBLISHED, ms=5)
    front = rows[is_front].sort_values(across, kind="stable")
    steps: tuple[Any, Any] = front[across], np.minimum.accumulate(front[up])
    if not others:
        history = view.history()
        steps = [*history.index + 1, len(view.rows)], [*history["best"], history["best"].iloc[-1]]
    (line,) = axes.step(*steps, where="post", color=_FOUND, lw=1)
    what = "on the front" if others else "best so far"
    is_both = front.index.isin(view.baselines.index)
    dots(front[~is_both], f"found, {what}", "o", line, color=_FOUND, ms=5)
    dots(front[is_both], f"published, {what}", "D", line, color=_FOUND, ms=5)
    _name_axes(axes, "number of the candidate" if across == "number" else across, up)
    _scale(axes, rows[up], rows[across] if others else None)
    axes.legend(*zip(*legend, strict=True), frameon=False)


def _history(view: Overview, axes: Axes) -> None:
    volumes = view.hypervolume()
    if view.is_interval and not volumes.empty:  # the least KL is that of the least sparsity
        axes.step(volumes["tokens"], volumes["hypervolume"], where="post", color=_FOUND)
        _name_axes(axes, "tokens run through pruned models", "hypervolume")
        return
    history, up = view.history(), view.objectives[0]
    costs = view.costs()
    unit = "tokens" if costs["tokens"].max() > 0 else "seconds"  # a run that screens runs no tokens
    end = costs[unit].max()
    axes.step([*history[unit], end], [*history["best"], history["best"].iloc[-1]], where="post",
              color=_FOUND, label="best so far")  # fmt: skip
    best = view.best_published
    if best is not None:
        axes.axhline(best[up], color=_PUBLISHED, ls="--", lw=1, label="best published")
    _name_axes(axes, "tokens run through pruned models" if unit == "tokens" else "seconds of measuring", up)
    _scale(axes, history["best"], None)
    axes.legend(frameon=False)


def _ratios(view: Overview, axes: Axes) -> None:
    best = view.best
    assert best is not None  # the front has a row
    ratios = view.vectors([best])[best]
    if len(ratios) != len(view.layers):
        raise SecateurError(
            f"expected an archive that names its layers for a plot of ratios, got {view.folder} without"
        )
    kinds = list(dict.fromkeys(layer.kind for layer in view.layers))
    blocks = sorted({layer.block for layer in view.layers})
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for layer, ratio in zip(view.layers, ratios, strict=True):
        grid[kinds.index(layer.kind), blocks.index(layer.block)] = ratio
    middle = view.target(ratios)
    reach = max(float(np.nanmax(np.abs(grid - middle))), 0.02)
    # Orange loses more than the model as a whole, violet less: apart for every kind of sight.
    image = axes.imshow(
        grid, cmap="PuOr_r", vmin=middle - reach, vmax=middle + reach, aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(len(kinds)), kinds)
    ticks = depth_ticks(len(blocks))
    axes.set_xticks(ticks, [str(blocks[i]) for i in ticks])
    axes.set_xlabel("decoder block")
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label=f"ratio; the model: {middle:.1%}", fraction=0.05, pad=0.02)


PLOTS: dict[str, Callable[[Overview, Axes], None]] = {
    "front": _front,
    "history": _history,
    "ratios": _ratios,
}


def _name_axes(axes: Axes, across: str, up: str) -> None:
    units = {"kl": "KL, nats per token", "size": "size, nodes of the metric"}
    titles = {name: objective.title for name, objective in OBJECTIVES.items()} | units
    axes.set_xlabel(titles.get(across, across.replace("_", " ")))
    axes.set_ylabel(titles.get(up, up.replace("_", " ")))
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: Axes, up: object, across: object) -> None:
    """Draw what spans much on a logarithmic axis, with plain numbers, as the report does."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for values, to, line in ((up, axes.set_yscale, axes.yaxis), (across, axes.set_xscale, axes.xaxis)):
        scale = axis("", [] if values is None else np.asarray(values, dtype=float).tolist())
        if scale.is_log:
            to("log")
            line.set_major_locator(FixedLocator(scale.ticks()))
            line.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            line.set_minor_locator(NullLocator())
