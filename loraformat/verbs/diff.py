"""Diff: what two adapters do differently, computed in their factors; or which tensors of two models differ.

ΔA and ΔB are never formed where they are pairs: distances, cosines and angles come from problems of the size of the
ranks (``loraformat.algebra``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from loraformat.adapter import Adapter
from loraformat.algebra.factors import lowrank
from loraformat.algebra.lowrank import LowRank, inner, norm, total
from loraformat.algebra.svd import angles
from loraformat.dtypes import dtype_names
from loraformat.errors import LoraFormatError, fault
from loraformat.parts import roles_of
from loraformat.resolve import Hints
from loraformat.values import value_problems
from loraformat.verbs.compare import Weights, compare

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base
    from loraformat.parts import Part
    from loraformat.updates import Update

    F64 = npt.NDArray[np.float64]

__all__ = ["TOLERANCE", "Differences", "Target", "diff"]

TOLERANCE = 1e-6
"""‖ΔA − ΔB‖ up to this share of the larger of the two is rounding."""

_METADATA = ("names", "components", "requires", "base_model", "about", "provenance", "extensions")


@dataclass(frozen=True, slots=True)
class Target:
    """One parameter that both adapters change.

    Attributes:
        norms: ‖ΔA‖, ‖ΔB‖.
        distance: ‖ΔA − ΔB‖; None where the two have no difference, of other shapes or without additive parts.
        cosine: ⟨ΔA, ΔB⟩ / ‖ΔA‖‖ΔB‖; None where one is zero, or there is no distance.
        overlap: (out, in): mean cos² of the principal angles between what the two write, and read; 1: the smaller
            space lies in the other. None of matrices of full rank, where it says nothing.
        parts: kind → how far absolute values (replace, magnitude, rows) are apart, relative; infinite where only one
            has them, or they are of other tensors.
        form: field → (A's, B's), of what differs without changing what is done: kind, rank, scale, dtype, axes.
    """

    norms: tuple[float, float]
    distance: float | None
    cosine: float | None
    overlap: tuple[float, float] | None
    parts: Mapping[str, float] = field(default_factory=dict)
    form: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def relative(self) -> float:
        """The distance as a share of the larger ‖Δ‖, or that of the parts, whichever is more."""
        whole = max(self.norms)
        own = math.inf if self.distance is None else self.distance / whole if whole else 0.0
        return max([own, *self.parts.values()])


@dataclass(frozen=True, slots=True)
class Differences:
    """How two adapters differ.

    Attributes:
        only: (A's, B's) targets that the other has not.
        targets: target that both have → how it differs; those that are equal too.
        metadata: field → (A's, B's).
        distance, cosine: of the whole, over the targets that can be compared.
    """

    only: tuple[tuple[str, ...], tuple[str, ...]]
    targets: Mapping[str, Target]
    metadata: Mapping[str, tuple[Any, Any]]
    distance: float
    cosine: float | None

    def moved(self, tolerance: float = TOLERANCE) -> dict[str, Target]:
        """The targets that both have, and that do something else."""
        return {key: target for key, target in self.targets.items() if target.relative > tolerance}

    @property
    def forms(self) -> dict[str, Target]:
        """The targets that are stored in another form."""
        return {key: target for key, target in self.targets.items() if target.form}

    def __bool__(self) -> bool:
        """Whether anything differs: targets, what they do, their form, metadata."""
        return bool(any(self.only) or self.moved() or self.forms or self.metadata)


@overload
def diff(a: Adapter, b: Adapter, hints: Hints | None = None) -> Differences: ...


@overload
def diff(a: Base, b: Base, hints: Hints | None = None) -> Weights: ...


def diff(a: Adapter | Base, b: Adapter | Base, hints: Hints | None = None) -> Differences | Weights:
    """How two adapters, or two models, differ; falsy where they do not.

    Args:
        hints: names are those of ``b``, by what ``a`` calls them.

    Raises:
        LoraFormatError: LF-705 an adapter and a model; LF-312 an adapter with a value that is not finite.
    """
    if isinstance(a, Adapter) and isinstance(b, Adapter):
        if problems := [p for one in (a, b) for p in value_problems(one) if p.severity == "error"]:
            raise LoraFormatError(problems)
        return _adapters(a, b, hints or Hints())
    if isinstance(a, Adapter) or isinstance(b, Adapter):
        raise fault("LF-705", "an adapter and a model are not compared", fix="loraformat verify, resolve or extract")
    return compare(a, b, hints or Hints())


def _adapters(a: Adapter, b: Adapter, hints: Hints) -> Differences:
    names = {key: hints.mapped(key) or key for key in a}
    shared = {key: name for key, name in names.items() if name in b}
    taken = set(shared.values())
    targets: dict[str, Target] = {}
    sums = np.zeros(3)  # ‖ΔA‖², ‖ΔB‖², ⟨ΔA, ΔB⟩ of all
    distances: list[float] = []
    for key, name in shared.items():
        targets[key], products = _target(a[key], b[name])
        sums += products
        distances.append(targets[key].distance or 0.0)
    length = math.sqrt(sums[0] * sums[1])
    return Differences(
        (tuple(key for key in a if key not in shared), tuple(key for key in b if key not in taken)),
        targets,
        dict(_metadata(a, b)),
        math.sqrt(math.fsum(d * d for d in distances)),
        float(np.clip(sums[2] / length, -1.0, 1.0)) if length else None,
    )


def _target(a: Update, b: Update) -> tuple[Target, F64]:
    """How two updates differ; and ‖ΔA‖², ‖ΔB‖², ⟨ΔA, ΔB⟩."""
    form, parts = dict(_form(a, b)), dict(_parts(a, b))
    if _equal(a.additive, b.additive):
        length = norm(lowrank(a)) if a.additive else 0.0
        one = 1.0 if length else None
        return Target((length, length), 0.0, one, (1.0, 1.0) if length else None, parts, form), np.full(3, length**2)
    if a.matrix_shape() != b.matrix_shape() or (a.placement != b.placement and a.placement and b.placement):
        lengths = tuple(norm(lowrank(update)) if update.additive else 0.0 for update in (a, b))
        return Target((lengths[0], lengths[1]), None, None, None, parts, form), np.zeros(3)
    m, n = lowrank(a), lowrank(b)
    one, other, product = norm(m), norm(n), inner(m, n)
    distance = norm(total([(1.0, m), (-1.0, n)]))
    cosine = float(np.clip(product / (one * other), -1.0, 1.0)) if one and other else None
    overlap = _overlap(m, n) if cosine is not None else None
    return Target((one, other), distance, cosine, overlap, parts, form), np.array([one**2, other**2, product])


def _overlap(m: LowRank, n: LowRank) -> tuple[float, float] | None:
    if max(m.rank, n.rank) >= min(m.shape[-2:]):
        return None
    found = [np.cos(angles(m, n, side)) ** 2 for side in ("out", "in")]
    return float(np.mean(found[0])), float(np.mean(found[1]))


def _parts(a: Update, b: Update) -> Iterator[tuple[str, float]]:
    """How far the absolute values are apart, of those that are not equal."""
    for kind in ("replace", "magnitude", "rows"):
        if (kind in a) != (kind in b):
            yield kind, math.inf
        elif kind in a and not _equal((a[kind],), (b[kind],)):
            yield kind, _apart(a[kind], b[kind])


def _apart(a: Part, b: Part) -> float:
    """‖a − b‖ / the larger of ‖a‖ and ‖b‖ over the roles; infinite where the two are of other tensors or fields."""
    square, sizes = 0.0, [0.0, 0.0]
    one, other = dict(roles_of(a)), dict(roles_of(b))
    for role, tensor in one.items():
        if role not in other or other[role].shape != tensor.shape:
            return math.inf
        if role == "indices" and not np.array_equal(tensor, other[role]):
            return math.inf
        pair = [np.asarray(t, np.float64) for t in (tensor, other[role])]
        square += float(np.sum((pair[0] - pair[1]) ** 2))
        sizes = [size + float(np.sum(t**2)) for size, t in zip(sizes, pair, strict=True)]
    if square == 0.0:
        return 0.0 if _fields(a) == _fields(b) else math.inf
    return math.sqrt(square / max(sizes))


def _fields(part: Part) -> tuple[Any, ...]:
    return tuple(getattr(part, name) for name in ("magnitude_axes", "eps", "axis") if hasattr(part, name))


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether parts do the same by the same tensors, bit for bit."""
    if [part.kind for part in a] != [part.kind for part in b]:
        return False
    for one, other in zip(a, b, strict=True):
        if getattr(one, "scale", None) != getattr(other, "scale", None) or _fields(one) != _fields(other):
            return False
        roles = dict(roles_of(one)), dict(roles_of(other))
        if roles[0].keys() != roles[1].keys() or not all(_same(roles[0][r], roles[1][r]) for r in roles[0]):
            return False
    return True


