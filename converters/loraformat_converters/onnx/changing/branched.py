"""The adapter that somebody else put into a graph, found by what its nodes compute and not by what they are called.

    x ─┬── MatMul(W) ── Add(bias) ───────────── Add ── y
       └── MatMul(A) ── MatMul(B) ── Mul(s) ────┘

So PEFT's layers look when they are exported un-merged, and so do the models of Olive and of ONNX Runtime GenAI's builder.
Each use of a weight has factors of its own here, though exporters store all B that are still zero as one tensor (measured
with torch 2.13's both exporters). Names only tell what the target is called.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from loraformat.adapter import Adapter
from loraformat.errors import LoraFormatError, Problem
from loraformat.parts import Lora
from loraformat.updates import Update
from loraformat_converters.onnx.attaching.branches import FORMS
from loraformat_converters.onnx.attaching.slot_names import key_of
from loraformat_converters.onnx.finding.names import MODULES, modules_of, names_of
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.model import array
from loraformat_converters.onnx.graph.operators import attribute
from loraformat_converters.onnx.graph.scopes import STANDARD, Scope
from loraformat_converters.onnx.graph.trace import trace
from loraformat_converters.onnx.graph.values import Values

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Branch", "branched", "pairs"]

_SAME = frozenset({"Identity", "Cast", "Dropout"})
"""What leaves a value what it is, when a model runs and does not learn."""

_AS_ROWS = _SAME | {"Reshape"}
"""What leaves the rows of a value what they are, where its last axis is known to stay: both of two products take as many."""

_DEPTH = 16
"""How many nodes of a kind are followed: a stranger's graph may be a circle."""

_FACTOR = re.compile(r"lora_[AB]\b|lora_(down|up)\b")
"""How everybody names a factor; one that is found in no branch is told."""

_FIX = "merge it where it came from, or give the adapter's own file"


@dataclass(frozen=True)
class Branch:
    """s·B·A·x beside a weight: the value that A reads, the uses of A and B, and s."""

    x: str
    a: Site
    b: Site
    scale: float


def branched(index: Index, values: Values) -> Adapter | None:
    """The pairs beside the weights of a graph, with the scale as a ``factor``; None where there is none.

    Raises:
        LoraFormatError: LF-613 a tensor is called a factor and lies in no such branch, or one weight has two branches.
    """
    graph = _Graph(index, values)
    found = list(graph.found())
    used = {site.number for _, branch in found for site in (branch.a, branch.b)}
    problems = [*_lost(index, used), *_twice(found)]
    if problems:
        raise LoraFormatError(problems)
    targets: dict[str, Update] = {}
    for site, branch in found:  # a module that is called twice has two uses of one weight and of one pair
        targets.setdefault(_key(site, branch), graph.update(site, branch))
    return Adapter(dict(sorted(targets.items())), provenance={"verb": "extract"}) if targets else None


def pairs(index: Index, values: Values) -> list[tuple[str, Site, Branch]]:
    """(what the target is called, a use of its weight, the branch beside it); LF-613 where one weight has two branches."""
    found = list(_Graph(index, values).found())
    if problems := list(_twice(found)):
        raise LoraFormatError(problems)
    return [(_key(site, branch), site, branch) for site, branch in found]


def _lost(index: Index, used: Container[int]) -> Iterator[Problem]:
    """What goes by the name of a factor and was not found to be one: leaving it out would be another adapter."""
    for name in dict.fromkeys(value.name for value in index.graph.input):  # olive-ai 0.13 lists each twice
        root = index.roots.get(name)
        if _FACTOR.search(name) and (root is None or 0 in root.dims):
            what, fix = "it is fed to the model, which does not hold it", "convert the file that is fed"
            yield Problem("LF-613", what, name, fix)
    for site in index.sites:
        called = next((name for name in (site.root_name, *modules_of(site)) if _FACTOR.search(name)), None)
        if called and site.number not in used and site.known_operator and not site.vector:
            what = "it is called a factor, and is in no branch s·B·A·x beside a weight"
            yield Problem("LF-613", what, called, _FIX)


