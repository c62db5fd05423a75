"""Undo: our nodes, constants and inputs out of a graph, and what stood in their places as it was."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import onnx

from loraformat_converters.onnx.graph.scopes import scopes

__all__ = ["taken_out"]


def taken_out(
    model: onnx.ModelProto,
    stems: Sequence[str],
    values: Mapping[str, str],
    inputs: Container[str],
    apart: Mapping[str, onnx.NodeProto],
) -> None:
    """Take what was attached out of every graph of a model.

    Args:
        stems: below what our nodes and constants are named.
        values: a value of ours → the value of the base in whose place it stands.
        inputs: those of the main graph that the base has not.
        apart: the nodes that were taken apart, as they were, by what their parts are named below.
    """
    below = tuple(f"{stem}/" for stem in stems)
    for scope in scopes(model):
        if scope.graph is not None:
            _remove(scope.graph, below, values, inputs)
            _put_together(scope.graph, apart)


def _remove(graph: onnx.GraphProto, stems: tuple[str, ...], values: Mapping[str, str], inputs: Container[str]) -> None:
    """Take our nodes and constants out of one graph, and give the base's values their names back."""
    for held in (graph.node, graph.initializer, graph.input):
        for i in reversed(range(len(held))):
            if held[i].name.startswith(stems) or (held is not graph.node and held[i].name in inputs):
                del held[i]
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name in values:
                    names[i] = values[name]


def _put_together(graph: onnx.GraphProto, apart: Mapping[str, onnx.NodeProto]) -> None:
    """What is left of a node that was taken apart reads its parts: it becomes what it was."""
    for node in graph.node:
        for stem, was in apart.items():
            if node.input and node.input[0].startswith(f"{stem}/"):
                node.CopyFrom(was)
