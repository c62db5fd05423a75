"""The orders in which transformers puts the rows of older tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loraformat.naming.links import Share

if TYPE_CHECKING:
    import numpy.typing as npt

    Indices = npt.NDArray[np.intp]

__all__ = ["Interleaved", "Order", "Rotary"]


@dataclass(frozen=True, slots=True)
class Interleaved(Share):
    """A share of the even rows followed by the odd ones: gate and input of an MLP, row by row in one tensor."""

    def indices(self, total: int) -> Indices | None:
        """See ``Share``."""
        rows = Share.indices(self, total)
        return None if rows is None or total % 2 else np.arange(total).reshape(-1, 2).T.reshape(-1)[rows]


@dataclass(frozen=True, slots=True)
class Rotary(Share):
    """A share whose heads have the two numbers of each rotation side by side, put half behind half as transformers has them."""

    heads: int = 1

    def indices(self, total: int) -> Indices | None:
        """See ``Share``."""
        rows = Share.indices(self, total)
        if rows is None or len(rows) % (2 * self.heads):
            return None
        return rows.reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class Order:
    """What becomes of the order of rows.

    Attributes:
        kind: empty: it stays.
        config: the part of ``config.json`` that has the number of heads, where the model has that part, else its whole.
        only: the shares that are meant of ``rotary``.
    """

    kind: Literal["", "interleaved", "rotary"] = ""
    config: str | None = None
    only: Sequence[int] = ()

    def share(self, number: int, of: int, config: Mapping[str, Any]) -> Share | None:
        """One of the shares of the older tensor, in the order of the new one; None where the number of heads is not known."""
        if self.kind == "interleaved":
            return Interleaved(number, number + 1, of)
        if self.kind != "rotary" or number not in self.only:
            return Share(number, number + 1, of)
        inner = config.get(self.config or "")
        heads = (inner if isinstance(inner, dict) else config).get("num_attention_heads")
        return Rotary(number, number + 1, of, heads) if isinstance(heads, int) and heads > 0 else None
