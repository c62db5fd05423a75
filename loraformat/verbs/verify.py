"""Whether a merged base is what base and adapter make: W + ΔW within one rounding, the rest bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from loraformat.errors import Problem, fault
from loraformat.identity import digest
from loraformat.resolve import Hints

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.base import Base, Graph
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


def verify(base: Base, adapter: Adapter, merged: Base, hints: Hints | None = None) -> Verdict:
    """Compare ``merged`` with ``base`` and ``adapter``, tensor by tensor; raises only where a target is not found."""
    hints = hints or Hints()
    if "extract" in merged.verbs and (attached := cast("Graph", merged)).attached:
        return _attached(base, adapter, attached)
    before = base.resolve(adapter, hints).require()
    placed = {key: places[0].turned(adapter[key]) for key, places in before.targets.items()}
    after = merged.resolve(replace(adapter, targets=placed), hints).require()
    old, new = base.parameters(), merged.parameters()
    problems: list[Problem] = []
    touched: dict[str, float] = {}
    changed: set[str] = set()
    for key, places in before.targets.items():
        source, result = places[0], after.targets[key][0]
        changed |= {result.weight}
        value = base.read(source.weight) if source.weight in old else None
        touched[key], why = _compare(placed[key], value, merged.read(result.weight))
        if why:
            problems.append(Problem("LF-611", why, key))
    problems += [Problem("LF-611", f"the tensor {n} is gone", n) for n in old if n not in new and n not in changed]
    problems += [Problem("LF-611", f"the tensor {n} is new", n) for n in new if n not in old and n not in changed]
    same = [n for n in old if n in new and n not in changed]
    problems += [
        Problem("LF-611", "no target, and yet changed", n) for n in same if not _identical(base.read(n), merged.read(n))
    ]
    return Verdict(touched, len(same), problems)


def _attached(base: Base, adapter: Adapter, merged: Graph) -> Verdict:
    """An attached model is right where it holds the adapter bit for bit, and is the base without it."""
    if "extract" not in base.verbs:
        raise fault("LF-608", f"{base.path} is no graph, and {merged.path} is one with an adapter attached")
    held, wanted, problems = merged.extract(), digest(adapter), []
    if wanted not in {digest(found) for _, found in held}:
        what = f"{', '.join(name for name, _ in held)} is attached, and not an adapter of digest {wanted[:12]}"
        problems.append(Problem("LF-611", what, str(merged.path), "another version of it, or another strength"))
    if len(held) > 1:
        problems.append(Problem("LF-611", f"{len(held)} adapters are attached, not one", str(merged.path)))
    before = merged.without()
    if before.identity != cast("Graph", base).identity:
        problems.append(Problem("LF-611", "without the adapter, the graph is not the base's", str(merged.path)))
    old, new = base.parameters(), before.parameters()
    same = [n for n in old if n in new and _identical(base.read(n), before.read(n))]
    problems += [Problem("LF-611", "no target, and yet changed", n) for n in old if n not in same]
    return Verdict(dict.fromkeys(adapter, 0.0), len(same), problems)


def _compare(update: Update, base: Array | None, found: Array) -> tuple[float, str]:
    """(relative distance, what is wrong or "")."""
    wanted = update.apply(base)
    if wanted.shape != found.shape:
        return np.inf, f"the tensor is {list(found.shape)}, expected {list(wanted.shape)}"
    expected, got = wanted.astype(np.float64), found.astype(np.float64)
    distance = _norm(got - expected)
    relative = distance / (_norm(expected) or 1.0)
    noise = _NOISE * float(np.abs(expected).max(initial=0.0))
    # Rounding is monotone: what lies between the rounded bounds is one rounding of a value between the bounds.
    least, most = ((expected + sign * noise).astype(found.dtype).astype(np.float64) for sign in (-1, 1))
    wrong = int((~((got >= least) & (got <= most))).sum())
    if not wrong:
        return relative, ""
    told = f"{wrong} of {found.size} values are not W + ΔW rounded once; relative distance {relative:.2g}"
    return relative, told + _cause(update, base, got, distance)


def _cause(update: Update, base: Array | None, got: Array, distance: float) -> str:
    """Which of the usual wrong merges was made, if one explains the values clearly better than the right one."""
    guesses = [(words, _norm(guess - got)) for words, guess in _suspects(update, base)]
    if not guesses:
        return ""
    words, least = min(guesses, key=lambda item: item[1])
    return f": {words}" if least < 0.2 * distance else ""


def _suspects(update: Update, base: Array | None) -> Iterator[tuple[str, Array]]:
    """The usual wrong merges."""
    if base is None or not update.linear:
        return
    delta, weight = update.delta().astype(np.float64), base.astype(np.float64)
    yield "the adapter was not applied", weight
    yield "the adapter was applied twice", weight + 2 * delta
    if delta.ndim == 2 and delta.shape[0] == delta.shape[1]:
        yield "ΔW was added transposed", weight + delta.T
    if update.scale and update.kind == "lora":
        part = update["lora"]
        yield "the scale was lost (ΔW = B·A)", weight + delta / part.scale
        yield "alpha was taken for the scale", weight + delta / part.scale * part.alpha
        if part.scale_rule == "alpha/sqrt(r)":
            yield "rsLoRA was ignored (alpha/r)", weight + delta / part.scale * part.alpha / part.r


def _norm(values: Array) -> float:
    return float(np.linalg.norm(values.reshape(-1)))


def _identical(one: Array, other: Array) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool((_bits(one) == _bits(other)).all())


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
