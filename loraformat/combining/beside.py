"""Changes put side by side as they are stored: the sum, exactly. Ranks add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.algebra.factors import lowrank
from loraformat.parts import Additive, Delta, Lora, ordered
from loraformat.products import product
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.combining.terms import Term

    Array = npt.NDArray[Any]
    Weighted = tuple[float, Any]  # weight · scale, part

__all__ = ["beside"]


def beside(terms: Sequence[Term]) -> tuple[Additive, ...]:
    """Σ weight · ΔW as parts, at most one of each kind.

    What only one adapter has keeps its form, dtype and bytes; only its alpha is multiplied. Pairs are concatenated
    under the scale of the first; the ratio of another's to it goes into its B, in the dtype where that is exact (a
    power of two), else in float32. Two Hadamard or Kronecker products become the pairs that they are, or dense.
    """
    weighted: dict[str, list[Weighted]] = {}
    for term in terms:
        for part in term.update.additive:
            weighted.setdefault(part.kind, []).append((term.weight, part))
    for kind in ("loha", "lokr"):
        if len(weighted.get(kind, ())) > 1:
            for weight, part in weighted.pop(kind):
                other = _as_pair(part)
                weighted.setdefault(other.kind, []).append((weight, other))
    return ordered(_one(kind, items) for kind, items in weighted.items())


def _one(kind: str, items: list[Weighted]) -> Additive:
    if len(items) == 1:
        ((weight, part),) = items
        return part if weight == 1.0 else replace(part, alpha=part.alpha * weight)  # type: ignore[no-any-return]
    return _sum(items) if kind == "delta" else _pairs(items)


def _pairs(items: list[Weighted]) -> Lora:
    scales = [weight * part.scale for weight, part in items]
    scale = next((s for s in scales if s), 1.0)
    plain = [part if part.mid is None else _without_core(part) for _, part in items]
    b = [_times(part.lora_B, s / scale) for part, s in zip(plain, scales, strict=True)]
    return Lora(_concatenated([part.lora_A for part in plain], -2), _concatenated(b, -1), scale, "factor")


def _without_core(part: Lora) -> Lora:
    return lowrank(Update((replace(part, alpha=1.0, scale_rule="factor"),))).pair()


def _times(tensor: Array, ratio: float) -> Array:
    """In the tensor's dtype where no digit is lost, else in float32."""
    if ratio == 1.0:
        return tensor
    exact = np.asarray(tensor, np.float64) * ratio
    with np.errstate(over="ignore"):
        same = exact.astype(tensor.dtype)
    return same if np.array_equal(np.asarray(same, np.float64), exact) else exact.astype(np.float32)


def _concatenated(factors: Sequence[Array], axis: int) -> Array:
    """One dtype for all, float32 where they differ; a factor that shares what another does not is repeated."""
    batch = np.broadcast_shapes(*(f.shape[:-2] for f in factors))
    dtype = factors[0].dtype if len({f.dtype for f in factors}) == 1 else np.dtype(np.float32)
    return np.concatenate([np.broadcast_to(f.astype(dtype), (*batch, *f.shape[-2:])) for f in factors], axis=axis)


def _sum(items: list[Weighted]) -> Delta:
    total = sum(weight * part.scale * np.asarray(part.delta, np.float64) for weight, part in items)
    return Delta(np.asarray(total, np.float32))


def _as_pair(part: Any) -> Lora | Delta:
    """A Hadamard or Kronecker product as the pair that it is, where that is smaller than its matrix."""
    m = lowrank(Update((part,)))
    if m.rank < min(m.shape[-2:]):
        return m.pair()
    return Delta(product(part), part.scale)
