"""A metric as a Python file that needs torch and nothing of ours: its scores and masks.

The file computes the order form of the metric (see ``metrics_dsl/order.py``), for that is what the evaluator
scores: with the same operations in the same order its masks are the evaluator's bit for bit. Functions that
protect a division or a root are written into the file as ``metrics_dsl/operators.py`` defines them.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from ...metrics_dsl.expression import Expression
from ...metrics_dsl.operators import COLUMN, EXP_LIMIT, LEAVES, LOG_OFFSET, OPERATORS, ROW
from ...metrics_dsl.order import order_form
from ...metrics_dsl.plugins import origin_of
from ...search.core.candidate import parse_pattern
from .candidate_record import CandidateRecord, ExportError

# How each leaf is computed, in the words of someone who has the layer at hand.
HOW = {
    "W": "the layer's weight (outputs, inputs)",
    "G": "sqrt(mean over sequences of g^2), g the gradient of the sequence's mean next-token loss",
    "X": "sqrt(mean over tokens of x^2), x the inputs of the layer",
    "M": "mean over tokens of x",
    "V": "variance over tokens of x, unbiased (divided by tokens - 1)",
    "D": "diagonal of inverse(H + 0.01 * mean(diagonal of H) * I), H the mean over tokens of x x'",
    "Y": "sqrt(mean over tokens of y^2), y the outputs of the layer, with its bias",
}
_RESHAPED = {ROW: ".reshape(-1, 1)", COLUMN: ".reshape(1, -1)"}
_METHODS = {
    "abs": "{}.abs()",
    "sqrt": "{}.abs().sqrt()",
    "log": f"({{}}.abs() + {LOG_OFFSET!r}).log()",
    "log1p": "{}.abs().log1p()",
    "exp": f"{{}}.clamp(max={EXP_LIMIT!r}).exp()",
    "tanh": "{}.tanh()",
    "sigmoid": "{}.sigmoid()",
}
_REDUCTIONS = {
    "sum": "{}.sum({over}, keepdim=True)",
    "mean": "{}.mean({over}, keepdim=True)",
    "norm": "{}.square().sum({over}, keepdim=True).sqrt()",
    "max": "{}.amax({over}, keepdim=True)",
}
_OVER = {"row": "(1,)", "col": "(0,)", "all": "(0, 1)"}
_INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2)}
_ATOM = 5  # binds stronger than any infix operator
_LONGEST = 60  # characters of code that stay within a line of their own
_HELPERS = {
    "divide": '''
        def divide(a, b):
            """Return a / b, and 0 where b is 0."""
            return (a / b).masked_fill(b == 0, 0.0)
        ''',
    "power": '''
        def power(x, exponent):
            """Return x**exponent, of |x| for a fractional exponent, and 0 at 0 for a negative one."""
            result = (x if float(exponent).is_integer() else x.abs()).pow(exponent)
            return result.masked_fill(x == 0, 0.0) if exponent < 0 else result
        ''',
    "square": '''
        def square(x):
            """Return x * x."""
            return x * x
        ''',
    "minmax": '''
        def minmax(x):
            """Return (x - min) / (max - min) over the whole matrix, 0 if x is constant."""
            low, high = x.amin((0, 1), keepdim=True), x.amax((0, 1), keepdim=True)
            return divide(x - low, high - low)
        ''',
    "zscore": '''
        def zscore(x):
            """Return (x - mean) / standard deviation over the whole matrix, 0 if x is constant."""
            mean, deviation = x.mean((0, 1), keepdim=True), x.std((0, 1), correction=0, keepdim=True)
            return divide(x - mean, deviation)
        ''',
}
_MASKS = {
    "row": '''
        def mask(scores, ratio):
            """Return which weights to remove, (rows, columns) bool: the smallest scores of each row.

            Exactly floor(columns * ratio) a row; of equal scores the one that comes first is removed.
            """
            count = int(scores.shape[1] * ratio)
            order = scores.argsort(dim=1, stable=True)
            return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)
        ''',
    "layer": '''
        def mask(scores, ratio):
            """Return which weights to remove, (rows, columns) bool: the smallest scores of the layer.

            Exactly floor(rows * columns * ratio); of equal scores the one that comes first is removed.
            """
            flat = scores.reshape(-1)
            order = flat.argsort(stable=True)
            removed = torch.zeros_like(flat, dtype=torch.bool)
            removed[order[: int(len(flat) * ratio)]] = True
            return removed.reshape(scores.shape)
        ''',
    "pattern": '''
        def mask(scores, ratio=None):
            """Return which weights to remove, (rows, columns) bool: {n} of every {m} consecutive inputs.

            The smallest scores go, of equal ones the first; inputs that fill no last group stay. The
            pattern decides how many, so the ratio has no effect.
            """
            rows, columns = scores.shape
            whole = columns - columns % {m}
            order = scores[:, :whole].reshape(-1, {m}).argsort(dim=1, stable=True)
            removed = torch.zeros(order.shape, dtype=torch.bool, device=scores.device)
            result = torch.zeros_like(scores, dtype=torch.bool)
            result[:, :whole] = removed.scatter_(1, order[:, :{n}], True).reshape(rows, whole)
            return result
        ''',
}


class _Writer:
    """Writes an expression as torch code: what would be long is computed before, under a name of its own.

    Attributes:
        lines: The statements that come before, in order.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[Expression, str] = {}

    def code(self, e: Expression) -> tuple[str, int]:
        """Return the code of a node, and how strongly it binds."""
        if e in self._names:
            return self._names[e], _ATOM
        text, strength = self._code(e)
        if len(text) <= _LONGEST:
            return text, strength
        self._names[e] = f"part_{len(self.lines) + 1}"
        self.lines.append(f"{self._names[e]} = {text}")
        return self._names[e], _ATOM

    def _code(self, e: Expression) -> tuple[str, int]:
        if e.op == "const":
            return f"number({e.value!r})", _ATOM
        if not e.args:
            return e.op, _ATOM
        parts = [self.code(arg) for arg in e.args]
        if e.op in _INFIX:
            symbol, strength = _INFIX[e.op]
            right = strength + 1  # both associate to the left, so an equal on the right is wrapped
            return f"{_wrapped(*parts[0], strength)} {symbol} {_wrapped(*parts[1], right)}", strength
        if e.op == "neg":
            return f"-{_wrapped(*parts[0], 3)}", 3
        if e.op == "div":
            return f"divide({parts[0][0]}, {parts[1][0]})", _ATOM
        if e.op == "pow":
            return f"power({parts[0][0]}, {e.value!r})", _ATOM
        if e.op in _HELPERS:
            return f"{e.op}({parts[0][0]})", _ATOM
        if origin := origin_of(OPERATORS, e.op):
            return self._added(e, [text for text, _ in parts], origin), _ATOM
        inner = _wrapped(*parts[0], _ATOM)
        if e.op in _METHODS:
            return _METHODS[e.op].format(inner), _ATOM
        axis, _, what = e.op.partition("_")
        return _REDUCTIONS[what].format(inner, over=_OVER[axis]), _ATOM

    def _added(self, e: Expression, operands: list[str], origin: str) -> str:
        """Return the code of an operator of somebody else's; operands have names, for it may repeat them.

        Raises:
            ExportError: When its row does not say it.
        """
        template = OPERATORS[e.op].python
        if not template:
            raise ExportError(
                f"the operator {e.op} of {origin} does not say how it is computed without us; give its row "
                "python=..., or export masks or json instead"
            )
        names = []
        for arg, text in zip(e.args, operands, strict=True):
            if not text.isidentifier():
                self._names[arg] = f"part_{len(self.lines) + 1}"
                self.lines.append(f"{self._names[arg]} = {text}")
                text = self._names[arg]
            names.append(text)
        return f"({template.format(*names)})"


