"""Whether a stored tensor is what a module gave for a constant, c·Wᵀ + b, however its axes were moved and cut afterwards."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.onnx.graph.index import Index, Site
    from loraformat_converters.onnx.graph.values import Values

    Array = npt.NDArray[Any]

__all__ = ["Answer", "Module", "kind_of", "module_of", "sizes_of", "vectors"]

_NEAR = 0.03
"""How near the nearest c·Wᵀ + b must come, relative to what is stored: 16 bits and codes leave that; chance more."""

_TOLD = 16
"""How many vectors of a stored tensor are compared."""

_AXES = 6
"""Of how many axes longer than 1 all groups are tried: q, cut into heads of windows, has five."""


class Answer(enum.Enum):
    """Whether a stored tensor is c·Wᵀ + b: no; with c = 0; with another c; or nothing tells, as any tensor is if W is square."""

    NO, BIAS, PRODUCT, UNKNOWN = range(4)


@dataclass(frozen=True)
class Module:
    """W [out, in] and b [out] of what a weight's operator computes; None where it has none, or it tells nothing."""

    kind: str
    out: int
    weight: Array | None
    bias: Array | None

    def gives(self, stored: Array) -> Answer:
        """Whether a tensor, of any shape, may be made of what it gave for a constant."""
        found = {self._of(own) for own in vectors(stored, self.out)}
        found |= {Answer.BIAS} if self._cut(stored) else set()
        return next((a for a in (Answer.PRODUCT, Answer.BIAS, Answer.UNKNOWN) if a in found), Answer.NO)

    def _cut(self, stored: Array) -> bool:
        """Whether it is one of equal parts of the bias, as a gate is, wherever it is read."""
        if self.bias is None:
            return False
        for axis in (axis for axis, n in enumerate(stored.shape) if n > 1 and self.out % n == 0):
            rows = np.moveaxis(stored, axis, -1).reshape(-1, stored.shape[axis])
            parts = self.bias.reshape(-1, rows.shape[1])
            if (rows == rows[0]).all() and any(part.any() and np.array_equal(part, rows[0]) for part in parts):
                return True
        return False

    def _of(self, values: Array) -> Answer:
        rest = values if self.bias is None else values - self.bias
        if not rest.any():
            return Answer.BIAS if self.bias is not None and self.bias.any() else Answer.NO
        if self.weight is None:
            return Answer.UNKNOWN
        some = np.stack([rest[i] for i in np.linspace(0, len(rest) - 1, min(len(rest), _TOLD)).astype(int)])
        if self.kind == "table":
            return Answer.PRODUCT if _rows_of(self.weight.T, some) else Answer.NO
        x, *_ = np.linalg.lstsq(self.weight, some.T)
        near = np.linalg.norm(self.weight @ x - some.T) <= _NEAR * np.linalg.norm(some)
        return Answer.PRODUCT if near else Answer.NO


def vectors(stored: Array, out: int) -> Iterator[Array]:
    """[n, out] of a tensor for each of its axes, or groups of them, that are as long together."""
    long = [axis for axis, n in enumerate(stored.shape) if n != 1]
    for count in range(1, min(len(long), _AXES) + 1):
        for group in itertools.permutations(long, count) if len(long) <= _AXES else [(axis,) for axis in long]:
            if math.prod(stored.shape[axis] for axis in group) == out:
                yield np.moveaxis(stored, group, range(-count, 0)).reshape(-1, out)
        if len(long) > _AXES:
            return


def sizes_of(shape: tuple[int, ...]) -> set[int]:
    """How long the axes of a tensor are, and groups of them."""
    found = {1}
    for n in shape:
        found |= {n * other for other in found}
    return found


def _rows_of(table: Array, rows: Array) -> bool:
    far = (table**2).sum(1) - 2 * rows @ table.T + (rows**2).sum(1, keepdims=True)
    return bool((far.min(1) <= (_NEAR * np.linalg.norm(rows, axis=1)) ** 2 + 1e-12).all())


def kind_of(site: Site) -> str:
    """What a weight's operator is: a convolution, a table or a linear."""
    return "convolution" if "Conv" in site.like else "table" if site.looks_up else "linear"


def module_of(values: Values, site: Site, folded: frozenset[str]) -> Module | None:
    """What a weight or bias is a part of; None of no product. ``folded``: what is added, and is no bias."""
    weight = site if not site.vector else next((s for s in _around(values.index, site) if not s.vector), None)
    if weight is None or weight.operand.batch:
        return None
    kind, (*_, out, in_) = kind_of(weight), weight.placement.matrix_shape
    near = () if kind == "table" else (s for s in _around(values.index, weight) if s.vector and s.parameter == "bias")
    bias = next((s for s in near if s.root_name not in folded), None)
    tells = kind == "table" or out > in_  # of a W that is square or wide any tensor is a product: it is not read
    return Module(kind, out, _matrix(values, weight) if tells else None, _matrix(values, bias))


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