def _twice(found: list[tuple[Site, Branch]]) -> Iterator[Problem]:
    """Two adapters at once: which is meant, and whether they are one, the graph does not say."""
    owners: dict[str, tuple[str, str, str]] = {}
    for site, branch in found:
        key, pair = _key(site, branch), (site.root_name, branch.a.root_name, branch.b.root_name)
        if owners.setdefault(key, pair) != pair:
            yield Problem("LF-613", "two branches run beside this weight", key, _FIX)


def _key(site: Site, branch: Branch) -> str:
    """What the target is called: by the weight's own module, by the factors' names, else as the weight is stored."""
    said = next((name for rung in MODULES if (name := names_of(site, rung))), None)
    if said is not None:
        return f"{_unwrapped(said)}.{site.parameter}"
    stored = names_of(site, "initializer") or site.root_name
    if stored.endswith(f".{site.parameter}"):
        return f"{_unwrapped(stored.removesuffix(f'.{site.parameter}'))}.{site.parameter}"
    listed = key_of(branch.a.root_name)
    return listed[0] if listed else stored


def _unwrapped(module: str) -> str:
    """A module's path in the model that PEFT wrapped (0.21.2): without what it puts around all, and around each layer."""
    return re.sub(r"\.base_layer(_\d+)?$", "", module.removeprefix("base_model.model."))


