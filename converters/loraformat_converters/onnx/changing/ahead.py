"""Products that were computed ahead: a call of a module on a constant is a stored tensor, which no change reaches.

torch's exporter folds them, and so does every optimiser: the learned queries of a decoder, the start of a cell, a token that
is looked up. The calls that are left are changed, this one is not: the model would be neither the old nor the new. What
says so is the tensor's name, where a tool named it after the node that gave it; of torch's own names, its values.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat.errors import Problem
from loraformat_converters.onnx.finding.names import modules_of, names_of, same_module
from loraformat_converters.onnx.graph.model import FLOATS, array
from loraformat_converters.onnx.graph.operators import WEIGHTS

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.onnx.changing.spots import Change
    from loraformat_converters.onnx.graph.index import Index, Site
    from loraformat_converters.onnx.graph.values import Values

    Array = npt.NDArray[Any]

__all__ = ["computed_ahead"]

_TOOL = re.compile(r"/(?P<module>.+)/(?P<operator>[A-Za-z]\w*?)(_\d+)?_output_\d+")
"""How TorchScript (torch 2.13) calls a node's value; onnxslim, onnxsim and ONNX Runtime keep that for what they computed."""

_MOVES = frozenset({"Cast", "Constant", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""The operators that a stored tensor may have been through without a product."""

_TORCH: dict[str, re.Pattern[str]] = {
    "linear": re.compile(r"(linear|addmm|matmul|mm|bmm|einsum)(_\d+)?"),
    "convolution": re.compile(r"_?conv(olution|[123]d|_transpose[123]d)(_\d+)?"),
    "table": re.compile(r"embedding(_\d+)?"),
}
"""What torch.onnx (2.13, dynamo) calls the value of a product, one that it folded too; its own constants are ``val_7``."""

_NEAR = 0.03
"""How near the nearest c·Wᵀ + b must come, relative to what is stored: 16 bits and codes leave that; chance more."""

_LOOKED_UP = 16
"""How many rows of a stored look-up are looked for in the table."""


class Answer(enum.Enum):
    """Whether a stored tensor is c·Wᵀ + b: no; with c = 0; with another c; or nothing tells, as any tensor is if W is square."""

    NO, BIAS, PRODUCT, UNKNOWN = range(4)


@dataclass(frozen=True)
class _Module:
    """W [out, in] and b [out] of what a weight's operator computes; None where it has none, or it tells nothing."""

    kind: str
    weight: Array | None
    bias: Array | None

    def gives(self, stored: Array) -> Answer:
        """Whether a tensor may be what it gave for a constant."""
        values = np.moveaxis(stored, self.axis, -1).reshape(-1, stored.shape[self.axis])
        rest = values if self.bias is None else values - self.bias
        if not rest.any():
            return Answer.BIAS if self.bias is not None and self.bias.any() else Answer.NO
        if self.weight is None:
            return Answer.UNKNOWN
        if self.kind == "table":
            return Answer.PRODUCT if _rows_of(self.weight.T, values[:_LOOKED_UP]) else Answer.NO
        x, *_ = np.linalg.lstsq(self.weight, rest.T)
        near = np.linalg.norm(self.weight @ x - rest.T) <= _NEAR * np.linalg.norm(rest)
        return Answer.PRODUCT if near else Answer.NO

    @property
    def axis(self) -> int:
        """Which axis of what it gives is out."""
        return 1 if self.kind == "convolution" else -1


def _rows_of(table: Array, rows: Array) -> bool:
    far = (table**2).sum(1) - 2 * rows @ table.T + (rows**2).sum(1, keepdims=True)
    return bool((far.min(1) <= (_NEAR * np.linalg.norm(rows, axis=1)) ** 2 + 1e-12).all())


def computed_ahead(values: Values, changes: Iterable[tuple[tuple[Site, ...], list[Change]]]) -> Iterator[Problem]:
    """LF-608 for every change of a weight or bias of which a product is stored too, or may be."""
    stored = _Stored(values)
    for sites, wanted in changes:
        name = next((name for name in stored.names if stored.reaches(name, sites)), None)
        what = ""
        if name is not None:
            what = (
                f"a product of it and a constant was computed when the model was exported or optimised, and is stored as {name}, "
                "or nothing shows that this is another's"
            )
        elif _lacks_first(sites):
            what = f"{sites[0].node.name} is a later call of its module, and the first was computed ahead, or left out"
        if what:
            fix = "export with that constant as an input, or merge into the checkpoint, then export"
            yield Problem("LF-608", what, wanted[0].key, fix)


def _lacks_first(sites: tuple[Site, ...]) -> bool:
    """Whether nodes are named after later calls alone of the module that the tensor is named after."""
    module = sites[0].root_name.rpartition(".")[0]
    paths = {names_of(site, "node_name") for site in sites}
    return module not in paths and all(path is not None and same_module(module, path) for path in paths)


class _Stored:
    """The stored tensors whose names say that they are what an operator gave."""

    def __init__(self, values: Values) -> None:
        self.values, self.index = values, values.index
        weights = {(s.root_name, path) for s in self.index.sites if s.node.op_type in WEIGHTS for path in modules_of(s)}
        held = [name for name, tensor in self.index.roots.items() if _is_value(name, tensor)]
        self.names = [name for name in held if (name, _path(name)) not in weights]  # cut or joined for its own product
        self._answers: dict[tuple[str, int], Answer] = {}

    def reaches(self, name: str, sites: tuple[Site, ...]) -> bool:
        """Whether a change at these sites would have changed a stored tensor, or nothing tells that it would not."""
        own, path = self._answer(name, sites[0]), _path(name)
        if own in (Answer.PRODUCT, Answer.BIAS):
            return own is Answer.PRODUCT or sites[0].vector
        paths = {called for site in sites for called in modules_of(site)}
        mine = any(same_module(*pair) for called in paths if path for pair in ((called, path), (path, called)))
        if not (mine or (path is None and own is Answer.UNKNOWN)):
            return False
        others = (self._answer(name, other) for other in self.index.sites if other not in sites)
        return not any(other in (Answer.PRODUCT, Answer.BIAS) for other in others)

    def _answer(self, name: str, site: Site) -> Answer:
        key = name, id(site.node)
        if key not in self._answers:
            self._answers[key] = self._compared(name, site)
        return self._answers[key]

    def _compared(self, name: str, site: Site) -> Answer:
        """By the names of the operator and of the tensor, then by sizes, then by values."""
        weight = site if not site.vector else next((s for s in _around(self.index, site) if not s.vector), None)
        if weight is None or weight.operand.batch:
            return Answer.NO
        kind = "convolution" if "Conv" in weight.like else "table" if weight.looks_up else "linear"
        sizes, (*_, out, in_) = self.index.roots[name].dims, weight.placement.matrix_shape
        if not (_path(name) or _TORCH[kind].fullmatch(name)):
            return Answer.NO
        if len(sizes) < 2 or sizes[_Module(kind, None, None).axis] != out:
            return Answer.NO
        near = () if kind == "table" else (s for s in _around(self.index, weight) if s.vector and s.parameter == "bias")
        bias = next((s for s in near if s.root_name not in self.names), None)
        stored = array(self.index.roots[name], self.values.folder).astype(np.float32)
        tells = kind == "table" or out > in_  # of a W that is square or wide any tensor is a product: it is not read
        read = _matrix(self.values, weight) if tells else None
        return _Module(kind, read, _matrix(self.values, bias)).gives(stored)


def _is_value(name: str, tensor: onnx.TensorProto) -> bool:
    if tensor.data_type not in FLOATS or len(tensor.dims) < 1 or max(tensor.dims) == 1:
        return False
    called = _TOOL.fullmatch(name)
    if called is not None:
        return called["operator"] not in _MOVES
    return len(tensor.dims) > 1 and any(pattern.fullmatch(name) for pattern in _TORCH.values())


def _path(name: str) -> str | None:
    """The call of a module that gave a value, where its name tells."""
    called = _TOOL.fullmatch(name)
    return called["module"].replace("/", ".") if called else None


def _around(index: Index, site: Site) -> Iterator[Site]:
    """The other parameters of a product: those of its operator, and of the Add behind it or the product before it."""
    for other in index.sites:
        if other.refusal or other is site:
            continue
        first, second = (other, site) if site.vector else (site, other)
        behind = second.node.op_type == "Add" and first.end.output[0] in second.node.input
        if other.node is site.node or (second.vector and not first.vector and behind):
            yield other


def _matrix(values: Values, site: Site | None) -> Array | None:
    """W [out, in], or b [out]."""
    read = None if site is None else values.read(site)
    if site is None or read is None:
        return None
    matrix = np.asarray(read[1].to_matrix(read[0]), np.float32)
    return matrix.reshape(-1) if site.vector else matrix
