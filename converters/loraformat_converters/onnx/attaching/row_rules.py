"""What each operator makes of the axis that carries the rows; see ``rows``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import onnx

from loraformat_converters.onnx.graph import einsum
from loraformat_converters.onnx.graph.operators import attribute

__all__ = ["FIRST_ALONE", "RULES", "LostError", "Read", "Rows", "Values"]


@dataclass(frozen=True)
class Rows:
    """The axis that carries the rows, and how many of its entries belong to one."""

    axis: int
    per: int = 1


class LostError(Exception):
    """Why the rows cannot be followed further."""


Read = Mapping[int, Rows]
"""What of a node's inputs carries the rows: position → rows."""


class Values(Protocol):
    """What a rule may ask."""

    opset: int
    count: int | None

    def rank(self, name: str) -> int:
        """How many axes a value has."""

    def shape(self, name: str) -> tuple[int | None, ...]:
        """The sizes of a value, as far as they are known."""

    def numbers(self, node: onnx.NodeProto, name: str, position: int) -> list[int] | None:
        """An attribute, or since some opset the constant input in its place."""


def _agreed(node: onnx.NodeProto, states: Sequence[Rows]) -> Rows:
    if len(set(states)) != 1:
        raise LostError(f"{node.name or node.op_type} joins values whose rows lie along different axes")
    return states[0]


