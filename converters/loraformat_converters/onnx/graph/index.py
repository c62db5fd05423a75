"""Graph → sites: every place where an operator uses a stored weight, with the weight's orientation by the operator's meaning."""

from __future__ import annotations

from dataclasses import replace

import onnx

from loraformat.axes import Placement
from loraformat_converters.onnx.graph.experts import Use, multiplied
from loraformat_converters.onnx.graph.exported import parameter as exported_as
from loraformat_converters.onnx.graph.model import FLOATS
from loraformat_converters.onnx.graph.operators import (
    SEVERAL,
    VECTORS,
    WEIGHTS,
    Meaning,
    attribute,
    meaning,
    operator,
    parameter,
    refused,
    vector_axis,
)
from loraformat_converters.onnx.graph.quantised import product
from loraformat_converters.onnx.graph.scopes import Scope, opset_of, scopes
from loraformat_converters.onnx.graph.site import Site
from loraformat_converters.onnx.graph.trace import CODES, Trace, Value, trace

__all__ = ["Index", "Site", "Use", "Value"]


class Index:
    """The sites of a model and the maps that a rewrite needs.

    Attributes:
        scopes: the main graph first, an outer one before those in it.
        sites: in the order of the scopes, and of the nodes in each.
        roots: name → stored tensor; one that lies in an inner scope is called after that scope too.
        taken: every name of a value or a node.
        compiled: the nodes that hold a compiled part of the model, with its weights.

    Raises:
        LoraFormatError: LF-610 a name is defined twice.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.ir_version = model.ir_version
        self.opset = opset_of(model)
        self.scopes = scopes(model)
        self._functions = {(function.domain, function.name) for function in model.functions}
        self.roots: dict[str, onnx.TensorProto] = {}
        self.taken: set[str] = set()
        self.sites: list[Site] = []
        self.compiled = [node for scope in self.scopes for node in scope.nodes if node.op_type == "EPContext"]
        self._readers: dict[tuple[int, str], list[Use]] = {}
        self._stems: set[str] = set()
        for scope in self.scopes:
            self._note(scope)
        for scope in self.scopes:
            for node in scope.nodes:
                self._add_sites(node, scope)

    def _note(self, scope: Scope) -> None:
        self.roots |= {_full_name(Value(scope, name)): tensor for name, tensor in scope.roots.items()}
        self.taken |= scope.defined
        for node in scope.nodes:
            self.taken.add(node.name)
            for position, name in enumerate(node.input):
                home = scope.home(name, "defined")
                if home is not None:
                    self._readers.setdefault((id(home), name), []).append(Use(node, position))

    def _add_sites(self, node: onnx.NodeProto, scope: Scope) -> None:
        """The use of a weight as such, and of vectors; of any other operator, every matrix that it reads, to be refused."""
        if node.op_type in WEIGHTS:
            any(self._add_site(node, position, "weight", scope) for position in WEIGHTS[node.op_type])
        for position in SEVERAL.get(node.op_type, {}):
            self._add_site(node, position, parameter(node, position), scope)
        made = scope.constant.keys().isdisjoint(
            node.output
        )  # else what counts is the use of what it makes of the weight
        if made or node.op_type in WEIGHTS:
            for position, name in VECTORS.get(node.op_type, {}).items():
                self._add_site(node, position, name, scope)
        if made and node.op_type not in WEIGHTS:
            for position, name in enumerate(node.input):
                named = VECTORS.get(node.op_type, {}).keys() | SEVERAL.get(node.op_type, {}).keys()
                if position not in named and scope.home(name, "constant") is not None:
                    self._add_site(node, position, "weight", scope)

    def _add_site(self, node: onnx.NodeProto, position: int, name: str, scope: Scope) -> bool:
        found = trace(node.input[position], scope) if position < len(node.input) else None
        if found is None:
            return False
        if () in found.axes and node.op_type not in SEVERAL:  # a matrix of one operator, a vector of another
            why = found.refusal or "Unsqueeze lies between its weight and it"
            found = replace(found, axes=tuple(filter(None, found.axes)), refusal=why)
        stack = multiplied(node, scope, self._reader) if position == 0 and len(found.axes) == 3 else None
        if stack or name == "weight":
            name = exported_as(node, factor=not stack) or name
        means = _meaning(*(stack or (node, position)), found)
        if means is None:
            return False
        operand = Placement(means.shape or found.shape, means.out, means.in_, means.batch)
        placement = operand if means.shape else _in_root(operand, found)
        if len(placement.batch) > len(operand.batch):
            found, placement = found.divided(), operand
        floats = product(node, position, found.dtype, scope, self._reader) if found.sealed else None
        said = (found.refusal, means.refusal) if node.op_type in SEVERAL else (means.refusal, found.refusal)
        refusal = said[0] or said[1] or (floats.refusal if floats else _dtype_refusal(found.dtype))
        x = floats.x if floats else "".join(node.input[int(position == 0) :][:1])
        if node.op_type in WEIGHTS and not x:
            refusal = refusal or "it lacks the input that its weight is multiplied with"
        if (node.domain, node.op_type) in self._functions:
            refusal = f"{operator(node)} is a function of the model's own: give --inline, which writes its body into the graph"
        if not scope.rewritable:
            refusal = f"it lies inside {scope.where}: give --inline, which writes the function's body into the graph"
        site = Site(
            *(len(self.sites), node, position, name, found.root, _full_name(found.values[0]), found.chain),
            *(scope, found.values, operand, placement, means.factor, means.natural, refusal),
            *(found.sealed, floats, floats.dtype if floats else found.dtype, means.permute, means.doubt),
            tuple((axis,) for axis in range(len(operand.shape))) if means.shape else found.axes,
            means.turned,
        )
        self.sites.append(site)
        return True

    def uses(self, root_name: str) -> list[Site]:
        """Every site of one stored weight."""
        return [site for site in self.sites if site.root_name == root_name]

    def readers(self, value: Value) -> list[Use]:
        """Every input that reads a value, inside other nodes' graphs too."""
        return self._readers.get((id(value.scope), value.name), [])

    def _reader(self, scope: Scope, name: str) -> onnx.NodeProto | None:
        """The only node that reads a value; None where there are several, or it leaves its graph."""
        home = scope.home(name, "defined")
        uses = self.readers(Value(home, name)) if home is not None and name not in home.outputs else []
        return uses[0].node if len(uses) == 1 else None

    def fresh(self, name: str) -> str:
        """``name``, or ``name`` with a number, that no value or node of the model has; it is taken from now on."""
        candidate, n = name, 1
        while candidate in self.taken:
            n += 1
            candidate = f"{name}_{n}"
        self.taken.add(candidate)
        return candidate

    def stem(self, key: str) -> str:
        """``lora/<key>``, or it with a number, below which the model has no name yet."""
        if not self._stems:
            own = [name.split("/") for name in self.taken if name.startswith("lora/")]
            self._stems = {"lora"} | {"/".join(parts[:n]) for parts in own for n in range(1, len(parts) + 1)}
        name = candidate = f"lora/{key.replace('/', '.')}"  # a stem below another's would share its names
        n = 1
        while candidate in self._stems:
            n += 1
            candidate = f"{name}_{n}"
        self._stems.add(candidate)
        return candidate

    def store(self, tensor: onnx.TensorProto) -> str:
        """Add an initializer to the main graph, which every graph inside it sees; its name."""
        self.graph.initializer.append(tensor)
        if self.ir_version < 4:  # until then an initializer must be a graph input as well (onnx/docs/IR.md)
            self.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        return tensor.name


