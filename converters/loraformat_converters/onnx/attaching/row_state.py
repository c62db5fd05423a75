"""What is known of the rows at a value, and what a rule may ask to follow them through an operator; see ``rows``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx

__all__ = ["LostError", "Read", "Rows", "Rule", "Values", "agreed", "kept", "lost"]


@dataclass(frozen=True)
class Rows:
    """The axis that carries the rows, and how many of its entries belong to one."""

    axis: int
    per: int = 1


class LostError(Exception):
    """Why the rows cannot be followed further."""


def lost(node: onnx.NodeProto, why: str) -> LostError:
    """What a node does that loses the rows."""
    return LostError(f"{node.name or node.op_type} {why}")


Read = Mapping[int, Rows]
"""What of a node's inputs carries the rows: position → rows."""


class Values(Protocol):
    """What a rule may ask."""

    opset: int
    count: int | None

    def rank(self, name: str) -> int:
        """How many axes a value has."""

    def shape(self, name: str) -> tuple[int | None, ...]:
        """The sizes of a value, as far as they are known."""

    def numbers(self, node: onnx.NodeProto, name: str, position: int) -> list[int] | None:
        """An attribute, or since some opset the constant input in its place."""


Rule = Callable[[Values, onnx.NodeProto, Read], Rows]
"""The rows of a node's outputs; raises ``LostError``."""


def agreed(node: onnx.NodeProto, states: Sequence[Rows]) -> Rows:
    """Of all inputs that carry the rows: along one axis."""
    if len(set(states)) != 1:
        raise lost(node, "joins values whose rows lie along different axes")
    return states[0]


def kept(own: Values, node: onnx.NodeProto, read: Read) -> Rows:
    """Of one input, elementwise; others are not of the rows."""
    if read.keys() != {0}:
        raise lost(node, "is parametrised by the rows")
    return read[0]