def _broadcast(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Elementwise: axes are counted from the last."""
    rank = max(own.rank(name) for name in node.input if name)
    return _agreed(node, [replace(s, axis=s.axis + rank - own.rank(node.input[i])) for i, s in read.items()])


def _kept(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Of one input, elementwise; others are not of the rows."""
    if read.keys() != {0}:
        raise LostError(f"{node.name or node.op_type} is parametrised by the rows")
    return read[0]


def _first_axis(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Operators over a batch: what is in axis 0 stays apart."""
    state = _agreed(node, list(read.values()))
    if state.axis != 0:
        raise LostError(f"{node.name or node.op_type} takes axis {state.axis}, of the rows, for something else")
    return state


def _norm(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Over ``axis`` and all behind it."""
    state, rank = _kept(own, node, read), own.rank(node.input[0])
    if state.axis >= attribute(node, "axis", -1) % rank:
        raise LostError(f"{node.name or node.op_type} mixes the rows")
    return state


def _softmax(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Over ``axis``; until opset 13 over all behind it too."""
    state, rank = _kept(own, node, read), own.rank(node.input[0])
    axis = attribute(node, "axis", -1 if own.opset >= 13 else 1) % rank
    if state.axis == axis or (own.opset < 13 and state.axis > axis):
        raise LostError(f"{node.name or node.op_type} mixes the rows")
    return state


def _beside(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Along an axis that is not the rows': Concat, Split, CumSum."""
    rank = own.rank(node.input[0])
    axes = own.numbers(node, "axis", 1) if node.op_type == "CumSum" else [attribute(node, "axis", 0)]
    state = _agreed(node, list(read.values()))
    if state.axis in {axis % rank for axis in axes or [0]}:
        raise LostError(f"{node.name or node.op_type} joins or cuts the rows")
    return state


def _matmul(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Batch axes are counted from behind; what is summed over is lost."""
    ranks = [own.rank(node.input[i]) for i in (0, 1)]
    if min(ranks) < 2 or attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise LostError(f"{node.name or node.op_type} multiplies vectors, or moves its batch axes")
    states = []
    for i, state in read.items():
        if i > 1:
            raise LostError(f"{node.name or node.op_type} is parametrised by the rows")
        from_last = ranks[i] - state.axis
        if attribute(node, f"trans{'AB'[i]}", 0) and from_last <= 2:
            from_last = 3 - from_last
        if from_last == 1 + i:
            raise LostError(f"{node.name or node.op_type} sums over the rows")
        states.append(replace(state, axis=max(ranks) - from_last))
    return _agreed(node, states)


def _times_weight(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """x · W with a stored W: the last axis of x is summed over."""
    state = _kept(own, node, read)
    if state.axis == own.rank(node.input[0]) - 1:
        raise LostError(f"{node.name or node.op_type} sums over the rows")
    return state


def _gemm(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    product = {i: state for i, state in read.items() if i < 2}
    added = [replace(read[2], axis=read[2].axis + 2 - own.rank(node.input[2]))] if 2 in read else []
    return _agreed(node, [*([_matmul(own, node, product)] if product else []), *added])


def _transpose(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    rank = own.rank(node.input[0])
    return replace(read[0], axis=list(attribute(node, "perm", list(range(rank))[::-1])).index(read[0].axis))


def _reshape(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """The axes before the rows' must stay; then their axis counts rows where the rest divides what belongs to one."""
    state, old, new = _kept(own, node, read), own.shape(node.input[0]), own.shape(node.output[0])
    axis = state.axis
    before = list(zip(old[:axis], new[:axis], strict=False))
    if len(new) <= axis or any(a is None or a != b for a, b in before):
        raise LostError(f"{node.name or node.op_type} moves what lies before the rows")
    size, now = old[axis], new[axis]
    if now is not None and now in (size, own.count):  # as many as before, or one for each row, in the same order
        return state if now == size else Rows(axis)
    if None in old[axis + 1 :] or None in new[axis + 1 :]:
        raise LostError(f"{node.name or node.op_type} gives the rows sizes that are not known")
    one, rest = state.per * math.prod(n or 1 for n in old[axis + 1 :]), math.prod(n or 1 for n in new[axis + 1 :])
    if not rest or one % rest:
        raise LostError(f"{node.name or node.op_type} may cut a row in two")
    return Rows(axis, one // rest)


def _unsqueeze(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    state, axes = _kept(own, node, read), own.numbers(node, "axes", 1) or []
    rank = own.rank(node.input[0]) + len(axes)
    new = {axis % rank for axis in axes}
    return replace(state, axis=[a for a in range(rank) if a not in new][state.axis])


def _squeeze(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    state, rank = _kept(own, node, read), own.rank(node.input[0])
    return _without(node, state, own.numbers(node, "axes", 1), rank, kept=False)


def _reduce(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    state, rank = _kept(own, node, read), own.rank(node.input[0])
    name, position = ("axis", 9) if node.op_type in ("ArgMax", "ArgMin") else ("axes", 1)
    axes = own.numbers(node, name, position)
    return _without(
        node, state, [0] if axes is None and name == "axis" else axes, rank, kept=bool(attribute(node, "keepdims", 1))
    )


def _without(node: onnx.NodeProto, state: Rows, axes: Sequence[int] | None, rank: int, *, kept: bool) -> Rows:
    gone = {axis % rank for axis in axes} if axes else set(range(rank))
    if state.axis in gone:
        raise LostError(f"{node.name or node.op_type} leaves no rows")
    return state if kept else replace(state, axis=state.axis - sum(axis < state.axis for axis in gone))


def _gather(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """By indices of the rows, of a table that is not; or entries of another axis of the rows' values."""
    rank = own.rank(node.input[0])
    axis = attribute(node, "axis", attribute(node, "gather_axis", 0)) % rank
    if read.keys() == {1}:
        return replace(read[1], axis=axis + read[1].axis)
    if read.keys() == {0} and read[0].axis != axis:
        more = own.rank(node.input[1]) - 1 if read[0].axis > axis else 0
        return replace(read[0], axis=read[0].axis + more)
    raise LostError(f"{node.name or node.op_type} picks among the rows")


def _gather_elements(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """By as many indices as there are rows, each of its own row, or of a table that is not of the rows."""
    state = _agreed(node, list(read.values()))
    if 1 not in read or (0 in read and attribute(node, "axis", 0) % own.rank(node.input[0]) == state.axis):
        raise LostError(f"{node.name or node.op_type} picks among the rows")
    return state


def _slice(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Of other axes; of the rows' own, all of them in their order, however many there are."""
    state, rank = _kept(own, node, read), own.rank(node.input[0])
    axes = own.numbers(node, "axes", 3)
    places = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    if state.axis in places:  # what is cut from other axes may be computed
        at = places.index(state.axis)
        starts, ends, steps = (
            own.numbers(node, name, 1 + i + (i > 1)) for i, name in enumerate(("starts", "ends", "steps"))
        )
        if not starts or not ends or at >= len(starts):
            raise LostError(f"{node.name or node.op_type} cuts the rows")
        if starts[at] != 0 or ends[at] < _ANY or (steps or [1] * rank)[at] != 1:
            raise LostError(f"{node.name or node.op_type} cuts the rows")
    return state


_ANY = 2**31 - 1
"""What exporters write for "to the end"."""


def _resize(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Axis by axis: one whose size stays is left alone, but for a crop."""
    state = _kept(own, node, read)
    cropped = attribute(node, "coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
    if cropped or not _as_many(own, node, state):
        raise LostError(f"{node.name or node.op_type} resizes the rows")
    return state


def _pad(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    state, rank = _kept(own, node, read), own.rank(node.input[0])
    ends = own.numbers(node, "pads", 1) or []
    if len(ends) != 2 * rank or ends[state.axis] or ends[rank + state.axis]:
        raise LostError(f"{node.name or node.op_type} adds rows")
    return state


def _as_many(own: Values, node: onnx.NodeProto, state: Rows) -> bool:
    """Whether the rows' axis is as long after the operator as before."""
    before, after = own.shape(node.input[0])[state.axis], own.shape(node.output[0])[state.axis]
    return before is not None and before == after


def _expand(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    state = _kept(own, node, read)
    return replace(state, axis=state.axis + own.rank(node.output[0]) - own.rank(node.input[0]))


def _einsum(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    inputs, _, out = attribute(node, "equation", b"").decode().replace(" ", "").partition("->")
    terms = inputs.split(",")
    letters = {i: terms[i][state.axis : state.axis + 1] for i, state in read.items()}
    if einsum.DOTS in inputs or any(letter not in out for letter in letters.values()):
        raise LostError(f"{node.name or node.op_type} sums over the rows")
    return _agreed(node, [replace(state, axis=out.index(letters[i])) for i, state in read.items()])


def _each(
    rule: Callable[[Values, onnx.NodeProto, Read], Rows], *names: str
) -> dict[str, Callable[[Values, onnx.NodeProto, Read], Rows]]:
    return {name: rule for words in names for name in words.split()}


FIRST_ALONE = frozenset({"DynamicQuantizeLinear"})
"""Of whose outputs only the first has the rows: the others are the scale and the zero point of all rows together."""

RULES: Mapping[str, Callable[[Values, onnx.NodeProto, Read], Rows]] = {
    **_each(
        _broadcast, "Add Sub Mul Div Pow Min Max Mean Sum Mod And Or Xor Equal Greater Less GreaterOrEqual LessOrEqual"
    ),
    **_each(_broadcast, "Where PRelu BitwiseAnd BitwiseOr com.microsoft.BiasGelu com.microsoft.FastGelu"),
    **_each(
        _kept,
        "Identity Cast CastLike Dropout Relu LeakyRelu Elu Selu Gelu Erf Tanh Sigmoid HardSigmoid HardSwish Swish",
    ),
    **_each(
        _kept,
        "QuantizeLinear DequantizeLinear Mish Softplus Softsign Exp Log Sqrt Reciprocal Neg Abs Not Sign Floor Ceil Round Sin Cos Clip IsInf IsNaN",
    ),
    **_each(_kept, "com.microsoft.Gelu com.microsoft.QuickGelu"),
    **_each(_norm, "LayerNormalization RMSNormalization SimplifiedLayerNormalization"),
    **_each(_softmax, "Softmax LogSoftmax"),
    **_each(_times_weight, "com.microsoft.MatMulNBits com.microsoft.MatMulBnb4"),
    **_each(_times_weight, "com.microsoft.DynamicQuantizeMatMul com.microsoft.MatMulIntegerToFloat"),
    **_each(_kept, "DynamicQuantizeLinear"),
    **_each(_beside, "Concat Split CumSum"),
    **_each(_matmul, "MatMul MatMulInteger com.microsoft.FusedMatMul"),
    **_each(
        _first_axis,
        "Conv ConvInteger ConvTranspose MaxPool AveragePool GlobalAveragePool GlobalMaxPool BatchNormalization",
    ),
    **_each(_first_axis, "InstanceNormalization GroupNormalization Attention RotaryEmbedding com.microsoft.Attention"),
    **_each(
        _first_axis, "com.microsoft.MultiHeadAttention com.microsoft.SkipLayerNormalization DepthToSpace SpaceToDepth"
    ),
    **_each(
        _first_axis,
        "com.microsoft.GroupQueryAttention com.microsoft.RotaryEmbedding com.microsoft.EmbedLayerNormalization",
    ),
    **_each(_first_axis, "com.microsoft.SkipSimplifiedLayerNormalization com.microsoft.GroupNorm"),
    **_each(
        _reduce, "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ArgMax ArgMin"
    ),
    **_each(_reshape, "Reshape Flatten"),
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    **_each(_gather, "Gather com.microsoft.GatherBlockQuantized"),
    "GatherElements": _gather_elements,
    "Slice": _slice,
    "Resize": _resize,
    "Upsample": _resize,
    "Pad": _pad,
    "Expand": _expand,
    "Einsum": _einsum,
}
