"""What one adapter does beside a weight, in constants: A, s·B and g, from A, B, s and m as they are stored.

Of a weight that holds several parameters, q, k and v in one product, there is one of each: the A above each other, the B
side by side with each in the rows of its parameter, and g of them all. So they cost as many kernels as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.attaching.branches import Form, Pair
from loraformat_converters.onnx.attaching.magnitude import Rescaling
from loraformat_converters.onnx.attaching.weight import wide
from loraformat_converters.onnx.changing.rounding import balance
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
    made = [_pair(one, site) for one in own]
    ratios = [(ratio, one.change.rows) for one, (_, ratio) in zip(own, made, strict=True) if ratio]
    rescaling = magnitude.rescaling(make, form, site, magnitude.of_all(make, ratios, site)) if ratios else None
    return form.constants(make, site, _joined(make, [pair for pair, _ in made])), rescaling


def _pair(own: Own, site: Site) -> tuple[Pair, str]:
    """A and s·B of one change, of all rows of the weight; and its g, "" without a magnitude."""
    make, change, dtype = own.make, own.change, site.dtype
    lora = change.update["lora"]
    kind = np.float64 if wide(dtype) == TensorProto.DOUBLE else np.float32
    k, _ = balance(lora, site.factor, dtype)
    a, b = make.store("lora_A", lora.lora_A), make.store("lora_B", lora.lora_B)
    scale = make.store("scale", np.asarray(lora.scale * site.factor * 2.0**k, kind))
    # fp16 arithmetic has no CPU kernel to fold it, so products are taken in fp32 and cast last (ORT 1.32).
    b = make.node("Mul", [make.cast(b, wide(dtype), "lora_B/wide"), scale], "lora_B/scaled")
    ratio = "" if own.norms is None else magnitude.ratio(make, change.update, own.norms, wide(dtype))
    if ratio:
        column = make.reshape(ratio, lora.lora_B.shape[:1], [lora.lora_B.shape[0], 1], "magnitude/column")
        b = make.node("Mul", [b, column], "lora_B/rescaled")
    b, b_shape = make.spread(b, lora.lora_B.shape, change.rows, site.operand.matrix_shape[-2], "lora_B/rows")
    b = make.cast(b, dtype, "lora_B/cast", wide(dtype))
    if k:
        half = make.store("lora_A/power", np.asarray(2.0**-k, kind))
        a = make.node("Mul", [make.cast(a, wide(dtype), "lora_A/wide"), half], "lora_A/balanced")
        a = make.cast(a, dtype, "lora_A/cast", wide(dtype))
    else:
        a = make.cast(a, dtype, "lora_A/cast")
    return Pair(a, b, lora.lora_A.shape, b_shape), ratio


def _joined(make: Nodes, pairs: Sequence[Pair]) -> Pair:
    """Pairs of two axes as one, along the rank."""
    if len(pairs) == 1:
        return pairs[0]
    a = make.node("Concat", [pair.a for pair in pairs], "A/own", axis=0)
    b = make.node("Concat", [pair.b for pair in pairs], "B/own", axis=1)
    (_, in_), (out, _), rank = pairs[0].a_shape, pairs[0].b_shape, sum(pair.a_shape[0] for pair in pairs)
    return Pair(a, b, (rank, in_), (out, rank))
