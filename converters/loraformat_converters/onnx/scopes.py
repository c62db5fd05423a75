"""Scopes: the main graph, the graphs inside nodes and the bodies of functions. A name means something in its scope only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx

from loraformat.errors import fault

__all__ = ["STANDARD", "Scope", "scopes", "tensors"]

STANDARD = ("", "ai.onnx")
"""The two spellings of the standard operators' domain. A MatMul of another domain is another operator."""


@dataclass(eq=False)
class Scope:
    """One graph or function body.

    Attributes:
        where: what holds it, "" for the main graph.
        outer: the scope whose values it sees too; None for the main graph and for functions.
        graph: the graph itself; None for functions, which are not rewritten.
        roots: name → stored tensor: dense initializers and the values of Constants. A sparse one has no data type.
        producers: value → the node that computes it.
        constant: values that depend on stored tensors only.
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
    constant: set[str] = field(default_factory=set)
    defined: set[str] = field(default_factory=set)
    outputs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for tensor in self.stored:
            self._define(tensor.name)
            self.roots[tensor.name] = tensor
        for sparse in self.sparse:
            self._define(sparse.values.name)
            self.roots[sparse.values.name] = onnx.TensorProto(name=sparse.values.name, dims=sparse.dims)
        self.constant |= self.roots.keys()
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

    def _note(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Constant" and node.domain in STANDARD:
            self.constant |= {*node.output}
            for attribute in node.attribute:
                if attribute.name == "value" and node.output:
                    self.roots[node.output[0]] = attribute.t
            return
        inputs = [name for name in node.input if name]
        holds_graph = any(a.HasField("g") or a.graphs for a in node.attribute)
        if inputs and not holds_graph and all(self.home(name, "constant") for name in inputs):
            self.constant |= {*node.output}

    @property
    def rewritable(self) -> bool:
        """Whether it is no function's: a function sees nothing of the graph that calls it."""
        return self.graph is not None and (self.outer is None or self.outer.rewritable)

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
