"""Scopes: the main graph, the graphs inside nodes and the bodies of functions. A name means something in its scope only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx

from loraformat.errors import fault

__all__ = ["STANDARD", "Scope", "opset_of", "scopes", "tensors"]

STANDARD = ("", "ai.onnx")
"""The two spellings of the standard operators' domain. A MatMul of another domain is another operator."""


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators; 0 where the model states none."""
    return next((opset.version for opset in model.opset_import if opset.domain in STANDARD), 0)


@dataclass(eq=False)
class Scope:
    """One graph or function body.

    Attributes:
        where: what holds it, "" for the main graph.
        outer: the scope whose values it sees too; None for the main graph and for functions.
        graph: the graph itself; None for functions, which are not rewritten.
        roots: name → stored tensor: dense initializers and the values of Constants. A sparse one has no data type.
        producers: value → the node that computes it.
        constant: value that depends on stored tensors only → how many values the largest of these tensors has.
        defined: every name that is given a meaning here.
        outputs: names that leave the scope.
    """

    nodes: Sequence[onnx.NodeProto]
    where: str = ""
    outer: Scope | None = None
    graph: onnx.GraphProto | None = None
    stored: Sequence[onnx.TensorProto] = ()
    sparse: Sequence[onnx.SparseTensorProto] = ()
    roots: dict[str, onnx.TensorProto] = field(default_factory=dict)
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    constant: dict[str, int] = field(default_factory=dict)
    defined: set[str] = field(default_factory=set)
    outputs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for tensor in self.stored:
            self._define(tensor.name)
            self._hide_nothing(tensor.name)
            self.roots[tensor.name] = tensor
        for sparse in self.sparse:
            self._define(sparse.values.name)
            self.roots[sparse.values.name] = onnx.TensorProto(name=sparse.values.name, dims=sparse.dims)
        self.constant |= {name: math.prod(tensor.dims) for name, tensor in self.roots.items()}
        for node in self.nodes:
            for name in filter(None, node.output):
                self._define(name)
                self.producers[name] = node
            self._note(node)
        self.defined |= self.roots.keys() | self.producers.keys()

    def _define(self, name: str) -> None:
        # ONNX Runtime takes the last of two initializers of one name and only warns: a change could miss the one in use.
        if name in self.roots or name in self.producers:
            raise fault("LF-610", f"the value {name} is defined twice", where=self.where, fix="onnx.checker says more")

    def _hide_nothing(self, name: str) -> None:
        # ONNX Runtime 1.32 then gives one operator the outer tensor, and another none at all.
        if self.outer is not None and self.outer.home(name, "defined") is not None:
            what = (
                f"the value {name} hides one of the same name in a graph around it: which one counts, runtimes disagree"
            )
            raise fault("LF-610", what, where=self.where, fix="give one of them another name")

    def _note(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Constant" and node.domain in STANDARD:
            stored = next((a.t for a in node.attribute if a.name == "value"), None)
            self.constant |= dict.fromkeys(node.output, math.prod(stored.dims) if stored is not None else 0)
            if stored is not None and node.output:
                self.roots[node.output[0]] = stored
            return
        inputs = [name for name in node.input if name]
        holds_graph = any(a.HasField("g") or a.graphs for a in node.attribute)
        sizes = [self.size(name) for name in inputs]
        if inputs and not holds_graph and None not in sizes:
            self.constant |= dict.fromkeys(node.output, max(size or 0 for size in sizes))

    @property
    def rewritable(self) -> bool:
        """Whether it is no function's: a function sees nothing of the graph that calls it."""
        return self.graph is not None and (self.outer is None or self.outer.rewritable)

    def size(self, name: str) -> int | None:
        """Of a constant: how many values the largest tensor has that it is made of."""
        home = self.home(name, "constant")
        return None if home is None else home.constant[name]

    def home(self, name: str, kind: str) -> Scope | None:
        """The nearest scope that has ``name`` among its ``roots``, ``producers``, ``constant`` or ``defined``."""
        scope: Scope | None = self
        while scope is not None and name not in getattr(scope, kind):
            scope = scope.outer
        return scope


def scopes(model: onnx.ModelProto) -> list[Scope]:
    """Every scope, the main graph first, an outer one before those in it."""
    main = _of_graph(model.graph, "", None)
    found, queue = [main], [main]
    for function in model.functions:
        scope = Scope(function.node, f"function {function.name}", defined={*function.input})
        found.append(scope)
        queue.append(scope)
    while queue:
        outer = queue.pop(0)
        for node in outer.nodes:
            for name, graph in _graphs(node):
                inner = _of_graph(graph, f"{outer.where}/{node.name or node.op_type}.{name}", outer)
                found.append(inner)
                queue.append(inner)
    return found


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model stores, wherever it is."""
    for scope in scopes(model):
        yield from scope.stored
        for sparse in scope.sparse:
            yield from (sparse.values, sparse.indices)
        for node in scope.nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _of_graph(graph: onnx.GraphProto, where: str, outer: Scope | None) -> Scope:
    return Scope(
        graph.node,
        where,
        outer,
        graph,
        graph.initializer,
        graph.sparse_initializer,
        defined={value.name for value in graph.input},
        outputs=frozenset(value.name for value in graph.output),
    )


def _graphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        yield from ((f"{attribute.name}{i}", graph) for i, graph in enumerate(attribute.graphs))
