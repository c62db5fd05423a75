"""Graph → sites: every place where an operator uses a stored weight, with the weight's orientation by the operator's meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx

from loraformat.axes import Placement
from loraformat_converters.onnx.model import FLOATS
from loraformat_converters.onnx.scopes import STANDARD, Scope, scopes

__all__ = ["Index", "Site"]

_WEIGHT_INPUT = {
    **dict.fromkeys(("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "MatMulInteger", "ConvInteger"), 1),
    **dict.fromkeys(("MatMulNBits", "FusedMatMul", "FusedGemm", "DynamicQuantizeMatMul"), 1),
    "Gather": 0,
    "QLinearMatMul": 3,
}
"""Operator → the input that is a weight. Those that are not rewritten are indexed too, to be refused by name."""


@dataclass(frozen=True, eq=False)
class Site:
    """One use of one stored weight.

    Attributes:
        number: its place in ``Index.sites``, the same in every copy of the model.
        node: the operator.
        position: which of its inputs the weight is.
        root: the stored tensor: an initializer, or the value of a Constant.
        chain: the nodes between root and operator, root first: Identity and Transpose, or the use is refused.
        placement: how [out, in] lies in the root.
        refusal: why this use cannot be changed; None if it can.
        parameter: what the stored tensor is called inside its module.
    """

    number: int
    node: onnx.NodeProto
    position: int
    root: onnx.TensorProto
    root_name: str
    chain: tuple[onnx.NodeProto, ...]
    placement: Placement
    refusal: str | None = None
    parameter: str = "weight"

    @property
    def known_operator(self) -> bool:
        """Whether the operator is one whose weight is what its module is called after."""
        return self.node.op_type in _WEIGHT_INPUT

    @property
    def gemm_alpha(self) -> float:
        """The factor that Gemm puts on x·W; 1 for every other operator."""
        return _attribute(self.node, "alpha", 1.0) if self.node.op_type == "Gemm" else 1.0

    @property
    def transposes_x(self) -> bool:
        """Whether Gemm reads x transposed."""
        return self.node.op_type == "Gemm" and bool(_attribute(self.node, "transA", 0))


@dataclass(frozen=True)
class _Trace:
    """From an operator's input back to a stored tensor; ``axes``: the root's axis of each axis of the input."""

    root_name: str
    home: Scope
    chain: tuple[onnx.NodeProto, ...]
    axes: tuple[int, ...]
    refusal: str | None


class Index:
    """The sites of a model and the maps that a rewrite needs.

    Attributes:
        sites: in the order of the scopes, and of the nodes in each.
        roots: name → stored tensor; one that lies in an inner scope is called after that scope too.
        consumers: value → nodes of the main graph that read it.
        outputs: names of the main graph's outputs.
        captured: values that a graph inside a node reads.

    Raises:
        LoraFormatError: LF-610 a name is defined twice.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.ir_version = model.ir_version
        self.opset = next((o.version for o in model.opset_import if o.domain in STANDARD), 0)
        self.roots: dict[str, onnx.TensorProto] = {}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        self.captured: set[str] = set()
        self.outputs = {o.name for o in model.graph.output}
        self.taken: set[str] = {value.name for value in model.graph.input}
        self.sites: list[Site] = []
        for scope in scopes(model):
            self._note(scope)
            for node in scope.nodes:
                self._add_sites(node, scope)

    def _note(self, scope: Scope) -> None:
        self.roots |= {_full_name(name, scope): tensor for name, tensor in scope.roots.items()}
        self.taken |= scope.roots.keys() | scope.producers.keys()
        for node in scope.nodes:
            self.taken |= {node.name, *node.input}  # an inner graph's own inputs are among these
            for name in node.input:
                if scope.where:
                    self.captured.add(name)
                else:
                    self.consumers.setdefault(name, []).append(node)

    def _add_sites(self, node: onnx.NodeProto, scope: Scope) -> None:
        """The use of a weight as such; of any other operator, every stored tensor that it reads directly."""
        position = _WEIGHT_INPUT.get(node.op_type)
        if position is None:
            if scope.constant.isdisjoint(node.output):  # else what counts is the use of what it makes of the weight
                for i, name in enumerate(node.input):
                    if scope.home(name, "roots") is not None:
                        self._add_site(node, i, scope)
            return
        found = self._add_site(node, position, scope)
        if not found and node.op_type in ("MatMul", "Gemm"):
            self._add_site(node, 0, scope)

    def _add_site(self, node: onnx.NodeProto, position: int, scope: Scope) -> bool:
        trace = _trace(node.input[position], scope) if position < len(node.input) else None
        if trace is None or len(trace.axes) < 2:
            return False
        root = trace.home.roots[trace.root_name]
        placement, refusal = _meaning(node, position, root, trace.axes)
        refusal = trace.refusal or refusal
        if scope.where:
            refusal = f"it lies inside {scope.where}: only the main graph is rewritten yet"
        name = _full_name(trace.root_name, trace.home)
        self.sites.append(Site(len(self.sites), node, position, root, name, trace.chain, placement, refusal))
        return True

    def uses(self, root_name: str) -> list[Site]:
        """Every site of one stored weight."""
        return [site for site in self.sites if site.root_name == root_name]

    def fresh(self, name: str) -> str:
        """``name``, or ``name`` with a number, that no value or node of the model has; it is taken from now on."""
        candidate, n = name, 1
        while candidate in self.taken:
            n += 1
            candidate = f"{name}_{n}"
        self.taken.add(candidate)
        return candidate

    def store(self, tensor: onnx.TensorProto) -> str:
        """Add an initializer to the main graph; its name."""
        self.graph.initializer.append(tensor)
        if self.ir_version < 4:  # until then an initializer must be a graph input as well (onnx/docs/IR.md)
            self.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        return tensor.name


