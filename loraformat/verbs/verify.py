"""Whether a merged base is what base and adapter make: W + ΔW within one rounding, the rest bit for bit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from loraformat.base import Recognising, Requantising, Tying
from loraformat.blas import one_blas_thread
from loraformat.container import dtype_name
from loraformat.errors import Problem, fault
from loraformat.identity import digest
from loraformat.resolve import Hints
from loraformat.rounding import rounded, widened
from loraformat.shapes import FLOATS
from loraformat.strength import weighed
from loraformat.tiles import applied, prepared, read_runs
from loraformat.verbs.cause import NOT_APPLIED, cause

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.base import Base, Graph, Parameter
    from loraformat.resolve import Match
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Verdict", "verify"]

_NOISE = 2e-6
"""float32 sums of another order differ by so much of the largest value."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was compared and what differs.

    Attributes:
        touched: target → ‖found − expected‖ / ‖expected‖.
        untouched: how many other tensors are equal bit for bit.
        problems: one LF-611 for each difference.
    """

    touched: Mapping[str, float]
    untouched: int
    problems: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class _Touched:
    """A weight that changes: its name in the base and in the result, and what is applied, in order.

    ``tie``: what says that it is another module's tensor too, where that is why it changes.
    """

    before: str
    after: str
    keys: list[str] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    tie: str = ""


@dataclass(frozen=True, slots=True)
class _Compared:
    """The relative distance of one weight, what is wrong, and which mistake it was, as far as they are known."""

    distance: float
    wrong: str = ""
    mistake: str = ""


@one_blas_thread()
def verify(
    base: Base, adapter: Adapter | Sequence[tuple[Adapter, float]], merged: Base, hints: Hints | None = None
) -> Verdict:
    """Compare ``merged`` with ``base`` and the adapters, tile by tile; raises only where a target is not found.

    Args:
        adapter: one, or several with their weights, as they were merged.
    """
    hints = hints or Hints()
    if "extract" in merged.verbs and (attached := cast("Graph", merged)).attached:
        return _attached(base, [one for _, one in weighed(adapter)], attached)
    weights: dict[str, _Touched] = {}
    for _, one in weighed(adapter):
        _gather(base, one, merged, hints, weights)
    old, new = base.parameters(), merged.parameters()
    compared = {
        name: _compare(base, old.get(weight.before), merged, new.get(weight.after), weight)
        for name, weight in weights.items()
    }
    touched: dict[str, float] = {}
    for name, weight in weights.items():
        touched |= {key: max(compared[name].distance, touched.get(key, 0.0)) for key in weight.keys}
    problems = list(_told(weights, compared))
    changed = {name for weight in weights.values() for name in (weight.before, weight.after)}
    problems += [Problem("LF-611", f"the tensor {n} is gone", n) for n in old if n not in new and n not in changed]
    problems += [Problem("LF-611", f"the tensor {n} is new", n) for n in new if n not in old and n not in changed]
    same = [n for n in old if n in new and n not in changed]
    found = ((n, _difference(base, old[n], merged, new[n])) for n in same)
    problems += [Problem("LF-611", _untouched(n, why, base, changed), n) for n, why in found if why]
    problems += _torn(merged, new, changed)
    return Verdict(touched, len(same), problems)


def _told(weights: Mapping[str, _Touched], compared: Mapping[str, _Compared]) -> Iterator[Problem]:
    """What is wrong with each weight; one that was left out among others that were not is called skipped."""
    applied_elsewhere = any(one.mistake != NOT_APPLIED for one in compared.values())
    for name, weight in weights.items():
        one = compared[name]
        if not one.wrong:
            continue
        mistake = one.mistake
        if mistake == NOT_APPLIED and weight.tie:
            mistake = f"the tie was broken ({weight.tie}): {mistake} to {weight.after}"
        elif mistake == NOT_APPLIED and applied_elsewhere:
            mistake = f"the target was skipped: {mistake}"
        yield Problem("LF-611", f"{mistake}: {one.wrong}" if mistake else one.wrong, weight.keys[0])


def _untouched(name: str, why: str, base: Base, changed: Collection[str]) -> str:
    """Of a tensor that no target means."""
    ties = base.ties() if isinstance(base, Tying) else {}
    partners = [other for pair in ties.items() if name in pair for other in pair if other != name and other in changed]
    if partners:
        return f"no target, and yet {why}, as {partners[0]}, to which it is tied in the base: the tie was to be ended"
    return f"no target, and yet {why}"


def _torn(merged: Base, new: Mapping[str, Parameter], changed: Collection[str]) -> Iterator[Problem]:
    """LF-611 where two tensors that differ are stored, and the configuration says that they are one."""
    for head, embedding in (merged.ties() if isinstance(merged, Tying) else {}).items():
        if not {head, embedding} & set(changed) or not {head, embedding} <= new.keys():
            continue
        if _difference(merged, new[embedding], merged, new[head]):
            what = f"config.json ties it to {embedding}, and the two hold different values: loading loses one of them"
            yield Problem("LF-611", what, head, "tie_word_embeddings must be false in config.json")


def _gather(base: Base, adapter: Adapter, merged: Base, hints: Hints, weights: dict[str, _Touched]) -> None:
    before = base.resolve(adapter, hints).require()
    # Rows of a packed weight, gates in another order, and what a checkpoint stores the other way round, are found in the result
    # as they were in the base: by the update as it is.
    placed = {
        key: adapter[key] if _as_it_is(first) else first.turned(adapter[key])
        for key, (first, *_) in before.targets.items()
    }
    after = merged.resolve(replace(adapter, targets=placed), hints).require()
    old, new = base.parameters(), merged.parameters()
    for key, places in before.targets.items():
        results = list(dict.fromkeys(m.called(new.keys()) for m in after.targets[key]))
        sources = {m.called(old.keys()): m for m in reversed(places)}
        for i, (source, match) in enumerate(reversed(sources.items())):
            # Of a tie that the merge ended, the other end goes by its own name.
            weight = weights.setdefault(source, _Touched(source, results[i] if i < len(results) else source))
            weight.keys.append(key)
            weight.updates.append(match.turned(adapter[key]))
            weight.tie = weight.tie or next((e for e in match.evidence[:1] if e.startswith("tied: ")), "").removeprefix(
                "tied: "
            )


def _as_it_is(place: Match) -> bool:
    return bool(place.rows or place.permute or (place.parameter and not place.node))


def _attached(base: Base, adapters: Sequence[Adapter], merged: Graph) -> Verdict:
    """An attached model is right where it holds the adapters bit for bit, and is the base without them."""
    if "extract" not in base.verbs:
        raise fault("LF-608", f"{base.path} is no graph, and {merged.path} is one with an adapter attached")
    wanted, held = [digest(one) for one in adapters], merged.extract()
    found, problems = [digest(one) for _, one in held], list[Problem]()
    if found != wanted:
        what = f"{len(held)} adapters are attached, of digest {', '.join(d[:12] for d in found)}"
        fix = f"expected {', '.join(d[:12] for d in wanted)}: another version, another strength?"
        problems.append(Problem("LF-611", what, str(merged.path), fix))
    before = merged.without()
    if before.identity != cast("Graph", base).identity:
        problems.append(Problem("LF-611", "without the adapter, the graph is not the base's", str(merged.path)))
    old, new = base.parameters(), before.parameters()
    differ = {n: _difference(base, old[n], before, new[n]) if n in new else "gone" for n in old}
    problems += [Problem("LF-611", f"no target, and yet {why}", n) for n, why in differ.items() if why]
    return Verdict({key: 0.0 for one in adapters for key in one}, sum(not why for why in differ.values()), problems)


def _compare(
    base: Base, before: Parameter | None, merged: Base, after: Parameter | None, weight: _Touched
) -> _Compared:
    updates = weight.updates
    if tiles := _requantised(base, weight):
        return _stored_alike(tiles, merged, weight.after)
    if after is None:
        return _Compared(math.inf, f"{weight.after} is quantised: what W + ΔW is rounded to in it is not known")
    wrong, square, whole = 0, 0.0, 0.0
    for rows, wanted in _expected(base, before, after.shape, [prepared(update) for update in updates]):
        if rows is None and wanted.shape != after.shape:
            return _Compared(math.inf, f"the tensor is {list(after.shape)}, expected {list(wanted.shape)}")
        got = merged.read(after.name, rows)
        wrong += _count_wrong(wanted, got)
        square += _square((widened(got) if wanted.dtype == np.float32 else got.astype(np.float64)) - wanted)
        whole += _square(wanted)
    relative = math.sqrt(square / whole) if whole else math.sqrt(square)
    if not wrong:
        return _Compared(relative)
    told = f"{wrong} of {math.prod(after.shape)} values are not W + ΔW rounded once, relative distance {relative:.2g}"
    if before is None or before.shape != after.shape or not after.shape or not {before.dtype, after.dtype} <= FLOATS:
        return _Compared(relative, told)
    return _Compared(relative, told, cause(base, before, merged, after, updates, square))


def _requantised(base: Base, weight: _Touched) -> Iterator[tuple[tuple[int, int], Array]] | None:
    # What replaces a checkpoint's tensor is stored as it comes; a graph rounds it to the codes that its operator takes.
    as_it_comes = all(update.replaces for update in weight.updates) and not isinstance(base, Recognising)
    if not isinstance(base, Requantising) or as_it_comes:
        return None
    return base.requantised(weight.before, weight.updates)


def _stored_alike(tiles: Iterator[tuple[tuple[int, int], Array]], merged: Base, name: str) -> _Compared:
    """Of a weight in few bits, whose stored values are what is compared: the scale beside them is another tensor."""
    wrong, count, square, whole = 0, 0, 0.0, 0.0
    for rows, wanted in tiles:
        got = merged.read(name, rows)
        count += wanted.size
        if got.dtype != wanted.dtype or got.shape != wanted.shape:
            return _Compared(math.inf, f"the tensor is {got.dtype.name} {list(got.shape)}")
        wrong += int(np.count_nonzero(_bits(got) != _bits(wanted)))
        square += _square(widened(got) - widened(wanted))
        whole += _square(widened(wanted))
    relative = math.sqrt(square / whole) if whole else math.sqrt(square)
    told = f"{wrong} of {count} values are not W + ΔW rounded to the steps of their scale"
    return _Compared(relative, told if wrong else "")


def _expected(
    base: Base, before: Parameter | None, shape: tuple[int, ...], updates: Sequence[Update]
) -> Iterator[tuple[tuple[int, int] | None, Array]]:
    """W' before rounding, by runs of rows; whole, with None, where it has to be or has another shape than ``shape``."""
    if before is None or before.shape != shape or not shape or not all(u.tileable for u in updates):
        yield None, applied(updates, base.read(before.name) if before is not None else None, None)
        return
    for rows, tile in read_runs(base, before):
        yield rows, applied(updates, tile, rows)


