"""Meaning: what the axes of one operand of an operator are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx

__all__ = ["Meaning", "attribute"]


@dataclass(frozen=True)
class Meaning:
    """What the axes of one operand are.

    Attributes:
        factor: what the operator multiplies x·W with.
        natural: whether torch keeps the named parameter in these very axes.
        refusal: why the operand cannot be changed; None if it can.
        shape: the sizes of the axes, where the stored tensor is packed and has others.
        permute: of a torch module's rows, in as many blocks, which stands first here, which second, …
        doubt: why a name alone does not tell in which order the rows are.
        turned: the other order in which they may be then, as ``permute`` has it.
    """

    out: tuple[int, ...]
    in_: tuple[int, ...]
    batch: tuple[int, ...] = ()
    factor: float = 1.0
    natural: bool = False
    refusal: str | None = None
    shape: tuple[int, ...] | None = None
    permute: tuple[int, ...] | None = None
    doubt: str | None = None
    turned: tuple[int, ...] | None = None


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute's value, or ``default``."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)
