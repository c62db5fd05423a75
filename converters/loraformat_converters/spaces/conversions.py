"""What transformers does with the rows of older tensors while it loads them: links to the tensors that come of it.

transformers 5.23.0 core_model_loading: ``Chunk(0)`` divides a tensor into equal shares, ``Concatenate(0)`` puts several
one under the other, whatever their sizes; ``MergeModulelist(0)`` stacks the weights of experts, and ``Concatenate(1)``
behind it puts those of two projections of each expert one under the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from loraformat.naming.links import Link, Seat, Share
from loraformat.naming.spaces import Known

__all__ = ["Conversion", "converted"]

_MOST = 2**16  # experts


@dataclass(frozen=True, slots=True)
class Conversion:
    """One of transformers' conversions.

    Attributes:
        kind: ``split`` one tensor into equal shares, ``join`` several, ``stack`` a list of experts.
        olds: what is looked for in an older name; of a stack, one group is the expert's number.
        news: what stands there in the names that come of it.
    """

    kind: Literal["split", "join", "stack"]
    olds: Sequence[re.Pattern[str]]
    news: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Piece:
    """An older tensor that a conversion takes, by which of its patterns, of which expert, and which share of it."""

    older: str
    place: int
    expert: int
    share: int


def converted(
    renamed: Mapping[str, Collection[str]], tables: Sequence[Sequence[Conversion]], known: Known, told: str
) -> Iterator[Link]:
    """The links of older names to what the conversions make of them.

    Args:
        renamed: older name → what the renamings may make of it.
        tables: of each model that may be meant.
    """
    pieces: dict[tuple[str, int], list[_Piece]] = {}
    of: dict[int, Conversion] = {}
    for older, names in renamed.items():
        for name, table in ((name, table) for name in names for table in tables):
            if (found := _first(name, table)) is None:
                continue
            conversion, place, match = found
            of[id(conversion)] = conversion
            expert = int(match[1]) if conversion.kind == "stack" else 0
            for share, new in enumerate(conversion.news):
                there = name.replace(match[0], new, 1)
                pieces.setdefault((there, id(conversion)), []).append(_Piece(older, place, expert, share))
    for (there, which), found_there in pieces.items():
        yield from _links(there, of[which], found_there, known, told)


def _first(name: str, table: Sequence[Conversion]) -> tuple[Conversion, int, re.Match[str]] | None:
    """The conversion that takes a name, and by which of its patterns, the longest first."""
    for conversion in table:
        for place, old in sorted(enumerate(conversion.olds), key=lambda item: -len(item[1].pattern)):
            if match := old.search(name):
                return conversion, place, match
    return None


def _links(there: str, conversion: Conversion, pieces: list[_Piece], known: Known, told: str) -> Iterator[Link]:
    match conversion.kind:
        case "split":
            for piece in pieces:
                rows = Share(piece.share, piece.share + 1, len(conversion.news))
                yield Link(Seat(piece.older, rows=rows), Seat(there), told)
        case "join":
            yield from _joined(there, conversion, pieces, known, told)
        case "stack":
            count, n = _experts(there, pieces, known), len(conversion.olds)
            for piece in (piece for piece in pieces if piece.expert < count):
                share = Share(piece.place, piece.place + 1, n) if n > 1 else None
                seat = Seat(there, rows=share, index=(piece.expert, count), axes="batch,out,in")
                yield Link(Seat(piece.older, axes="out,in"), seat, told)


def _joined(there: str, conversion: Conversion, pieces: list[_Piece], known: Known, told: str) -> Iterator[Link]:
    """Whatever the sizes are: only where each of them is known."""
    sizes: dict[int, int] = {}
    for piece in pieces:
        if (rows := _rows(piece.older, known)) is not None and sizes.setdefault(piece.place, rows) != rows:
            return
    if set(sizes) != set(range(len(conversion.olds))):
        return
    starts = list(accumulate((sizes[i] for i in range(len(sizes))), initial=0))
    shape = known.names.get(there)
    for piece in pieces:
        rows_there = np.arange(starts[piece.place], starts[piece.place + 1])
        seat = Seat(
            there, rows=rows_there, axes="out,in" if shape is not None and len(shape) == 2 else None, shape=shape
        )
        yield Link(Seat(piece.older), seat, told)


def _rows(name: str, known: Known) -> int | None:
    """How many rows a tensor has, by the base or by its update."""
    if (shape := known.names.get(name)) is not None:
        return shape[0] if shape else None
    matrix = known.adapter[name].matrix_shape() if name in known.adapter else None
    return None if matrix is None else matrix[-2]


def _experts(there: str, pieces: list[_Piece], known: Known) -> int:
    """How many experts a stack has: by its own shape, or by those that the base has one by one; 0 where nothing says it."""
    if (shape := known.names.get(there)) is not None:
        return shape[0] if len(shape) == 3 else 0
    numbers = {piece.expert for piece in pieces if piece.older in known.names}
    return len(numbers) if numbers == set(range(min(len(numbers), _MOST))) else 0
