"""The slots that somebody else gave a model: Olive's ExtractAdapters makes inputs of what PEFT's layers were exported with.

    x ─┬── MatMul(W) ───────────────────────── Add ── y          the inputs A and B have defaults of rank 0
       └── MatMul( A ) ── MatMul( B ) ── Mul(s) ─┘

They are found by what the nodes compute, with the s that the graph has: what is fed is the adapter's own s over it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from onnx import helper

from loraformat.errors import LoraFormatError, Problem
from loraformat_converters.onnx.attaching.branches import LINEAR
from loraformat_converters.onnx.attaching.slot import Slot
from loraformat_converters.onnx.attaching.slots import Slots
from loraformat_converters.onnx.changing.branched import pairs
from loraformat_converters.onnx.changing.computed import Branch
from loraformat_converters.onnx.graph.index import Index, Site

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    from loraformat_converters.onnx.graph.values import Values

__all__ = ["slotted"]


def slotted(index: Index, values: Values, identity: Callable[[], str]) -> Slots | None:
    """The slots of a model without a record of ours; None where no input has a default of rank 0.

    Args:
        identity: the SHA-256 of the model.

    Raises:
        LoraFormatError: LF-613 such an input is no factor of a branch s·B·A·x, or is one in a form that no slot has.
    """
    empty = {v.name for v in index.graph.input if _is_empty(index.roots.get(v.name))}
    if not empty:
        return None
    names: dict[tuple[str, str, str], str] = {}  # a module that is called twice is called by two names
    made = [
        (branch, _slot(names.setdefault((site.root_name, branch.a.root_name, branch.b.root_name), key), site, branch))
        for key, site, branch in pairs(index, values)
    ]
    found = [(branch, slot) for branch, slot in made if slot is not None and slot.inputs.keys() <= empty]
    slots = {slot.key: slot for _, slot in found}
    used = {site.number for branch, slot in found if slots[slot.key] == slot for site in (branch.a, branch.b)}
    owners = Counter(name for slot in slots.values() for name in slot.inputs)
    strange = {name for name in empty if owners[name] != 1}
    strange |= {site.root_name for site in index.sites if site.root_name in empty and site.number not in used}
    if strange:
        what = "an input of rank 0 that is no factor A [in, r] or B [r, out] of one weight, and nothing else"
        fix = "put adapters into the model as it was exported: attach --mode swap"
        raise LoraFormatError([Problem("LF-613", what, name, fix) for name in sorted(strange)])
    return Slots(slots, identity())


def _is_empty(tensor: onnx.TensorProto | None) -> bool:
    """Whether it is a matrix of rank 0; an empty vector may be anything, such as a Resize's roi."""
    return tensor is not None and len(tensor.dims) == 2 and 0 in tensor.dims


def _slot(key: str, site: Site, branch: Branch) -> Slot | None:
    """As MatMul reads A and B on its right, which is how Olive writes them; None of any other form."""
    a, b, scale = branch.a, branch.b, branch.scale / site.factor
    plain = all(s.like in LINEAR and s.side == 1 and not s.chain and s.operand.out == (1,) for s in (a, b))
    if (
        not plain
        or branch.ratio is not None
        or not math.isfinite(scale)
        or scale == 0
        or len(site.operand.matrix_shape) != 2
    ):
        return None
    dtype = helper.tensor_dtype_to_np_dtype(a.root.data_type).name
    shapes = (a.operand.shape[0], None), (None, b.operand.shape[1])
    return Slot(key, a.root_name, b.root_name, *shapes, dtype, scale=scale)
