"""Which wrong merge was made: found in what a tensor holds beside W, where that explains it but for its rounding.

D = (what was found) − W is fitted by ΔW: D ≈ f·ΔW. The factor says which mistake it was: 0 not applied, 2 applied twice,
1/s a scale that was lost. What does not only add (a magnitude) is compared with what each mistake would have made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement
from loraformat.parts import Lora
from loraformat.rounding import rounded, widened
from loraformat.tiles import applied, read_runs

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base, Parameter, Requantising
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    F64 = npt.NDArray[np.float64]

__all__ = ["NOT_APPLIED", "cause", "cause_in_few_bits"]

NOT_APPLIED = "the adapter was not applied"
_TWICE = "the adapter was applied twice"
_ULPS = 2.5  # of 16 bits: two roundings, and what ΔW lost in a product of 16-bit factors


def cause(
    base: Base, before: Parameter, merged: Base, after: Parameter, updates: Sequence[Update], square: float
) -> str:
    """What was done instead, in words; "" where no usual mistake explains it.

    Args:
        before, after: the tensor, of one shape in both.
        updates: what should have been applied, one after the other.
        square: ‖found − expected‖².
    """
    if all(update.linear for update in updates):
        return _fitted(base, before, merged, after, updates, square)
    if len(updates) > 1:
        return ""
    return _guessed(base, before, merged, after, updates[0], square)


# Updates that add.


@dataclass(slots=True)
class _Fit:
    """Sums over the tiles: ⟨Δᵢ, Δⱼ⟩, ⟨D, Δᵢ⟩, ‖D‖², and the squared rounding of what is stored."""

    products: F64
    with_found: F64
    found: float = 0.0
    rounding: float = 0.0
    ulps: float = 0.0

    def left(self, chosen: Sequence[int]) -> tuple[F64, float]:
        """(the factors of the chosen Δ, ‖D − Σ f·Δ‖²) of the best fit."""
        gram, sums = self.products[np.ix_(chosen, chosen)], self.with_found[list(chosen)]
        factors = np.asarray(np.linalg.lstsq(gram, sums, rcond=1e-12)[0], np.float64)
        return factors, max(0.0, self.found - float(factors @ sums))


def _fitted(
    base: Base, before: Parameter, merged: Base, after: Parameter, updates: Sequence[Update], square: float
) -> str:
    turned = _turned(updates[0]) if len(updates) == 1 else None
    fit = _summed(base, before, merged, after, updates, turned)
    own = tuple(range(len(updates)))
    factors, left = fit.left(own)
    noise = math.sqrt(fit.rounding / (float(np.diag(fit.products)[: len(own)].min()) or 1.0))
    if after.dtype in ("BF16", "F16") and fit.ulps <= _ULPS and np.all(abs(factors - 1) <= max(0.02, 4 * noise)):
        return f"ΔW is there, rounded more than once: values are off by up to {fit.ulps:.2g} units in the last place of W or ΔW"
    if _explains(left, square, fit.rounding):
        return _several(factors, noise) if len(own) > 1 else _one(updates[0], float(factors[0]), noise)
    if turned is not None:
        factors, left = fit.left((1,))
        if _explains(left, square, fit.rounding):
            more = "" if abs(factors[0] - 1) < 0.01 else f", and multiplied by {factors[0]:.3g}"
            return f"ΔW was added transposed{more}"
    return ""


def _summed(
    base: Base, before: Parameter, merged: Base, after: Parameter, updates: Sequence[Update], turned: Update | None
) -> _Fit:
    every = [*updates, *([turned] if turned else [])]
    fit = _Fit(np.zeros((len(every), len(every))), np.zeros(len(every)))
    for rows, tile in read_runs(base, before):
        stored = merged.read(after.name, rows)
        got, ulp = stored.astype(np.float64), _ulp(stored)
        deltas = np.stack([update.delta(rows=rows).astype(np.float64).reshape(-1) for update in every])
        found = (got - tile.astype(np.float64)).reshape(-1)
        fit.products += deltas @ deltas.T
        fit.with_found += deltas @ found
        fit.found += float(found @ found)
        fit.rounding += float(np.sum(ulp**2))
        largest = np.maximum(np.abs(got), np.maximum(np.abs(tile.astype(np.float64)), np.abs(found.reshape(got.shape))))
        off = np.abs(got - applied(updates, tile, rows)) / _ulp(rounded(largest, stored.dtype))
        fit.ulps = max(fit.ulps, float(off.max(initial=0.0)))
    return fit


def _ulp(stored: Array) -> F64:
    """How far the next value of the dtype is from each."""
    with np.errstate(all="ignore"):
        step = np.spacing(np.abs(stored)).astype(np.float64)
    return np.maximum(step, np.finfo(np.float64).tiny)


def _explains(left: float, square: float, rounding: float) -> bool:
    """Whether what a guess leaves is rounding, and little of what was wrong."""
    return left < min(0.04 * square, 1e-4 * square + 2 * rounding)


def _several(factors: F64, noise: float) -> str:
    """Of several adapters."""
    told = [f"adapter {i} was {_times(f)}" for i, f in enumerate(factors, 1) if abs(f - 1) > max(1e-3, 4 * noise)]
    return ", ".join(told)


def _times(factor: float) -> str:
    return (
        "not applied"
        if abs(factor) < 0.01
        else "applied twice"
        if abs(factor - 2) < 0.01
        else f"multiplied by {factor:.3g}"
    )


def _one(update: Update, factor: float, noise: float) -> str:
    close = max(2e-3, 4 * noise)
    named = [words for words, wanted in _factors(update) if abs(factor - wanted) <= close * max(1.0, abs(wanted))]
    if named:
        return ", or ".join(dict.fromkeys(named))
    scale = f": the scale is {factor * update.scale:.3g} instead of {update.scale:.3g}" if update.scale else ""
    return f"ΔW was multiplied by {factor:.3g}{scale}"


def _factors(update: Update) -> Iterator[tuple[str, float]]:
    """The usual mistakes, each with what it makes of ΔW."""
    yield NOT_APPLIED, 0.0
    yield _TWICE, 2.0
    yield "ΔW was subtracted", -1.0
    if len(update.additive) == 1 and update.scale:
        yield from ((words, wrong / update.scale) for words, wrong in _scales(update))


def _scales(update: Update) -> Iterator[tuple[str, float]]:
    """What is taken for the scale."""
    part = update.additive[0]
    yield "the scale was lost (ΔW = B·A)", 1.0
    if part.scale_rule != "factor" and part.r:
        yield "alpha was taken for the scale", part.alpha
        yield "the scale was applied twice", part.scale**2
        if part.scale_rule == "alpha/sqrt(r)":
            yield "rsLoRA was ignored (alpha/r)", part.alpha / part.r
        else:
            yield "rsLoRA was assumed (alpha/√r)", part.alpha / math.sqrt(part.r)


def _turned(update: Update) -> Update | None:
    """The same ΔW transposed, where its shape hides that."""
    place = update.placement
    if (
        place is None
        or len(place.out) != 1
        or len(place.in_) != 1
        or place.shape[place.out[0]] != place.shape[place.in_[0]]
    ):
        return None
    return update.placed(Placement(place.shape, place.in_, place.out, place.batch))


# Updates that do not only add.


def _guessed(base: Base, before: Parameter, merged: Base, after: Parameter, update: Update, square: float) -> str:
    """By making each mistake; what is not tileable is held whole, as it is when it is merged."""
    guesses = dict(_suspects(update))
    sums, rounding = dict.fromkeys(guesses, 0.0), 0.0
    tiles = read_runs(base, before) if update.tileable else [(None, base.read(before.name))]
    for rows, tile in tiles:
        stored = merged.read(after.name, rows)
        got = stored.astype(np.float64)
        rounding += float(np.sum(_ulp(stored) ** 2))
        for words, wrong in guesses.items():
            made = applied(wrong, tile, rows) if wrong else widened(tile)
            sums[words] += float(np.sum((widened(rounded(made, stored.dtype)) - got) ** 2))
    words = min(sums, key=sums.__getitem__)
    return words if _explains(sums[words], square, rounding) else ""


# Weights in few bits.


def cause_in_few_bits(base: Requantising, before: str, merged: Base, after: str, updates: Sequence[Update]) -> str:
    """As ``cause``, of a weight in few bits: what each mistake would have stored is compared number by number."""
    if len(updates) > 1:
        return ""
    turned = _turned(updates[0])
    guesses = dict(_suspects(updates[0])) | ({"ΔW was added transposed": [turned]} if turned else {})
    named = []
    for words, wrong in guesses.items():
        tiles = base.requantised(before, wrong) if wrong else None
        if tiles is not None and all(_same(tile, merged.read(after, rows)) for rows, tile in tiles):
            named.append(words)
    return ", or ".join(named)


def _same(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)


def _suspects(update: Update) -> Iterator[tuple[str, list[Update]]]:
    yield NOT_APPLIED, []
    yield _TWICE, [update, update]
    if "magnitude" in update:
        yield "the magnitude was ignored (plain LoRA)", [_without(update, "magnitude")]
    if "rows" in update and len(update.parts) > 1:
        yield "the trained rows were not set", [_without(update, "rows")]
    part = next((p for p in update.additive if isinstance(p, Lora)), None)
    if part is not None and len(update.additive) == 1 and part.scale:
        for words, scale in _scales(update):
            wrong = replace(part, alpha=scale, scale_rule="factor")
            yield words, [replace(update, parts=tuple(wrong if p is part else p for p in update.parts))]


def _without(update: Update, kind: str) -> Update:
    return replace(update, parts=tuple(part for part in update.parts if part.kind != kind))
