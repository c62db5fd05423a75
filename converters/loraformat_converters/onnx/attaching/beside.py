"""What one adapter does beside a weight, in constants: A, s·B and g, from A, B, s and m as they are stored.

Of a weight that holds several parameters, q, k and v in one product, there is one of each: the A above each other, the B
side by side with each in the rows of its parameter, and g of them all. So they cost as many kernels as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.attaching.branches import Form, Pair
from loraformat_converters.onnx.attaching.factors import factors, side_by_side
from loraformat_converters.onnx.attaching.magnitude import Rescaling
from loraformat_converters.onnx.attaching.weight import wide
from loraformat_converters.onnx.changing.spots import Change, Spot
from loraformat_converters.onnx.graph.index import Site
from loraformat_converters.onnx.graph.nodes import Nodes

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Own", "constants", "groups"]


@dataclass(frozen=True)
class Own:
    """A change, where its own tensors go, and what its magnitude divides by; None without one."""

    make: Nodes
    change: Change
    norms: Array | None


def groups(spot: Spot) -> list[list[int]]:
    """The changes of a weight that have one branch: an adapter's, of the parameters that the weight holds."""

    def key(n: int) -> tuple[int, int]:
        change = spot.changes[n]
        packed = change.rows is not None and change.update["lora"].lora_A.ndim == 2
        return change.job, -1 if packed else n

    return [list(numbers) for _, numbers in groupby(range(len(spot.changes)), key)]


def constants(make: Nodes, form: Form, site: Site, own: Sequence[Own]) -> tuple[Pair, Rescaling | None]:
    """A and s·B in the graph's dtype, as ``form`` takes them; with a magnitude, what rescales the output."""
    kind, ratios = wide(site.dtype), list[tuple[str, tuple[int, int] | None]]()
    found = []
    for one in own:
        ratio = "" if one.norms is None else magnitude.ratio(one.make, one.change.update, one.norms, kind)
        ratios += [(ratio, one.change.rows)] if ratio else []
        found.append(factors(one.make, one.change, site, site.factor, ratio))
    pair = side_by_side(make, found)
    a, b = (make.cast(value, site.dtype, f"{role}/cast", kind) for role, value in (("A", pair.a), ("B", pair.b)))
    lora, out = own[0].change.update["lora"], site.operand.matrix_shape[-2]  # only those of two axes are joined
    shapes = (*lora.lora_A.shape[:-2], pair.r, lora.lora_A.shape[-1]), (*lora.lora_B.shape[:-2], out, pair.r)
    rescaling = magnitude.rescaling(make, form, site, magnitude.of_all(make, ratios, site)) if ratios else None
    return form.constants(make, site, Pair(a, b, *shapes)), rescaling
