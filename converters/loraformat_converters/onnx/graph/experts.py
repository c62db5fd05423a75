"""Stacks of experts in operators of ONNX itself: those that the rows were sent to are gathered, and multiplied by them.

    stack [experts, n, m] ── GatherND, Gather ── MatMul ── y

So torch's exporter writes Transformers' experts (5.23, ``experts_implementation = "batched_mm"``). A change of the stack is
one of every expert, whichever are gathered; what a row of its matrices is, the product tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import onnx

from loraformat_converters.onnx.graph.counted import counted
from loraformat_converters.onnx.graph.operators import attribute, operator
from loraformat_converters.onnx.graph.scopes import Scope

__all__ = ["Use", "multiplied"]


class Use(NamedTuple):
    """One input of one node."""

    node: onnx.NodeProto
    position: int


def multiplied(node: onnx.NodeProto, scope: Scope, reader: Callable[[Scope, str], onnx.NodeProto | None]) -> Use | None:
    """The product of what a node gathers of a stack, by its first axis; None where it is used in another way.

    Args:
        reader: (scope, value) → the only node that reads it.
    """
    if len(node.input) < 2 or not node.output or not _takes_whole(node, scope):
        return None
    product = reader(scope, node.output[0])
    if product is None or operator(product) != "MatMul":
        return None
    return Use(product, list(product.input).index(node.output[0]))


def _takes_whole(node: onnx.NodeProto, scope: Scope) -> bool:
    """Whether it takes matrices of a stack, each by one number."""
    if operator(node) == "Gather":
        return attribute(node, "axis", 0) in (0, -3)
    if operator(node) != "GatherND" or attribute(node, "batch_dims", 0):
        return False
    home = scope.home(node.input[1], "producers")
    made = home.producers[node.input[1]] if home is not None else None
    if made is None or operator(made) != "Unsqueeze":
        return False
    axes = counted(made.input[1], scope, lambda *_: None) if len(made.input) > 1 else attribute(made, "axes", None)
    return axes is not None and list(axes) == [-1]
