"""Back from an operator's input to the stored tensor that it is made of, through what moves, casts and dequantises it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from loraformat_converters.onnx.graph.counted import counted
from loraformat_converters.onnx.graph.model import FLOATS
from loraformat_converters.onnx.graph.operators import attribute
from loraformat_converters.onnx.graph.scopes import STANDARD, Scope

__all__ = ["CODES", "Trace", "Value", "reshaped", "trace"]

_INTEGERS = ("INT8", "UINT8", "INT16", "UINT16", "INT4", "UINT4", "INT2", "UINT2")

CODES = frozenset(
    value for name, value in TensorProto.DataType.items() if name in _INTEGERS or name.startswith(("FLOAT8", "FLOAT4"))
)
"""The data types in which quantisers store weights. INT32 and INT64 are indices, shapes and biases."""

_ARITHMETIC = frozenset({"Sub", "Mul", "Add", "Div"})


class Value(NamedTuple):
    """A name, and the scope that gives it its meaning."""

    scope: Scope
    name: str


@dataclass(frozen=True)
class Trace:
    """From an operator's input back to a stored tensor.

    Attributes:
        values: the stored tensor, then what each node of the chain makes of it.
        dims: the sizes of the stored tensor; after a Reshape that divides its axes, what that makes of them.
        axes: which of ``dims`` each axis of the input is made of; none for one of size 1 that Unsqueeze added.
        dtype: the data type of the input.
        refusal: why the input is no weight that a change could be put beside.
        sealed: why the stored tensor itself cannot hold a change.
    """

    values: tuple[Value, ...]
    chain: tuple[onnx.NodeProto, ...]
    dims: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    dtype: int
    refusal: str | None = None
    sealed: str | None = None

    @property
    def root(self) -> onnx.TensorProto:
        """The stored tensor."""
        scope, name = self.values[0]
        return scope.roots[name]

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the input."""
        return tuple(math.prod(self.dims[axis] for axis in axes) for axes in self.axes)

    def divided(self) -> Trace:
        """The same where the axes that a Reshape made are none of the stored tensor's."""
        sealed = self.sealed or "Reshape lies between its weight and it"
        return replace(self, dims=self.shape, axes=_each(self.shape), sealed=sealed)


def trace(name: str, scope: Scope) -> Trace | None:
    """Back from a value to the stored tensor that it is made of, if it is made of stored tensors only."""
    chain: list[onnx.NodeProto] = []
    home = scope.home(name, "constant")
    if home is None:
        return None
    values = [Value(home, name)]
    while name not in home.roots:
        node = home.producers[name]
        if not node.input or not node.input[0]:
            return None
        chain.insert(0, node)
        name = _weight_of(node, home)
        found = home.home(name, "constant")
        if found is None:
            return None
        home = found
        values.insert(0, Value(home, name))
    root = home.roots[name]
    dims, kind = tuple(root.dims), root.data_type
    sealed = f"its weight is {TensorProto.DataType.Name(kind)}, quantised" if kind in CODES else None
    traced = Trace(tuple(values), tuple(chain), dims, _each(dims), kind, sealed=sealed)
    for node, value, result in zip(chain, values, values[1:], strict=False):
        if traced.refusal is None:
            traced = _step(traced, node, value.name, result.scope)
    return replace(traced, refusal=traced.refusal or _unscaled(traced))


def _weight_of(node: onnx.NodeProto, scope: Scope) -> str:
    """Which input the weight is: the first; of scale and weight, whichever comes first, the larger."""
    names = node.input if node.op_type in ("Mul", "Add") else node.input[:1]
    return str(max(names, key=lambda name: scope.size(name) or 0))


def _step(before: Trace, node: onnx.NodeProto, value: str, scope: Scope) -> Trace:
    """What one node of the chain, in ``scope``, makes of ``value``."""
    op = node.op_type
    between = replace(before, refusal=f"{op} lies between its weight and it")
    if node.domain not in STANDARD:
        return between
    if op == "Identity":
        return before
    if op == "Transpose":
        return _transposed(before, node)
    if op == "Unsqueeze":
        return _unsqueezed(before, node, scope) or between
    if op == "Reshape":
        shape = reshaped(before.shape, node, scope)
        return between if shape is None else _regrouped(before, shape)
    if op == "Cast":
        return _cast(before, attribute(node, "to", 0)) or between
    if op == "DequantizeLinear" and before.dtype in CODES:
        return replace(before, dtype=_dequantised(node, scope))
    if op == "QuantizeLinear" and before.dtype in FLOATS:
        # A model trained for 8 bits keeps its weights as floats, which the graph itself rounds.
        sealed = before.sealed or "QuantizeLinear lies between its weight and it: a merge would be rounded by it"
        return replace(before, dtype=TensorProto.INT8, sealed=sealed)
    if op in _ARITHMETIC and before.root.data_type in CODES and _keeps(before.shape, node, value, scope):
        return before
    return between


