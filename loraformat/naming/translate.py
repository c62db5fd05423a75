"""An adapter under other names, along links: every target wholly, each place once, or every problem at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import components_of, key_fault, nearest
from loraformat.naming.cut import cut, out_size
from loraformat.naming.fuse import fuse
from loraformat.naming.links import Link
from loraformat.naming.stacked import stack, unstack
from loraformat.naming.transposed import transposed
from loraformat.parts import Additive, Replace
from loraformat.shapes import shape_problems
from loraformat.turned import neutral, turned

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Indices = npt.NDArray[np.intp]

__all__ = ["Translated", "translate"]


@dataclass(frozen=True, slots=True)
class Translated:
    """An adapter in another name space.

    Attributes:
        matched: key → its new keys, several where a tensor was taken apart.
        evidence: what says so, each once.
    """

    adapter: Adapter
    matched: Mapping[str, tuple[str, ...]]
    evidence: tuple[str, ...] = ()


def translate(adapter: Adapter, links: Iterable[Link], names: str) -> Translated:
    """The adapter along ``links``, whose ``here`` are its own keys; ``names`` is the space that they lead to.

    Raises:
        LoraFormatError: LF-602 a target, or some rows of it, without a link; LF-603 one with two, or a place for two;
            LF-604, LF-606, LF-612 what a link asks for has no exact form.
    """
    found: dict[str, list[Link]] = {}
    for link in links:
        own = found.setdefault(link.here.name, [])
        if not any(link.same(other) for other in own):
            own.append(link)
    problems: list[Problem] = []
    pieces: dict[str, list[tuple[Link, Update]]] = {}
    for key, update in adapter.items():
        try:
            for link, piece in _taken(key, update, found, names):
                pieces.setdefault(link.there.name, []).append((link, piece))
        except LoraFormatError as error:
            problems += [replace(p, where=p.where or key) for p in error.problems]
    targets: dict[str, Update] = {}
    for name, held in pieces.items():
        try:
            targets[name] = _made(name, held)
        except LoraFormatError as error:
            problems += [replace(p, where=p.where or name) for p in error.problems]
    if problems:
        raise LoraFormatError(problems)
    targets = {name: targets[name] for name in sorted(targets)}
    matched = {key: tuple(dict.fromkeys(link.there.name for link in found[key])) for key in adapter}
    told = tuple(dict.fromkeys(link.evidence for key in adapter for link in found[key]))
    components = components_of(targets)
    return Translated(replace(adapter, targets=targets, names=names, components=components), matched, told)


def _taken(key: str, update: Update, found: Mapping[str, list[Link]], names: str) -> list[tuple[Link, Update]]:
    """What each link takes of one update, in the axes of the other side."""
    links = found.get(key, [])
    if not links:
        close = nearest(key, found)
        fix = f"nearest: {', '.join(close)}" if close else "state it: --names MAP"
        raise fault("LF-602", f"nothing says what this parameter is called in {names}", where=key, fix=fix)
    taken: list[tuple[Link, Update]] = []
    covered: dict[int | None, list[tuple[Indices, int, Link]]] = {}
    for link in links:
        seat, piece = link.here, _times(update, link.scale)
        if link.transposed:
            piece = transposed(piece)
        if seat.index is not None:
            piece = unstack(piece, *seat.index, seat.axes)
        if seat.rows is not None:
            piece = _flattened(piece)
        spec = seat.matrix_axes
        size = out_size(piece, spec) if seat.rows is not None or len(links) > 1 else 0
        rows = seat.indices(size)
        covered.setdefault(None if seat.index is None else seat.index[0], []).append((rows, size, link))
        taken.append((link, _laid(cut(piece, rows, spec) if seat.rows is not None else piece, link)))
    for parts in covered.values():
        _check_cover(key, parts)
    counts = {link.here.index[1] for link in links if link.here.index is not None}
    if counts and set(covered) != set(range(max(counts))):
        raise fault("LF-602", f"{len(covered)} of the {max(counts)} matrices of the stack have a name there", where=key)
    return taken


def _times(update: Update, scale: float) -> Update:
    """The change multiplied: exactly, by the scales of its parts; LF-612 where a part is no change."""
    if scale == 1.0:
        return update
    if other := [part.kind for part in update.parts if not isinstance(part, Additive)]:
        what = f"the weight is kept as {scale:g} times this one there, and {other[0]} parts are no multiple"
        raise fault("LF-612", what, fix=f"--drop {other[0]}")
    parts = tuple(replace(part, alpha=part.alpha * scale) for part in update.additive)
    return replace(update, parts=parts, base_sha256=None, sketch=None)


def _flattened(update: Update) -> Update:
    """Without the placement where out is several axes: some rows of the matrix are none of the tensor's slices."""
    if update.placement is None or len(update.placement.out) == 1 or not neutral(update):
        return update
    return replace(update, placement=None, base_sha256=None, sketch=None)


