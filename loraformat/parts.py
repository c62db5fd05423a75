"""The kinds of change that an update is made of, each with the tensors (roles) and fields that it stores.

An update applies its parts in the order of ``ORDER``: ``replace``, then the sum of the additive kinds, then
``magnitude``, then ``rows``. Field names that are roles (``lora_A``, ``values``, …) hold tensors; the others are
the JSON fields of the part. Shapes are checked here; the arithmetic is in ``loraformat.updates``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from loraformat.axes import Placement
from loraformat.names import ROLES
from loraformat.scale import ScaleRule, scale_of

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = [
    "ADDITIVE", "KINDS", "ORDER", "Additive", "Delta", "Loha", "Lokr", "Lora", "Magnitude", "Part", "Replace",
    "Rows", "ordered", "roles_of",
]  # fmt: skip


class _Scaled:
    """What the additive kinds share: alpha, its rule, and the rank that the rule divides by."""

    alpha: float
    scale_rule: ScaleRule
    r: int | None

    @property
    def scale(self) -> float:
        """The number that multiplies the product, in float64."""
        return scale_of(self.alpha, self.scale_rule, self.r)


@dataclass(frozen=True, eq=False)
class Lora(_Scaled):
    """ΔW = scale · B @ A; with ``mid`` (Tucker), A is first contracted with the core.

    ``lora_A`` [*batch, r, in], ``lora_B`` [*batch, out, r]; each batch size is that of the base or 1 (shared).
    ``mid`` [r, r, *kernel] makes ``lora_A`` [r, channels], and in = channels · kernel.
    """

    kind: ClassVar[Literal["lora"]] = "lora"
    lora_A: Array
    lora_B: Array
    alpha: float
    scale_rule: ScaleRule
    mid: Array | None = None

    @property
    def r(self) -> int:  # type: ignore[override]
        """The rank: the rows of A."""
        return int(self.lora_A.shape[-2])

    def matrix_shape(self) -> tuple[int, ...]:
        """(*batch, out, in)."""
        a, b = self.lora_A.shape, self.lora_B.shape
        kernel = _prod(self.mid.shape[2:]) if self.mid is not None else 1
        batch = tuple(max(m, n) for m, n in zip(a[:-2], b[:-2], strict=True))
        return (*batch, b[-2], a[-1] * kernel)

    def fault(self) -> str | None:
        """Why the factors do not fit each other, or None."""
        a, b = self.lora_A.shape, self.lora_B.shape
        if len(a) < 2 or len(a) != len(b):
            return f"lora_A {list(a)} and lora_B {list(b)} must be [*batch, r, in] and [*batch, out, r]"
        if self.mid is not None and (len(a) != 2 or len(self.mid.shape) < 3 or self.mid.shape[0] != b[-1]):
            return f"mid {list(self.mid.shape)} must be [r, r, *kernel] between lora_B {list(b)} and lora_A {list(a)}"
        joint = self.mid.shape[1] if self.mid is not None else b[-1]
        if a[-2] != joint:
            return f"lora_A is {list(a)} but lora_B is {list(b)}: their rank must agree ({a[-2]} ≠ {joint})"
        if any(m != n and 1 not in (m, n) for m, n in zip(a[:-2], b[:-2], strict=True)):
            return f"batch sizes of lora_A {list(a)} and lora_B {list(b)} differ and neither is 1"
        return None


@dataclass(frozen=True, eq=False)
class Loha(_Scaled):
    """ΔW = scale · (w1_a @ w1_b) ⊙ (w2_a @ w2_b) (FedPara, arXiv:2108.06098).

    ``*_a`` [out, r], ``*_b`` [r, in]; with cores ``t1``, ``t2`` [r, r, *kernel] instead ``*_a`` [r, out] and
    ``*_b`` [r, channels].
    """

    kind: ClassVar[Literal["loha"]] = "loha"
    hada_w1_a: Array
    hada_w1_b: Array
    hada_w2_a: Array
    hada_w2_b: Array
    alpha: float
    scale_rule: ScaleRule
    t1: Array | None = None
    t2: Array | None = None

    @property
    def r(self) -> int:  # type: ignore[override]
        """The rank: the rows of w1_b."""
        return int(self.hada_w1_b.shape[0])

    def matrix_shape(self) -> tuple[int, ...]:
        """(out, in)."""
        if self.t1 is None:
            return (self.hada_w1_a.shape[0], self.hada_w1_b.shape[1])
        return (self.hada_w1_a.shape[1], self.hada_w1_b.shape[1] * _prod(self.t1.shape[2:]))

    def fault(self) -> str | None:
        """Why the factors do not fit each other, or None."""
        pairs = ((self.hada_w1_a, self.hada_w1_b, self.t1), (self.hada_w2_a, self.hada_w2_b, self.t2))
        if (self.t1 is None) != (self.t2 is None):
            return "t1 and t2 must be both present or both absent"
        for n, (a, b, core) in enumerate(pairs, 1):
            if why := _pair_fault(f"hada_w{n}", a, b, core):
                return why
        first, second = (_tucker_shape(a, b, t) for a, b, t in pairs)
        return None if first == second else f"the two factors give {list(first)} and {list(second)}"


@dataclass(frozen=True, eq=False)
class Lokr(_Scaled):
    """ΔW = scale · kron(w1, w2) (KronA, arXiv:2212.10650); w1 and w2 whole, or as products of ``_a`` and ``_b``.

    w1 [o1, i1], w2 [o2, i2]; with ``t2`` [r, r, *kernel], ``lokr_w2_a`` is [r, o2] and ``lokr_w2_b`` [r, channels].
    """

    kind: ClassVar[Literal["lokr"]] = "lokr"
    alpha: float
    scale_rule: ScaleRule
    lokr_w1: Array | None = None
    lokr_w1_a: Array | None = None
    lokr_w1_b: Array | None = None
    lokr_w2: Array | None = None
    lokr_w2_a: Array | None = None
    lokr_w2_b: Array | None = None
    t2: Array | None = None
    r: int | None = None

    def sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of w1 and w2 as matrices."""
        first = self.lokr_w1.shape if self.lokr_w1 is not None else _tucker_shape(self.lokr_w1_a, self.lokr_w1_b, None)
        second = (
            self.lokr_w2.shape if self.lokr_w2 is not None else _tucker_shape(self.lokr_w2_a, self.lokr_w2_b, self.t2)
        )
        return (first[0], first[1]), (second[0], _prod(second[1:]))

    def matrix_shape(self) -> tuple[int, ...]:
        """(out, in)."""
        (o1, i1), (o2, i2) = self.sides()
        return (o1 * o2, i1 * i2)

    def fault(self) -> str | None:
        """Why the factors do not fit each other, or None."""
        for n, core in (("1", None), ("2", self.t2)):
            whole, a, b = (getattr(self, f"lokr_w{n}{end}") for end in ("", "_a", "_b"))
            if (whole is None) == (a is None) or (a is None) != (b is None):
                return f"give either lokr_w{n}, or both lokr_w{n}_a and lokr_w{n}_b"
            if whole is not None and (whole.ndim < 2 or (n == "1" and whole.ndim > 2) or core is not None):
                return f"lokr_w{n} {list(whole.shape)} must be [out, in{', *kernel' if n == '2' else ''}], without t2"
            if a is not None and (why := _pair_fault(f"lokr_w{n}", a, b, core)):
                return why
        return None


