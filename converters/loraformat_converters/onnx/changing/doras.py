"""DoRAs that a graph computes beside its weights: y = g ⊙ W·x + c ⊙ B·A·x + bias, with a vector g, however it is summed.

    PEFT (0.21.2, tuners/lora/dora.py)        base + (g − 1) ⊙ (base − bias) + g ⊙ s·B·A·x
    PEFT, a table (tuners/lora/variants.py)   g ⊙ base + g ⊙ s·B·A·x
    attach                                    g ⊙ base + (1 − g) ⊙ bias + (g ⊙ s·B)·A·x

The magnitude is g·‖W + s·BA‖, which is computed, within one rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from onnx import helper

from loraformat_converters.onnx.attaching.branches import FORMS
from loraformat_converters.onnx.changing.walking import AS_ROWS, DEPTH, is_sum, plain, producer
from loraformat_converters.onnx.graph.index import Site
from loraformat_converters.onnx.graph.scopes import STANDARD, Scope

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.onnx.changing.computed import Branch, Branches

    Array = npt.NDArray[Any]
    Terms = Mapping[Site | None, Array]

__all__ = ["Doras"]


class Doras:
    """The DoRAs of one graph.

    A value is read as its terms: what multiplies each product of a stored weight, and (None) what is added.
    """

    def __init__(self, branches: Branches) -> None:
        self.branches = branches
        self._biases: dict[int, Array] = {}
        self._inside: set[int] = set()

    def found(self, scope: Scope) -> Iterator[tuple[Site, Branch]]:
        """(the use of a weight, the pair beside it with its g); a sum that is a part of another one is none of its own."""
        for node in reversed(scope.nodes):
            if id(node) in self._inside or not node.output or not (is_sum(node) or self.branches.summed(node, scope)):
                continue
            seen: set[int] = set()
            try:
                dora = self._dora(self._terms(node.output[0], scope, seen) or {}, scope)
            except ValueError:  # constants on two sides of a Reshape need not fit together
                continue
            if dora is not None:
                self._inside |= seen
                yield dora

    def _dora(self, terms: Terms, scope: Scope) -> tuple[Site, Branch] | None:
        """What terms are, where these are the ones of a DoRA: two products, one of which is that of a pair."""
        products = [site for site in terms if site is not None]
        for site, last in itertools.permutations(products) if len(products) == 2 else ():
            branch = self.branches.summed(last.node, scope) or self.branches.branch(last.end.output[0], scope)
            g = _by_channel(terms[site], site)
            if branch is None or g is None or not self.branches.beside(site, branch, scope):
                continue
            if not self._keeps_bias(site, terms[site], terms.get(None, np.zeros(())), scope):
                return None
            return _rescaled(site, branch, g, terms[last])
        return None

    def _keeps_bias(self, site: Site, kept: Array, constant: Array, scope: Scope) -> bool:
        """Whether y has the bias of the product once and as it was; one inside the operator is rescaled with the product."""
        if site.bias is None or (site.bias and site.number in self._biases):
            return False
        own = self.branches.walk.constant(site.bias, scope) if site.bias else np.zeros(())
        if own is None:
            return False
        if site.bias and "Conv" in site.like:
            own = own.reshape(-1, *(1 for _ in site.operand.shape[2:]))
        return _close(site, constant + kept * own, self._biases.get(site.number, own))

    def _terms(self, value: str, scope: Scope, seen: set[int], depth: int = 0) -> Terms | None:
        """The terms of a value that is computed of the input; None where it is of anything else as well."""
        if depth > DEPTH:
            return None
        exact, rows = plain(value, scope), plain(value, scope, AS_ROWS)
        node = producer(exact, scope)
        site = self.branches.of_end.get((id(scope), rows))
        if site is not None and ("Conv" not in site.like or exact == rows):
            if self.branches.summed(site.node, scope) is None:
                return {site: np.ones(())}
            rest = self._terms(site.node.input[2], scope, seen, depth + 1)
            return None if rest is None else _plus({site: np.ones(())}, rest)
        if node is None or node.domain not in STANDARD or len(node.input) != 2:
            return None
        known = [scope.home(name, "constant") is not None for name in node.input]
        if node.op_type not in ("Add", "Sub", "Mul") or all(known) or (node.op_type == "Mul" and not any(known)):
            return None
        seen.add(id(node))
        terms: list[Terms] = []
        for i in sorted((0, 1), key=known.__getitem__):  # constants last
            name = node.input[i]
            found = self._constant(name, scope) if known[i] else self._terms(name, scope, seen, depth + 1)
            if found is None:
                return None
            terms.append(_times(found, -np.ones(())) if node.op_type == "Sub" and i else found)
        if node.op_type == "Mul":
            return _times(terms[0], terms[1][None])
        if node.op_type == "Add":
            self._note_bias(*terms)
        return _plus(*terms)

    def _constant(self, name: str, scope: Scope) -> Terms | None:
        found = self.branches.walk.constant(name, scope)
        return None if found is None else {None: found.astype(np.float64)}

    def _note_bias(self, one: Terms, other: Terms) -> None:
        """What is added to a product itself."""
        (site, by), *rest = one.items()
        if site is not None and not rest and other.keys() == {None} and by.ndim == 0 and by == 1:
            self._biases.setdefault(site.number, other[None])


def _rescaled(site: Site, branch: Branch, g: Array, change: Array) -> tuple[Site, Branch] | None:
    """The pair with its g; None where what multiplies it is no multiple of g, nor a number, B having g in it already."""
    if change.ndim == 0:
        whole = replace(branch, scale=branch.scale * float(change), ratio=g, inside=True)
        return (site, whole) if g.all() and change else None
    c = _by_channel(change, site)
    s = float(c @ g / (g @ g)) if c is not None and g.any() else 0.0
    if c is None or s == 0 or not _close(site, c, s * g):
        return None
    return site, replace(branch, scale=branch.scale * s, ratio=c / s)


def _plus(one: Terms, other: Terms) -> Terms:
    nothing = np.zeros(())
    return {leaf: one.get(leaf, nothing) + other.get(leaf, nothing) for leaf in (*one, *other)}


def _times(terms: Terms, by: Array) -> Terms:
    return {leaf: value * by for leaf, value in terms.items()}


def _by_channel(by: Array, site: Site) -> Array | None:
    """[out] of what multiplies a product; None where it multiplies along another axis."""
    form = FORMS[site.like].spread(site)
    if form is None:
        return None
    shape = (site.operand.matrix_shape[-2], *form[1:])
    lead = by.ndim - len(shape)
    return by.reshape(-1) if lead >= 0 and by.shape[lead:] == shape and set(by.shape[:lead]) <= {1} else None


def _close(site: Site, one: Array, other: Array) -> bool:
    """Whether two constants are equal but for the rounding of a graph, which computes g − 1."""
    eps = max(1e-6, float(ml_dtypes.finfo(helper.tensor_dtype_to_np_dtype(site.dtype)).eps))  # type: ignore[no-untyped-call]
    return bool(np.allclose(one, other, rtol=4 * eps, atol=eps * float(np.abs(other).max(initial=0))))
