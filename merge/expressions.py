"""Ratios that depend on the layer: `ramp(0.3, 1)`, `1 - 0.5 * depth`, `max(0.2, 1 - layer / 40)`.

    layer    the tensor's decoder layer, counted from 0; the embedding counts as the first layer,
             the final norm and the head as the last
    layers   how many there are
    depth    layer / (layers - 1): 0 in the first layer, 1 in the last
    ramp(a, b)   from a in the first layer to b in the last: a + (b - a) * depth

Besides these: numbers, + - * /, parentheses, min, max, abs. Evaluated once for each tensor, in
double precision.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

Names = Mapping[str, float]

_BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max, "abs": abs}
_LARGEST = 3.4e38  # float32's
_NAMES = ("layer", "layers", "depth")


def evaluate(ratio: float | str, layer: int, layers: int) -> float:
    """The ratio in a layer. Raises `ValueError` with a sentence for anything else."""
    if not isinstance(ratio, str):
        try:
            return _finite(float(ratio), ratio, layer, layers)
        except OverflowError:
            raise ValueError("the ratio is too large") from None
    names = {"layer": float(layer), "layers": float(layers), "depth": layer / max(layers - 1, 1)}
    try:
        value = _value(ast.parse(ratio.strip(), mode="eval").body, names)
    except SyntaxError:
        raise ValueError(f"{ratio!r} is not an arithmetic expression") from None
    except ZeroDivisionError:
        raise ValueError(f"{ratio!r} divides by zero in layer {layer} of {layers}") from None
    except (TypeError, RecursionError, MemoryError, OverflowError):
        raise ValueError(
            f"{ratio!r} cannot be evaluated; see docs/merge.md for what an expression may hold"
        ) from None
    return _finite(value, ratio, layer, layers)


def _finite(value: float, ratio: float | str, layer: int, layers: int) -> float:
    if not abs(value) <= _LARGEST:
        raise ValueError(
            f"{ratio!r} is {value} in layer {layer} of {layers}, which is not finite in float32"
        )
    return value


def _value(node: ast.expr, names: Names) -> float:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, names), _value(right, names))
        case ast.Call(func=ast.Name(id="ramp"), args=[first, last], keywords=[]):
            start, end = _value(first, names), _value(last, names)
            return start + (end - start) * names["depth"]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(argument, names) for argument in arguments))
    known = ", ".join([*_NAMES, "ramp(a, b)", *_FUNCTIONS])
    raise ValueError(
        f"{ast.unparse(node)!r} is not known in a ratio; it may hold numbers, + - * / and {known}"
    )
