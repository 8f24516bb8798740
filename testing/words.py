"""The contract of operators and leaves: that what their rows say of them is true of random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from ..metrics_dsl.errors import MetricError
from ..metrics_dsl.operators import COLUMN, FULL, LEAVES, OPERATORS, ROW, SCALAR, Leaf, Operator
from ..search.core.objectives import look_up
from .expecting import expect

_ROWS, _COLUMNS = 24, 32
_SIZES = {FULL: (_ROWS, _COLUMNS), COLUMN: (1, _COLUMNS), ROW: (_ROWS, 1), SCALAR: (1, 1)}
_SLACK = 1e-5  # of 32-bit floats


def _exponents(operator: Operator) -> Sequence[float | None]:
    return (2.0, 0.5, -1.0, 3.0) if operator.name == "pow" else (None,)


def _value(operator: Operator, operands: Sequence[Any], exponent: float | None) -> Any:
    extra = operator.statistics(operands[0]) if operator.statistics else ()
    return operator.compute(*operands, *extra, *(() if exponent is None else (exponent,)))


def _shapes(operator: Operator, draw: Any) -> None:
    """Values have the shape that the row declares, and the sign."""
    import torch

    for shapes, signs in product(product(_SIZES, repeat=operator.arity), (True, False)):
        try:
            declared = operator.shape(*shapes)
        except ValueError:
            continue
        operands = [torch.randn(_SIZES[shape], generator=draw) for shape in shapes]
        operands = [operand.abs() for operand in operands] if signs else operands
        for exponent in _exponents(operator):
            found = _value(operator, operands, exponent)
            wanted = _SIZES[declared]
            got = tuple(getattr(found, "shape", ()))
            expect(got == wanted, f"expected {operator.name} to have the shape {wanted}, got {got}")
            if operator.nonnegative((signs,) * operator.arity, exponent):
                least = float(found.nan_to_num(0.0).min())
                expect(least >= -_SLACK, f"{operator.name} says that it is at least 0, and is {least:g}")


def _order(operator: Operator) -> None:
    """It does to the order of its operand what the row says."""
    import torch

    if not operator.order or operator.name == "pow":
        return
    line = torch.linspace(-3, 3, _ROWS * _COLUMNS).reshape(_SIZES[FULL])
    found = _value(operator, [line], None).flatten()
    of_what = line.flatten().abs() if operator.order == "magnitude" else line.flatten()
    steps = found[of_what.argsort(stable=True)].diff()
    steps = -steps if operator.order == "decreasing" else steps
    worst = float(steps.min())
    expect(
        worst >= -_SLACK,
        f"{operator.name} says that its order is {operator.order}, and goes back by {-worst:g}",
    )


def _rows(operator: Operator, draw: Any) -> None:
    """Elementwise means that some rows have the values that they have among all."""
    import torch

    if operator.kind != "elementwise":
        return
    operands = [torch.randn(_SIZES[FULL], generator=draw) for _ in range(operator.arity)]
    for exponent in _exponents(operator):
        whole, some = (_value(operator, [x[:n] for x in operands], exponent)[:5] for n in (_ROWS, 5))
        same = torch.allclose(whole, some, rtol=1e-5, atol=1e-6, equal_nan=True)
        expect(same, f"{operator.name} says that it is elementwise, and depends on other rows")


def _numbers(operator: Operator) -> None:
    """The function of plain numbers is that of tensors."""
    import torch

    if operator.number is None:
        return
    for numbers, exponent in product(
        product((-2.0, -0.5, 0.0, 0.3, 4.0), repeat=operator.arity), _exponents(operator)
    ):
        tensors = [torch.full((1, 1), number, dtype=torch.float64) for number in numbers]
        expected = float(_value(operator, tensors, exponent))
        got = operator.number(*numbers, *(() if exponent is None else (exponent,)))
        near = abs(got - expected) <= 1e-6 * max(1.0, abs(expected)) or expected != expected
        expect(near, f"{operator.name} of {numbers} is {got:g} as a number and {expected:g} as a tensor")


def _code(operator: Operator, draw: Any) -> None:
    """What exports write computes the same."""
    import torch

    if operator.python:
        operands = [torch.randn(_SIZES[FULL], generator=draw) for _ in range(operator.arity)]
        names = {f"x{i}": operand for i, operand in enumerate(operands)}
        code = f"found = {operator.python.format(*names)}"
        scope: dict[str, Any] = {"torch": torch, **names}
        exec(code, scope)  # noqa: S102 (the operator's own, as its exports hold it)
        found, expected = scope["found"], _value(operator, operands, None)
        same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, equal_nan=True)
        expect(same, f"the python of {operator.name} computes something else than the operator")


def check_operator(operator: str | Operator) -> None:
    """Hold an operator to what its row says of its shape, sign, order, numbers and code."""
    import torch

    row = operator if isinstance(operator, Operator) else look_up(OPERATORS, operator, "an operator")
    draw = torch.Generator().manual_seed(0)
    _shapes(row, draw)
    _order(row)
    _rows(row, draw)
    _numbers(row)
    _code(row, draw)


def check_leaf(leaf: str | Leaf) -> None:
    """Hold a computed leaf to its shape and sign, on the statistics of a random layer."""
    import torch

    from ..workers.calibrate.folder import LayerStatistics
    from ..workers.calibrate.input_statistics import damped_inverse_diagonal
    from ..workers.calibrate.leaves import LayerLeaves

    row = leaf if isinstance(leaf, Leaf) else look_up(LEAVES, leaf, "a leaf")
    if row.compute is None:  # calibration's own
        return
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(_SIZES[FULL], generator=draw)
    inputs = torch.randn(3 * _COLUMNS, _COLUMNS, generator=draw) + 0.3
    gram = inputs.T @ inputs / len(inputs)
    outputs = (inputs @ weights.T).square().mean(0)
    held = {
        "X": inputs.square().mean(0, keepdim=True).sqrt(),
        "M": inputs.mean(0, keepdim=True),
        "V": inputs.var(0, keepdim=True),
        "D": damped_inverse_diagonal(gram).float().reshape(1, -1),
        "Y": outputs.sqrt().reshape(-1, 1),
        "G": torch.randn(_SIZES[FULL], generator=draw).abs(),
    }
    leaves = LayerLeaves("of a test", weights, LayerStatistics(gram, outputs.double(), held))
    try:
        leaves.compute(row)
    except MetricError as error:
        raise AssertionError(str(error)) from error
