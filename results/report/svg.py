"""Charts: axes and points as SVG that a page's style sheet colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .html import Markup, element, joined

WIDTH, HEIGHT = 560, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 36, 54
_FINEST = 0.4  # steps below this width do not show
_LOG_SPAN = 6.0  # values that span more than this are told apart on a logarithmic axis only


@dataclass(frozen=True)
class Axis:
    """What an axis shows, from ``low`` to ``high``."""

    label: str
    low: float
    high: float
    is_log: bool = False

    def place(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return where values are between the ends, 0 to 1; what lies outside is put at the end."""
        found = np.asarray(values, dtype=float)
        low, high = self.low, self.high
        if self.is_log:
            found, low, high = np.log(np.maximum(found, low)), math.log(low), math.log(high)
        return np.clip((found - low) / (high - low), 0.0, 1.0)

    def ticks(self) -> list[float]:
        """Return some round values between the ends."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            each = (1, 2, 5) if len(decades) <= 4 else (1,)
            step = 1 + len(decades) // 8
            found = [m * 10.0**d for d in decades[::step] for m in each]
        else:
            step_ = _round_step((self.high - self.low) / 4)
            first = math.ceil(self.low / step_ - 1e-9)
            found = [round(i * step_, 12) for i in range(first, math.floor(self.high / step_ + 1e-9) + 1)]
        return [
            value for value in found if self.low <= value * (1 + 1e-9) and value <= self.high * (1 + 1e-9)
        ]


def axis(label: str, values: Iterable[float], *, margin: float = 0.05, whole: bool = False) -> Axis:
    """Return an axis that holds the finite values with a margin, logarithmic where they span much.

    ``whole`` begins at 0, as costs and shares do.
    """
    found = [float(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    if whole:
        return Axis(label, 0.0, high * (1 + margin) or 1.0)
    if low > 0 and high / low >= _LOG_SPAN:
        reach = (high / low) ** margin
        return Axis(label, low / reach, high * reach, is_log=True)
    reach = (high - low) * margin or abs(high) * margin or 1.0
    return Axis(label, low - reach, high + reach)


def short(value: float) -> str:
    """Return a number in few characters, such as 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


class Chart:
    """Points and lines over two axes.

    Args:
        x: The axis from left to right.
        y: The axis from bottom to top.
    """

    def __init__(self, x: Axis, y: Axis) -> None:
        self._x, self._y = x, y
        self._marks: list[Markup] = []

    def dots(self, kind: str, xs: ArrayLike, ys: ArrayLike, of: Sequence[int] = ()) -> None:
        """Draw points, all in one path; ``of`` says which candidates they are."""
        marks = [f"M{x:.1f} {y:.1f}{_dot(kind)}" for x, y in self._places(xs, ys)]
        path = "".join(marks if len(of) else dict.fromkeys(marks))  # what nobody asks about shows once
        if path:
            ids = " ".join(map(str, of)) if len(of) else None
            if kind == "front" and len(of):
                self._marks.append(element("path", d=path, class_="halo"))
            self._marks.append(element("path", d=path, class_=f"dots {kind}", data_of=ids))

    def steps(self, kind: str, xs: ArrayLike, ys: ArrayLike) -> None:
        """Draw a staircase: each value holds until the next."""
        places = self._places(xs, ys)
        if places:
            (x, y), *rest = places
            path = f"M{x:.1f} {y:.1f}"
            for a, b in rest:
                if (a, b) == rest[-1] or max(abs(a - x), abs(b - y)) >= _FINEST:
                    path += f"H{a:.1f}V{b:.1f}"
                    x, y = a, b
            self._marks.append(element("path", d=path, class_=f"line {kind}"))

    def line(self, kind: str, xs: ArrayLike, ys: ArrayLike) -> None:
        """Draw straight lines from point to point."""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in self._places(xs, ys))
        if path:
            self._marks.append(element("path", d=f"M{path}", class_=f"line {kind}"))

    def level(self, kind: str, value: float, label: str) -> None:
        """Draw a horizontal line with its meaning."""
        (_, y), *_ = self._places([self._x.low], [value])
        self._marks.append(element("path", d=f"M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}", class_=f"level {kind}"))
        above = y - 6 if y > _TOP + 24 else y + 18
        self._marks.append(element("text", label, x=WIDTH - _RIGHT - 2, y=f"{above:.1f}", class_="end note"))

    def svg(self, description: str) -> Markup:
        """Return the picture; the description is for those who do not see it."""
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        frame: list[Markup] = []
        for value in self._y.ticks():
            (_, y), *_ = self._places([self._x.low], [value])
            frame.append(element("path", d=f"M{_LEFT} {y:.1f}H{right}", class_="grid"))
            frame.append(element("text", short(value), x=_LEFT - 8, y=f"{y + 4.5:.1f}", class_="end"))
        for value in self._x.ticks():
            (x, _), *_ = self._places([value], [self._y.low])
            frame.append(element("path", d=f"M{x:.1f} {bottom}v5", class_="axis"))
            frame.append(element("text", short(value), x=f"{x:.1f}", y=bottom + 22, class_="middle"))
        across = element("text", _named(self._x), x=(_LEFT + right) / 2, y=HEIGHT - 6, class_="middle label")
        labels = joined(across, element("text", _named(self._y), x=4, y=16, class_="label"))
        return element(
            "svg",
            *frame,
            element("path", d=f"M{_LEFT} {bottom}H{right}", class_="axis"),
            *self._marks,
            labels,
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            class_="chart",
            role="img",
            aria_label=description,
        )

    def _places(self, xs: ArrayLike, ys: ArrayLike) -> list[tuple[float, float]]:
        across = _LEFT + self._x.place(xs) * (WIDTH - _LEFT - _RIGHT)
        down = HEIGHT - _BOTTOM - self._y.place(ys) * (HEIGHT - _TOP - _BOTTOM)
        return list(zip(across.tolist(), down.tolist(), strict=True))