def _full_name(name: str, scope: Scope) -> str:
    return f"{scope.where}/{name}" if scope.where else name


def _trace(name: str, scope: Scope) -> _Trace | None:
    """Back from a value to the stored tensor that it is made of, if it is made of stored tensors only."""
    chain: list[onnx.NodeProto] = []
    home = scope.home(name, "constant")
    while home is not None and name not in home.roots:
        node = home.producers[name]
        if not node.input or not node.input[0]:
            return None
        chain.insert(0, node)
        name = node.input[0]
        home = home.home(name, "constant")
    if home is None:
        return None
    axes = tuple(range(len(home.roots[name].dims)))
    for node in chain:
        perm = _attribute(node, "perm", tuple(reversed(range(len(axes)))))
        if node.domain not in STANDARD or node.op_type not in ("Identity", "Transpose"):
            return _Trace(name, home, tuple(chain), axes, f"{node.op_type} lies between its weight and it")
        if node.op_type == "Transpose":
            if sorted(perm) != list(range(len(axes))):
                return _Trace(name, home, tuple(chain), axes, f"{node.name} has perm {list(perm)} of {len(axes)} axes")
            axes = tuple(axes[i] for i in perm)
    return _Trace(name, home, tuple(chain), axes, None)


def _meaning(
    node: onnx.NodeProto, position: int, root: onnx.TensorProto, axes: tuple[int, ...]
) -> tuple[Placement, str | None]:
    """Which root axis is out and which is in, by what the operator computes; and why it cannot be rewritten."""
    shape = tuple(root.dims)
    plain = Placement(shape, (axes[0],), tuple(axes[1:]))
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in STANDARD:
        domain = "" if node.domain in STANDARD else f"{node.domain}."
        return plain, f"{domain}{node.op_type} is not rewritten yet (MatMul and Gemm are)"
    if position == 0:
        return plain, f"the weight is the left operand of {node.op_type}"
    if len(axes) != 2:
        return plain, f"its weight has {len(axes)} axes {list(shape)}: a batch of matrices"
    turned = node.op_type == "Gemm" and bool(_attribute(node, "transB", 0))
    out, in_ = (axes[0], axes[1]) if turned else (axes[1], axes[0])
    return Placement(shape, (out,), (in_,)), _dtype_refusal(root.data_type)


def _dtype_refusal(dtype: int) -> str | None:
    if dtype in FLOATS:
        return None
    if dtype == onnx.TensorProto.UNDEFINED:  # how a scope marks it
        return "its weight is stored sparse"
    return f"its weight is {onnx.TensorProto.DataType.Name(dtype)}"


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)
