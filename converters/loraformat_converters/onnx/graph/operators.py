"""What each operator makes of its stored inputs: which axes are out, in and batch, and which vector is a bias.

One table an idea: ``WEIGHTS`` says where an operator's matrix may stand, ``VECTORS`` where its vectors do, and
``_MEANINGS`` what the axes of a matrix mean (``Meaning``). A further operator is a line in each and a function here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import onnx

from loraformat_converters.onnx.graph import einsum, mixtures
from loraformat_converters.onnx.graph.meanings import Meaning, attribute
from loraformat_converters.onnx.graph.scopes import STANDARD

__all__ = [
    "SEVERAL",
    "VECTORS",
    "WEIGHTS",
    "Meaning",
    "attribute",
    "meaning",
    "operator",
    "parameter",
    "refused",
    "vector_axis",
]

WEIGHTS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "Einsum"), (1, 0)),
    **dict.fromkeys(("Conv", "ConvTranspose", "MatMulInteger", "ConvInteger"), (1,)),
    **dict.fromkeys(("FusedGemm", "FusedConv", "MatMulNBits", "MatMulBnb4"), (1,)),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulIntegerToFloat"), (1,)),
    **dict.fromkeys(("Gather", "GatherND"), (0,)),
    "GatherBlockQuantized": (0,),
    **dict.fromkeys(("Attention", "QAttention"), (1,)),
    **dict.fromkeys(("QLinearMatMul", "QGemm", "QLinearConv"), (3,)),
}
"""Operator → the inputs that may be its weight, in the order in which they are looked at; the first stored one is it.

Those that are not rewritten are listed too, to be refused by name.
"""

_OF_GATES: Mapping[int, str] = {1: "weight_ih", 2: "weight_hh"}
SEVERAL: Mapping[str, Mapping[int, str]] = {
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _OF_GATES),
    **mixtures.STACKS,
}
"""Operator → input → what that weight of several is called. Of an LSTM ``parameter`` says more."""

_LAID_OUT = ("com.microsoft.nchwc", "com.ms.internal.nhwc")
"""The domains of what ONNX Runtime (1.32) makes of convolutions for the processor that it runs on."""

_BIAS = {2: "bias"}
_SCALE = {1: "weight"}
VECTORS: Mapping[str, Mapping[int, str]] = {
    "Add": {0: "bias", 1: "bias"},
    "Mul": {0: "weight", 1: "weight"},
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), _BIAS),
    **dict.fromkeys(("LayerNormalization", "BatchNormalization"), _SCALE | _BIAS),
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization"), _SCALE | _BIAS),
    **dict.fromkeys(("PRelu", "RMSNormalization", "SimplifiedLayerNormalization"), _SCALE),
    "SkipLayerNormalization": {2: "weight", 3: "bias"},
    "SkipSimplifiedLayerNormalization": {2: "weight"},
}
"""Operator → input → what a vector there is called in its module."""


def operator(node: onnx.NodeProto) -> str:
    """The operator with its domain: two domains may have operators of one name."""
    return node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"


def meaning(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning:
    """What the operand of ``shape`` at ``position`` is to the operator."""
    if position in VECTORS.get(node.op_type, {}) and (axis := vector_axis(shape)) is not None:
        return Meaning((axis,), tuple(a for a in range(len(shape)) if a != axis), natural=True)
    rule = _MEANINGS.get(operator(node))
    if node.domain in _LAID_OUT:
        return refused(shape, f"{operator(node)} has its weight laid out for one processor: attach before optimising")
    if rule is None:
        return refused(shape, f"{operator(node)} is not rewritten yet")
    found = rule(node, position, shape)
    return refused(shape, found) if isinstance(found, str) else found


def vector_axis(shape: tuple[int, ...]) -> int | None:
    """The axis of a tensor that is a vector, such as [n] or [n, 1, 1]; None for what is none."""
    long = [axis for axis, n in enumerate(shape) if n != 1]
    return None if len(long) > 1 or not shape else (long or [0])[0]


def refused(shape: tuple[int, ...], reason: str) -> Meaning:
    """What an operand is that cannot be changed."""
    return Meaning((0,), tuple(range(1, len(shape))), refusal=reason)


def _matmul(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """MatMul, Gemm, FusedMatMul: [*batch, in, out] on the right, [*batch, out, in] on the left, or turned."""
    side = "AB"[position]
    if attribute(node, f"transBatch{side}", 0):
        return f"transBatch{side} moves the batch axes of its weight"
    last, before = len(shape) - 1, len(shape) - 2
    turned = bool(attribute(node, f"trans{side}", 0))
    out, in_ = (before, last) if turned == (position == 1) else (last, before)
    return Meaning((out,), (in_,), tuple(range(before)), attribute(node, "alpha", 1.0))


def _conv(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """[out, in, *kernel]."""
    if (group := attribute(node, "group", 1)) != 1:
        return f"a convolution of {group} groups: a pair A, B that sees every channel has no form in its weight"
    return Meaning((0,), tuple(range(1, len(shape))), natural=True)


def _conv_transpose(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """[in, out, *kernel]."""
    if (group := attribute(node, "group", 1)) != 1:
        return f"a convolution of {group} groups: a pair A, B that sees every channel has no form in its weight"
    return Meaning((1,), (0, *range(2, len(shape))), natural=True)


def _gather(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """A table [vocabulary, dim] of which rows are taken: the one-hot input is ``in``."""
    if len(shape) != 2 or attribute(node, "axis", 0) not in (0, -2):
        return f"it does not take rows of a table: axis {attribute(node, 'axis', 0)} of {list(shape)}"
    return Meaning((1,), (0,), natural=True)


def _einsum(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """By its letters: contracted with x → in, in the output only → out, in all three → batch."""
    try:
        letters = einsum.read(attribute(node, "equation", b"").decode(), position, len(shape))
    except ValueError as error:
        return str(error)
    return Meaning(letters.out, letters.in_, letters.batch)


def _attention(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """com.microsoft.Attention: [in, out of q | out of k | out of v], multiplied before anything else is done."""
    return Meaning((1,), (0,)) if len(shape) == 2 else f"its weight {list(shape)} is no matrix"


_GATES: Mapping[str, tuple[int, ...]] = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""Which gate of torch's comes first here, which second, …: ONNX has i, o, f, c and z, r, h (docs/Operators.md of 1.23),
torch 2.13 has i, f, g, o and r, z, n (torch.nn.LSTM, torch.nn.GRU)."""


