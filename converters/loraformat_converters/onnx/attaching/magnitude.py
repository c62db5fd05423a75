"""m/‖V‖ of a DoRA as the output of an operator meets it: y' = g ⊙ (y − bias) + bias + change, with g = m/‖V‖.

‖V‖ is known when the adapter is attached, so that g is a constant; the magnitude rescales W, and W alone.
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

__all__ = ["Rescaling", "beside", "kept", "norms", "ratio", "read", "rest", "sizes"]


@dataclass(frozen=True)
class Rescaling:
    """g as the output meets it, and 1 − g."""

    ratio: str
    rest: str


def read(index: Index, folder: Path, spot: Spot) -> tuple[Array, Placement]:
    """The weight as float32, and how [out, in] lies in it; LF-608 where it cannot be computed."""
    return _read(index, folder, spot.sites[0], spot.key)


def _read(index: Index, folder: Path, site: Site, key: str) -> tuple[Array, Placement]:
    found = Values(index, folder).read(site)
    if found is None:
        what = f"{site.node.name or site.operator}: its weight cannot be computed, and {key} needs its values"
        raise fault("LF-608", what, where=key, fix="loraformat convert --to-lora R makes a plain pair of it")
    return found[0].astype(np.float32), found[1]


def norms(index: Index, folder: Path, spot: Spot, change: Change, before: Sequence[Change] = ()) -> Array:
    """What the magnitude of a change divides by, on the weight that the changes ``before`` it leave."""
    value, root = read(index, folder, spot)
    for other in before:
        value = other.turned(root).apply(value)
    place = change.parameter or root
    return replace(change.update, placement=place).norms(place.from_matrix(root.to_matrix(value)))


def beside(index: Index, folder: Path) -> Callable[[Gain, Update], Array]:
    """What the magnitude of an update divides by, on the weight that a slot stands beside; LF-608 where it has none."""

    def norms(gain: Gain, update: Update) -> Array:
        wanted = gain.weight, gain.out, update.matrix_shape()
        sites = [s for s in index.sites if (s.root_name, s.placement.out, s.placement.matrix_shape) == wanted]
        if len({id(site.root) for site in sites}) != 1:  # inner graphs may use one name each
            what = f"{len(sites)} operators of the model read {gain.weight} as the one beside the slot does"
            raise fault("LF-608", what, where=gain.name, fix="attach the DoRA as a branch, or merge it")
        value, root = _read(index, folder, sites[0], gain.name)
        matrix = root.to_matrix(value)
        return replace(update, placement=Placement(matrix.shape, (0,), (1,))).norms(matrix)

    return norms


def ratio(make: Nodes, update: Update, norms: Array, kind: int) -> str:
    """g, of the type in which constants are computed."""
    m = make.cast(make.store("magnitude", update["magnitude"].magnitude), kind, "magnitude/wide")
    norm = make.store("norm", norms.astype(helper.tensor_dtype_to_np_dtype(kind)))
    return make.node("Div", [m, norm], "magnitude/ratio")


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


def sizes(form: Form, site: Site) -> list[int]:
    """The shape in which a vector [out] meets the output."""
    out = site.operand.matrix_shape[-2]
    return [out if n == -1 else n for n in form.spread(site) or ()]
