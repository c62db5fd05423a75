"""Joint: several small products of one x as one product, which is cut into theirs.

    x ── MatMul( W₁|W₂ ) ── Split ──┬── y₁
                                    └── y₂

On a GPU a small product costs a kernel more than its arithmetic. The base's own operators stay in the graph, for the way
back: they multiply nothing with nothing, which costs no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loraformat_converters.onnx.graph.index import Site
from loraformat_converters.onnx.graph.nodes import Nodes

__all__ = ["join", "joins"]

_SMALL = 2**24
"""Numbers of a weight that shares a product: up to q of a Llama 8B. With 2²³, which leaves q out, half is gained; with gate
and up, which are 3.5 times as large, 1024 tokens take 4 % longer (one H100, float16, CUDA graph, ONNX Runtime 1.31.1)."""


def joins(site: Site) -> bool:
    """Whether a product is small, and one of a stored weight [in, out] with nothing else in its operator."""
    plain = site.operator == "MatMul" and site.operand.in_ == (0,) and site.operand.out == (1,)
    stored = site.values[-1].name not in site.scope.producers
    return plain and stored and int(np.prod(site.operand.shape)) <= _SMALL


def join(run: Nodes, x: str, uses: Sequence[tuple[Site, str]]) -> dict[str, str]:
    """Compute the products of several sites at once.

    Args:
        run: takes the nodes, which lie before all that reads a product.
        x: what is read, by all of them.
        uses: the site, and the weight in the place of its own.

    Returns:
        A value of ours → the value of the base in whose place it stands.
    """
    weight = run.node("Concat", [weight for _, weight in uses], "weights", axis=1)
    product = run.node("MatMul", [x, weight], "products")
    aside = run.split(product, [site.operand.matrix_shape[-2] for site, _ in uses], "products/of")
    split, values = run.list[-1], {}
    for n, (site, _) in enumerate(uses):
        for position, shape in ((0, (0, 1)), (1, (1, 1))):
            nothing = run.store(f"nothing/{n}", np.zeros(shape, np.float32))
            values[nothing] = site.node.input[position]
            site.node.input[position] = nothing
        values[aside[n]] = site.node.output[0]
        split.output[n], site.node.output[0] = site.node.output[0], aside[n]
    return values
