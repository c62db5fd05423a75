"""Widened: pairs inside the base's own product, [x|u] · [W;B] with u = x·A, and u once for all weights that read one x.

    x ──┬─────────────────────────── Concat ── MatMul( W;B ) ── y
        └── MatMul( A₁|A₂|… ) ── u ──┘

On a GPU a branch costs kernels and passes over its output, not arithmetic: this adds two kernels for each x, and no pass
over y. B's rows stand below W in a constant subgraph, which ONNX Runtime folds when it loads the model. W stays as it
is stored. Below each of several weights stand the rows of all, zeros where a column of u is another's; where those would
cost more than the kernels, u is split and each weight has its own Concat. Where the weights are small, their products
are one (``joint``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from onnx import helper

from loraformat_converters.onnx.attaching.branches import LINEAR
from loraformat_converters.onnx.attaching.factors import Factors, padded
from loraformat_converters.onnx.attaching.joint import join, joins
from loraformat_converters.onnx.attaching.weight import wide
from loraformat_converters.onnx.changing.spots import Spot
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.nodes import Editor, Nodes
from loraformat_converters.onnx.graph.operators import attribute

__all__ = ["together", "widen", "widens"]

_KERNEL = 2**21
"""Numbers of a weight that take a GPU as long as one kernel more does (one H100, float16, ONNX Runtime 1.31.1)."""


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
    a = make.turn(make.node("Concat", [pair.a for _, own in uses for pair in own], "A/all", axis=0), 2, "A/T")
    a = make.cast(a, dtype, "A/cast", wide(dtype))
    apart = _stand_apart(uses)
    below, run = _below(make, uses, apart), Nodes(index, make.stem)
    xs = _beside(run, first.x, between(run, run.node("MatMul", [first.x, a], "hidden")), uses, apart)
    values, small = dict.fromkeys(xs, first.x), list[tuple[Site, str]]()
    several = not apart and sum(joins(site) for site, _ in uses) > 1
    for b, x, (site, _) in zip(below, xs, uses, strict=True):
        weight, name = site.values[-1].name, index.fresh(f"{make.stem}/weight")
        node = helper.make_node("Concat", [weight, b], [name], name, axis=site.operand.in_[0])
        if several and joins(site):
            run.list.append(node)
            small.append((site, name))
            continue
        editor.before(site.scope, site.node.output[0], [node])
        values[name] = weight
        site.node.input[site.side] = name
        site.node.input[1 - site.side] = x
    if small:
        values |= join(run, xs[0], small)
    reader = min((site for site, _ in uses), key=lambda site: site.number)
    editor.before(reader.scope, reader.node.output[0], run.list)
    return values


def _beside(
    run: Nodes, x: str, hidden: str, uses: Sequence[tuple[Site, Sequence[Factors]]], apart: bool
) -> Sequence[str]:
    """[x|u] as each weight reads it: with all of u, or ``apart`` with its own part."""
    if not apart:
        return [run.node("Concat", [x, hidden], "x", axis=-1)] * len(uses)
    parts = run.split(hidden, [sum(pair.r for pair in own) for _, own in uses], "hidden/of")
    return [run.node("Concat", [x, part], "x", axis=-1) for part in parts]


def _stand_apart(uses: Sequence[tuple[Site, Sequence[Factors]]]) -> bool:
    """Whether the zeros below the weights would cost more than a Split and a Concat for each weight but one."""
    total = sum(pair.r for _, own in uses for pair in own)
    zeros = sum((total - sum(pair.r for pair in own)) * site.operand.matrix_shape[-2] for site, own in uses)
    return zeros > len(uses) * _KERNEL


def _below(make: Nodes, uses: Sequence[tuple[Site, Sequence[Factors]]], apart: bool) -> list[str]:
    """What stands below each weight, laid like it: its own B, and zeros at the columns of u that are not its own."""
    total, start, found = sum(pair.r for _, own in uses for pair in own), 0, []
    for number, (site, own) in enumerate(uses):
        rank = sum(pair.r for pair in own)
        b = make.node("Concat", [pair.b for pair in own], f"B/{number}/all", axis=1) if len(own) > 1 else own[0].b
        b = b if apart else padded(make, b, [0, start, 0, total - start - rank], f"B/{number}")
        b = b if site.operand.out == (0,) else make.turn(b, 2, f"B/{number}/T")
        found.append(make.cast(b, site.dtype, f"B/{number}/cast", wide(site.dtype)))
        start += rank
    return found
