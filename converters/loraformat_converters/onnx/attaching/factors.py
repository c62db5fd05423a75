"""The pairs of a weight as constants of a graph, in the type in which constants are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import helper

from loraformat.parts import Lora
from loraformat_converters.onnx.attaching.weight import wide
from loraformat_converters.onnx.changing.rounding import balance
from loraformat_converters.onnx.changing.spots import Change
from loraformat_converters.onnx.graph.index import Site
from loraformat_converters.onnx.graph.nodes import Nodes

__all__ = ["Factors", "factors", "joined", "owners", "padded", "side_by_side"]


@dataclass(frozen=True)
class Factors:
    """One adapter's pair: A [r, in], s·B [out, r]."""

    job: int
    a: str
    b: str
    r: int


def factors(make: Nodes, change: Change, site: Site, factor: float, ratio: str = "") -> Factors:
    """The pair of a change times ``factor``, its tensors stored as the adapter has them; ``ratio`` [out] rescales B.

    Computed in float32 or float64: 16-bit arithmetic has no CPU kernel that would fold it (ONNX Runtime 1.32).
    """
    lora: Lora = change.update["lora"]
    kind = wide(site.dtype)
    k, _ = balance(lora, factor, site.dtype)
    numpy = helper.tensor_dtype_to_np_dtype(kind)
    scale = make.store("scale", np.asarray(lora.scale * factor * 2.0**k, numpy))
    b = make.cast(make.store("lora_B", lora.lora_B), kind, "lora_B/wide")
    b = make.node("Mul", [b, scale], "lora_B/scaled")
    if ratio:
        column = make.reshape(ratio, lora.lora_B.shape[:1], [lora.lora_B.shape[0], 1], "magnitude/column")
        b = make.node("Mul", [b, column], "lora_B/rescaled")
    b, _ = make.spread(b, lora.lora_B.shape, change.rows, site.operand.matrix_shape[-2], "lora_B/rows")
    a = make.cast(make.store("lora_A", lora.lora_A), kind, "lora_A/wide")
    if k:
        a = make.node("Mul", [a, make.store("lora_A/power", np.asarray(2.0**-k, numpy))], "lora_A/balanced")
    return Factors(change.job, a, b, lora.r)


def joined(make: Nodes, pairs: Sequence[Factors]) -> dict[int, Factors]:
    """Adapter → its pairs as one: those of the parameters that a packed weight holds, side by side."""
    by_job: dict[int, list[Factors]] = {}
    for pair in pairs:
        by_job.setdefault(pair.job, []).append(pair)
    return {job: side_by_side(make, own) for job, own in by_job.items()}


def side_by_side(make: Nodes, pairs: Sequence[Factors]) -> Factors:
    """Pairs of one adapter as one, along the rank."""
    if len(pairs) == 1:
        return pairs[0]
    a = make.node("Concat", [pair.a for pair in pairs], "A/own", axis=0)
    b = make.node("Concat", [pair.b for pair in pairs], "B/own", axis=1)
    return Factors(pairs[0].job, a, b, sum(pair.r for pair in pairs))


def owners(pairs: Sequence[Factors]) -> list[int]:
    """The adapter of each column of u."""
    return [pair.job for pair in pairs for _ in range(pair.r)]


def padded(make: Nodes, value: str, ends: Sequence[int], role: str) -> str:
    """With zeros before and after each axis."""
    return make.pad(value, ends, f"{role}/padded") if any(ends) else value
