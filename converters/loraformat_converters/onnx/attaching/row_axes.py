"""Rules for operators that move the axes of a value, or take entries along them; see ``rows``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx

from loraformat_converters.onnx.attaching.row_state import Read, Rows, Rule, Values, agreed, kept, lost
from loraformat_converters.onnx.graph.operators import attribute

__all__ = ["AXES"]

_TO_THE_END = 2**31 - 1
"""What exporters write, or more, for the end of a slice that has none."""


def _transpose(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    rank = own.rank(node.input[0])
    return replace(read[0], axis=list(attribute(node, "perm", list(range(rank))[::-1])).index(read[0].axis))


def _reshape(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """The axes before the rows' must stay; then their axis counts rows where the rest divides what belongs to one."""
    state, old, new = kept(own, node, read), own.shape(node.input[0]), own.shape(node.output[0])
    axis = state.axis
    before = list(zip(old[:axis], new[:axis], strict=False))
    if len(new) <= axis or any(a is None or a != b for a, b in before):
        raise lost(node, "moves what lies before the rows")
    size, now = old[axis], new[axis]
    if now is not None and now in (size, own.count):  # as many as before, or one for each row, in the same order
        return state if now == size else Rows(axis)
    if None in old[axis + 1 :] or None in new[axis + 1 :]:
        raise lost(node, "gives the rows sizes that are not known")
    one, rest = state.per * math.prod(n or 1 for n in old[axis + 1 :]), math.prod(n or 1 for n in new[axis + 1 :])
    if not rest or one % rest:
        raise lost(node, "may cut a row in two")
    return Rows(axis, one // rest)


def _unsqueeze(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    state, axes = kept(own, node, read), own.numbers(node, "axes", 1) or []
    rank = own.rank(node.input[0]) + len(axes)
    new = {axis % rank for axis in axes}
    return replace(state, axis=[a for a in range(rank) if a not in new][state.axis])


def _squeeze(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    state, rank = kept(own, node, read), own.rank(node.input[0])
    return _without(node, state, own.numbers(node, "axes", 1), rank, kept=False)


def _reduce(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    state, rank = kept(own, node, read), own.rank(node.input[0])
    name, position = ("axis", 9) if node.op_type in ("ArgMax", "ArgMin") else ("axes", 1)
    axes = own.numbers(node, name, position)
    return _without(
        node, state, [0] if axes is None and name == "axis" else axes, rank, kept=bool(attribute(node, "keepdims", 1))
    )


def _without(node: onnx.NodeProto, state: Rows, axes: Sequence[int] | None, rank: int, *, kept: bool) -> Rows:
    gone = {axis % rank for axis in axes} if axes else set(range(rank))
    if state.axis in gone:
        raise lost(node, "leaves no rows")
    return state if kept else replace(state, axis=state.axis - sum(axis < state.axis for axis in gone))


def _expand(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    state = kept(own, node, read)
    return replace(state, axis=state.axis + own.rank(node.output[0]) - own.rank(node.input[0]))


def _gather(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """By indices of the rows, of a table that is not; or entries of another axis of the rows' values."""
    rank = own.rank(node.input[0])
    axis = attribute(node, "axis", attribute(node, "gather_axis", 0)) % rank
    if read.keys() == {1}:
        return replace(read[1], axis=axis + read[1].axis)
    if read.keys() == {0} and read[0].axis != axis:
        more = own.rank(node.input[1]) - 1 if read[0].axis > axis else 0
        return replace(read[0], axis=read[0].axis + more)
    raise lost(node, "picks among the rows")


def _gather_elements(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """By as many indices as there are rows, each of its own row, or of a table that is not of the rows."""
    state = agreed(node, list(read.values()))
    if 1 not in read or (0 in read and attribute(node, "axis", 0) % own.rank(node.input[0]) == state.axis):
        raise lost(node, "picks among the rows")
    return state


def _slice(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Of other axes; of the rows' own, all of them in their order, however many there are."""
    state, rank = kept(own, node, read), own.rank(node.input[0])
    axes = own.numbers(node, "axes", 3)
    places = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    if state.axis in places:  # what is cut from other axes may be computed
        at = places.index(state.axis)
        starts, ends, steps = (own.numbers(node, *place) for place in (("starts", 1), ("ends", 2), ("steps", 4)))
        ones = [1] * rank
        whole = starts and ends and starts[at : at + 1] == [0] and ends[at] >= _TO_THE_END and (steps or ones)[at] == 1
        if not whole:
            raise lost(node, "cuts the rows")
    return state


def _resize(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Axis by axis: one whose size stays is left alone, but for a crop."""
    state = kept(own, node, read)
    cropped = attribute(node, "coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
    if cropped or not _as_many(own, node, state):
        raise lost(node, "resizes the rows")
    return state


def _pad(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    state, rank = kept(own, node, read), own.rank(node.input[0])
    ends = own.numbers(node, "pads", 1) or []
    if len(ends) != 2 * rank or ends[state.axis] or ends[rank + state.axis]:
        raise lost(node, "adds rows")
    return state


def _as_many(own: Values, node: onnx.NodeProto, state: Rows) -> bool:
    """Whether the rows' axis is as long after the operator as before."""
    before, after = own.shape(node.input[0])[state.axis], own.shape(node.output[0])[state.axis]
    return before is not None and before == after


AXES: Mapping[Rule, str] = {
    _transpose: "Transpose",
    _reshape: "Reshape Flatten",
    _unsqueeze: "Unsqueeze",
    _squeeze: "Squeeze",
    _expand: "Expand",
    _reduce: """
        ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ArgMax ArgMin
    """,
    _gather: "Gather com.microsoft.GatherBlockQuantized",
    _gather_elements: "GatherElements",
    _slice: "Slice",
    _resize: "Resize Upsample",
    _pad: "Pad",
}
"""Rule → the operators that it is of."""
