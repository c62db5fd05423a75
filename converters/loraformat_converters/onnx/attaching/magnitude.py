"""m/‖V‖ of a DoRA as the output of an operator meets it: y' = g ⊙ (y − bias) + bias + change, with g = m/‖V‖.

‖V‖ is known when the adapter is attached, so that g is a constant; the magnitude rescales W, and W alone. Of a weight that
holds several parameters g is one vector for all of them, with 1 at the rows that have no magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import helper

from loraformat.axes import Placement
from loraformat.errors import fault
from loraformat.tiles import length
from loraformat_converters.onnx.attaching.branches import Form
from loraformat_converters.onnx.attaching.weight import wide
from loraformat_converters.onnx.changing.spots import Change, Spot
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.nodes import Nodes
from loraformat_converters.onnx.graph.operators import attribute
from loraformat_converters.onnx.graph.values import Values

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.updates import Update
    from loraformat_converters.onnx.attaching.slot import Gain

    Array = npt.NDArray[Any]

__all__ = ["Ratio", "Rescaling", "beside", "kept", "norms", "of_all", "ratio", "read", "rescaling", "rest", "sizes"]


Rows = tuple[int, int] | None

Ratio = tuple[str, Rows]
"""g of one parameter, and which rows of its weight it is for."""


@dataclass(frozen=True)
class Rescaling:
    """g as the output meets it, and 1 − g."""

    ratio: str
    rest: str


def read(index: Index, folder: Path, spot: Spot) -> tuple[Array, Placement]:
    """The weight as float32, and how [out, in] lies in it; LF-608 where it cannot be computed."""
    stored, place = _stored(index, folder, spot.sites[0], spot.key)
    return stored.astype(np.float32), place


def _stored(index: Index, folder: Path, site: Site, key: str) -> tuple[Array, Placement]:
    found = Values(index, folder).read(site)
    if found is None:
        what = f"{site.node.name or site.operator}: its weight cannot be computed, and {key} needs its values"
        raise fault("LF-608", what, where=key, fix="loraformat convert --to-lora R makes a plain pair of it")
    return found


def norms(index: Index, folder: Path, spot: Spot, change: Change, before: Sequence[Change] = ()) -> Array:
    """What the magnitude of a change divides by, on the weight that the changes ``before`` it leave."""
    stored, root = _stored(index, folder, spot.sites[0], spot.key)
    if change.rows is None and change.parameter is None:
        own = replace(change.update, placement=root)
        return own.laid_as_magnitude(length(own, [other.turned(root) for other in before], stored))
    value = stored.astype(np.float32)
    for other in before:
        value = other.turned(root).apply(value)
    if change.rows is not None:
        return _of_matrix(change.update, root.to_matrix(value)[..., slice(*change.rows), :])
    place = change.parameter or root
    return replace(change.update, placement=place).norms(place.from_matrix(root.to_matrix(value)))


def beside(index: Index, folder: Path) -> Callable[[Gain, Update], Array]:
    """What the magnitude of an update divides by, on the weight that a slot stands beside; LF-608 where it has none."""

    def norms(gain: Gain, update: Update) -> Array:
        sites = [site for site in index.sites if _is_beside(site, gain, update)]
        if len({id(site.root) for site in sites}) != 1:  # inner graphs may use one name each
            what = f"{len(sites)} operators of the model read {gain.weight} as the one beside the slot does"
            raise fault("LF-608", what, where=gain.name, fix="attach the DoRA as a branch, or merge it")
        stored, root = _stored(index, folder, sites[0], gain.name)
        if gain.rows is None and update["magnitude"].magnitude_axes is None:
            own = replace(update, placement=root)
            return own.laid_as_magnitude(length(own, [], stored))
        return _of_matrix(update, root.to_matrix(stored.astype(np.float32))[slice(*gain.rows or (None,))])

    return norms


def _is_beside(site: Site, gain: Gain, update: Update) -> bool:
    """Whether a site may be the one that a slot stands beside: by the weight's name and by its sizes."""
    shape, wanted = site.placement.matrix_shape, update.matrix_shape()
    if gain.rows is not None and len(shape) == 2 and gain.rows[1] <= shape[0]:
        shape = (gain.rows[1] - gain.rows[0], shape[1])
    return (site.root_name, site.placement.out, shape) == (gain.weight, gain.out, wanted)


