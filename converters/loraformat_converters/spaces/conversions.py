"""What transformers does with older tensors while it loads them: links to the tensors that come of it.

transformers 5.23.0 core_model_loading. ``Chunk`` divides a tensor into equal shares, ``Split`` into unequal ones;
``Concatenate`` puts several one under the other, whatever their sizes; ``MergeModulelist(0)`` stacks the weights of experts,
``Concatenate(1)`` behind it puts those of two projections of each expert one under the other, and
``ErnieFuseAndSplitTextVisionExperts`` makes two such stacks, of the first half of the experts and of the second.
``Interleave`` and ``PermuteForRope`` change the order of rows (``orders``), ``Transpose`` exchanges rows and columns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from loraformat.naming.links import Link, Seat, Share
from loraformat.naming.spaces import Known
from loraformat_converters.spaces.orders import Order

__all__ = ["Conversion", "converted"]

_MOST = 2**16  # experts


@dataclass(frozen=True, slots=True)
class Conversion:
    """One of transformers' conversions.

    Attributes:
        kind: ``split`` one tensor into equal shares, ``divide`` one into any, ``join`` several, ``stack`` a list of experts,
            ``transpose`` one.
        olds: what is looked for in an older name; of a stack, one group is the expert's number.
        news: what stands there in the names that come of it.
        order: of the rows of a ``split``, where they change places.
    """

    kind: Literal["split", "divide", "join", "stack", "transpose"]
    olds: Sequence[re.Pattern[str]]
    news: Sequence[str]
    order: Order = field(default_factory=Order)

    @classmethod
    def of(cls, kind: Any, olds: Sequence[str], news: Sequence[str], order: Sequence[Any] = ()) -> Conversion:
        """From an entry of ``transformers.json``."""
        return cls(kind, [re.compile(old) for old in olds], news, Order(*order))


@dataclass(frozen=True, slots=True)
class _Piece:
    """An older tensor that a conversion takes: by which of its patterns, of which expert; and what comes of which share."""

    older: str
    place: int
    expert: int
    share: int
    there: str


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
            group = name.replace(match[0], conversion.news[0], 1), id(conversion)
            for share, new in enumerate(conversion.news):
                there = name.replace(match[0], new, 1)
                pieces.setdefault(group, []).append(_Piece(older, place, expert, share, there))
    for (_, which), group_of in pieces.items():
        yield from _links(of[which], group_of, known, told)


def _first(name: str, table: Sequence[Conversion]) -> tuple[Conversion, int, re.Match[str]] | None:
    """The conversion that takes a name, and by which of its patterns, the longest first."""
    for conversion in table:
        for place, old in sorted(enumerate(conversion.olds), key=lambda item: -len(item[1].pattern)):
            if match := old.search(name):
                return conversion, place, match
    return None


def _links(conversion: Conversion, pieces: list[_Piece], known: Known, told: str) -> Iterator[Link]:
    """Of all pieces that the conversion makes tensors of together."""
    match conversion.kind:
        case "split":
            for piece in pieces:
                share = conversion.order.share(piece.share, len(conversion.news), known.config)
                if share is not None:
                    yield Link(Seat(piece.older, rows=share), Seat(piece.there), told)
        case "transpose":
            yield from (Link(Seat(piece.older), Seat(piece.there), told, transposed=True) for piece in pieces)
        case "join":
            olds = {piece.place: piece.older for piece in pieces}
            yield from _joined(pieces[0].there, [olds.get(i) for i in range(len(conversion.olds))], known, told)
        case "divide":
            news: list[str | None] = [piece.there for piece in pieces]
            yield from (link.reversed() for link in _joined(pieces[0].older, news, known, told))
        case "stack":
            yield from _stacked(conversion, pieces, known, told)


def _joined(whole: str, parts: Sequence[str | None], known: Known, told: str) -> Iterator[Link]:
    """Of each part to its rows of the whole, whatever the sizes are: only where each is known, or all but one and the whole."""
    sizes = [_rows(part, known) for part in parts]
    total = _rows(whole, known)
    if sizes.count(None) == 1 and total is not None:
        sizes[sizes.index(None)] = total - sum(size or 0 for size in sizes)
    if None in sizes:
        return
    starts = list(accumulate((size or 0 for size in sizes), initial=0))
    shape = known.names.get(whole)
    axes = {2: "out,in", 3: "batch,out,in"}.get(len(shape or ()))
    for part, start, stop in zip(parts, starts, starts[1:], strict=False):
        if part is not None:
            yield Link(Seat(part), Seat(whole, rows=np.arange(start, stop), axes=axes, shape=shape), told)


def _rows(name: str | None, known: Known) -> int | None:
    """How many out rows a tensor has, by the base or by its update: of a stack, each of its matrices."""
    if name is None:
        return None
    if (shape := known.names.get(name)) is not None:
        return shape[-2] if len(shape) > 1 else shape[0] if shape else None
    matrix = known.adapter[name].matrix_shape() if name in known.adapter else None
    return None if matrix is None else matrix[-2]


def _stacked(conversion: Conversion, pieces: list[_Piece], known: Known, told: str) -> Iterator[Link]:
    """Equal runs of the experts, as many as there are stacks, the last one perhaps shorter."""
    n = len(conversion.olds)
    first, count = _experts(conversion, pieces, known)
    for piece in pieces:
        begin = first * piece.share
        size = min(first, count - begin)
        if begin <= piece.expert < begin + size:
            share = Share(piece.place, piece.place + 1, n) if n > 1 else None
            seat = Seat(piece.there, rows=share, index=(piece.expert - begin, size), axes="batch,out,in")
            yield Link(Seat(piece.older, axes="out,in"), seat, told)


def _experts(conversion: Conversion, pieces: list[_Piece], known: Known) -> tuple[int, int]:
    """How many experts the first stack has, and all of them have: by their own shapes, or by the experts that the base has
    one by one; 0 where nothing says it.
    """
    stacks = dict.fromkeys(piece.there for piece in pieces)
    sizes = [shape[0] for there in stacks if (shape := known.names.get(there)) is not None and len(shape) == 3]
    if len(sizes) == len(conversion.news):
        return sizes[0], sum(sizes)
    numbers = {piece.expert for piece in pieces if piece.older in known.names}
    count = len(numbers) if numbers == set(range(min(len(numbers), _MOST))) else 0
    return -(-count // len(conversion.news)), count
