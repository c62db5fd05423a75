"""Which axis of a value counts the rows of a batch: followed from a model's input through every operator, or lost.

A stack chooses an adapter for each row, so where it acts the rows must be told apart. An axis *carries* the rows where its
entry i belongs to row i // per, with ``per`` entries to a row: per is 1 for [rows, tokens, dim], tokens for [rows·tokens,
dim]. Every operator that is not known here, or that mixes rows, loses them, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx

from loraformat.errors import fault
from loraformat_converters.onnx.attaching.row_rules import FIRST_ALONE, RULES
from loraformat_converters.onnx.attaching.row_state import LostError, Rows
from loraformat_converters.onnx.graph.operators import attribute, operator
from loraformat_converters.onnx.graph.scopes import opset_of
from loraformat_converters.onnx.graph.sizes import sizes

if TYPE_CHECKING:
    from loraformat_converters.onnx.graph.index import Site

__all__ = ["Rows", "RowsOf", "starts"]


def starts(model: onnx.ModelProto, words: Sequence[str]) -> dict[str, int]:
    """``INPUT`` or ``INPUT:AXIS`` as input → axis; LF-705 of what the model has not."""
    stored = {tensor.name for tensor in model.graph.initializer}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in model.graph.input if v.name not in stored}
    found: dict[str, int] = {}
    for word in words:
        name, _, axis = (word, "", "0") if word in ranks else word.rpartition(":")[:3]
        if name not in ranks or not axis.isdigit() or int(axis) >= ranks[name]:
            fix = f"INPUT or INPUT:AXIS, of {', '.join(f'{n} ({r} axes)' for n, r in ranks.items())}"
            raise fault("LF-705", f"--rows {word!r} is no axis of an input", fix=fix)
        found[name] = int(axis)
    if not found:
        raise fault(
            "LF-705",
            "a stack chooses by rows of the batch: which axis of which input counts them?",
            fix=f"--rows INPUT[:AXIS], of {', '.join(ranks)}",
        )
    return found


State = Rows | LostError


class RowsOf:
    """The axes of all values of the main graph, in which the rows are counted.

    Sizes that a model leaves open are followed as numbers: the rows as a large prime, the others as small ones, and all
    of it twice with other primes. A size that has the rows in it is told by that, and no shape of tables is exceeded.

    Attributes:
        size: of the rows, for an input of ours: a number or a symbol.
    """

    def __init__(self, model: onnx.ModelProto, start: Mapping[str, int]) -> None:
        first, axis = next(iter(start.items()))
        declared = next(v for v in model.graph.input if v.name == first).type.tensor_type.shape.dim[axis]
        self.size: int | str = declared.dim_value or declared.dim_param or "rows"
        self._walks = [_Walk(model, start, primes) for primes in _PRIMES]

    def of(self, site: Site) -> Rows | str:
        """The rows of what a site multiplies its weight with, or why they are not known."""
        if site.scope.outer is not None:
            return "it lies in a graph inside a node, where rows are not followed"
        found = [walk.states.get(site.x) for walk in self._walks]
        if lost := next((state for state in found if isinstance(state, LostError)), None):
            return str(lost)
        one, two = found
        if not isinstance(one, Rows) or not isinstance(two, Rows):
            return "what it reads does not depend on the rows"
        if one.axis != two.axis or (one.per == 1) != (two.per == 1):
            return "where the rows lie depends on the sizes of the inputs"
        return one

    def axes(self, name: str) -> int | None:
        """How many axes a value has."""
        shape = self._walks[0].shapes.get(name)
        return None if shape is None else len(shape)

    def is_vector(self, name: str) -> bool:
        """Whether a value is known to have one axis at most that is longer than 1, its last."""
        shape = self._walks[0].shapes.get(name)
        return shape is not None and all(n == 1 for n in shape[:-1])


_PRIMES = ((10007, 5, 3, 7, 11, 2, 13), (10009, 3, 7, 2, 5, 13, 11))
"""For the rows, and for what else has no size: small, because tables of positions are short."""


class _Walk:
    """One walk through the graph with numbers for sizes."""

    def __init__(self, model: onnx.ModelProto, start: Mapping[str, int], primes: Sequence[int]) -> None:
        self.shapes, self.constants = sizes(model, start, primes)
        self.opset = opset_of(model)
        first, axis = next(iter(start.items()))
        self.count = self.shapes[first][axis]
        self.states: dict[str, State] = {name: Rows(axis) for name, axis in start.items()}
        for node in model.graph.node:
            self._follow(node)

    def rank(self, name: str) -> int:
        """How many axes a value has."""
        return len(self.shape(name))

    def shape(self, name: str) -> tuple[int | None, ...]:
        """The sizes of a value, as far as they are known."""
        if name not in self.shapes:
            raise LostError(f"the shape of {name} is not known")
        return self.shapes[name]

    def numbers(self, node: onnx.NodeProto, name: str, position: int) -> list[int] | None:
        """An attribute, or since some opset the constant input in its place."""
        if (stated := attribute(node, name, None)) is not None:
            return [int(n) for n in (stated if isinstance(stated, (list, tuple)) else [stated])]
        if position < len(node.input) and node.input[position]:
            if node.input[position] not in self.constants:
                raise LostError(f"{node.name or node.op_type} computes its {name}")
            return self.constants[node.input[position]]
        return None

    def _follow(self, node: onnx.NodeProto) -> None:
        read = {i: self.states[name] for i, name in enumerate(node.input) if name in self.states}
        if not read or operator(node) in ("Shape", "Size"):  # how many there are does not tell what is in them
            if any(name in self.states for graph in _graphs(node) for name in _names(graph)):
                self._set(node, LostError(f"the rows cannot be followed into {node.name or node.op_type}"))
            return
        try:
            if lost := next((state for state in read.values() if isinstance(state, LostError)), None):
                raise lost
            rule = RULES.get(operator(node))
            if rule is None:
                raise LostError(f"the rows cannot be followed through {operator(node)} ({node.name})")
            self._set(node, rule(self, node, {i: state for i, state in read.items() if isinstance(state, Rows)}))
        except LostError as lost:
            self._set(node, lost)

    def _set(self, node: onnx.NodeProto, state: State) -> None:
        outputs = node.output[:1] if operator(node) in FIRST_ALONE else node.output
        self.states |= {name: state for name in outputs if name}


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for held in node.attribute:
        if held.HasField("g"):
            yield held.g
        yield from held.graphs


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
        for inner in _graphs(node):
            yield from _names(inner)