@dataclass(frozen=True, eq=False)
class Delta(_Scaled):
    """ΔW = scale · delta, dense [*batch, out, in]; one axis [out] for a vector parameter (a bias, a norm)."""

    kind: ClassVar[Literal["delta"]] = "delta"
    delta: Array
    alpha: float = 1.0
    scale_rule: ScaleRule = "factor"
    r: int | None = None

    def matrix_shape(self) -> tuple[int, ...]:
        """(*batch, out, in); (out, 1) for a vector."""
        shape = self.delta.shape
        return (shape[0], 1) if len(shape) == 1 else tuple(shape)

    def fault(self) -> str | None:
        """A scalar has no out axis."""
        return None if self.delta.ndim else "delta has no axes"


@dataclass(frozen=True, eq=False)
class Replace:
    """The parameter becomes ``replace``, in the base tensor's own shape and order of axes.

    ``allows`` says what else than new values may happen: ``resize`` (the base has another shape: a resized
    vocabulary) and ``add`` (the base lacks the tensor: a classifier head). Without it both are errors.
    """

    kind: ClassVar[Literal["replace"]] = "replace"
    replace: Array
    allows: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Magnitude:
    """W' = magnitude · V / (‖V‖ + eps), V the float32 sum so far (DoRA, arXiv:2402.09353).

    The norm runs over every base axis that ``magnitude_axes`` does not keep; ``magnitude`` has the sizes of the
    kept axes. Default: the batch axes, then the out axes, as [*batch, out].

    ``span``: of a tensor that holds several parameters, which rows [start, stop) of the matrix are rescaled; ``magnitude``
    is then 1 at the others. No file says it.

    ``length``: ‖V‖ + eps where it is known, as it meets the tensor: the kept axes in their order, the others of size 1. No
    file says it either.
    """

    kind: ClassVar[Literal["magnitude"]] = "magnitude"
    magnitude: Array
    magnitude_axes: tuple[int, ...] | None = None
    eps: float = 0.0
    span: tuple[int, int] | None = None
    length: Array | None = None

    def shape_for(self, matrix_shape: tuple[int, ...], placement: Placement | None) -> tuple[int, ...]:
        """The shape that ``magnitude`` must have."""
        if self.magnitude_axes is None or placement is None:
            return matrix_shape[:-1]
        return tuple(placement.shape[a] for a in self.magnitude_axes)


