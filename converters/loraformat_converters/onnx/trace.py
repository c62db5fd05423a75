"""Back from an operator's input to the stored tensor that it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import onnx

from loraformat_converters.onnx.operators import attribute
from loraformat_converters.onnx.scopes import STANDARD, Scope

__all__ = ["Trace", "Value", "trace"]


class Value(NamedTuple):
    """A name, and the scope that gives it its meaning."""

    scope: Scope
    name: str


@dataclass(frozen=True)
class Trace:
    """From an operator's input back to a stored tensor; ``axes``: the root's axis of each axis of the input."""

    values: tuple[Value, ...]
    chain: tuple[onnx.NodeProto, ...]
    axes: tuple[int, ...]
    refusal: str | None

    @property
    def root(self) -> onnx.TensorProto:
        """The stored tensor."""
        scope, name = self.values[0]
        return scope.roots[name]


def trace(name: str, scope: Scope) -> Trace | None:
    """Back from a value to the stored tensor that it is made of, if it is made of stored tensors only."""
    chain: list[onnx.NodeProto] = []
    home = scope.home(name, "constant")
    if home is None:
        return None
    values = [Value(home, name)]
    while name not in home.roots:
        node = home.producers[name]
        if not node.input or not node.input[0]:
            return None
        chain.insert(0, node)
        name = _weight_of(node, home)
        found = home.home(name, "constant")
        if found is None:
            return None
        home = found
        values.insert(0, Value(home, name))
    axes = tuple(range(len(home.roots[name].dims)))
    for node in chain:
        perm = attribute(node, "perm", tuple(reversed(range(len(axes)))))
        if node.domain not in STANDARD or node.op_type not in ("Identity", "Transpose"):
            return Trace(tuple(values), tuple(chain), axes, f"{node.op_type} lies between its weight and it")
        if node.op_type == "Transpose":
            if sorted(perm) != list(range(len(axes))):
                what = f"{node.name} has perm {list(perm)} of {len(axes)} axes"
                return Trace(tuple(values), tuple(chain), axes, what)
            axes = tuple(axes[i] for i in perm)
    return Trace(tuple(values), tuple(chain), axes, None)


def _weight_of(node: onnx.NodeProto, scope: Scope) -> str:
    """Which input the weight is: the first; of scale and weight, whichever comes first, the larger."""
    names = node.input if node.op_type in ("Mul", "Add") else node.input[:1]
    return str(max(names, key=lambda name: scope.size(name) or 0))
