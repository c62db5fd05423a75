"""Extract: the adapter that turns one model into another, as near as its rank allows; or the one that is attached.

Each linear that differs becomes the best pair for W' − W (``loraformat.algebra.randomised``), one after the other: no more
than a few differences are held. What no pair can say is taken as it is where that is asked for, and else told with its size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np

from loraformat.adapter import Adapter
from loraformat.algebra.randomised import Pair, best_pair
from loraformat.blas import one_blas_thread
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.extracting.counterparts import Counterparts, common_prefix, counterparts
from loraformat.extracting.linears import Linear, linears
from loraformat.extracting.others import KINDS, Form, Other, others
from loraformat.names import components_of
from loraformat.naming.spaces import space_of
from loraformat.parts import Lora
from loraformat.resolve import Hints, matches
from loraformat.updates import Update
from loraformat.verbs import graph

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base, Graph

    F32 = npt.NDArray[np.float32]

__all__ = ["Extracted", "between", "extract"]

_WORKERS = 2  # more differences than that are not held, but for the one that is read


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was extracted, and what was not.

    Attributes:
        residuals: target → ‖ΔW − B·A‖ / ‖ΔW‖, measured.
        whole: the same of all these targets together.
        left_out: what differs and is not in the adapter.
        equal: how many tensors are the same in both.
    """

    adapter: Adapter
    residuals: Mapping[str, float]
    whole: float
    left_out: Sequence[Other]
    equal: int


@overload
def extract(base: Base, *, name: str | None = None) -> Adapter: ...


@overload
def extract(
    base: Base,
    tuned: Base,
    *,
    rank: int | None = None,
    energy: float | None = None,
    only: Sequence[str] = (),
    take: Collection[str] = (),
    form: Form = "replace",
    hints: Hints | None = None,
) -> Extracted: ...


def extract(base: Base, tuned: Base | None = None, *, name: str | None = None, **how: Any) -> Adapter | Extracted:
    """Of one model, the adapter that is attached to it; of two, the one that makes the second of the first.

    See ``loraformat.verbs.graph.extract`` and ``between``.
    """
    return graph.extract(base, name=name) if tuned is None else between(base, tuned, **how)


@one_blas_thread()
def between(
    base: Base,
    tuned: Base,
    *,
    rank: int | None = None,
    energy: float | None = None,
    only: Sequence[str] = (),
    take: Collection[str] = (),
    form: Form = "replace",
    hints: Hints | None = None,
) -> Extracted:
    """The adapter whose pairs are the nearest to W' − W of each linear: ``lora_A`` [r, in], ``lora_B`` [out, r] float32.

    Args:
        rank: of every pair, unless the difference has less.
        energy: in its place, the share of ‖W' − W‖² that each pair holds.
        only: patterns of the tensors that are looked at.
        take: of ``others.KINDS``, what else goes into the adapter.
        form: how that is stored: its new values, or the difference, which can be weighed and combined.
        hints: names are those of the tuned model; axes are of both.

    Raises:
        LoraFormatError: LF-705 what is asked; LF-602 … LF-605 a linear without a counterpart or a known orientation;
            LF-608 a quantised one, or an adapter that is attached; LF-312 a value that is not finite; LF-304 nothing differs.
    """
    _check(rank, energy, take)
    _check_bare(base, tuned)
    stated = hints or Hints()
    side = _side_by_side(base, tuned, only, stated)
    updates, pairs, equal, seen = dict[str, Update](), dict[str, Pair](), 0, set[str]()
    for linear, pair in _pairs(_linears(base, tuned, side, only, stated), base, tuned, rank, energy):
        seen |= {linear.before.name, linear.after.name} | linear.beside(base, tuned)
        if pair.norm == 0.0:
            equal += 1
            continue
        pairs[linear.key] = pair
        updates[linear.key] = Update((Lora(pair.A, pair.B, 1.0, "factor"),), linear.placement)
    rest, same = others(base, tuned, side.of(lambda name: name not in seen))
    for other in rest:
        if other.kind in take:
            updates[other.name] = other.update(base, tuned, form)
    left = [other for other in rest if other.kind not in take]
    if not updates:
        kinds = ", ".join(sorted({other.kind for other in left}))
        said = f"; what differs is {kinds}" if left else ""
        raise fault("LF-304", f"no linear of {tuned.path} differs from that of {base.path}{said}")
    asked = {"rank": rank} if rank is not None else {"energy": energy}
    components = components_of(pairs)
    provenance = {"verb": "extract", **asked}
    adapter = Adapter(dict(sorted(updates.items())), space_of(base), components=components, provenance=provenance)
    return Extracted(adapter, {key: pair.residual for key, pair in pairs.items()}, _whole(pairs), left, equal + same)