@dataclass(frozen=True, eq=False)
class Rows:
    """Slices ``indices`` of ``axis`` become ``values`` (absolute): trained tokens.

    ``indices`` [n] int64, unique and ascending; ``values`` has the base's shape with ``axis`` cut to n.
    """

    kind: ClassVar[Literal["rows"]] = "rows"
    values: Array
    indices: Array
    axis: int = 0

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why these are no slices of a tensor of ``shape``, or None."""
        wanted = tuple(len(self.indices) if a == self.axis else n for a, n in enumerate(shape))
        if self.values.shape == wanted and int(self.indices[-1]) < shape[self.axis]:
            return None
        return f"values {list(self.values.shape)} at indices up to {int(self.indices[-1])} do not fit {list(shape)}"


Additive = Lora | Loha | Lokr | Delta
Part = Lora | Loha | Lokr | Delta | Replace | Magnitude | Rows

KINDS: dict[str, type[Any]] = {c.kind: c for c in (Replace, Lora, Loha, Lokr, Delta, Magnitude, Rows)}
ADDITIVE = ("lora", "loha", "lokr", "delta")
ORDER = tuple(KINDS)
"""The order of application, and so the order in which the file lists parts."""


P = TypeVar("P", bound=Part)


def ordered(parts: Iterable[P]) -> tuple[P, ...]:
    """The parts in the order of application."""
    return tuple(sorted(parts, key=lambda part: ORDER.index(part.kind)))


def roles_of(part: Part) -> Iterator[tuple[str, Array]]:
    """The tensors that a part stores, as (role, tensor)."""
    for field in fields(part):
        if field.name in ROLES and (tensor := getattr(part, field.name)) is not None:
            yield field.name, tensor


def _prod(sizes: tuple[int, ...]) -> int:
    out = 1
    for n in sizes:
        out *= n
    return out


def _pair_fault(name: str, a: Array, b: Array, core: Array | None) -> str | None:
    """Why ``a @ b``, or a and b around a core, is no matrix; None if it is."""
    if a.ndim != 2 or b.ndim != 2:
        return f"{name}_a {list(a.shape)} and {name}_b {list(b.shape)} must have two axes"
    if core is None and a.shape[1] != b.shape[0]:
        return f"{name}_a {list(a.shape)} and {name}_b {list(b.shape)}: their rank must agree"
    if core is not None and (core.ndim < 3 or core.shape[:2] != (a.shape[0], b.shape[0])):
        return f"the core of {name} is {list(core.shape)}, it must be [{a.shape[0]}, {b.shape[0]}, *kernel]"
    return None


def _tucker_shape(a: Array | None, b: Array | None, core: Array | None) -> tuple[int, int]:
    """(out, in) of ``a @ b``, or of a, b around a core."""
    assert a is not None
    assert b is not None
    if core is None:
        return (a.shape[0], _prod(b.shape[1:]))
    return (a.shape[1], b.shape[1] * _prod(core.shape[2:]))