def legend_mark(*marks: str) -> Markup:
    """Return a picture of marks, one on the other, as charts draw them: ``line front``, ``dots front``."""
    paths = [
        element("path", d=f"M17 7{_dot(mark)}" if mark.startswith("dots") else "M1 7H33", class_=mark)
        for mark in marks
    ]
    return element("svg", *paths, viewBox="0 0 34 14", class_="chart key", aria_hidden="true")


def depth_ticks(count: int) -> range:
    """Return the places on an axis of so many decoder blocks that get a number."""
    return range(0, count, 1 if count <= 12 else 5 if count <= 60 else 10)


def interval(scale: Axis, value: float, reach: float, kind: str) -> Markup:
    """Return a small picture of a value and what lies within reach, on a scale that several of them share."""
    start, middle, end = 6 + scale.place([value - reach, value, value + reach]) * 268
    whisker = element(
        "path", d=f"M{start:.1f} 9H{end:.1f}M{start:.1f} 5v8M{end:.1f} 5v8", class_=f"whisker {kind}"
    )
    dot = element("path", d=f"M{middle:.1f} 9h0", class_=f"dots {kind}")
    return element(
        "svg", whisker if reach else None, dot, viewBox="0 0 280 18", class_="bar wide", aria_hidden="true"
    )


def shares(best: float, every: float) -> Markup:
    """Return a small picture of two shares, 0 to 1, on one line."""
    first, second = 6 + np.clip([every, best], 0, 1) * 148
    return element(
        "svg",
        element("path", d="M6 9H154", class_="grid"),
        element("path", d=f"M{first:.1f} 9H{second:.1f}", class_="line front"),
        element("path", d=f"M{first:.1f} 9h0", class_="dots other"),
        element("path", d=f"M{second:.1f} 9h0", class_="dots front"),
        viewBox="0 0 160 18", class_="bar", aria_hidden="true",
    )  # fmt: skip


def bar(share: float, kind: str) -> Markup:
    """Return a bar of a share, 0 to 1."""
    return element(
        "svg", element("rect", width=f"{max(160 * share, 1):.1f}", height=12, y=3, class_=kind),
        viewBox="0 0 160 18", class_="bar", aria_hidden="true",
    )  # fmt: skip


def _dot(kind: str) -> str:
    # A line of no length with round ends is a dot, in a tenth of the bytes of a circle.
    return "m0-5l5 5l-5 5l-5-5z" if "published" in kind else "h0"


def _named(scale: Axis) -> str:
    return f"{scale.label} (log scale)" if scale.is_log else scale.label


def _round_step(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return next(m * size for m in (1, 2, 2.5, 5, 10) if step <= m * size * (1 + 1e-9))
