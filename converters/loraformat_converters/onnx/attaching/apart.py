"""Apart: an Attention that multiplies by its weight itself, as a product and what goes on with it, to run something between.

    x ── Attention( W, bias, mask, past, added ) ── y, present

    x ── MatMul( W ) ── Split ── MultiHeadAttention( bias, mask, added, past[0], past[1] ) ── y
                                                                                  └── Concat ── present

Behind their products both operators run one attention: on the CPU (onnxruntime 1.20.1 and 1.32.0) and with CUDA (1.31.1, one
H100) their outputs are the same bits, but where on the CPU MultiHeadAttention of no mask and no present takes flash attention
(7e-8), and in float16 with CUDA where there is a present and no past (3e-4). What it does not take, it refuses by itself when
it is run. The node stays where it is, and becomes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from loraformat.errors import Problem
from loraformat_converters.onnx.graph.nodes import Nodes
from loraformat_converters.onnx.graph.operators import attribute
from loraformat_converters.onnx.graph.sizes import sizes

if TYPE_CHECKING:
    from loraformat.base import Options
    from loraformat_converters.onnx.changing.spots import Spot
    from loraformat_converters.onnx.graph.index import Index, Site

    Shapes = Mapping[str, tuple[int | None, ...]]

__all__ = ["Apart", "obstacles", "products", "told", "wanted", "widths"]

_ATTENTION = "com.microsoft.Attention"
_BIAS, _MASK, _PAST, _ADDED = range(2, 6)

_SHARED = ("num_heads", "unidirectional", "mask_filter_value", "scale")
"""The attributes that mean the same in both operators."""

_ALONE = {
    "do_rotary": "it turns q and k by their positions itself",
    "past_present_share_buffer": "its past and present share a buffer",
}
"""What MultiHeadAttention does not do."""

_ROWS, _REST = 10007, (5, 3, 7, 11, 2, 13)
"""Numbers for the sizes that a model leaves open."""


def wanted(options: Options) -> bool:
    """Whether something is to run beside every product: what is fed, chosen, or multiplied by an input."""
    return options.mode != "branch" or options.live_scale


def products(spots: Sequence[Spot]) -> list[Spot]:
    """The spots as they are when the attentions are apart; no graph is changed."""

    def product(site: Site) -> Site:
        name = f"{site.node.output[0]}/product"
        return replace(site, node=helper.make_node("MatMul", site.node.input[:_BIAS], [name], site.node.name))

    return [_each(spot, product) for spot in spots]


def obstacles(spots: Sequence[Spot], model: onnx.ModelProto) -> Iterator[Problem]:
    """Why an attention cannot be taken apart."""
    shapes: Shapes | None = None
    for spot in spots:
        for site in filter(_is_attention, spot.sites):
            if shapes is None and _input(site.node, _MASK):
                shapes, _ = sizes(model, {}, (_ROWS, *_REST))
            if why := _refusal(site, shapes or {}):
                what = f"{site.node.name or site.operator} cannot be taken apart, to put something between its product and the rest: {why}"
                fix = "--mode branch without --live-scale, which changes its weight; or attach before the attention is fused"
                yield Problem("LF-608", what, spot.key, fix)


def told(spots: Sequence[Spot]) -> str:
    """What becomes of the graph, for a person; "" where nothing."""
    count = len({site.number for spot in spots for site in spot.sites if _is_attention(site)})
    return f"{count} × Attention is taken apart, into MatMul and MultiHeadAttention" if count else ""


class Apart:
    """Attentions being taken apart in one graph.

    Attributes:
        was: below what the new nodes are named → the node as it was.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.was: dict[str, bytes] = {}
        self._products: dict[int, onnx.NodeProto] = {}

    def taken(self, spots: Sequence[Spot]) -> list[Spot]:
        """The same spots, with their attentions apart."""
        return [_each(spot, self._site) for spot in spots]

    def _site(self, site: Site) -> Site:
        if site.number not in self._products:
            self._products[site.number] = self._product(site)
        return replace(site, node=self._products[site.number])

    def _product(self, site: Site) -> onnx.NodeProto:
        """The MatMul, laid into the graph with what goes on with it."""
        node, graph = site.node, site.scope.graph
        assert graph is not None
        make = Nodes(self.index, self.index.stem(node.name or site.root_name))
        self.was[make.stem] = node.SerializeToString(deterministic=True)
        parts = make.split(make.node("MatMul", node.input[:_BIAS], "product"), widths(site), "part")
        if past := _input(node, _PAST):
            halves = [make.store(f"past/{n}/at", np.array(n)) for n in (0, 1)]
            parts += [make.node("Gather", [past, half], f"past/{n}", axis=0) for n, half in enumerate(halves)]
        behind = Nodes(self.index, make.stem)
        present = self._present(behind, node.output[1]) if len(node.output) > 1 and node.output[1] else []
        _become(node, parts, present)
        at = next(i for i, other in enumerate(graph.node) if other.output[:1] == node.output[:1])
        for n, new in enumerate(behind.list):
            graph.node.insert(at + 1 + n, new)
        for n, new in enumerate(make.list):
            graph.node.insert(at + n, new)
        product: onnx.NodeProto = graph.node[at]
        return product

    def _present(self, make: Nodes, name: str) -> list[str]:
        """The keys and values that go into ``name`` [2, …]."""
        halves = [self.index.fresh(f"{make.stem}/present/{n}") for n in (0, 1)]
        tall = [make.unsqueeze(half, 0, f"present/{n}/half") for n, half in enumerate(halves)]
        make.list.append(helper.make_node("Concat", tall, [name], self.index.fresh(f"{make.stem}/present"), axis=0))
        return halves