def _same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(a, b))


def _form(a: Update, b: Update) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """What is stored in another way."""
    for name in ("kind", "rank", "scale", "op"):
        if getattr(a, name) != getattr(b, name):
            yield name, (getattr(a, name), getattr(b, name))
    rules = [[part.scale_rule for part in update.additive] for update in (a, b)]
    if rules[0] != rules[1]:
        yield "scale_rule", ("+".join(rules[0]), "+".join(rules[1]))
    dtypes = dtype_names(a.tensors), dtype_names(b.tensors)
    if dtypes[0] != dtypes[1]:
        yield "dtype", dtypes
    shapes = a.matrix_shape(), b.matrix_shape()
    if shapes[0] != shapes[1]:
        yield "shape", (list(shapes[0] or ()), list(shapes[1] or ()))
    if a.placement != b.placement:
        yield "axes", tuple(update.placement.spec if update.placement else None for update in (a, b))  # type: ignore[misc]
    if a.base_sha256 != b.base_sha256:
        yield "base_sha256", (a.base_sha256, b.base_sha256)


def _metadata(a: Adapter, b: Adapter) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Field by field, mappings entry by entry."""
    for name in _METADATA:
        one, other = getattr(a, name), getattr(b, name)
        if not isinstance(one, Mapping) or not isinstance(other, Mapping):
            if one != other:
                yield name, (one, other)
            continue
        for entry in sorted({*one, *other}):
            if one.get(entry) != other.get(entry):
                yield f"{name}.{entry}", (one.get(entry), other.get(entry))
