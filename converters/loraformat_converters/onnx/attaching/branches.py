"""The branch s·B·A·x of each operator: how A and B are laid for it, and the nodes that run beside it.

A form has two halves. ``constants`` lays A [*batch, r, in] and B [*batch, out, r], once for all uses of the weight;
``run`` gives the change of one use's output. ``spread`` is the shape in which a vector [out] meets that output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx
from onnx import helper

from loraformat_converters.onnx.graph import einsum
from loraformat_converters.onnx.graph.index import Site
from loraformat_converters.onnx.graph.nodes import Nodes
from loraformat_converters.onnx.graph.operators import attribute

__all__ = ["FORMS", "LINEAR", "Between", "Form", "Pair"]

LINEAR = ("MatMul", "Gemm", "com.microsoft.FusedMatMul")


@dataclass(frozen=True)
class Pair:
    """A and B as values of the graph, with their shapes."""

    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


Between = Callable[[str], str]
"""What happens to A·x, whose last axis (of a convolution: the second) is the rank, before B."""


def unchanged(hidden: str) -> str:
    """Nothing."""
    return hidden


class Form(Protocol):
    """One operator's branch."""

    def constants(self, make: Nodes, site: Site, pair: Pair) -> Pair:
        """A and B as ``run`` takes them."""

    def run(self, make: Nodes, site: Site, pair: Pair, between: Between = unchanged) -> str:
        """s·B·A·x."""

    def spread(self, site: Site) -> Sequence[int] | None:
        """[out] as it meets the output, -1 for out; None where no vector can."""


class _Linear:
    """MatMul, Gemm, FusedMatMul: two MatMuls, x on the left or on the right of the weight."""

    def constants(self, make: Nodes, site: Site, pair: Pair) -> Pair:
        if site.side == 0:
            return pair
        a = make.turn(pair.a, len(pair.a_shape), "lora_A/T")
        return Pair(a, make.turn(pair.b, len(pair.b_shape), "lora_B/T"), pair.a_shape, pair.b_shape)

    def run(self, make: Nodes, site: Site, pair: Pair, between: Between = unchanged) -> str:
        side = "BA"[site.side]
        turns = {name: attribute(site.node, name, 0) for name in (f"trans{side}", f"transBatch{side}")}
        if site.side == 0:
            hidden = between(_multiply(make, site, pair.a, site.x, turns))
            return make.node("MatMul", [pair.b, hidden], "change")
        hidden = between(_multiply(make, site, site.x, pair.a, turns))
        return make.node("MatMul", [hidden, pair.b], "change")

    def spread(self, site: Site) -> Sequence[int] | None:
        return [-1] if site.side == 1 and not site.operand.batch else None


def _multiply(make: Nodes, site: Site, left: str, right: str, turns: Mapping[str, int]) -> str:
    """x·A as the operator reads x."""
    used = {name: 1 for name, turned in turns.items() if turned}
    if site.operator == "com.microsoft.FusedMatMul":
        return make.node("FusedMatMul", [left, right], "hidden", domain="com.microsoft", **used)
    if used:  # a Gemm's x has two axes
        turned = make.node("Transpose", [site.x], "x", perm=[1, 0])
        left, right = (turned if value == site.x else value for value in (left, right))
    return make.node("MatMul", [left, right], "hidden")


class _Conv:
    """The site's own convolution with A as its kernel, then one of width 1 with B."""

    def constants(self, make: Nodes, site: Site, pair: Pair) -> Pair:
        _, *kernel = (site.operand.shape[a] for a in site.operand.in_)
        a = [pair.a_shape[0], site.operand.shape[site.operand.in_[0]], *kernel]
        b = [*pair.b_shape, *(1 for _ in kernel)]
        turn = list(range(len(a)))
        if site.like == "ConvTranspose":  # its kernels are [in, r, *kernel]
            turn[:2] = 1, 0
        laid = make.transpose(make.reshape(pair.a, pair.a_shape, a, "lora_A/kernel"), turn, "lora_A/T")
        return Pair(laid, make.reshape(pair.b, pair.b_shape, b, "lora_B/kernel"), tuple(a), tuple(b))

    def run(self, make: Nodes, site: Site, pair: Pair, between: Between = unchanged) -> str:
        hidden = between(make.node(site.like, [site.x, pair.a], "hidden", **_attributes(site.node)))
        return make.node("Conv", [hidden, pair.b], "change")

    def spread(self, site: Site) -> Sequence[int] | None:
        return [-1, *(1 for _ in site.operand.shape[2:])]


class _Gather:
    """The same rows of Aᵀ, then a MatMul with Bᵀ."""

    def constants(self, make: Nodes, site: Site, pair: Pair) -> Pair:
        a, b = make.turn(pair.a, 2, "lora_A/T"), make.turn(pair.b, 2, "lora_B/T")
        return Pair(a, b, pair.a_shape, pair.b_shape)

    def run(self, make: Nodes, site: Site, pair: Pair, between: Between = unchanged) -> str:
        hidden = between(make.node("Gather", [pair.a, site.x], "hidden"))
        return make.node("MatMul", [hidden, pair.b], "change")

    def spread(self, site: Site) -> Sequence[int] | None:
        return [-1]


class _Einsum:
    """Two equations, the rank between them."""

    def constants(self, make: Nodes, site: Site, pair: Pair) -> Pair:
        place = site.operand
        out, in_ = ([place.shape[a] for a in axes] for axes in (place.out, place.in_))
        a = [*self._batch(pair.a_shape), pair.a_shape[-2], *in_]
        b = [*self._batch(pair.b_shape), *out, pair.b_shape[-1]]
        laid = (
            make.reshape(pair.a, pair.a_shape, a, "lora_A/axes"),
            make.reshape(pair.b, pair.b_shape, b, "lora_B/axes"),
        )
        return Pair(*laid, pair.a_shape, pair.b_shape)

    def run(self, make: Nodes, site: Site, pair: Pair, between: Between = unchanged) -> str:
        letters = einsum.read(attribute(site.node, "equation", b"").decode(), site.position, len(site.operand.shape))
        shapes = (pair.a_shape, pair.b_shape)
        shared = [i for i, shape in enumerate(shapes) if not self._batch(shape)]
        first, second = letters.steps(shared)
        hidden = between(make.node("Einsum", [site.x, pair.a], "hidden", equation=first))
        return make.node("Einsum", [hidden, pair.b], "change", equation=second)

    def spread(self, site: Site) -> Sequence[int] | None:
        return None

    @staticmethod
    def _batch(shape: tuple[int, ...]) -> list[int]:
        """The batch sizes of a factor, none where one serves all."""
        return list(shape[:-2]) if any(n != 1 for n in shape[:-2]) else []


FORMS: Mapping[str, Form] = {
    **dict.fromkeys(LINEAR, _Linear()),
    **dict.fromkeys(("Conv", "ConvTranspose"), _Conv()),
    "Gather": _Gather(),
    "Einsum": _Einsum(),
}


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