def _full_name(value: Value) -> str:
    return f"{value.scope.where}/{value.name}" if value.scope.where else value.name


def _in_root(operand: Placement, found: Trace) -> Placement:
    """How a matrix that the operator reads so lies in the stored tensor."""
    groups = (operand.out, operand.in_, operand.batch)
    out, in_, batch = (tuple(axis for a in axes for axis in found.axes[a]) for axes in groups)
    return Placement(found.dims, out, in_, batch)


def _entries(node: onnx.NodeProto, found: Trace) -> tuple[int, ...]:
    """The sizes of an operand; a byte of GatherBlockQuantized holds several values (onnxruntime 1.32)."""
    if node.op_type != "GatherBlockQuantized" or found.dtype != onnx.TensorProto.UINT8 or not found.shape:
        return found.shape
    return (*found.shape[:-1], found.shape[-1] * (8 // max(1, attribute(node, "bits", 4))))


def _meaning(node: onnx.NodeProto, position: int, found: Trace) -> Meaning | None:
    """What the operand is; None where it is no parameter: a number, a shape, indices."""
    real, shape = found.root.data_type in FLOATS, _entries(node, found)
    if position not in VECTORS.get(node.op_type, {}):
        means = meaning(node, position, shape) if shape else None
        if means is None or len(means.shape or shape) > 1:
            return means
        if node.op_type in WEIGHTS and found.dtype in CODES and means.refusal:
            return means
        # Of one axis as it is stored, and a matrix by what lies between.
        return refused(shape, means.refusal or found.refusal) if real and found.refusal else None
    if real and _is_vector(node, shape):
        means = meaning(node, position, shape)
        return replace(means, refusal=means.refusal or found.sealed)
    several = real and sum(n != 1 for n in shape) > 1
    return (
        refused(shape, f"{operator(node)} takes it as it is, {list(shape)}: no matrix, no vector") if several else None
    )


def _is_vector(node: onnx.NodeProto, shape: tuple[int, ...]) -> bool:
    """One factor for all is no parameter of a module, but a number that its computation needs."""
    return vector_axis(shape) is not None and (node.op_type != "Mul" or any(n != 1 for n in shape))


def _dtype_refusal(dtype: int) -> str | None:
    if dtype in FLOATS:
        return None
    if dtype == onnx.TensorProto.UNDEFINED:  # how a scope marks it
        return "its weight is stored sparse"
    return f"its weight is {onnx.TensorProto.DataType.Name(dtype)}"
