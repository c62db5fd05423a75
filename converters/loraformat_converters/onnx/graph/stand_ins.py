"""Operators of ONNX Runtime as standard ones whose outputs have the same sizes: onnx infers no shapes of the others.

Sizes as in ONNX Runtime 1.32's docs/ContribOperators.md. What stands in computes nothing: its weights have no values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import onnx
from onnx import TensorProto, helper

from loraformat_converters.onnx.graph.operators import attribute, operator

if TYPE_CHECKING:
    from collections.abc import Iterable

    Dims = Mapping[str, tuple[int, ...]]
    StandIn = Callable[[onnx.NodeProto, Dims], tuple[list[onnx.NodeProto], list[TensorProto]]]

__all__ = ["stand_in"]


def stand_in(graph: onnx.GraphProto) -> None:
    """Put them in the places of those that are known."""
    dims: Dims = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        made, weights = _KNOWN.get(operator(node), _itself)(node, dims)
        nodes += made
        graph.initializer.extend(weights)
    del graph.node[:]
    graph.node.extend(nodes)


def _itself(node: onnx.NodeProto, dims: Dims) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    return [node], []


def _alike(node: onnx.NodeProto, dims: Dims) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """What has the sizes of the first input: the first output, and the sum that a Skip… also gives."""
    outputs = [name for i, name in enumerate(node.output) if name and i in (0, 3)]
    return [helper.make_node("Identity", [node.input[0]], [name]) for name in outputs], []


def _product(node: onnx.NodeProto, x: str, rows: int, columns: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    weight = TensorProto(name=f"{node.output[0]}/weight", dims=[rows, columns], data_type=TensorProto.FLOAT)
    return [helper.make_node("MatMul", [x, weight.name], [node.output[0]])], [weight]


def _nbits(node: onnx.NodeProto, dims: Dims) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    return _product(node, node.input[0], attribute(node, "K", 0), attribute(node, "N", 0))


def _matmul(node: onnx.NodeProto, dims: Dims) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """x · W of a stored W, in whatever numbers; turned where transB says so."""
    shape = dims.get(node.input[1], ())
    if len(shape) != 2 or any(attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return [node], []
    return _product(node, node.input[0], *(shape[::-1] if attribute(node, "transB", 0) else shape))


def _attention(node: onnx.NodeProto, dims: Dims) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """[rows, tokens, hidden of v] of x · [Wq|Wk|Wv]."""
    shape = dims.get(node.input[1], ())
    if len(shape) != 2:
        return [node], []
    parts = attribute(node, "qkv_hidden_sizes", None) or [shape[1] // 3] * 3
    return _product(node, node.input[0], shape[0], parts[2])


def _heads(node: onnx.NodeProto, dims: Dims) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """[rows, tokens of q, hidden of v]; a q that holds k and v too is left alone."""
    if len(node.input) < 3 or not node.input[2]:
        return [node], []
    terms = "bsh,btv->bsv"
    return [helper.make_node("Einsum", [node.input[0], node.input[2]], [node.output[0]], equation=terms)], []


def _grouped(node: onnx.NodeProto, dims: Dims) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """[rows, tokens, hidden] like q; a q that holds k and v too is left alone."""
    return _alike(node, dims) if node.input[1] else ([node], [])


def _looked_up(node: onnx.NodeProto, dims: Dims) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Rows of a table [entries, size], of which each scale holds a block."""
    table, scales = dims.get(node.input[0], ()), dims.get(node.input[2], ())
    if len(table) != 2 or len(scales) != 2 or attribute(node, "gather_axis", 0):
        return [node], []
    sizes = [table[0], scales[1] * attribute(node, "block_size", 128)]
    held = TensorProto(name=f"{node.output[0]}/table", dims=sizes, data_type=TensorProto.FLOAT)
    return [helper.make_node("Gather", [held.name, node.input[1]], [node.output[0]])], [held]


def _embedded(node: onnx.NodeProto, dims: Dims) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Rows of the table of words, its first."""
    return [helper.make_node("Gather", [node.input[2], node.input[0]], [node.output[0]])], []


def _each(rule: StandIn, names: Iterable[str]) -> dict[str, StandIn]:
    return {f"com.microsoft.{name}": rule for name in names}


_KNOWN: Mapping[str, StandIn] = {
    **_each(_alike, ("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding")),
    **_each(_alike, ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")),
    **_each(_matmul, ("FusedMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")),
    **_each(_nbits, ("MatMulNBits", "MatMulBnb4")),
    **_each(_attention, ("Attention",)),
    **_each(_heads, ("MultiHeadAttention",)),
    **_each(_grouped, ("GroupQueryAttention",)),
    **_each(_embedded, ("EmbedLayerNormalization",)),
    **_each(_looked_up, ("GatherBlockQuantized",)),
}
