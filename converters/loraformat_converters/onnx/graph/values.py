"""What an operator multiplies by: the values of its weight as the matrix [out, in], for finding a target by its values.

A float weight is read where it lies. A quantised one is computed as the graph computes it: by onnx's own reference
where nodes dequantise it (DequantizeLinear, or Cast, Sub and Mul), by ``unpack`` where its operator does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from loraformat.axes import Placement
from loraformat.sketch import sketch, sketches
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.model import FLOATS, array
from loraformat_converters.onnx.graph.operators import meaning
from loraformat_converters.onnx.graph.scopes import STANDARD
from loraformat_converters.onnx.graph.site import Order
from loraformat_converters.onnx.graph.trace import reshaped
from loraformat_converters.onnx.graph.unpack import Codes, readable, unpacked

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Values", "fingerprint"]

_MOVES = frozenset({"Identity", "Transpose"})
_LEAVES = frozenset({"Cast", "Unsqueeze", "Reshape"})
_SPREADS = frozenset({"Sub", "Mul", "Add", "Div"})
_COMPUTES = _MOVES | _SPREADS | {"Cast", "DequantizeLinear", "QuantizeLinear", "Reshape"}
"""The operators that dequantisation is made of."""

_DEPTH = 8
"""How many of them may follow each other: a chain that is longer was not made by a quantiser."""


class Values:
    """The matrices of a graph's sites; what is computed of one is kept, the matrix is not."""

    def __init__(self, index: Index, folder: Path) -> None:
        self.index, self.folder = index, folder
        # onnx 1.23's reference has DequantizeLinear since 19; what 10 and 13 allow means the same in 21.
        self.opset = onnx.helper.make_opsetid("", max(21, index.opset))
        self.producers = {name: node for node in index.graph.node for name in node.output}
        self._shapes: dict[int, tuple[int, ...] | None] = {}
        self._sketches: dict[Hashable, Array | None] = {}
        self._runs: dict[Hashable, Mapping[int, Array]] = {}
        self._fingerprints: dict[Hashable, str | None] = {}

    def key(self, site: Site) -> Hashable:
        """The same for two sites that multiply by the same matrix."""
        direct = self._direct(site)
        return (
            (site.root_name, site.placement)
            if direct
            else (site.node.input[site.position], site.operand.out, site.operand.in_)
        )

    def shape(self, site: Site) -> tuple[int, ...] | None:
        """The shape of the matrix, without reading it; None where it cannot be read."""
        if self._direct(site) or (site.product is not None and readable(site) and self._in_main(site)):
            return site.placement.matrix_shape
        if site.number not in self._shapes:
            name = site.node.input[site.position]
            # Integers as they are read are indices, not weights.
            sizes = None if name in self.index.roots or not self._in_main(site) else self._sizes(name)
            place = None if sizes is None else _laid(site, sizes)
            self._shapes[site.number] = place.matrix_shape if place else None
        return self._shapes[site.number]

    def _in_main(self, site: Site) -> bool:
        """Whether the operator is of the main graph: elsewhere its inputs' names mean other values."""
        return self.producers.get(site.node.output[0]) == site.node

    def _sizes(self, name: str, depth: int = 0) -> tuple[int, ...] | None:
        """The shape of what ``compute`` gives, without reading it."""
        if name in self.index.roots:
            return tuple(self.index.roots[name].dims)
        node = self._step(name) if depth < _DEPTH else None
        if node is not None and node.op_type == "Reshape":
            before = self._sizes(node.input[0], depth + 1)
            return None if before is None else reshaped(before, node, self.index.scopes[0])
        inputs = [self._sizes(other, depth + 1) for other in node.input if other] if node is not None else []
        if node is None or not inputs or any(sizes is None for sizes in inputs):
            return None
        first = inputs[0] or ()
        if node.op_type == "Transpose":
            perm = next((tuple(a.ints) for a in node.attribute if a.name == "perm"), tuple(range(len(first)))[::-1])
            return tuple(first[i] for i in perm) if sorted(perm) == list(range(len(first))) else None
        return _spread([sizes or () for sizes in inputs]) if node.op_type in _SPREADS else first

    def _step(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a constant of the main graph, if it is one that weights are dequantised with."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type in _COMPUTES and node.domain in STANDARD else None

    def sketch(self, site: Site, order: Order = None, rows: tuple[int, int] | None = None) -> Array | None:
        """The sketch of the matrix, or of a run [start, stop) of its rows; None where it has none.

        Args:
            order: of its rows, where it is not the only one.
        """
        if rows is not None:
            start, size = rows[0], rows[1] - rows[0]
            return self.sketches(site, size, start or size).get(start)
        key = (self.key(site), order)
        if key not in self._sketches:
            found = self._as_named(site, order)
            self._sketches[key] = None if found is None else sketch(*found)
        return self._sketches[key]

    def sketches(self, site: Site, rows: int, step: int) -> Mapping[int, Array]:
        """Start → sketch of the runs of ``rows`` rows of the matrix; none where it cannot be read."""
        key = (self.key(site), rows, step)
        if key not in self._runs:
            found = self._as_named(site)
            self._runs[key] = {} if found is None else sketches(found[1].to_matrix(found[0]), rows, step)
        return self._runs[key]

    def fingerprint(self, site: Site, order: Order = None) -> str | None:
        """The fingerprint of the matrix in the dtype in which it is stored; None for a quantised one."""
        key = (self.key(site), order)
        if key not in self._fingerprints:
            found = self._as_named(site, order) if self._direct(site) else None
            self._fingerprints[key] = None if found is None else fingerprint(found[1].to_matrix(found[0]))
        return self._fingerprints[key]

    def _direct(self, site: Site) -> bool:
        """Whether the weight is a stored float tensor, turned or cast at most, or with axes that are one now."""
        moved = all(node.op_type in _MOVES or node.op_type in _LEAVES for node in site.chain)
        return site.root.data_type in FLOATS and moved and not site.sealed

    def read(self, site: Site) -> tuple[Array, Placement] | None:
        """The weight and how [out, in] lies in it; None where it cannot be computed."""
        if self._direct(site):
            return array(site.root, self.folder), site.placement
        if not self._in_main(site):
            return None
        if site.dequantises:
            codes = self.codes(site)
            return None if codes is None else (codes.floats, site.operand)
        value = self.compute(site.node.input[site.position])
        place = _laid(site, value.shape) if value is not None else None
        return (value, place) if value is not None and place is not None else None

    def _as_named(self, site: Site, order: Order = None) -> tuple[Array, Placement] | None:
        """The weight with its rows in the order in which the module has them that a target names."""
        found, order = self.read(site), order or site.permute
        if found is None or order is None:
            return found
        value, place = found
        matrix = place.to_matrix(value)
        gates = matrix.reshape(site.operand.shape[0], len(order), -1, matrix.shape[-1])
        named, rank = gates[:, np.argsort(order)].reshape(matrix.shape), matrix.ndim
        return named, Placement(matrix.shape, (rank - 2,), (rank - 1,), tuple(range(rank - 2)))

    def codes(self, site: Site) -> Codes | None:
        """The codes of a weight whose operator takes them; None where they are packed in another way than is known."""
        if not self._in_main(site):
            return None
        try:
            found = unpacked(site, self.compute)
            return found if found is not None and found.floats.shape == site.operand.shape else None
        except ValueError:  # of tensors that do not fit each other
            return None

    def compute(self, name: str, instead: Mapping[str, Array] | None = None) -> Array | None:
        """A constant of the main graph; None where it is made in another way than weights are dequantised.

        Args:
            instead: what to compute with in the place of stored tensors.
        """
        if instead and name in instead:
            return instead[name]
        if name in self.index.roots:
            return array(self.index.roots[name], self.folder)
        node = self._step(name)
        if node is None or self._sizes(name) is None:
            return None
        if node.op_type == "Reshape":
            moved, sizes = self.compute(node.input[0], instead), self._sizes(name)
            return None if moved is None or sizes is None else moved.reshape(sizes)
        inputs = {name: self.compute(name, instead) for name in node.input if name}
        if any(value is None for value in inputs.values()):
            return None
        try:
            return _evaluated(node, {k: v for k, v in inputs.items() if v is not None}, self.opset)
        except Exception:  # of a stranger's graph onnx may raise anything: what cannot be computed is not recognised
            return None


def fingerprint(matrix: Array) -> str:
    """SHA-256 of a matrix [*batch, out, in]: dtype, shape, row-major little-endian values, −0 as +0."""
    digest = hashlib.sha256(f"{matrix.dtype.name} {list(matrix.shape)}".encode())
    rows = max(1, (1 << 20) // max(1, matrix[:1].size))
    kind = np.dtype(f"u{matrix.dtype.itemsize}")
    minus_zero = kind.type(1 << (8 * kind.itemsize - 1))
    for start in range(0, len(matrix), rows):
        bits = np.ascontiguousarray(matrix[start : start + rows]).view(kind)
        bits = np.where(bits == minus_zero, kind.type(0), bits).astype(kind.newbyteorder("<"), copy=False)
        digest.update(bits.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _spread(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of a product; None where it is larger than each of its inputs: a weight does not grow."""
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        return None
    return shape if shape in shapes else None


def _evaluated(node: onnx.NodeProto, inputs: Mapping[str, Array], opset: onnx.OperatorSetIdProto) -> Array:
    typed = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in inputs]
    output = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UNDEFINED, None)
    graph = onnx.helper.make_graph([node], "weight", typed, [output])
    model = onnx.helper.make_model(graph, opset_imports=[opset])
    (value,) = ReferenceEvaluator(model).run(None, dict(inputs))
    return np.asarray(value)


def _laid(site: Site, shape: tuple[int, ...]) -> Placement | None:
    """How [out, in] lies in what the operator reads; None where its meaning is not known."""
    means = meaning(site.node, site.position, shape)
    return None if means.refusal else Placement(shape, means.out, means.in_, means.batch)
