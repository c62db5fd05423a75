"""The branches that a graph computes beside its weights, found by what its nodes are and not by what they are called.

x ─┬── MatMul(W) ── Add(bias) ───────────── Add ── y
   └── MatMul(A) ── MatMul(B) ── Mul(s) ────┘
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from loraformat.errors import LoraFormatError, Problem
from loraformat.parts import Lora, Magnitude
from loraformat.updates import Update
from loraformat_converters.onnx.attaching.branches import FORMS
from loraformat_converters.onnx.changing.doras import Doras
from loraformat_converters.onnx.changing.walking import AS_ROWS, DEPTH, Constants, is_sum, plain, producer
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.operators import attribute
from loraformat_converters.onnx.graph.scopes import Scope
from loraformat_converters.onnx.graph.values import Values

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["FIX", "Branch", "Branches"]

_RESCALED = re.compile(r"lora/.+/(rescaled|bias)(_\d+)?", re.S)
"""A value of a DoRA that ``attach`` made; a weight that gives it has the magnitude folded in: beside it runs no plain pair."""

FIX = "merge it where it came from, or give the adapter's own file"


@dataclass(frozen=True)
class Branch:
    """s·B·A·x beside a weight.

    Attributes:
        x: the value that A reads.
        a, b: the uses of the factors.
        scale: s.
        ratio: the g of a DoRA, by which it is multiplied; None of a plain pair.
        inside: whether B has g in it already.
    """

    x: str
    a: Site
    b: Site
    scale: float
    ratio: Array | None = None
    inside: bool = False


class Branches:
    """The branches of one graph."""

    def __init__(self, index: Index, values: Values) -> None:
        self.index, self.values, self.walk = index, values, Constants(index, values.folder)
        uses = (site for site in index.sites if len(site.node.input) > 1 and site.end.output)
        plain = [site for site in uses if not site.vector and site.like in FORMS]
        self.doras = Doras(self)
        self.of_node = {id(site.node): site for site in plain}
        self.of_end = {(id(site.scope), site.end.output[0]): site for site in plain}

    def found(self) -> Iterator[tuple[Site, Branch]]:
        """(the use of a weight, the branch beside it)."""
        for scope in self.index.scopes:
            yield from self.doras.found(scope)
            for node in scope.nodes:
                for branch, base in self._sums(node, scope):
                    site = self._base(base, branch, scope)
                    if site is not None:
                        yield site, branch

    def update(self, site: Site, branch: Branch) -> Update:
        """A [r, in] and B [out, r] as the graph computes with them."""
        a, b = (self._matrix(own) for own in (branch.a, branch.b))
        placement = site.placement if site.natural else None
        if branch.ratio is not None and branch.inside:
            b = (b / branch.ratio[:, None]).astype(np.float32)
        pair = Lora(a, b, branch.scale / site.factor, "factor")
        op = "embedding" if site.looks_up else None
        if branch.ratio is None:
            return Update((pair,), placement, op=op)
        length = np.linalg.norm(self._matrix(site).astype(np.float64) + pair.scale * (b.astype(np.float64) @ a), axis=1)
        return Update((pair, Magnitude((branch.ratio * length).astype(np.float32))), placement, op=op)

    def _chained(self, a: Site, b: Site) -> bool:
        """Whether B takes what A gives: matrices, A's out being B's in; of two convolutions the second is 1 wide."""
        first, second = self.values.shape(a), self.values.shape(b)
        if first is None or second is None or len(first) != 2 or len(second) != 2 or first[0] != second[1]:
            return False
        return b.like != "Conv" or all(n == 1 for n in b.operand.shape[2:])

    def beside(self, site: Site, branch: Branch, scope: Scope) -> bool:
        """Whether a branch takes the x that a weight takes, and gives as much."""
        a, b = self.values.shape(branch.a), self.values.shape(branch.b)
        fits = a is not None and b is not None and self.values.shape(site) == (b[0], a[1])
        return fits and _beside(site, branch, scope)

    def _matrix(self, site: Site) -> Array:
        found = self.values.read(site)
        if found is None:
            what = f"{site.node.name or site.operator}: how its weight is quantised is not known"
            raise LoraFormatError([Problem("LF-613", what, site.root_name, FIX)])
        value, place = found
        return np.array(place.to_matrix(value))

    def _sums(self, node: onnx.NodeProto, scope: Scope) -> Iterator[tuple[Branch, str]]:
        """Of a sum: (what is a branch, the value that it is added to)."""
        if (inside := self.summed(node, scope)) is not None:
            yield inside, node.input[2]
        for i in (0, 1) if is_sum(node) else ():
            if (branch := self.branch(node.input[i], scope)) is not None:
                yield branch, node.input[1 - i]

    def summed(self, node: onnx.NodeProto, scope: Scope) -> Branch | None:
        """s·B·A·x inside a Gemm that adds its last input: ONNX Runtime makes one of B and its Add."""
        if node.op_type != "Gemm" or len(node.input) < 3 or not node.output or attribute(node, "beta", 1.0) != 1.0:
            return None
        if scope.home(node.input[2], "constant") is not None:  # its bias
            return None
        return self.branch(node.output[0], scope, summed=True)

    def branch(self, value: str, scope: Scope, *, summed: bool = False) -> Branch | None:
        """s·B·A·x of a value. ``summed``: what B's own Gemm adds is no bias."""
        before, scale = self.walk.unscaled(value, scope)
        b = self.of_node.get(id(producer(before, scope)))
        if b is None or (b.bias and not summed) or b.looks_up:
            return None
        hidden, more = self.walk.unscaled(b.x, scope)
        a = self.of_node.get(id(producer(hidden, scope)))
        if a is None or a.bias or a is b or not self._chained(a, b):
            return None
        return Branch(plain(a.x, scope), a, b, scale * more * a.factor * b.factor)

    def _base(self, value: str, branch: Branch, scope: Scope, depth: int = 0) -> Site | None:
        """The use of a weight whose product with the same x a value is, but for a bias and for other branches."""
        exact, value = plain(value, scope), plain(value, scope, AS_ROWS)
        if _RESCALED.fullmatch(exact):
            return None
        site = self.of_end.get((id(scope), value))
        if site is not None and site not in (branch.a, branch.b) and ("Conv" not in site.like or exact == value):
            return site if self.beside(site, branch, scope) else None
        node = producer(value, scope)
        if node is None or not is_sum(node) or depth > DEPTH:
            return None
        for name, other in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
            if scope.home(other, "constant") is not None or self.branch(other, scope) is not None:
                found = self._base(name, branch, scope, depth + 1)
                if found is not None:
                    return found
        return None


def _beside(site: Site, branch: Branch, scope: Scope) -> bool:
    """Whether a branch reads the same x as a weight does, in the same way."""
    if site.looks_up != branch.a.looks_up:
        return False
    if "Conv" in site.like:
        same = _attributes(site.node) == _attributes(branch.a.node)
        return same and branch.a.like == site.like and plain(site.x, scope) == plain(branch.x, scope)
    return plain(site.x, scope, AS_ROWS) == plain(branch.x, scope, AS_ROWS)


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    """How a convolution moves; what is not said is as if it were."""
    said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: said[name] for name in ("strides", "pads", "dilations", "auto_pad") if name in said}