def _count_wrong(wanted: Array, got: Array) -> int:
    """How many values are no rounding of the wanted ones, but for the noise of float32 sums."""
    places = np.flatnonzero(_bits(rounded(wanted, got.dtype)) != _bits(got))
    if not places.size or dtype_name(got.dtype) not in FLOATS:
        return places.size
    expected, values = wanted.reshape(-1)[places].astype(np.float64), got.reshape(-1)[places].astype(np.float64)
    noise = _NOISE * float(np.abs(wanted).max())
    # Rounding is monotone: what lies between the rounded bounds is one rounding of a value between the bounds.
    least, most = ((expected + sign * noise).astype(got.dtype).astype(np.float64) for sign in (-1, 1))
    return int((~((values >= least) & (values <= most))).sum())


def _square(values: Array) -> float:
    flat = np.ascontiguousarray(values, np.float32 if values.dtype == np.float32 else np.float64).reshape(-1)
    return float(np.dot(flat, flat))


def _difference(base: Base, before: Parameter, merged: Base, after: Parameter) -> str:
    """How a tensor that should be the same differs, or ""."""
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"{after.dtype} {list(after.shape)} instead of {before.dtype} {list(before.shape)}"
    for rows, tile in read_runs(base, before):
        if not np.array_equal(_bits(tile), _bits(merged.read(after.name, rows))):
            return "changed"
    return ""


def _bits(values: Array) -> Array:
    """The values as unsigned integers of their own size."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(f"u{flat.itemsize}" if flat.itemsize <= 8 else np.uint8)