class _Graph:
    """The branches of one graph."""

    def __init__(self, index: Index, values: Values) -> None:
        self.index, self.values = index, values
        plain = [site for site in index.sites if not site.vector and site.like in FORMS]
        self.of_node = {id(site.node): site for site in plain}
        self.of_end = {(id(site.scope), site.end.output[0]): site for site in plain}

    def found(self) -> Iterator[tuple[Site, Branch]]:
        """(the use of a weight, the branch beside it)."""
        for scope in self.index.scopes:
            for node in scope.nodes:
                for branch, base in self._sums(node, scope):
                    site = self._base(base, branch, scope)
                    if site is not None:
                        yield site, branch

    def update(self, site: Site, branch: Branch) -> Update:
        """A [r, in] and B [out, r] as the graph computes with them."""
        a, b = (self._matrix(own) for own in (branch.a, branch.b))
        placement = site.placement if site.natural else None
        pair = Lora(a, b, branch.scale / site.factor, "factor")
        return Update((pair,), placement, op="embedding" if site.looks_up else None)

    def _chained(self, a: Site, b: Site) -> bool:
        """Whether B takes what A gives: matrices, A's out being B's in; of two convolutions the second is 1 wide."""
        first, second = self.values.shape(a), self.values.shape(b)
        if first is None or second is None or len(first) != 2 or len(second) != 2 or first[0] != second[1]:
            return False
        return b.like != "Conv" or all(n == 1 for n in b.operand.shape[2:])

    def _fits(self, site: Site, branch: Branch) -> bool:
        """Whether a branch takes and gives as much as a weight does."""
        a, b = self.values.shape(branch.a), self.values.shape(branch.b)
        return a is not None and b is not None and self.values.shape(site) == (b[0], a[1])

    def _matrix(self, site: Site) -> Array:
        found = self.values.read(site)
        if found is None:
            what = f"{site.node.name or site.operator}: how its weight is quantised is not known"
            raise LoraFormatError([Problem("LF-613", what, site.root_name, _FIX)])
        value, place = found
        return np.array(place.to_matrix(value))

    def _sums(self, node: onnx.NodeProto, scope: Scope) -> Iterator[tuple[Branch, str]]:
        """Of a sum: (what is a branch, the value that it is added to). ONNX Runtime makes one Gemm of B and its Add."""
        pairs: list[tuple[str, str]] = []
        if _is_sum(node):
            pairs = [(node.input[0], node.input[1]), (node.input[1], node.input[0])]
        elif node.op_type == "Gemm" and len(node.input) > 2 and attribute(node, "beta", 1.0) == 1.0:
            pairs = [(node.output[0], node.input[2])]
        for value, base in pairs:
            branch = self._branch(value, scope, summed=node.op_type == "Gemm")
            if branch is not None:
                yield branch, base

    def _branch(self, value: str, scope: Scope, *, summed: bool = False) -> Branch | None:
        """s·B·A·x of a value. ``summed``: what B's own Gemm adds is no bias."""
        before, scale = self._unscaled(value, scope)
        b = self.of_node.get(id(_producer(before, scope)))
        if b is None or (b.bias and not summed) or b.looks_up:
            return None
        hidden, more = self._unscaled(b.x, scope)
        a = self.of_node.get(id(_producer(hidden, scope)))
        if a is None or a.bias or a is b or not self._chained(a, b):
            return None
        return Branch(_plain(a.x, scope), a, b, scale * more * a.factor * b.factor)

    def _unscaled(self, value: str, scope: Scope) -> tuple[str, float]:
        """A value without the constant numbers that it was multiplied with, and their product."""
        scale = 1.0
        for _ in range(_DEPTH):
            value = _plain(value, scope)
            node = _producer(value, scope)
            if node is None or node.op_type != "Mul" or node.domain not in STANDARD or len(node.input) != 2:
                break
            numbers = [self._number(name, scope) for name in node.input]
            known = next((n for n in numbers if n is not None), None)
            if known is None or None not in numbers:
                break
            scale, value = scale * known, node.input[numbers.index(None)]
        return value, scale

    def _number(self, name: str, scope: Scope) -> float | None:
        """A stored number; None of anything else."""
        traced = trace(name, scope)
        if traced is None or traced.refusal or traced.sealed or any(n != 1 for n in traced.dims):
            return None
        return float(array(traced.root, self.values.folder).reshape(()))

    def _base(self, value: str, branch: Branch, scope: Scope, depth: int = 0) -> Site | None:
        """The use of a weight whose product with the same x a value is, but for a bias and for other branches."""
        exact, value = _plain(value, scope), _plain(value, scope, _AS_ROWS)
        site = self.of_end.get((id(scope), value))
        if site is not None and site not in (branch.a, branch.b) and ("Conv" not in site.like or exact == value):
            return site if self._fits(site, branch) and _beside(site, branch, scope) else None
        node = _producer(value, scope)
        if node is None or not _is_sum(node) or depth > _DEPTH:
            return None
        for name, other in ((node.input[0], node.input[1]), (node.input[1], node.input[0])):
            if scope.home(other, "constant") is not None or self._branch(other, scope) is not None:
                found = self._base(name, branch, scope, depth + 1)
                if found is not None:
                    return found
        return None


def _is_sum(node: onnx.NodeProto) -> bool:
    return node.op_type == "Add" and node.domain in STANDARD and len(node.input) == 2


def _beside(site: Site, branch: Branch, scope: Scope) -> bool:
    """Whether a branch reads the same x as a weight does, in the same way."""
    if site.looks_up != branch.a.looks_up:
        return False
    if "Conv" in site.like:
        same = _attributes(site.node) == _attributes(branch.a.node)
        return same and branch.a.like == site.like and _plain(site.x, scope) == _plain(branch.x, scope)
    return _plain(site.x, scope, _AS_ROWS) == _plain(branch.x, scope, _AS_ROWS)


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    """How a convolution moves; what is not said is as if it were."""
    said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: said[name] for name in ("strides", "pads", "dilations", "auto_pad") if name in said}


def _plain(name: str, scope: Scope, through: frozenset[str] = _SAME) -> str:
    """The value that a value is, but for casts and copies."""
    for _ in range(_DEPTH):
        node = _producer(name, scope)
        if (
            node is None
            or node.op_type not in through
            or node.domain not in STANDARD
            or node.output[0] != name
            or not node.input
        ):
            break
        name = node.input[0]
    return name


def _producer(name: str, scope: Scope) -> onnx.NodeProto | None:
    home = scope.home(name, "producers")
    return home.producers[name] if home is not None else None
