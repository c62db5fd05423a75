"""Whether a merged base is what base and adapter make: W + ΔW within one rounding, the rest bit for bit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from loraformat.base import Tying
from loraformat.blas import one_blas_thread
from loraformat.dtypes import dtype_name
from loraformat.errors import Problem, fault
from loraformat.identity import digest
from loraformat.resolve import Hints
from loraformat.rounding import rounded, widened
from loraformat.shapes import FLOATS
from loraformat.strength import weighed
from loraformat.tiles import Lazy, applied, measured, prepared, read_runs
from loraformat.verbs.cause import NOT_APPLIED, cause
from loraformat.verbs.numbers import Compared, bits, compare_numbers, square_of
from loraformat.verbs.touched import Touched, gather

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
        touched: target → ‖found − expected‖ / ‖expected‖; of a weight in few bits that of the numbers as they are stored.
        untouched: how many other tensors are equal bit for bit.
        problems: one LF-611 for each difference.
    """

    touched: Mapping[str, float]
    untouched: int
    problems: list[Problem] = field(default_factory=list)


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
    weights: dict[str, Touched] = {}
    for _, one in weighed(adapter):
        gather(base, one, merged, hints, weights)
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


def _told(weights: Mapping[str, Touched], compared: Mapping[str, Compared]) -> Iterator[Problem]:
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


def _compare(base: Base, before: Parameter | None, merged: Base, after: Parameter | None, weight: Touched) -> Compared:
    updates = weight.updates
    if found := compare_numbers(base, weight.before, merged, weight.after, updates):
        return found
    if after is None:
        return Compared(math.inf, f"{weight.after} is quantised: what W + ΔW is rounded to in it is not known")
    wrong, square, whole = 0, 0.0, 0.0
    for rows, wanted in _expected(base, before, after.shape, [prepared(update) for update in updates]):
        if rows is None and wanted.shape != after.shape:
            return Compared(math.inf, f"the tensor is {list(after.shape)}, expected {list(wanted.shape)}")
        got = merged.read(after.name, rows)
        wrong += _count_wrong(wanted, got)
        square += square_of((widened(got) if wanted.dtype == np.float32 else got.astype(np.float64)) - wanted)
        whole += square_of(wanted)
    relative = math.sqrt(square / whole) if whole else math.sqrt(square)
    if not wrong:
        return Compared(relative)
    told = f"{wrong} of {math.prod(after.shape)} values are not W + ΔW rounded once, relative distance {relative:.2g}"
    if before is None or before.shape != after.shape or not after.shape or not {before.dtype, after.dtype} <= FLOATS:
        return Compared(relative, told)
    return Compared(relative, told, cause(base, before, merged, after, updates, square))


def _expected(
    base: Base, before: Parameter | None, shape: tuple[int, ...], updates: Sequence[Update]
) -> Iterator[tuple[tuple[int, int] | None, Array]]:
    """W' before rounding, by runs of rows; whole, with None, of a scalar or of another shape than ``shape``."""
    if before is None or before.shape != shape or not shape:
        yield None, applied(updates, base.read(before.name) if before is not None else None, None)
        return
    updates = measured(updates, Lazy(base, before))
    for rows, tile in read_runs(base, before):
        yield rows, applied(updates, tile, rows)


def _count_wrong(wanted: Array, got: Array) -> int:
    """How many values are no rounding of the wanted ones, but for the noise of float32 sums."""
    places = np.flatnonzero(bits(rounded(wanted, got.dtype)) != bits(got))
    if not places.size or dtype_name(got.dtype) not in FLOATS:
        return places.size
    expected, values = wanted.reshape(-1)[places].astype(np.float64), got.reshape(-1)[places].astype(np.float64)
    noise = _NOISE * float(np.abs(wanted).max())
    # Rounding is monotone: what lies between the rounded bounds is one rounding of a value between the bounds.
    least, most = ((expected + sign * noise).astype(got.dtype).astype(np.float64) for sign in (-1, 1))
    return int((~((values >= least) & (values <= most))).sum())


def _difference(base: Base, before: Parameter, merged: Base, after: Parameter) -> str:
    """How a tensor that should be the same differs, or ""."""
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"{after.dtype} {list(after.shape)} instead of {before.dtype} {list(before.shape)}"
    for rows, tile in read_runs(base, before):
        if not np.array_equal(bits(tile), bits(merged.read(after.name, rows))):
            return "changed"
    return ""
