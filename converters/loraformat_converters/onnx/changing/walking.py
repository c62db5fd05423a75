"""Back along the values of a graph: through what leaves them as they are, and the constants that they are multiplied with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from loraformat_converters.onnx.graph.index import Index
from loraformat_converters.onnx.graph.model import array
from loraformat_converters.onnx.graph.scopes import STANDARD, Scope
from loraformat_converters.onnx.graph.trace import trace

if TYPE_CHECKING:
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

__all__ = ["AS_ROWS", "DEPTH", "Constants", "is_sum", "plain", "producer"]

_SAME = frozenset({"Identity", "Cast", "Dropout"})
"""What leaves a value what it is, when a model runs and does not learn."""

AS_ROWS = _SAME | {"Reshape"}
"""What leaves the rows of a value what they are, where its last axis is known to stay: both of two products take as many."""

DEPTH = 16
"""How many nodes of a kind are followed: a stranger's graph may be a circle."""

_NODES = 64
"""How many nodes a constant may be computed by: PEFT's norm of a DoRA takes twelve (0.21.2)."""


def plain(name: str, scope: Scope, through: frozenset[str] = _SAME) -> str:
    """The value that a value is, but for casts and copies."""
    for _ in range(DEPTH):
        node = producer(name, scope)
        if (
            node is None
            or node.op_type not in through
            or node.domain not in STANDARD
            or node.output[0] != name
            or not node.input
        ):
            break
        name = node.input[0]
    return name


def producer(name: str, scope: Scope) -> onnx.NodeProto | None:
    """The node that gives a value."""
    home = scope.home(name, "producers")
    return home.producers[name] if home is not None else None


def is_sum(node: onnx.NodeProto) -> bool:
    """Whether it adds two values."""
    return node.op_type == "Add" and node.domain in STANDARD and len(node.input) == 2


class Constants:
    """The constants that values of one graph are multiplied with."""

    def __init__(self, index: Index, folder: Path) -> None:
        self.index, self.folder = index, folder
        self._known: dict[str, F32 | None] = {}

    def unscaled(self, value: str, scope: Scope) -> tuple[str, float]:
        """A value without the constant numbers that it was multiplied with, and their product."""
        scale = 1.0
        for _ in range(DEPTH):
            value = plain(value, scope)
            node = producer(value, scope)
            if node is None or node.op_type != "Mul" or node.domain not in STANDARD or len(node.input) != 2:
                break
            numbers = [self._number(name, scope) for name in node.input]
            known = next((n for n in numbers if n is not None), None)
            if known is None or None not in numbers:
                break
            scale, value = scale * known, node.input[numbers.index(None)]
        return value, scale

    def _number(self, name: str, scope: Scope) -> float | None:
        """A stored number; None of anything else."""
        traced = trace(name, scope)
        if traced is None or traced.refusal or traced.sealed or any(n != 1 for n in traced.dims):
            return None
        return float(array(traced.root, self.folder).reshape(()))

    def constant(self, name: str, scope: Scope) -> F32 | None:
        """A constant of the main graph, by onnx's own reference; None where that cannot compute it."""
        if name not in self._known:
            self._known[name] = self._computed(name, scope)
        return self._known[name]

    def _computed(self, name: str, scope: Scope) -> F32 | None:
        if scope is not self.index.scopes[0]:
            return None
        nodes: list[onnx.NodeProto] = []
        held: dict[str, onnx.TensorProto] = {}
        wanted = [name]
        while wanted and len(nodes) <= _NODES:
            value = wanted.pop()
            if value in held or any(value in node.output for node in nodes):
                continue
            if value in scope.roots:
                held[value] = numpy_helper.from_array(array(scope.roots[value], self.folder), value)
            elif value in scope.producers:
                nodes.append(scope.producers[value])
                wanted += [other for other in nodes[-1].input if other]
        order = {id(node): place for place, node in enumerate(scope.nodes)}
        nodes.sort(key=lambda node: order.get(id(node), 0))
        output = helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None)
        graph = helper.make_graph(nodes, "constant", [], [output], list(held.values()))
        try:
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.index.opset)])
            (found,) = ReferenceEvaluator(model).run(None, {})
            return np.asarray(found, np.float32)
        except Exception:  # of a stranger's nodes onnx may raise anything: then it is no constant that is known
            return None
