"""Quantised operators, in floats: what each computes is ``like``(x, W) = y, whatever the numbers are kept in.

A change is put beside W where x and y are floats:

    DynamicQuantizeLinear(x) → MatMulInteger → Cast → Mul(scales) = y
    QuantizeLinear(x) → DequantizeLinear → MatMul(DequantizeLinear(codes)) → QuantizeLinear → DequantizeLinear = y
    QuantizeLinear(x) → QLinearMatMul → DequantizeLinear = y
    MatMulNBits(x) = y

So the branch takes x as the exact model has it, before it is rounded, and adds to y after y was: the quantised operator
computes what it computed, its calibrated ranges do not clip the change, and runtimes fuse it as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from loraformat_converters.onnx.graph.model import FLOATS
from loraformat_converters.onnx.graph.operators import WEIGHTS, operator
from loraformat_converters.onnx.graph.scopes import Scope
from loraformat_converters.onnx.graph.trace import CODES

__all__ = ["Product", "Reader", "product"]

Reader = Callable[[Scope, str], onnx.NodeProto | None]
"""(scope, value) → the only node that reads it; None where there are several, or it leaves the graph."""


@dataclass(frozen=True)
class Product:
    """One quantised product in the words of floats.

    Attributes:
        like: the operator that it is in floats.
        x, bias: values; no bias is "", and one that is kept in integers None.
        end: the node that gives y.
        dtype: of x and y.
        refusal: why no change can be put beside it; None if one can.
        rounds: whether x or y is rounded to 8 bits on the way.
        scale, zero: values that dequantise the codes of the weight; "" where the operator itself says how, or there is none.
    """

    like: str
    x: str
    end: onnx.NodeProto
    dtype: int
    scale: str = ""
    zero: str = ""
    bias: str | None = ""
    refusal: str | None = None
    rounds: bool = False


@dataclass(frozen=True)
class _Words:
    """Which input is what: of x where it is a float, of its codes where it is not, of the weight's scale and zero point."""

    like: str
    x: int = 0
    scale: int = -1
    zero: int = -1
    bias: int = -1
    end: str = "float"


_WORDS: Mapping[str, _Words] = {
    # onnxruntime 1.32, docs/ContribOperators.md
    "com.microsoft.MatMulNBits": _Words("MatMul", scale=2, zero=3, bias=5),
    "com.microsoft.MatMulBnb4": _Words("MatMul", scale=2),
    "com.microsoft.GatherBlockQuantized": _Words("Gather", x=1, scale=2, zero=3),
    "com.microsoft.DynamicQuantizeMatMul": _Words("MatMul", scale=2, zero=3, bias=4),
    "com.microsoft.MatMulIntegerToFloat": _Words("MatMul", scale=3, zero=5, bias=6),
    "com.microsoft.QGemm": _Words("Gemm", scale=4, zero=5, bias=6, end="codes"),
    "MatMulInteger": _Words("MatMul", zero=3, end="sums"),
    "ConvInteger": _Words("Conv", zero=3, end="sums"),
    "com.microsoft.QAttention": _Words("com.microsoft.Attention", scale=4, zero=7, bias=2, end="inside"),
    "QLinearMatMul": _Words("MatMul", scale=4, zero=5, end="codes"),
    "QLinearConv": _Words("Conv", scale=4, zero=5, bias=8, end="codes"),
}

_EXPERTS: Mapping[int, _Words] = {
    at: _Words("com.microsoft.MoE", scale=at + 1, zero=zero, bias=at + 2, end="inside")
    for at, zero in ((2, 11), (5, 12), (8, 13))
}
"""The same for each of the stacks of com.microsoft.QMoE."""

_BIASED = {"Gemm": 2, "Conv": 2, "ConvTranspose": 2}
_ROUNDED = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})


def product(node: onnx.NodeProto, position: int, kind: int, scope: Scope, reader: Reader) -> Product | None:
    """What a node with a quantised weight computes in floats; None for an operator that is not known to take one.

    Args:
        position: which input the weight is.
        kind: the data type in which the operator reads it.
    """
    words = _EXPERTS.get(position) if operator(node) == "com.microsoft.QMoE" else _WORDS.get(operator(node))
    if words is None:
        if operator(node) == "Gather" and kind in CODES:
            return _gather(node, scope, reader)
        return _between(node, position, kind, scope, reader) if kind in FLOATS else None
    x, end, refusal = _input(node, words.x), node, None
    scale, zero, bias = (_input(node, at) for at in (words.scale, words.zero, words.bias))
    if words.end == "inside":
        refusal = f"{operator(node)} goes on with its product itself: put it into the model before quantisation"
    elif words.end != "float" or operator(node).endswith("IntegerToFloat"):
        rounded = _producer(x, scope)
        if rounded is not None and rounded.op_type in _ROUNDED:
            x = _input(rounded, 0)
        else:
            refusal = f"{operator(node)} takes its x in 8 bits, and no float of it is at hand"
    if words.end == "sums":
        scaled = _scaled(node, scope, reader)
        if scaled is not None:
            end, scale = scaled
        else:
            refusal = refusal or f"the sums of {operator(node)} are not scaled as ONNX Runtime's quantiser does it"
    elif words.end == "codes" and not (node.op_type == "QGemm" and not _input(node, 7)):
        widened = reader(scope, node.output[0])
        if widened is not None and widened.op_type == "DequantizeLinear":
            end = widened
        else:
            what = widened.op_type if widened is not None else "more than one node"
            refusal = refusal or f"{operator(node)} gives 8 bits, which {what} reads: a change would be rounded to them"
    kept = None if bias and words.end == "codes" else bias
    rounds = x != _input(node, words.x) or operator(node).endswith("DynamicQuantizeMatMul") or _in_int8(node)
    return Product(words.like, x, end, _dtype(scale, scope), scale, zero, kept, refusal, rounds)