def _wrapped(text: str, strength: int, weakest: int) -> str:
    return text if strength >= weakest else f"({text})"


def helpers_for(code: str) -> str:
    """Return the functions that a piece of code calls, as source; each before those that call it."""
    wanted = {name for name in _HELPERS if re.search(rf"(?<![.\w]){name}\(", code)}
    if wanted & {"minmax", "zscore"}:
        wanted.add("divide")
    return "\n\n".join(textwrap.dedent(text).strip() + "\n" for n, text in _HELPERS.items() if n in wanted)


def quoted(text: str) -> str:
    """Return a text in double quotes, as Python and YAML both read it: with every character that it has."""
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(character: str) -> str:
    code = ord(character)
    if character in '"\\':
        return f"\\{character}"
    if 32 <= code < 127:
        return character
    return f"\\x{code:02x}" if code < 1 << 8 else f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def in_a_line(text: str) -> str:
    """Return a text without what would end a comment."""
    line = " ".join(text.split())
    return line if line.isprintable() else quoted(line)


def docstring(text: str) -> str:
    """Return a text between three quotes: nothing that it says ends them, or is read as something else."""
    plain = '"""' not in text and not text.endswith('"')
    shown = "".join(
        c if c == "\n" or (c == '"' and plain) or (c.isprintable() and c not in '"\\') else _escaped(c)
        for c in text
    )
    return f'"""{shown}"""'