def _transposed(before: Trace, node: onnx.NodeProto) -> Trace:
    perm = attribute(node, "perm", tuple(reversed(range(len(before.axes)))))
    if sorted(perm) != list(range(len(before.axes))):
        return replace(before, refusal=f"{node.name} has perm {list(perm)} of {len(before.axes)} axes")
    return replace(before, axes=tuple(before.axes[i] for i in perm))


def _unsqueezed(before: Trace, node: onnx.NodeProto, scope: Scope) -> Trace | None:
    """Its axes are an attribute until opset 13."""
    said = attribute(node, "axes", None)
    places = counted(node.input[1], scope, _shape_of) if len(node.input) > 1 else said
    if places is None:
        return None
    rank = len(before.axes) + len(places)
    new = {int(place) % rank for place in places}
    if len(new) != len(places):
        return None
    held = iter(before.axes)
    return replace(before, axes=tuple(() if place in new else next(held) for place in range(rank)))


def _cast(before: Trace, to: int) -> Trace | None:
    """Of floats to floats, and of codes to floats; what is cast to integers is no weight any more."""
    return replace(before, dtype=to) if to in FLOATS and before.dtype in FLOATS.keys() | CODES else None


def _dequantised(node: onnx.NodeProto, scope: Scope) -> int:
    """The data type that DequantizeLinear gives: what it says (opset 23), else that of its scale."""
    scale = trace(node.input[1], scope) if len(node.input) > 1 else None
    return int(attribute(node, "output_dtype", 0) or (scale.dtype if scale else TensorProto.FLOAT))


def reshaped(shape: tuple[int, ...], node: onnx.NodeProto, scope: Scope) -> tuple[int, ...] | None:
    """The shape that a Reshape gives of another one; None where it is not known, or does not fit."""
    numbers = counted(node.input[1], scope, _shape_of) if len(node.input) > 1 else None
    if numbers is None:
        return None
    wanted = [int(n) for n in numbers]
    if not attribute(node, "allowzero", 0):
        wanted = [shape[i] if n == 0 and i < len(shape) else n for i, n in enumerate(wanted)]
    known, total = math.prod(n for n in wanted if n != -1), math.prod(shape)
    if wanted.count(-1) > 1 or min(wanted, default=0) < -1 or (known and total % known) or not known:
        return None
    made = tuple(total // known if n == -1 else n for n in wanted)
    return made if math.prod(made) == total else None


def _regrouped(before: Trace, shape: tuple[int, ...]) -> Trace:
    """Axes that a Reshape joins stay what they are in the stored tensor; that of one that it divides holds no change."""
    rest, axes = [axis for group in before.axes for axis in group], []
    for size in shape:
        group: list[int] = []
        while rest and (not group or math.prod(before.dims[axis] for axis in group) < size):
            group.append(rest.pop(0))
        axes.append(tuple(group))
    if axes and all(before.dims[axis] == 1 for axis in rest):
        axes[-1] += tuple(rest)
    joined = replace(before, axes=tuple(axes))
    if all(axes) and joined.shape == shape and sum(map(len, axes)) == len(before.dims):
        return joined
    return replace(before, dims=shape, axes=_each(shape)).divided()


def _each(dims: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Every axis by itself."""
    return tuple((axis,) for axis in range(len(dims)))


def _shape_of(name: str, scope: Scope) -> tuple[int, ...] | None:
    traced = trace(name, scope)
    return traced.shape if traced is not None and traced.refusal is None else None


def _unscaled(traced: Trace) -> str | None:
    """Codes that are floats and nothing else: their scale is somewhere behind the operator, and a branch would miss it."""
    if traced.root.data_type not in CODES or traced.dtype not in FLOATS:
        return None
    if any(node.op_type in ("Mul", "Div", "DequantizeLinear") for node in traced.chain):
        return None
    return f"{traced.chain[-1].op_type} lies between its weight and it, and no scale"


def _keeps(shape: tuple[int, ...], node: onnx.NodeProto, value: str, scope: Scope) -> bool:
    """Whether the other operand of an arithmetic node is spread over the weight, which keeps its shape."""
    others = [trace(name, scope) for name in node.input if name != value]
    if len(others) != 1 or others[0] is None:
        return False
    try:
        return np.broadcast_shapes(shape, others[0].shape) == shape
    except ValueError:
        return False