def _of_matrix(update: Update, matrix: Array) -> Array:
    """What the magnitude of an update divides by, on [*batch, out, in]."""
    *batch, out, in_ = range(matrix.ndim)
    return replace(update, placement=Placement(matrix.shape, (out,), (in_,), tuple(batch))).norms(matrix)


def ratio(make: Nodes, update: Update, norms: Array, kind: int) -> str:
    """g, of the type in which constants are computed."""
    m = make.cast(make.store("magnitude", update["magnitude"].magnitude), kind, "magnitude/wide")
    norm = make.store("norm", norms.astype(helper.tensor_dtype_to_np_dtype(kind)))
    return make.node("Div", [m, norm], "magnitude/ratio")


def of_all(make: Nodes, ratios: Sequence[Ratio], site: Site) -> str:
    """g [out] of a weight that holds several parameters, each with its rows: 1 at those of all others."""
    none = np.ones((), helper.tensor_dtype_to_np_dtype(wide(site.dtype)))
    return make.runs(ratios, [site.operand.matrix_shape[-2]], none, "magnitude/rows")


def rescaling(make: Nodes, form: Form, site: Site, ratio: str) -> Rescaling:
    """What of y is kept, by g [out]."""
    kind, out = wide(site.dtype), site.operand.matrix_shape[-2]
    spread = make.reshape(ratio, [out], sizes(form, site), "magnitude/spread")
    one = make.store("one", np.ones((), helper.tensor_dtype_to_np_dtype(kind)))
    rest = make.node("Sub", [one, spread], "magnitude/rest")
    return Rescaling(make.cast(spread, site.dtype, "magnitude/cast", kind), rest)


def kept(form: Form, site: Site, gain: str, run: Nodes, base: str, bias: str) -> str:
    """y ⊙ (1 + gain) − bias ⊙ gain, with gain = g − 1 an input: y itself, bit for bit, where that is 0."""
    one = run.store("one", np.ones((), helper.tensor_dtype_to_np_dtype(site.dtype)))
    rescaled = run.node("Mul", [base, run.node("Add", [gain, one], "ratio")], "rescaled")
    if not bias:
        return rescaled
    wide_gain = run.cast(gain, wide(site.dtype), "gain/wide", site.dtype)
    return run.node("Sub", [rescaled, rest(run, form, site, bias, wide_gain)], "bias")


def rest(make: Nodes, form: Form, site: Site, bias: str, rest: str) -> str:
    """bias ⊙ ``rest``, which is (1 − g) as the output meets it, in the operator's type."""
    dtype = site.dtype
    bias = make.cast(bias, wide(dtype), "bias/wide", dtype)
    if (beta := attribute(site.node, "beta", 1.0)) != 1.0 and site.operator == "Gemm":
        scale = np.asarray(beta, helper.tensor_dtype_to_np_dtype(wide(dtype)))
        bias = make.node("Mul", [bias, make.store("bias/beta", scale)], "bias/scaled")
    if site.like in ("Conv", "ConvTranspose"):
        bias = make.reshape(bias, [site.operand.matrix_shape[-2]], sizes(form, site), "bias/spread")
    return make.cast(make.node("Mul", [bias, rest], "bias/rest"), dtype, "bias/cast", wide(dtype))


def sizes(form: Form, site: Site, rows: Rows = None) -> list[int]:
    """The shape in which a vector [out], or what some rows have of it, meets the output."""
    out = site.operand.matrix_shape[-2] if rows is None else rows[1] - rows[0]
    return [out if n == -1 else n for n in form.spread(site) or ()]