def scores_function(record: CandidateRecord, leaves: frozenset[str]) -> str:
    """Return the source of ``scores``.

    Args:
        record: The candidate.
        leaves: What it takes: the leaves of the metric or of its order form, among them one of each axis.
    """
    metric = record.candidate.metric
    form = order_form(metric, record.candidate.group)
    names = [name for name in LEAVES if name in leaves]
    writer = _Writer()
    found = _wrapped(*writer.code(form), _ATOM)
    tall = next(n for n in names if LEAVES[n].shape.rows)
    wide = next(n for n in names if LEAVES[n].shape.columns)
    lines = [f"{n} = {n}.float(){_RESHAPED.get(LEAVES[n].shape, '')}" for n in names]
    if "number(" in "".join((*writer.lines, found)):
        lines += ["", "def number(value):", f"    return {names[0]}.new_full((1, 1), value)", ""]
    lines += [*writer.lines, f"return {found}.expand({tall}.shape[0], {wide}.shape[1])"]
    width = max(len(str(LEAVES[name].shape)) for name in names)
    described = []
    for name in names:
        start = f"{name}  {LEAVES[name].shape!s:{width}}  "
        text = f"{start}{HOW.get(name, LEAVES[name].meaning)} [{LEAVES[name].unit}]"
        described += textwrap.wrap(text, 98, subsequent_indent=" " * len(start), break_on_hyphens=False)
    group = {"layer": "whole matrix"}.get(record.candidate.group, record.candidate.group)
    meaning = f"""Return the score of each weight, (rows, columns) = (outputs, inputs); larger means keep.

    The metric is
        {metric}
    and what is computed is the simplest form that orders the weights of each {group} alike,
        {form}
    in 32-bit floats, as the search did. One number an input or output may come with one axis or two.

{textwrap.indent(chr(10).join(described), " " * 8)}
    """
    return f"""def scores({", ".join(names)}):
    {docstring(meaning)}
{textwrap.indent(chr(10).join(lines), " " * 4)}
"""


def mask_function(record: CandidateRecord) -> str:
    """Return the source of ``mask`` for the record's group or pattern."""
    counts = parse_pattern(record.pattern)
    text = textwrap.dedent(_MASKS["pattern" if counts else record.candidate.group]).strip() + "\n"
    return text.format(n=counts[0], m=counts[1]) if counts else text


def to_python(record: CandidateRecord) -> str:
    """Return the file's text."""
    candidate = record.candidate
    scores = scores_function(record, candidate.metric.leaves)
    figures = ", ".join(f"{name} {value:.6g}" for name, value in record.figures.items() if name != "seconds")
    known = record.provenance
    source = f"run {known.get('run')}, calibration {str(known.get('calibration'))[:12]}"
    measured = textwrap.fill(f"Measured: {figures or 'nothing yet'} ({source}).", 100, break_on_hyphens=False)
    ratios = "\n".join(
        f"    {quoted(layer.name)}: {ratio!r},"
        for layer, ratio in zip(record.layers, candidate.ratios, strict=True)
    )
    about = f"""A pruning rule found by secateur, key {candidate.key}; this file needs torch alone.

    keep = ~mask(scores(...), RATIOS[name])   # for each linear layer, by its name

{record.sparsity:.2%} of the weights go, pattern {record.pattern}, compared by {candidate.group}.
{measured}

Sums over a whole matrix may differ in their last bit with the number of threads or the layout of a tensor.
"""
    pieces = [f"{docstring(about)}\n\nimport torch\n", helpers_for(scores), scores, mask_function(record)]
    any_model = (
        " They are one: it is good for the layers of any model." if candidate.shared_ratio is not None else ""
    )
    pieces.append(
        f"# The fraction of weights to remove of each layer.{any_model}\nRATIOS = {{\n{ratios}\n}}\n"
    )
    return "\n\n".join(piece for piece in pieces if piece)


def write_python(record: CandidateRecord, path: Path) -> None:
    """Write the file."""
    path.write_text(to_python(record), encoding="utf-8")
