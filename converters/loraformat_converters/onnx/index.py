"""Graph → sites: every place where an operator uses a stored weight, with the weight's orientation by the operator's meaning."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from loraformat.axes import Placement
from loraformat_converters.onnx.model import FLOATS, graphs

__all__ = ["Index", "Site"]

_WEIGHT_OPS = {"MatMul": 1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1, "Gather": 0, "Einsum": 1, "MatMulNBits": 1}
"""Operator → the input that is a weight. Those that are not rewritten are indexed too, to be refused by name."""


@dataclass(frozen=True, eq=False)
class Site:
    """One use of one stored weight.

    Attributes:
        node: the operator.
        root: the stored tensor: an initializer, or the value of a Constant.
        chain: Identity and Transpose nodes between root and operator, root first.
        placement: how [out, in] lies in the root.
        refusal: why this use cannot be changed; None if it can.
    """

    node: onnx.NodeProto
    root: onnx.TensorProto
    root_name: str
    chain: tuple[onnx.NodeProto, ...]
    placement: Placement
    refusal: str | None = None

    @property
    def gemm_alpha(self) -> float:
        """The factor that Gemm puts on x·W; 1 for every other operator."""
        return (
            next((a.f for a in self.node.attribute if a.name == "alpha"), 1.0) if self.node.op_type == "Gemm" else 1.0
        )

    @property
    def transposes_x(self) -> bool:
        """Whether Gemm reads x transposed."""
        return self.node.op_type == "Gemm" and bool(_integer(self.node, "transA"))


class Index:
    """The sites of a model and the maps that a rewrite needs.

    Attributes:
        sites: in graph order.
        roots: name → stored tensor, of the main graph and of the graphs in it.
        consumers: value → nodes of the main graph that read it.
        outputs: names of the main graph's outputs.
        captured: values that a graph inside a node reads.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.graph = graph
        self.roots: dict[str, onnx.TensorProto] = {}
        self.producers: dict[str, onnx.NodeProto] = {}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        self.captured: set[str] = set()
        self.outputs = {o.name for o in graph.output}
        self.names: set[str] = {i.name for i in graph.input}
        inner: list[tuple[onnx.NodeProto, str]] = []
        for scope, where in graphs(model):
            self.roots |= {tensor.name: tensor for tensor in scope.initializer}
            for node in scope.node:
                self._note(node, where)
                inner.append((node, where))
        self.sites = [site for node, where in inner if (site := self._site(node, where)) is not None]

    def _note(self, node: onnx.NodeProto, where: str) -> None:
        self.producers |= dict.fromkeys(node.output, node)
        self.names |= {node.name, *node.output}
        for name in node.input:
            if where:
                self.captured.add(name)
            else:
                self.consumers.setdefault(name, []).append(node)
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    self.roots[node.output[0]] = attribute.t

    def _site(self, node: onnx.NodeProto, where: str) -> Site | None:
        position = _WEIGHT_OPS.get(node.op_type)
        if position is None or len(node.input) <= position:
            return None
        found = self._root(node.input[position])
        if found is None and node.op_type == "MatMul":
            found, position = self._root(node.input[0]), 0
        if found is None:
            return None
        root_name, chain, axes = found
        root = self.roots[root_name]
        if len(axes) < 2:
            return None
        placement, refusal = _meaning(node, position, root, axes)
        if where:
            refusal = f"it lies inside {where}: only the main graph is rewritten yet"
        return Site(node, root, root_name, chain, placement, refusal)

    def _root(self, name: str) -> tuple[str, tuple[onnx.NodeProto, ...], tuple[int, ...]] | None:
        """(root, nodes in between, root axis of each axis of ``name``), through Identity and Transpose."""
        chain: list[onnx.NodeProto] = []
        while name not in self.roots:
            node = self.producers.get(name)
            if node is None or node.op_type not in ("Identity", "Transpose"):
                return None
            chain.insert(0, node)
            name = node.input[0]
        axes = tuple(range(len(self.roots[name].dims)))
        for node in chain:
            if node.op_type == "Transpose":
                perm = next(
                    (list(a.ints) for a in node.attribute if a.name == "perm"), list(reversed(range(len(axes))))
                )
                axes = tuple(axes[i] for i in perm)
        return name, tuple(chain), axes

    def uses(self, root_name: str) -> list[Site]:
        """Every site of one stored weight."""
        return [site for site in self.sites if site.root_name == root_name]

    def fresh(self, name: str) -> str:
        """``name``, or ``name`` with a number, that no value or node of the graph has; it is taken from now on."""
        taken, candidate, n = self.names | self.roots.keys(), name, 1
        while candidate in taken:
            n += 1
            candidate = f"{name}_{n}"
        self.names.add(candidate)
        return candidate


def _meaning(
    node: onnx.NodeProto, position: int, root: onnx.TensorProto, axes: tuple[int, ...]
) -> tuple[Placement, str | None]:
    """Which root axis is out and which is in, by what the operator computes; and why it cannot be rewritten."""
    shape = tuple(root.dims)
    plain = Placement(shape, (axes[0],), tuple(axes[1:]))
    if node.op_type not in ("MatMul", "Gemm"):
        return plain, f"{node.op_type} is not rewritten yet (MatMul and Gemm are)"
    if node.op_type == "MatMul" and position == 0:
        return plain, "the weight is the left operand of MatMul"
    if len(axes) != 2:
        return plain, f"its weight has {len(axes)} axes {list(shape)}: a batch of matrices"
    turned = node.op_type == "Gemm" and bool(_integer(node, "transB"))
    out, in_ = (axes[0], axes[1]) if turned else (axes[1], axes[0])
    refusal = None if root.data_type in FLOATS else f"its weight is {onnx.TensorProto.DataType.Name(root.data_type)}"
    return Placement(shape, (out,), (in_,)), refusal


def _integer(node: onnx.NodeProto, name: str) -> int:
    return next((a.i for a in node.attribute if a.name == name), 0)
