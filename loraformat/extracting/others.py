"""What of two models differs beside their linears: norms, biases, embeddings, whatever else; told, or taken as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loraformat.axes import Placement
from loraformat.dtypes import DTYPES
from loraformat.errors import fault
from loraformat.extracting.counterparts import Counterparts, apart
from loraformat.huggingface import is_embedding
from loraformat.parts import Delta, Replace
from loraformat.rounding import widened
from loraformat.shapes import FLOATS
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base, Parameter

    Array = npt.NDArray[Any]

__all__ = ["KINDS", "Form", "Other", "others"]

KINDS = ("norms", "biases", "embeddings", "others", "new")
"""What a tensor that is no linear is called; ``new`` is one that the base lacks."""

Form = Literal["replace", "delta"]


@dataclass(frozen=True, slots=True)
class Other:
    """A tensor that differs, and is no linear.

    Attributes:
        name: of the base; of the tuned model where the base lacks it.
        kind: of ``KINDS``, or ``missing``: the tuned model lacks it.
        before, after: the stored tensors; None where there is none.
        change: ‖W' − W‖ / ‖W‖; None where that means nothing.
    """

    name: str
    kind: str
    before: Parameter | None
    after: Parameter | None
    change: float | None = None

    @property
    def nbytes(self) -> int:
        """As the tuned model stores it, or the base where that lacks it."""
        parameter = self.after or self.before
        assert parameter is not None
        return DTYPES.get(parameter.dtype, 0) * math.prod(parameter.shape)

    def update(self, base: Base, tuned: Base, form: Form) -> Update:
        """What makes the one of the other: the new values, or the difference in float32.

        Raises:
            LoraFormatError: LF-612 there is no difference, of two sizes or of what is no float.
        """
        assert self.after is not None
        new = tuned.read(self.after.name)
        if form == "replace" or self.before is None:
            allows = ("add",) if self.before is None else ("resize",) if self.before.shape != self.after.shape else ()
            return Update((Replace(new, allows),))
        shapes = f"{self.before.dtype} {list(self.before.shape)} and {self.after.dtype} {list(self.after.shape)}"
        floats = {self.before.dtype, self.after.dtype} <= FLOATS
        if not floats or self.before.shape != self.after.shape or not self.before.shape:
            raise fault("LF-612", f"{shapes} have no difference", where=self.name, fix="--form replace")
        matrix = widened(new) - widened(base.read(self.before.name))
        if self.kind == "embeddings":
            return Update((Delta(matrix.T),), Placement.of(matrix.shape, "in,out"), op="embedding")
        place = Placement(matrix.shape, (0,), tuple(range(1, matrix.ndim)))
        return Update((Delta(matrix if matrix.ndim == 1 else place.to_matrix(matrix)),), place)


def others(base: Base, tuned: Base, side: Counterparts) -> tuple[list[Other], int]:
    """Of tensors side by side those that differ, what only one of the two has, and how many have equal values."""
    found, equal = [], 0
    for name, (before, after) in side.pairs.items():
        if before.shape != after.shape:
            found.append(Other(name, _kind(before), before, after))
            continue
        far = apart(base, before, tuned, after)
        if far.norm == 0.0:
            equal += 1
        else:
            found.append(Other(name, _kind(before), before, after, far.change))
    found += [Other(name, "missing", parameter, None) for name, parameter in side.missing.items()]
    found += [Other(name, "new", None, parameter) for name, parameter in side.new.items()]
    return found, equal


def _kind(parameter: Parameter) -> str:
    if parameter.dtype not in FLOATS:
        return "others"
    leaf = parameter.name.rpartition(".")[2]
    if len(parameter.shape) == 1:
        return "biases" if leaf.endswith("bias") or leaf == "beta" else "norms"
    return "embeddings" if len(parameter.shape) == 2 and is_embedding(parameter.name) else "others"
