"""What each operator makes of the axis that carries the rows; see ``rows``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx

from loraformat_converters.onnx.attaching.row_axes import AXES
from loraformat_converters.onnx.attaching.row_state import Read, Rows, Rule, Values, agreed, kept, lost
from loraformat_converters.onnx.graph import einsum
from loraformat_converters.onnx.graph.operators import attribute

__all__ = ["FIRST_ALONE", "RULES"]


def _broadcast(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Elementwise: axes are counted from the last."""
    rank = max(own.rank(name) for name in node.input if name)
    return agreed(node, [replace(s, axis=s.axis + rank - own.rank(node.input[i])) for i, s in read.items()])


def _first_axis(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Operators over a batch: what is in axis 0 stays apart."""
    state = agreed(node, list(read.values()))
    if state.axis != 0:
        raise lost(node, f"takes axis {state.axis}, of the rows, for something else")
    return state


def _norm(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Over ``axis`` and all behind it."""
    state, rank = kept(own, node, read), own.rank(node.input[0])
    if state.axis >= attribute(node, "axis", -1) % rank:
        raise lost(node, "mixes the rows")
    return state


def _softmax(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Over ``axis``; until opset 13 over all behind it too."""
    state, rank = kept(own, node, read), own.rank(node.input[0])
    axis = attribute(node, "axis", -1 if own.opset >= 13 else 1) % rank
    if state.axis == axis or (own.opset < 13 and state.axis > axis):
        raise lost(node, "mixes the rows")
    return state


def _beside(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Along an axis that is not the rows': Concat, Split, CumSum."""
    rank = own.rank(node.input[0])
    axes = own.numbers(node, "axis", 1) if node.op_type == "CumSum" else [attribute(node, "axis", 0)]
    state = agreed(node, list(read.values()))
    if state.axis in {axis % rank for axis in axes or [0]}:
        raise lost(node, "joins or cuts the rows")
    return state


def _matmul(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Batch axes are counted from behind; what is summed over is lost."""
    ranks = [own.rank(node.input[i]) for i in (0, 1)]
    if min(ranks) < 2 or attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise lost(node, "multiplies vectors, or moves its batch axes")
    states = []
    for i, state in read.items():
        if i > 1:
            raise lost(node, "is parametrised by the rows")
        from_last = ranks[i] - state.axis
        if attribute(node, f"trans{'AB'[i]}", 0) and from_last <= 2:
            from_last = 3 - from_last
        if from_last == 1 + i:
            raise lost(node, "sums over the rows")
        states.append(replace(state, axis=max(ranks) - from_last))
    return agreed(node, states)


def _times_weight(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """x · W with a stored W: the last axis of x is summed over."""
    state = kept(own, node, read)
    if state.axis == own.rank(node.input[0]) - 1:
        raise lost(node, "sums over the rows")
    return state


def _gemm(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    product = {i: state for i, state in read.items() if i < 2}
    added = [replace(read[2], axis=read[2].axis + 2 - own.rank(node.input[2]))] if 2 in read else []
    return agreed(node, [*([_matmul(own, node, product)] if product else []), *added])


def _einsum(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    inputs, _, out = attribute(node, "equation", b"").decode().replace(" ", "").partition("->")
    terms = inputs.split(",")
    letters = {i: terms[i][state.axis : state.axis + 1] for i, state in read.items()}
    if einsum.DOTS in inputs or any(letter not in out for letter in letters.values()):
        raise lost(node, "sums over the rows")
    return agreed(node, [replace(state, axis=out.index(letters[i])) for i, state in read.items()])


FIRST_ALONE = frozenset({"DynamicQuantizeLinear"})
"""Of whose outputs only the first has the rows: the others are the scale and the zero point of all rows together."""

_COMPUTED: Mapping[Rule, str] = {
    _broadcast: """
        Add Sub Mul Div Pow Min Max Mean Sum Mod And Or Xor Equal Greater Less GreaterOrEqual LessOrEqual Where PRelu
        BitwiseAnd BitwiseOr com.microsoft.BiasGelu com.microsoft.FastGelu
    """,
    kept: """
        Identity Cast CastLike Dropout Relu LeakyRelu Elu Selu Gelu Erf Tanh Sigmoid HardSigmoid HardSwish Swish Mish
        Softplus Softsign Exp Log Sqrt Reciprocal Neg Abs Not Sign Floor Ceil Round Sin Cos Clip IsInf IsNaN
        QuantizeLinear DequantizeLinear DynamicQuantizeLinear com.microsoft.Gelu com.microsoft.QuickGelu
    """,
    _norm: "LayerNormalization RMSNormalization SimplifiedLayerNormalization",
    _softmax: "Softmax LogSoftmax",
    _times_weight: """
        com.microsoft.MatMulNBits com.microsoft.MatMulBnb4 com.microsoft.DynamicQuantizeMatMul
        com.microsoft.MatMulIntegerToFloat
    """,
    _beside: "Concat Split CumSum",
    _matmul: "MatMul MatMulInteger com.microsoft.FusedMatMul",
    _gemm: "Gemm",
    _einsum: "Einsum",
    _first_axis: """
        Conv ConvInteger ConvTranspose MaxPool AveragePool GlobalAveragePool GlobalMaxPool BatchNormalization
        InstanceNormalization GroupNormalization DepthToSpace SpaceToDepth Attention RotaryEmbedding
        com.microsoft.Attention com.microsoft.MultiHeadAttention com.microsoft.GroupQueryAttention
        com.microsoft.RotaryEmbedding com.microsoft.EmbedLayerNormalization com.microsoft.GroupNorm
        com.microsoft.SkipLayerNormalization com.microsoft.SkipSimplifiedLayerNormalization
    """,
}

RULES: Mapping[str, Rule] = {
    name: rule for rule, names in (*_COMPUTED.items(), *AXES.items()) for name in names.split()
}
"""Operator → its rule."""
