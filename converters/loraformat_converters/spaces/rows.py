"""One line of a table: a parameter of a diffusers model, and what it is called where the model was published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraformat.naming.links import Share

__all__ = ["WEIGHT", "Row", "modules", "swapped", "thirds"]

WEIGHT = ("weight",)
_BOTH = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Row:
    """The same numbers under two names.

    Attributes:
        torch: the parameter's name in diffusers or transformers.
        published: its name in the checkpoint as its authors published it.
        own: which out rows of it; None: all.
        rows: which out rows of the published tensor; None: all.
    """

    torch: str
    published: str
    own: Share | None = None
    rows: Share | None = None


def modules(
    torch: str,
    published: str | None = None,
    leaves: tuple[str, ...] = _BOTH,
    own: Share | None = None,
    rows: Share | None = None,
) -> Iterator[Row]:
    """The parameters of one module."""
    for leaf in leaves:
        yield Row(f"{torch}.{leaf}", f"{published or torch}.{leaf}", own, rows)


def thirds(names: tuple[str, str, str], published: str, leaves: tuple[str, ...] = _BOTH) -> Iterator[Row]:
    """Query, key and value, which are one tensor where the model was published."""
    for i, name in enumerate(names):
        yield from modules(name, published, leaves, rows=Share(i, i + 1, 3))


def swapped(torch: str, published: str) -> Iterator[Row]:
    """Scale and shift, which diffusers has the other way round (diffusers 0.42.1 single_file_utils, swap_scale_shift)."""
    first, second = Share(0, 1, 2), Share(1, 2, 2)
    yield from modules(torch, published, own=first, rows=second)
    yield from modules(torch, published, own=second, rows=first)