def _check_cover(key: str, parts: Sequence[tuple[Indices, int, Link]]) -> None:
    """Every row goes to one place."""
    if len(parts) == 1 and parts[0][2].here.rows is None:
        return
    size = parts[0][1]
    times = np.bincount(np.concatenate([rows for rows, _, _ in parts]), minlength=size)
    if (times > 1).any():
        told = ", ".join(f"{link.there.name} ({link.evidence})" for _, _, link in parts)
        fix = "give --base CHECKPOINT, whose names decide (a config.json has none), or --names MAP"
        raise fault("LF-603", f"several names are possible: {told}", where=key, fix=fix)
    if not times.all():
        told = ", ".join(link.there.name for _, _, link in parts)
        what = f"{int((times == 0).sum())} of {size} rows have no name there; the others go to {told}"
        raise fault("LF-602", what, where=key)


def _laid(update: Update, link: Link) -> Update:
    """The update of one piece, in the axes that the other side's tensor has (its batch axis apart)."""
    here, there = link.here.matrix_axes, link.there.matrix_axes
    shape = link.there.matrix_shape if link.there.rows is None else None
    if link.there.rows is not None and there is not None and there.count("out") > 1 and neutral(update):
        return replace(update, placement=None, base_sha256=None, sketch=None)
    if update.placement is None:
        if here == there or here is None or there is None or neutral(update):
            if there is not None and shape is not None:
                return update.placed(Placement.of(shape, there))
            return update
        known = next((part.replace.shape for part in update.parts if isinstance(part, Replace)), None)
        if known is None:
            raise fault(
                "LF-604", "trained rows and magnitudes of an unplaced update are not turned", fix="bind it first"
            )
        update = update.placed(Placement.of(known, here))
    if there is None or (here == there and shape is None):
        return update
    assert update.placement is not None
    target = Placement.of(shape, there) if shape is not None else _moved(update.placement, there)
    return update if target == update.placement else turned(update, update.placement, target)


def _moved(place: Placement, spec: str) -> Placement:
    """The placement under another order of as many axes."""
    words = [word.strip().rstrip("0123456789") for word in spec.split(",")]
    counts = [words.count(word) for word in ("out", "in", "batch")]
    if counts != [len(place.out), len(place.in_), len(place.batch)]:
        raise fault(
            "LF-604", f"a tensor [{place.spec}] as one of [{spec}]: how are the axes divided?", fix="give --base"
        )
    empty = Placement.of((1,) * len(words), spec)
    sizes: dict[int, int] = {}
    for mine, theirs in ((place.out, empty.out), (place.in_, empty.in_), (place.batch, empty.batch)):
        sizes |= {there: place.shape[here] for here, there in zip(mine, theirs, strict=True)}
    return Placement.of(tuple(sizes[axis] for axis in range(len(words))), spec)


def _made(name: str, held: Sequence[tuple[Link, Update]]) -> Update:
    """The update of one parameter there, of all that lead to it."""
    if why := key_fault(name):
        raise fault("LF-301", why, where=repr(name))
    stacks: dict[int | None, list[tuple[Link, Update]]] = {}
    for link, update in held:
        stacks.setdefault(None if link.there.index is None else link.there.index[0], []).append((link, update))
    fused = {index: _joined(name, parts) for index, parts in stacks.items()}
    counts = {link.there.index[1] for link, _ in held if link.there.index is not None}
    if not counts:
        update = fused[None]
    elif len(counts) > 1 or None in fused:
        raise fault("LF-603", "it is a stack for some targets and none, or another one, for others", where=name)
    else:
        places: list[tuple[int, Update]] = [(i, u) for i, u in fused.items() if i is not None]
        update = stack(sorted(places, key=lambda p: p[0]), counts.pop(), held[0][0].there.axes)
    seat = held[0][0].there
    if update.placement is None and seat.shape is not None and seat.axes is not None and neutral(update):
        update = update.placed(Placement.of(seat.shape, seat.axes))
    if update.op is None and (op := next((link.op for link, _ in held if link.op), None)):
        update = replace(update, op=op)  # layouts have places of their own for what is looked up
    if problems := shape_problems(name, update):
        raise LoraFormatError(problems)
    return update


def _joined(name: str, parts: Sequence[tuple[Link, Update]]) -> Update:
    """One matrix of the pieces that fill its rows."""
    if len(parts) == 1 and parts[0][0].there.rows is None:
        return parts[0][1]
    spec = parts[0][0].there.matrix_axes
    sizes = [out_size(update, spec) for _, update in parts]
    totals = {link.there.total(size, sum(sizes)) for (link, _), size in zip(parts, sizes, strict=True)}
    if len(totals) > 1 or None in totals:
        raise fault("LF-606", "its pieces do not agree about how many rows it has", where=name)
    total: Any = totals.pop()
    rows = [link.there.indices(total) for link, _ in parts]
    if (np.bincount(np.concatenate(rows), minlength=total) > 1).any():
        told = ", ".join(link.here.name for link, _ in parts)
        raise fault(
            "LF-603", f"it is the place of several targets: {told}", where=name, fix="--names MAP tells them apart"
        )
    if len(parts) == 1 and len(rows[0]) == total:
        return cut(parts[0][1], np.argsort(rows[0]), spec)
    return fuse([(r, update) for r, (_, update) in zip(rows, parts, strict=True)], total, spec)
