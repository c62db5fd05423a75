"""The ways out where a layout cannot carry an adapter: another form of the same change, or less of it, as asked.

Each gives a new adapter and says for every target that it altered what became of ΔW. Nothing here is done unasked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from loraformat.algebra.factors import lowrank
from loraformat.algebra.lowrank import norm, total
from loraformat.algebra.refactored import moved
from loraformat.algebra.svd import svd
from loraformat.errors import fault
from loraformat.parts import KINDS, Additive, Delta, Loha, Lokr, Lora, Part, roles_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Adapted", "adapt", "cast", "drop", "fold_scale", "pad_rank", "to_lora"]


@dataclass(frozen=True, slots=True)
class Adapted:
    """An adapter in another form.

    Attributes:
        residuals: key → ‖ΔW' − ΔW‖ / ‖ΔW‖, of every target whose matrix was computed anew; 0.0 where it is exact.
        dropped: what is gone: ``KEY: KIND``.
    """

    adapter: Adapter
    residuals: Mapping[str, float] = field(default_factory=dict)
    dropped: Sequence[str] = ()


def adapt(
    adapter: Adapter,
    *,
    drop: Sequence[str] = (),
    to_lora: int | None = None,
    dtype: str | None = None,
    fold_scale: bool = False,
    pad_rank: bool = False,
) -> Adapted:
    """All that is asked for, in this order. See the functions of these names.

    Raises:
        LoraFormatError: LF-705 an unknown kind or dtype, a rank below 1, or nothing left; LF-612 a value beyond a dtype.
    """
    done = Adapted(adapter)
    if drop:
        done = _then(done, _drop(done.adapter, drop))
    if to_lora is not None:
        done = _then(done, _to_lora(done.adapter, to_lora))
    if dtype is not None:
        done = _then(done, cast(done.adapter, dtype))
    if fold_scale:
        done = _then(done, _fold_scale(done.adapter))
    return _then(done, _pad_rank(done.adapter)) if pad_rank else done


def drop(adapter: Adapter, kinds: Sequence[str]) -> Adapted:
    """Without the parts of these kinds, and without the targets of which nothing is left."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise fault("LF-705", f"no kind of part is called {', '.join(unknown)}", fix=f"one of {', '.join(KINDS)}")
    kept: dict[str, Update] = {}
    gone = [f"{key}: {part.kind}" for key, update in adapter.items() for part in update.parts if part.kind in kinds]
    for key, update in adapter.items():
        if parts := tuple(part for part in update.parts if part.kind not in kinds):
            kept[key] = replace(update, parts=parts)
    if not kept:
        raise fault("LF-705", f"nothing is left of the adapter without {', '.join(kinds)}")
    return Adapted(replace(adapter, targets=kept), dropped=gone)


def to_lora(adapter: Adapter, rank: int) -> Adapted:
    """Every loha, lokr, delta and Tucker part as the nearest pair of ``rank`` (singular values).

    Plain pairs stay, and the changes of vectors, which have no factors. The residual of a target is that of its whole
    ΔW. LF-705 a rank below 1.
    """
    if rank < 1:
        raise fault("LF-705", f"a pair of rank {rank}", fix="--to-lora R with R ≥ 1")
    return _each(adapter, lambda _, update: _as_lora(update, rank))


def cast(adapter: Adapter, dtype: str) -> Adapted:
    """Every float tensor of every part in ``dtype``; the residual is that of the tensors, added up.

    LF-705 an unknown dtype; LF-612 a value beyond its range.
    """
    if dtype not in DTYPES:
        raise fault("LF-705", f"factors are not stored as {dtype}", fix=f"one of {', '.join(DTYPES)}")
    return _each(adapter, lambda key, update: _cast(key, update, np.dtype(DTYPES[dtype])))


def fold_scale(adapter: Adapter) -> Adapted:
    """Every scale multiplied into one factor (B of a pair), in its dtype: what is left is the factor 1."""
    return _each(adapter, lambda _, update: _folded(update))


def pad_rank(adapter: Adapter) -> Adapted:
    """Every pair with zeros up to the largest rank of all: the same ΔW, exactly."""
    most = max((u["lora"].r for u in adapter.values() if "lora" in u), default=0)
    return _each(adapter, lambda _, update: _padded(update, most))


DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_drop, _to_lora, _fold_scale, _pad_rank = drop, to_lora, fold_scale, pad_rank  # which ``adapt`` has as flags


def _then(one: Adapted, other: Adapted) -> Adapted:
    """Errors of steps add up at most."""
    keys = one.residuals.keys() | other.residuals.keys()
    sums = {key: one.residuals.get(key, 0.0) + other.residuals.get(key, 0.0) for key in sorted(keys)}
    return Adapted(other.adapter, {k: v for k, v in sums.items() if k in other.adapter}, (*one.dropped, *other.dropped))


def _each(adapter: Adapter, change: Any) -> Adapted:
    made: dict[str, Update] = {}
    residuals: dict[str, float] = {}
    for key, update in adapter.items():
        made[key], residual = change(key, update)
        if residual is not None:
            residuals[key] = residual
    return Adapted(replace(adapter, targets=made), residuals)


def _as_lora(update: Update, rank: int) -> tuple[Update, float | None]:
    plain = "lora" in update and update["lora"].mid is None and len(update.additive) == 1
    if not update.additive or plain or any(isinstance(p, Delta) and p.delta.ndim == 1 for p in update.additive):
        return update, None
    exact = lowrank(update)
    pair = svd(exact, rank).cut(rank).pair()
    others = (part for part in update.parts if part not in update.additive)
    made = _with(update, [*others, pair])
    whole = norm(exact)
    lost = norm(total([(1.0, exact), (-1.0, lowrank(replace(made, parts=(pair,))))]))
    return made, lost / whole if whole else 0.0


def _cast(key: str, update: Update, dtype: np.dtype[Any]) -> tuple[Update, float | None]:
    made, total = [], 0.0
    for part in update.parts:
        with np.errstate(over="ignore"):
            new: dict[str, Any] = {role: tensor.astype(dtype) for role, tensor in roles_of(part) if _is_float(tensor)}
        for role, tensor in new.items():
            total += moved(getattr(part, role), tensor, f"{key}.{role}")
        made.append(replace(part, **new))
    return _with(update, made), total


def _is_float(tensor: Array) -> bool:
    return tensor.dtype.kind not in "biu"


def _folded(update: Update) -> tuple[Update, float | None]:
    parts: list[Part] = []
    errors = []
    for part in update.parts:
        if isinstance(part, Additive):
            part, error = _fold(part)
            errors.append(error)
        parts.append(part)
    return _with(update, parts), max((error for error in errors if error is not None), default=None)


def _fold(part: Additive) -> tuple[Additive, float | None]:
    """The part with factor 1, and how far the rounding of the scaled tensor moved it, relative; None if it stays."""
    if part.scale == 1.0:
        return replace(part, alpha=1.0, scale_rule="factor"), None
    match part:
        case Lora():
            role = "lora_B"
        case Loha():
            role = "hada_w1_a"
        case Lokr():
            role = "lokr_w1" if part.lokr_w1 is not None else "lokr_w1_a"
        case Delta():
            role = "delta"
    old = getattr(part, role)
    exact = np.asarray(old, np.float64) * part.scale
    with np.errstate(over="ignore"):
        new = exact.astype(old.dtype)
    error = moved(exact, new, f"{role} × {part.scale:g}")
    changed: dict[str, Any] = {role: new, "alpha": 1.0, "scale_rule": "factor"}
    return replace(part, **changed), error


def _padded(update: Update, most: int) -> tuple[Update, float | None]:
    if "lora" not in update or update["lora"].r == most:
        return update, None
    part: Lora = update["lora"]
    if part.mid is not None:
        raise fault("LF-612", "a pair around a core is not padded", fix="--to-lora R first")
    more = most - part.r
    none = [(0, 0)] * (part.lora_A.ndim - 2)
    a, b = np.pad(part.lora_A, [*none, (0, more), (0, 0)]), np.pad(part.lora_B, [*none, (0, 0), (0, more)])
    wide = Lora(a, b, part.scale, "factor")  # whatever changes r states the factor itself
    return _with(update, [wide if p is part else p for p in update.parts]), 0.0


def _with(update: Update, parts: Sequence[Any]) -> Update:
    order = list(KINDS)
    return replace(update, parts=tuple(sorted(parts, key=lambda part: order.index(part.kind))))
