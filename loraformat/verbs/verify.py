"""Whether a merged base is what base and adapter make: W + ΔW within one rounding, the rest bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from loraformat.blas import one_blas_thread
from loraformat.container import dtype_name
from loraformat.errors import Problem, fault
from loraformat.identity import digest
from loraformat.resolve import Hints
from loraformat.rounding import rounded, widened
from loraformat.shapes import FLOATS
from loraformat.strength import weighed
from loraformat.tiles import applied, prepared, read_runs

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.base import Base, Graph, Parameter
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
    """A weight that changes: its name in the base and in the result, and what is applied, in order."""

    before: str
    after: str
    keys: list[str] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)


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
    problems: list[Problem] = []
    touched: dict[str, float] = {}
    for weight in weights.values():
        distance, why = _compare(base, old.get(weight.before), merged, new[weight.after], weight.updates)
        touched |= {key: max(distance, touched.get(key, 0.0)) for key in weight.keys}
        if why:
            problems.append(Problem("LF-611", why, weight.keys[0]))
    changed = {name for weight in weights.values() for name in (weight.before, weight.after)}
    problems += [Problem("LF-611", f"the tensor {n} is gone", n) for n in old if n not in new and n not in changed]
    problems += [Problem("LF-611", f"the tensor {n} is new", n) for n in new if n not in old and n not in changed]
    same = [n for n in old if n in new and n not in changed]
    found = ((n, _difference(base, old[n], merged, new[n])) for n in same)
    problems += [Problem("LF-611", f"no target, and yet {why}", n) for n, why in found if why]
    return Verdict(touched, len(same), problems)


def _gather(base: Base, adapter: Adapter, merged: Base, hints: Hints, weights: dict[str, _Touched]) -> None:
    before = base.resolve(adapter, hints).require()
    placed = {key: places[0].turned(adapter[key]) for key, places in before.targets.items()}
    after = merged.resolve(replace(adapter, targets=placed), hints).require()
    old, new = base.parameters(), merged.parameters()
    for key, places in before.targets.items():
        results = list(dict.fromkeys(m.name_in(new) or m.weight for m in after.targets[key]))
        sources = {m.name_in(old) or m.weight: m for m in reversed(places)}
        for i, (source, match) in enumerate(reversed(sources.items())):
            # Of a tie that the merge ended, the other end goes by its own name.
            weight = weights.setdefault(source, _Touched(source, results[i] if i < len(results) else source))
            weight.keys.append(key)
            weight.updates.append(match.turned(adapter[key]))


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
    base: Base, before: Parameter | None, merged: Base, after: Parameter, updates: Sequence[Update]
) -> tuple[float, str]:
    """(relative distance, what is wrong or "")."""
    wrong, square, whole = 0, 0.0, 0.0
    for rows, wanted in _expected(base, before, after.shape, [prepared(update) for update in updates]):
        if rows is None and wanted.shape != after.shape:
            return math.inf, f"the tensor is {list(after.shape)}, expected {list(wanted.shape)}"
        got = merged.read(after.name, rows)
        wrong += _count_wrong(wanted, got)
        square += _square((widened(got) if wanted.dtype == np.float32 else got.astype(np.float64)) - wanted)
        whole += _square(wanted)
    relative = math.sqrt(square / whole) if whole else math.sqrt(square)
    if not wrong:
        return relative, ""
    told = f"{wrong} of {math.prod(after.shape)} values are not W + ΔW rounded once, relative distance {relative:.2g}"
    if before is None or before.shape != after.shape or len(updates) != 1 or not updates[0].linear:
        return relative, told
    cause = _cause(base, before, merged, after, updates[0], square)
    return relative, f"{cause}: {told}" if cause else told


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


def _cause(base: Base, before: Parameter, merged: Base, after: Parameter, update: Update, square: float) -> str:
    """Which of the usual wrong merges was made, if one explains the values but for their rounding."""
    sums: dict[str, float] = {}
    turned, rounding = _turned(update), 0.0
    for rows, value in read_runs(base, before):
        stored = merged.read(after.name, rows)
        got = stored.astype(np.float64)
        rounding += _square(got) * float(np.spacing(np.ones((), stored.dtype))) ** 2
        for words, guess in _suspects(update, value.astype(np.float64), rows, turned):
            sums[words] = sums.get(words, 0.0) + _square(guess - got)
    words = min(sums, key=sums.__getitem__, default="")
    return words if words and sums[words] < min(0.04 * square, 1e-4 * square + rounding) else ""


def _turned(update: Update) -> Array | None:
    """ΔW transposed, where its shape hides that."""
    shape = update.placement.shape if update.placement is not None else ()
    return update.delta().T if len(shape) == 2 and shape[0] == shape[1] else None


def _suspects(
    update: Update, weight: Array, rows: tuple[int, int] | None, turned: Array | None
) -> Iterator[tuple[str, Array]]:
    """The usual wrong merges, for a run of rows."""
    delta = update.delta(rows=rows).astype(np.float64)
    yield "the adapter was not applied", weight
    yield "the adapter was applied twice", weight + 2 * delta
    if turned is not None and rows is not None:
        yield "ΔW was added transposed", weight + turned[slice(*rows)]
    if update.scale and update.kind == "lora":
        part = update["lora"]
        yield "the scale was lost (ΔW = B·A)", weight + delta / part.scale
        yield "alpha was taken for the scale", weight + delta / part.scale * part.alpha
        if part.scale_rule == "alpha/sqrt(r)":
            yield "rsLoRA was ignored (alpha/r)", weight + delta / part.scale * part.alpha / part.r


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
