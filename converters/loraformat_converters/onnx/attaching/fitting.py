"""What is fed, and how an operator's branch takes it: the slots of a weight, one for each parameter that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import helper

from loraformat.parts import Lora
from loraformat.updates import Update
from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.attaching.branches import FORMS, Pair
from loraformat_converters.onnx.attaching.factors import padded
from loraformat_converters.onnx.attaching.pairs import Form, laid
from loraformat_converters.onnx.attaching.slot import Gain, Slot
from loraformat_converters.onnx.attaching.slot_names import gain_of, inputs_of
from loraformat_converters.onnx.attaching.swappable import FORMS_FED
from loraformat_converters.onnx.changing.spots import Spot
from loraformat_converters.onnx.graph.nodes import Nodes

if TYPE_CHECKING:
    from loraformat.base import Options

__all__ = ["fitted", "gained", "slot_of"]


def slot_of(spot: Spot, options: Options) -> Slot:
    """The inputs of one parameter."""
    site = spot.sites[0]
    names = inputs_of(spot.key, options.slot_names)  # type: ignore[arg-type]
    dtype = helper.tensor_dtype_to_np_dtype(site.dtype).name
    form = FORMS_FED[site.like]
    *batch, out, in_ = site.operand.matrix_shape
    rows = spot.changes[0].rows
    if rows is not None:
        out = rows[1] - rows[0]
    none = Update((Lora(np.zeros((*batch, 0, in_)), np.zeros((*batch, out, 0)), 1.0, "factor"),))
    a, b = _laid_empty(none, form, [site.operand.shape[axis] for axis in site.operand.in_])
    # Nothing else in the shapes of a pair of rank 0 is 0.
    a_shape, b_shape = (tuple(n or None for n in shape) for shape in (a, b))
    gain = None
    if any("magnitude" in change.update for change in spot.changes):
        sizes = tuple(magnitude.sizes(FORMS[site.like], site, rows))
        name = gain_of(spot.key, options.slot_names)  # type: ignore[arg-type]
        gain = Gain(name, sizes, site.root_name, site.placement.out, rows)
    return Slot(spot.key, *names, a_shape, b_shape, dtype, form, options.pad_rank, gain)


def _laid_empty(none: Update, form: Form, in_sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a pair of rank 0: no -1 can be found where there is no value."""
    if form == "conv":
        out = none["lora"].lora_B.shape[0]
        return (0, *in_sizes), (out, 0, *(1 for _ in in_sizes[1:]))
    a, b = laid("", none, form)
    return a.shape, b.shape


def fitted(make: Nodes, spot: Spot, slots: Sequence[Slot]) -> Pair:
    """What is fed for all parameters of a weight, as the operator's branch takes one pair."""
    site, (a, b), rank = spot.sites[0], _joined(make, spot, slots), len(slots[0].a_shape)
    if site.like == "ConvTranspose":  # its kernels are [in, r, *kernel]
        a = make.transpose(a, [1, 0, *range(2, rank)], "A/T")
    elif site.like != "Gather" and site.side == 0:
        a, b = make.turn(a, rank, "A/T"), make.turn(b, rank, "B/T")
    if site.factor != 1.0:
        dtype = helper.tensor_dtype_to_np_dtype(site.dtype)
        b = make.node("Mul", [b, make.store("factor", np.asarray(site.factor, dtype))], "B/scaled")
    return Pair(a, b, (), ())


def gained(make: Nodes, spot: Spot, slots: Sequence[Slot]) -> str:
    """The gain of all rows of a weight, 0 at those of parameters that have none; "" where no parameter has one."""
    parts = [(part.changes[0].rows, slot.gain) for part, slot in zip(spot.parts(), slots, strict=True)]
    fed = [(gain.name, rows) for rows, gain in parts if gain is not None]
    if not fed:
        return ""
    site = spot.sites[0]
    none = np.zeros((), helper.tensor_dtype_to_np_dtype(site.dtype))
    return make.runs(fed, magnitude.sizes(FORMS[site.like], site), none, "gain/rows")


def _joined(make: Nodes, spot: Spot, slots: Sequence[Slot]) -> tuple[str, str]:
    """A and B of all slots of a weight as one pair: B in the rows of its parameter, and side by side along the rank."""
    pairs, out = [], spot.sites[0].operand.matrix_shape[-2]
    for n, (part, slot) in enumerate(zip(spot.parts(), slots, strict=True)):
        rows, ends = part.changes[0].rows, [0] * (2 * len(slot.b_shape))
        if rows is not None:
            axis = 0 if slot.form == "conv" else len(slot.b_shape) - 1
            ends[axis], ends[axis + len(slot.b_shape)] = rows[0], out - rows[1]
        pairs.append((slot.a, padded(make, slot.b, ends, f"B/{n}")))
    if len(pairs) == 1:
        return pairs[0]
    rank_of_a, rank_of_b = (shape.index(None) for shape in (slots[0].a_shape, slots[0].b_shape))
    a = make.node("Concat", [a for a, _ in pairs], "A/all", axis=rank_of_a)
    return a, make.node("Concat", [b for _, b in pairs], "B/all", axis=rank_of_b)
