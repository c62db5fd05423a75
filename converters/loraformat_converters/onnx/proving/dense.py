"""The change as one product more: y + op(x, ΔW), with ΔW computed by numpy. The proof's other way beside a quantised weight.

A branch multiplies by A and then by B, in constants of the graph's own; this multiplies once, by a matrix that
``Update`` made. What is linear must give the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import helper, numpy_helper

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat_converters.onnx.changing.spots import Spot
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.nodes import Editor
from loraformat_converters.onnx.graph.values import Values

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["beside", "check_products"]

_FIX = "leave --verify out; loraformat verify compares the weights"

_KERNELS = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides", "output_padding", "output_shape")
_ATTRIBUTES = {
    **dict.fromkeys(("Conv", "ConvTranspose"), _KERNELS),
    "Gemm": ("transA", "transB", "alpha"),
    "Einsum": ("equation",),
    "com.microsoft.FusedMatMul": ("transA", "transB", "transBatchA", "transBatchB", "alpha"),
}
"""What a product has that x and ΔW are multiplied with as x and W are."""


def beside(index: Index, values: Values, spots: Iterable[Spot], merged: Values | None = None) -> None:
    """Add to every use of these weights the product of its x with ΔW.

    Args:
        merged: another model's weights, which are W + ΔW; without them ΔW is what the changes say.
    """
    editor, spots = Editor(index), list(spots)
    check_products(spots)
    for spot in spots:
        for site in spot.sites:
            delta = _delta(values, spot, site) if merged is None else _between(values, merged, site)
            _add(index, editor, site, delta)
    editor.finish()


def check_products(spots: Iterable[Spot]) -> None:
    """LF-608 for the uses beside which nothing can be put."""
    unseen = [(spot.key, site) for spot in spots for site in spot.sites if site.refusal]
    what = "{}: its product is not at hand: nothing can be proved of it"
    problems = [Problem("LF-608", what.format(site.node.name or site.operator), key, _FIX) for key, site in unseen]
    if problems:
        raise LoraFormatError(problems)


def _delta(values: Values, spot: Spot, site: Site) -> Array:
    """ΔW [*batch, out, in] of all changes."""
    if all(change.update.linear for change in spot.changes):
        return np.asarray(sum(change.turned(site.operand).delta() for change in spot.changes))
    found = values.read(site)
    if found is None:
        raise fault("LF-608", "its weight cannot be computed: nothing can be proved of it", where=spot.key)
    old, place = found[0].astype(np.float32), found[1]
    new = old
    for change in spot.changes:
        new = change.turned(place).apply(new)
    return site.operand.from_matrix(place.to_matrix(new - old))


def _between(values: Values, merged: Values, site: Site) -> Array:
    """What became of the weight of a site in another model."""
    old, new = (own.read(own.index.sites[site.number]) for own in (values, merged))
    if old is None or new is None:
        raise fault("LF-608", "its weight cannot be computed: nothing can be proved of it", where=site.root_name)
    matrices = [place.to_matrix(weight.astype(np.float32)) for weight, place in (old, new)]
    return site.operand.from_matrix(matrices[1] - matrices[0])


def _add(index: Index, editor: Editor, site: Site, delta: Array) -> None:
    domain, _, op = site.like.rpartition(".")
    packed = site.dequantises and op == "MatMul" and site.operand.out == (0,)  # which MatMul itself reads as [in, out]
    kind = helper.tensor_dtype_to_np_dtype(site.dtype)
    name, change, base = (index.fresh(f"proof/{site.number}/{role}") for role in ("delta", "change", "base"))
    laid = np.ascontiguousarray((delta.T if packed else delta).astype(kind))
    index.store(numpy_helper.from_array(laid, name))
    inputs = [site.x, name] if site.side == 1 else [name, site.x]
    kept = {
        a.name: helper.get_attribute_value(a) for a in site.node.attribute if a.name in _ATTRIBUTES.get(site.like, ())
    }
    y = site.end.output[0]
    site.end.output[0] = base
    nodes = [
        helper.make_node(op, inputs, [change], domain=domain, **kept),
        helper.make_node("Add", [base, change], [y]),
    ]
    editor.lay(site.scope, base, nodes)