def _check(rank: int | None, energy: float | None, take: Collection[str]) -> None:
    if (rank is None) == (energy is None):
        raise fault("LF-705", "say how near: either a rank or an energy", fix="--rank 16, or --energy 0.95")
    if rank is not None and rank < 1:
        raise fault("LF-705", f"a pair of rank {rank}", fix="--rank R with R ≥ 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise fault("LF-705", f"energy {energy} is no share of ‖ΔW‖²", fix="--energy E with 0 < E ≤ 1")
    if unknown := [kind for kind in take if kind not in KINDS]:
        raise fault("LF-705", f"no tensors are called {', '.join(unknown)}", fix=f"one of {', '.join(KINDS)}")


def _check_bare(*models: Base) -> None:
    """LF-608 of a graph whose tensors are not all that acts."""
    for model in models:
        if "extract" in model.verbs and cast("Graph", model).attached:
            what = f"{model.path} has an adapter attached, which is not in its weights"
            raise fault("LF-608", what, fix=f"loraformat extract {model.path} takes it out as it is")


def _side_by_side(base: Base, tuned: Base, only: Sequence[str], hints: Hints) -> Counterparts:
    side = counterparts(base, tuned, hints)
    if not only:
        return side
    found = side.of(lambda name: matches(name, only))
    if not found.pairs and not found.missing:
        raise fault("LF-705", "no tensor of the base is meant by --only", where=", ".join(only))
    return found


def _linears(base: Base, tuned: Base, side: Counterparts, only: Sequence[str], hints: Hints) -> list[Linear]:
    try:
        return linears(base, tuned, only, hints)
    except LoraFormatError as error:
        prefix = common_prefix(side)
        if prefix is None or not any(p.rule == "LF-602" for p in error.problems):
            raise
        what = f"the tuned model has its tensors under other names: {prefix.replace(': ', ' → ')}"
        raise LoraFormatError(
            [Problem("LF-602", what, fix=f"--names map.json with {{{prefix}}}"), *error.problems]
        ) from None


def _pairs(
    linears: Sequence[Linear], base: Base, tuned: Base, rank: int | None, energy: float | None
) -> Iterator[tuple[Linear, Pair]]:
    """Each with its pair, in order; while some are worked on the next is read."""
    pool = ThreadPoolExecutor(_WORKERS)
    waiting: deque[tuple[Linear, Future[Pair]]] = deque()
    try:
        for linear in linears:
            matrix = _difference(linear, base, tuned)
            waiting.append((linear, pool.submit(best_pair, matrix, rank=rank, energy=energy, seed_name=linear.key)))
            del matrix  # the worker has it, and lets it go
            if len(waiting) > _WORKERS:
                first, future = waiting.popleft()
                yield first, future.result()
        yield from ((linear, future.result()) for linear, future in waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _difference(linear: Linear, base: Base, tuned: Base) -> F32:
    matrix = linear.difference(base, tuned)
    with np.errstate(over="ignore", invalid="ignore"):
        finite = bool(np.isfinite(np.sum(matrix)))
    if not finite and not np.isfinite(matrix).all():
        raise fault("LF-312", "W' − W holds NaN or an infinity", where=linear.key, fix="the training diverged")
    return matrix


def _whole(pairs: Mapping[str, Pair]) -> float:
    moved = math.fsum(pair.norm**2 for pair in pairs.values())
    lost = math.fsum((pair.norm * pair.residual) ** 2 for pair in pairs.values())
    return math.sqrt(lost / moved) if moved else 0.0
