"""Widened: pairs inside the base's own product, [x|u] · [W;B] with u = x·A, and u once for all weights that read one x.

    x ──┬─────────────────────────── Concat ── MatMul( W;B ) ── y
        └── MatMul( A₁|A₂|… ) ── u ──┘

On a GPU a branch costs kernels and passes over its output, not arithmetic: this adds two kernels for each x, and no pass
over y. B's rows stand below W in a constant subgraph, which ONNX Runtime folds when it loads the model; they are zeros
where a column of u is another weight's. W stays as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import helper

from loraformat.parts import Lora
from loraformat_converters.onnx.attaching.branches import LINEAR
from loraformat_converters.onnx.attaching.weight import wide
from loraformat_converters.onnx.changing.rounding import balance
from loraformat_converters.onnx.changing.spots import Change, Spot
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.nodes import Editor, Nodes
from loraformat_converters.onnx.graph.operators import attribute

__all__ = ["Factors", "factors", "owners", "padded", "together", "widen", "widens"]


@dataclass(frozen=True)
class Factors:
    """One adapter's pair in the type in which constants are computed: A [r, in], s·B [out, r]."""

    job: int
    a: str
    b: str
    r: int


def factors(make: Nodes, change: Change, site: Site, factor: float, ratio: str = "") -> Factors:
    """The pair of a change times ``factor``, its tensors stored as the adapter has them; ``ratio`` [out] rescales B."""
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


def owners(pairs: Sequence[Factors]) -> list[int]:
    """The adapter of each column of u."""
    return [pair.job for pair in pairs for _ in range(pair.r)]


def padded(make: Nodes, value: str, ends: Sequence[int], role: str) -> str:
    """With zeros before and after each axis."""
    if not any(ends):
        return value
    return make.node("Pad", [value, make.store(f"{role}/ends", np.array(ends, np.int64))], f"{role}/padded")


def widens(spot: Spot) -> bool:
    """Whether B can stand below W: a plain float weight of one use, on the right of an x that is read as it lies.

    In the body of a Loop nothing is known to be folded, and W would be copied at each turn.
    """
    site = spot.sites[0]
    plain = site.like in LINEAR and site.side == 1 and not site.vector and not site.operand.batch
    turned = any(attribute(site.node, name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    floats = site.product is None and site.sealed is None
    pairs = all(change.update.kind == "lora" and change.update["lora"].mid is None for change in spot.changes)
    return plain and floats and pairs and not turned and len(spot.sites) == 1 and site.scope.outer is None


def together(spots: Sequence[Spot]) -> list[list[Spot]]:
    """The spots that read one x, which have one u."""
    groups: dict[Hashable, list[Spot]] = {}
    for spot in spots:
        groups.setdefault((spot.sites[0].x, spot.sites[0].dtype), []).append(spot)
    return list(groups.values())


def widen(
    index: Index,
    editor: Editor,
    make: Nodes,
    uses: Sequence[tuple[Site, Sequence[Factors]]],
    between: Callable[[Nodes, str], str],
) -> dict[str, str]:
    """Put the pairs of several weights that read one x into their products.

    Args:
        make: takes the constants; whoever calls lays them.
        between: what happens to u, whose columns are those of all pairs in their order.

    Returns:
        A value of ours → the value of the base in whose place it stands.
    """
    first, dtype = uses[0][0], uses[0][0].dtype
    pairs = [pair for _, own in uses for pair in own]
    a = make.turn(make.node("Concat", [pair.a for pair in pairs], "A/all", axis=0), 2, "A/T")
    a = make.cast(a, dtype, "A/cast", wide(dtype))
    below = _below(make, uses, sum(pair.r for pair in pairs))
    run = Nodes(index, make.stem)
    hidden = between(run, run.node("MatMul", [first.x, a], "hidden"))
    x = run.node("Concat", [first.x, hidden], "x", axis=-1)
    reader = min((site for site, _ in uses), key=lambda site: site.number)
    editor.before(reader.scope, reader.node.output[0], run.list)
    values = {x: first.x}
    for b, (site, _) in zip(below, uses, strict=True):
        weight, name = site.values[-1].name, index.fresh(f"{make.stem}/weight")
        node = helper.make_node("Concat", [weight, b], [name], name, axis=site.operand.in_[0])
        editor.before(site.scope, site.node.output[0], [node])
        values[name] = weight
        site.node.input[site.side] = name
        site.node.input[1 - site.side] = x
    return values


def _below(make: Nodes, uses: Sequence[tuple[Site, Sequence[Factors]]], total: int) -> list[str]:
    """What stands below each weight, laid like it: its own B at the columns of u that are its own."""
    start, found = 0, []
    for number, (site, own) in enumerate(uses):
        rank = sum(pair.r for pair in own)
        b = make.node("Concat", [pair.b for pair in own], f"B/{number}/all", axis=1) if len(own) > 1 else own[0].b
        b = padded(make, b, [0, start, 0, total - start - rank], f"B/{number}")
        b = b if site.operand.out == (0,) else make.turn(b, 2, f"B/{number}/T")
        found.append(make.cast(b, site.dtype, f"B/{number}/cast", wide(site.dtype)))
        start += rank
    return found
