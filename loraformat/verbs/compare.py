"""Compare: which tensors of two models are equal, which changed and by how much, which only one has; tile by tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat.extracting.counterparts import Apart, apart, counterparts
from loraformat.registry import model_config
from loraformat.resolve import Hints

if TYPE_CHECKING:
    from loraformat.base import Base, Parameter

__all__ = ["Weights", "compare"]


@dataclass(frozen=True, slots=True)
class Weights:
    """How the tensors of two models differ.

    Attributes:
        equal: names of tensors that are equal bit for bit.
        changed: name → how far apart.
        resized: name → (A's, B's), of another shape.
        only: (A's, B's) tensors that the other has not.
        config: what ``config.json`` says of both, where that differs.
    """

    equal: tuple[str, ...]
    changed: Mapping[str, Apart]
    resized: Mapping[str, tuple[Parameter, Parameter]]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    config: Mapping[str, tuple[Any, Any]]

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.changed or self.resized or any(self.only) or self.config)


def compare(base: Base, other: Base, hints: Hints | None = None) -> Weights:
    """Read both once, a tile at a time.

    Args:
        hints: names are those of ``other``, by what ``base`` calls them.
    """
    side = counterparts(base, other, hints or Hints())
    equal: list[str] = []
    changed: dict[str, Apart] = {}
    resized: dict[str, tuple[Parameter, Parameter]] = {}
    for name, (before, after) in side.pairs.items():
        if before.shape != after.shape:
            resized[name] = (before, after)
            continue
        far = apart(base, before, other, after)
        if far.equal:
            equal.append(name)
        else:
            changed[name] = far
    config = _config(model_config(base), model_config(other))
    return Weights(tuple(equal), changed, resized, (tuple(side.missing), tuple(side.new)), config)


def _config(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted({*one, *other})
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}