def _in_int8(node: onnx.NodeProto) -> bool:
    """MatMulNBits with accuracy_level 4, as onnxruntime-genai builds it for the CPU: x is rounded to int8 in the product."""
    return any(a.name == "accuracy_level" and a.i == 4 for a in node.attribute)


def _gather(node: onnx.NodeProto, scope: Scope, reader: Reader) -> Product | None:
    """Rows of codes, dequantised behind the look-up (ONNX Runtime's dynamic quantiser)."""
    end = reader(scope, node.output[0])
    if end is None or end.op_type != "DequantizeLinear" or _input(end, 0) != node.output[0]:
        return None
    return Product("Gather", _input(node, 1), end, _dtype(_input(end, 1), scope), _input(end, 1), _input(end, 2))


def _between(node: onnx.NodeProto, position: int, kind: int, scope: Scope, reader: Reader) -> Product | None:
    """A float operator between pairs of QuantizeLinear and DequantizeLinear, which are passed by on both sides."""
    if position > 1 or len(node.input) < 2:
        return None
    x, end = node.input[1 - position], node
    pair = _producer(x, scope)
    if pair is not None and pair.op_type == "DequantizeLinear":
        before = _producer(_input(pair, 0), scope)
        # Past what another such operator gives, the pair itself is where a change of it is added.
        if before is not None and before.op_type == "QuantizeLinear" and not _weighs(_input(before, 0), scope):
            x = _input(before, 0)
    rounded = reader(scope, node.output[0])
    if rounded is not None and rounded.op_type == "QuantizeLinear" and _input(rounded, 0) == node.output[0]:
        widened = reader(scope, rounded.output[0])
        if widened is not None and widened.op_type == "DequantizeLinear":
            end = widened
    bias = _input(node, _BIASED.get(operator(node), -1))
    return Product(operator(node), x, end, kind, bias=bias, rounds=x != node.input[1 - position] or end is not node)


def _weighs(name: str, scope: Scope) -> bool:
    """Whether a value is the product of an operator that uses weights."""
    node = _producer(name, scope)
    return node is not None and node.op_type in WEIGHTS


def _scaled(node: onnx.NodeProto, scope: Scope, reader: Reader) -> tuple[onnx.NodeProto, str] | None:
    """(y's node, the weight's scale): Cast, and Mul by the product of x's scale and the weight's."""
    cast = reader(scope, node.output[0])
    if cast is None or cast.op_type != "Cast":
        return None
    end = reader(scope, cast.output[0])
    if end is None or end.op_type != "Mul":
        return None
    scales = next((_producer(name, scope) for name in end.input if name != cast.output[0]), None)
    rounded = _producer(_input(node, 0), scope)
    if scales is None or scales.op_type != "Mul" or rounded is None:
        return None
    if len(rounded.output) > 1:
        mine = [name for name in scales.input if name != rounded.output[1]]
    else:  # x is rows of a table in 8 bits, of which nothing but their names tells the scales apart (quantize_dynamic 1.32)
        mine = [name for name in scales.input if name == f"{_input(node, 1).removesuffix('_quantized')}_scale"]
    if len(mine) != 1 or scope.home(mine[0], "constant") is None:
        return None
    return end, mine[0]


def _producer(name: str, scope: Scope) -> onnx.NodeProto | None:
    home = scope.home(name, "producers")
    return home.producers[name] if home is not None else None


def _input(node: onnx.NodeProto, at: int) -> str:
    return node.input[at] if 0 <= at < len(node.input) else ""


def _dtype(scale: str, scope: Scope) -> int:
    """The float type that a scale is of."""
    home = scope.home(scale, "roots")
    kind = home.roots[scale].data_type if home is not None else TensorProto.FLOAT
    return int(kind if kind in FLOATS else TensorProto.FLOAT)