def _recurrent(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """LSTM, GRU, RNN: [directions, gates · hidden, in], one direction below the other."""
    gates, hidden = _GATES[node.op_type], attribute(node, "hidden_size", 0)
    if position > 2:
        return "its biases are two in one tensor, gate by gate, or it is a state"
    if len(shape) != 3 or shape[1] != len(gates) * hidden:
        return f"{list(shape)} is no weight of {len(gates)} gates of {hidden}"
    return Meaning((0, 1), (2,), permute=gates if len(gates) > 1 else None)


_DIRECTIONS = {"forward": "", "reverse": "_reverse"}


def parameter(node: onnx.NodeProto, position: int) -> str:
    """What torch calls one weight of several: of the second layer of an LSTM, whose operator is LSTM_1, ``weight_ih_l1``."""
    name = SEVERAL[node.op_type][position]
    if node.op_type not in _GATES:
        return name
    direction = attribute(node, "direction", b"forward").decode()
    layer = re.fullmatch(rf"(.*/)?{node.op_type}(_(\d+))?", node.name)
    number = (layer[3] if layer else None) or "0"
    return f"{name}_l{number}{_DIRECTIONS.get(direction, '_both')}"


def _product(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """QGemm and the quantised MatMuls: what they are named after, with the weight on the right."""
    return _matmul(node, 1, shape)


def _packed_product(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """MatMulNBits, MatMulBnb4: bytes of a matrix [N, K], which is out and in whatever the bytes' own axes are."""
    if not attribute(node, "transB", 1):
        return "it multiplies by the weight the other way (transB = 0)"
    sizes = attribute(node, "N", 0), attribute(node, "K", 0)
    return Meaning((0,), (1,), shape=sizes) if min(sizes) > 0 else "it does not say how large its matrix is"


def _packed_table(node: onnx.NodeProto, position: int, shape: tuple[int, ...]) -> Meaning | str:
    """GatherBlockQuantized: rows of a table."""
    if len(shape) != 2 or attribute(node, "gather_axis", 0) not in (0, -2):
        return f"it does not take rows of a table: axis {attribute(node, 'gather_axis', 0)} of {list(shape)}"
    return Meaning((1,), (0,), natural=True, shape=shape)


_MEANINGS: Mapping[str, Callable[[onnx.NodeProto, int, tuple[int, ...]], Meaning | str]] = {
    **dict.fromkeys(("MatMul", "Gemm", "com.microsoft.FusedMatMul"), _matmul),
    **dict.fromkeys(("MatMulInteger", "QLinearMatMul", "com.microsoft.QGemm"), _product),
    **dict.fromkeys(("com.microsoft.DynamicQuantizeMatMul", "com.microsoft.MatMulIntegerToFloat"), _product),
    **dict.fromkeys(("com.microsoft.MatMulNBits", "com.microsoft.MatMulBnb4"), _packed_product),
    **dict.fromkeys(("Conv", "ConvInteger", "QLinearConv"), _conv),
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(("com.microsoft.Attention", "com.microsoft.QAttention"), _attention),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    "com.microsoft.MoE": mixtures.experts,
    "com.microsoft.QMoE": mixtures.quantised_experts,
    "Gather": _gather,
    "com.microsoft.GatherBlockQuantized": _packed_table,
    "Einsum": _einsum,
}