def _become(node: onnx.NodeProto, parts: Sequence[str], present: Sequence[str]) -> None:
    """MultiHeadAttention of q, k, v and perhaps a past."""
    inputs = [*parts[:3], _input(node, _BIAS), _input(node, _MASK), _input(node, _ADDED), *parts[3:]]
    while not inputs[-1]:
        inputs.pop()
    kept = {name: attribute(node, name, None) for name in _SHARED}
    made = helper.make_node(
        "MultiHeadAttention", inputs, [node.output[0], *present], node.name, domain=node.domain,
        **{name: value for name, value in kept.items() if value is not None},
    )  # fmt: skip
    node.CopyFrom(made)


def _is_attention(site: Site) -> bool:
    return site.operator == _ATTENTION


def _each(spot: Spot, product: Callable[[Site], Site]) -> Spot:
    return replace(spot, sites=tuple(product(site) if _is_attention(site) else site for site in spot.sites))


def _refusal(site: Site, shapes: Shapes) -> str:
    node = site.node
    # ONNX Runtime 1.32 folds DequantizeLinear in front of Attention; of it and MatMul it makes MatMulNBits.
    if site.sealed:
        return f"{site.sealed}, and a product with it alone is computed otherwise, with x in 8 bits"
    for name, why in _ALONE.items():
        if attribute(node, name, 0):
            return why
    if sum(widths(site)) != site.operand.shape[1]:
        return f"its parts {widths(site)} are not the {site.operand.shape[1]} columns of its weight"
    mask, rows = shapes.get(_input(node, _MASK), ()), (shapes.get(node.input[0]) or (None,))[0]
    if len(mask) > 3:
        return "MultiHeadAttention takes no mask of 4 axes"
    if mask[-1:] == (1,):
        return "MultiHeadAttention takes no mask of one token for all"
    if rows is not None and mask == (2 * rows,):
        return "MultiHeadAttention takes no mask of ends and starts"
    return ""


def widths(site: Site) -> list[int]:
    """The sizes of q, k and v."""
    return list(attribute(site.node, "qkv_hidden_sizes", None) or [site.operand.shape[1] // 3] * 3)


def _input(node: onnx.NodeProto, at: int) -> str:
    return node.input[at] if at < len(node.input) else ""
