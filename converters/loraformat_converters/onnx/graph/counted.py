"""Shapes that a graph counts out of the shapes of its constants, as tf2onnx writes them where it takes an Einsum apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, numpy_helper

from loraformat_converters.onnx.graph.scopes import STANDARD, Scope

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["counted"]

ShapeOf = Callable[[str, Scope], "tuple[int, ...] | None"]
"""The shape of a constant; None where it is not known."""

_DEPTH = 16
"""How many nodes may follow each other: a stranger's graph may be a circle."""


def counted(name: str, scope: Scope, shape_of: ShapeOf, depth: int = 0) -> Array | None:
    """The whole numbers [n] of a constant; None where they are no such, or counted in another way."""
    home = scope.home(name, "constant")
    if home is None or depth > _DEPTH:
        return None
    if (tensor := home.roots.get(name)) is not None:
        return _stored(tensor)
    node = home.producers[name]
    if node.domain not in STANDARD:
        return None
    if node.op_type == "Shape" and not node.attribute:
        shape = shape_of(node.input[0], home)
        return None if shape is None else np.array(shape, np.int64)
    rule = _RULES.get(node.op_type)
    inputs = [counted(other, home, shape_of, depth + 1) for other in node.input]
    if rule is None or any(values is None for values in inputs):
        return None
    try:
        return np.asarray(rule(node, *inputs), np.int64).reshape(-1)
    except (ValueError, IndexError):  # of tensors that do not fit each other
        return None


def _stored(tensor: TensorProto) -> Array | None:
    if tensor.data_location == TensorProto.EXTERNAL or tensor.data_type != TensorProto.INT64 or len(tensor.dims) > 1:
        return None
    try:
        return numpy_helper.to_array(tensor).reshape(-1)
    except ValueError:  # its bytes do not fit its shape
        return None


# Of values with one axis, so that an operator's own axis can be no other.
_RULES: Mapping[str, Callable[..., Array]] = {
    "Constant": lambda node: np.array([n for a in node.attribute if a.name == "value_ints" for n in a.ints], np.int64),
    "Gather": lambda node, values, at: values[at],
    "ReduceProd": lambda node, values, *axes: np.prod(values),
    "Concat": lambda node, *parts: np.concatenate(parts),
    "Identity": lambda node, values: values,
}
