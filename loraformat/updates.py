"""Updates: what happens to one base parameter. The only module that multiplies B and A.

All arithmetic is float32, rounded once by whoever stores the result: a float16 product of rank 64 is already
off by 2e-4 relative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement, Rows
from loraformat.errors import fault
from loraformat.parts import ADDITIVE, Additive, Delta, Loha, Lokr, Lora, Magnitude, Part, Replace
from loraformat.parts import Rows as RowsPart

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["Update", "product"]


@dataclass(frozen=True, eq=False)
class Update:
    """The parts that change one base parameter, at most one of each kind, in order of application.

    Attributes:
        parts: see ``loraformat.parts``.
        placement: how the matrix lies in the base tensor; None where the source does not say (*unplaced*).
        op: ``embedding`` when the base looks rows up instead of multiplying; None when not stated.
        assumed: what the source did not state and the reader took as its convention, such as ``name``.
        base_sha256: SHA-256 of the base tensor's bytes, where the update was bound to a base.
        sketch: 64 float32 values that recognise the base tensor, where the update was bound to a base.
    """

    parts: tuple[Part, ...]
    placement: Placement | None = None
    op: str | None = None
    assumed: tuple[str, ...] = ()
    base_sha256: str | None = None
    sketch: Array | None = None

    def __getitem__(self, kind: str) -> Any:
        """The part of that kind; KeyError if there is none."""
        return next((p for p in self.parts if p.kind == kind), None) or _no_part(kind)

    def __contains__(self, kind: str) -> bool:
        return any(p.kind == kind for p in self.parts)

    @property
    def kind(self) -> str:
        """What a person calls it: ``dora`` for lora + magnitude, else the kinds joined by +."""
        kinds = [p.kind for p in self.parts]
        return "dora" if kinds == ["lora", "magnitude"] else "+".join(kinds)

    @property
    def additive(self) -> tuple[Additive, ...]:
        """The parts that are summed into ΔW."""
        return tuple(p for p in self.parts if p.kind in ADDITIVE)  # type: ignore[misc]

    @property
    def linear(self) -> bool:
        """Whether ΔW does not depend on the base: additive parts only."""
        return len(self.additive) == len(self.parts)

    @property
    def rank(self) -> int | None:
        """The rank of the lora part, or of the only part that has one."""
        return next((p.r for p in self.additive if p.r is not None), None)

    @property
    def scale(self) -> float | None:
        """The scale of the first additive part, float64."""
        return self.additive[0].scale if self.additive else None

    def matrix_shape(self) -> tuple[int, ...] | None:
        """(*batch, out, in) of ΔW as the factors have it, or None without additive parts."""
        shapes = [p.matrix_shape() for p in self.additive]
        return tuple(max(sizes) for sizes in zip(*shapes, strict=True)) if shapes else None

    def matrix(self) -> F32:
        """Σ scale · B @ A over the additive parts, float32 [*batch, out, in]; needs neither base nor placement."""
        if not self.additive:
            raise fault("LF-612", f"a {self.kind} update adds nothing: it has no matrix")
        return self._sum(None)

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius) of an additive update; of a lone lora by its factors: ‖BA‖² = tr(BᵀB · AAᵀ)."""
        if self.kind == "lora" and self["lora"].mid is None and self["lora"].lora_A.ndim == 2:
            a, b = (np.asarray(t, np.float64) for t in (self["lora"].lora_A, self["lora"].lora_B))
            return float(abs(self["lora"].scale) * np.sqrt(max(0.0, np.sum((b.T @ b) * (a @ a.T)))))
        return float(np.linalg.norm(self.matrix()))

    def placed(self, placement: Placement) -> Update:
        """The same update with its placement known."""
        return replace(self, placement=placement)

    def delta(self, base: Array | None = None, rows: tuple[int, int] | None = None) -> F32:
        """W' − W in the base tensor's shape, float32.

        Args:
            base: the base tensor W (or its rows); needed only where the change depends on it.
            rows: (start, stop) of axis 0, to serve a tile; ``base`` is then that tile.

        Raises:
            LoraFormatError: LF-604 unplaced; LF-606 shapes differ; LF-612 the change depends on a base that was
                not given.
        """
        if self.linear:
            tile = self._tile(rows)
            return self._sum(tile) if tile is None else tile.placement.from_matrix(self._sum(tile))
        if base is None:
            raise fault("LF-612", f"the change of a {self.kind} update depends on the base tensor", fix="pass base")
        result = self.apply(base, rows)
        if result.shape != base.shape:
            raise fault(
                "LF-606", f"the update resizes {list(base.shape)} to {list(result.shape)}: no difference exists"
            )
        return np.asarray(result - base.astype(np.float32), np.float32)

    def apply(self, base: Array | None, rows: tuple[int, int] | None = None) -> F32:
        """W' in float32: replace → + Σ scale·B@A → magnitude → rows.

        Args:
            base: W (or its rows), any float dtype; None only where ``replace`` adds the tensor.
            rows: (start, stop) of axis 0; not for a magnitude whose norm runs over axis 0 (see ``tileable``).
        """
        tile = self._tile(rows)
        assert tile is not None
        place = tile.placement
        value = self._start(base, rows, place)
        if self.additive:
            value += place.from_matrix(self._sum(tile))
        for part in self.parts:
            if isinstance(part, Magnitude):
                assert self.placement is not None
                value = _rescale(part, value, self.placement, rows)
            elif isinstance(part, RowsPart):
                _set_rows(part, value, rows)
        return value

    @property
    def tileable(self) -> bool:
        """Whether runs of rows of the base can be served alone: no norm runs over axis 0."""
        if "magnitude" not in self or self.placement is None:
            return True
        return 0 in _kept_axes(self["magnitude"], self.placement)

    def _start(self, base: Array | None, rows: tuple[int, int] | None, place: Placement) -> F32:
        for part in self.parts:
            if isinstance(part, Replace):
                whole = part.replace if rows is None else part.replace[rows[0] : rows[1]]
                return np.array(whole, np.float32)
        if base is None:
            raise fault("LF-612", f"a {self.kind} update changes a tensor; it cannot add one", fix="pass base")
        if base.shape != place.shape:
            raise fault("LF-606", f"the base tensor is {list(base.shape)}, the update is for {list(place.shape)}")
        return np.array(base, np.float32)

    def _tile(self, rows: tuple[int, int] | None) -> Rows:
        place = self.placement
        if place is None and not self.additive:  # no matrix to lay anywhere: any reading of the axes serves
            part = self.parts[0]
            shape = part.replace.shape if isinstance(part, Replace) else ()
            place = Placement(tuple(shape), (0,), tuple(range(1, len(shape)))) if shape else None
        if place is None:
            raise fault(
                "LF-604",
                "the update is unplaced: its file does not say how the matrix lies in the base tensor",
                fix="bind it to a base (loraformat bind FILE --base B) or say it (--axes PATTERN=out,in)",
            )
        return place.rows(*rows) if rows else place.rows(0, place.shape[0])

    def _sum(self, tile: Rows | None) -> F32:
        terms: Iterator[F32] = (product(p, tile) * np.float32(p.scale) for p in self.additive)
        total = next(terms)
        for term in terms:
            total = total + term
        return total


def product(part: Additive, tile: Rows | None = None) -> F32:
    """The unscaled matrix of an additive part, float32 [*batch, out, in]; of a tile of the base, if given."""
    match part:
        case Lora():
            a, b = _pick(_tucker_A(part), tile, "in", -1), _pick(_f32(part.lora_B), tile, "out", -2)
            return _f32(np.matmul(b, a))
        case Loha():
            first = _around(part.hada_w1_a, part.hada_w1_b, part.t1)
            return _cut(first * _around(part.hada_w2_a, part.hada_w2_b, part.t2), tile)
        case Lokr():
            w1 = _f32(part.lokr_w1) if part.lokr_w1 is not None else _around(part.lokr_w1_a, part.lokr_w1_b, None)
            w2 = _f32(part.lokr_w2) if part.lokr_w2 is not None else _around(part.lokr_w2_a, part.lokr_w2_b, part.t2)
            return _cut(np.kron(w1, w2.reshape(w2.shape[0], -1)), tile)
        case Delta():
            return _cut(_f32(part.delta).reshape(part.matrix_shape()), tile)


def _no_part(kind: str) -> Any:
    raise KeyError(kind)


def _f32(tensor: Array) -> F32:
    return np.asarray(tensor, np.float32)


def _tucker_A(part: Lora) -> F32:  # noqa: N802
    a = _f32(part.lora_A)
    if part.mid is None:
        return a
    # LyCORIS 4.1.3 functional/general.py rebuild_tucker: ΔW[o, i, …] = Σ up[o, m] mid[m, n, …] down[n, i]
    core: F32 = np.einsum("mn...,ni->mi...", _f32(part.mid), a)
    return core.reshape(core.shape[0], -1)


def _around(a: Array | None, b: Array | None, core: Array | None) -> F32:
    """``a @ b`` as a matrix, or the Tucker product around a core: Σ core[i, j, …] b[j, r] a[i, p] → [p, r·…]."""
    assert a is not None
    assert b is not None
    if core is None:
        return _f32(_f32(a) @ _f32(b).reshape(b.shape[0], -1))
    whole: F32 = np.einsum("ij...,jr,ip->pr...", _f32(core), _f32(b), _f32(a))
    return whole.reshape(whole.shape[0], -1)


def _pick(factor: F32, tile: Rows | None, side: str, axis: int) -> F32:
    """The slice of one factor that a tile needs: along its own side, or along a batch axis that it does not share."""
    if tile is None:
        return factor
    if tile.group == side:
        return _along(factor, tile.index, axis)
    if tile.group == "batch" and factor.shape[tile.position] != 1:
        return _along(factor, tile.index, tile.position)
    return factor


def _cut(matrix: F32, tile: Rows | None) -> F32:
    """The tile's part of a whole matrix."""
    if tile is None:
        return matrix
    if tile.group == "batch":
        return _along(matrix, tile.index, tile.position) if matrix.shape[tile.position] != 1 else matrix
    return _along(matrix, tile.index, -2 if tile.group == "out" else -1)


def _along(tensor: F32, index: slice | npt.NDArray[np.intp], axis: int) -> F32:
    selector: list[Any] = [slice(None)] * tensor.ndim
    selector[axis] = index
    return _f32(tensor[tuple(selector)])


def _kept_axes(part: Magnitude, place: Placement) -> tuple[int, ...]:
    return (*place.batch, *place.out) if part.magnitude_axes is None else part.magnitude_axes


def _rescale(part: Magnitude, value: F32, whole: Placement, rows: tuple[int, int] | None) -> F32:
    """magnitude · V / (‖V‖ + eps), V the tensor or a run of its rows."""
    kept = _kept_axes(part, whole)
    if rows and 0 not in kept:
        raise fault("LF-612", "the norm of this magnitude runs over axis 0: a run of rows cannot be served alone")
    over = tuple(a for a in range(value.ndim) if a not in kept)
    norm = np.sqrt(np.sum(np.square(value), axis=over, keepdims=True)) + np.float32(part.eps)
    ascending = sorted(range(len(kept)), key=kept.__getitem__)
    magnitude = _f32(part.magnitude).reshape([whole.shape[a] for a in kept]).transpose(ascending)
    magnitude = magnitude.reshape([n if a in kept else 1 for a, n in enumerate(whole.shape)])
    return np.asarray((magnitude[slice(*rows)] if rows else magnitude) * (value / norm), np.float32)


def _set_rows(part: RowsPart, value: F32, rows: tuple[int, int] | None) -> None:
    indices = np.asarray(part.indices)
    selector: list[Any] = [slice(None)] * value.ndim
    if rows is None or part.axis != 0:
        source: Array = part.values if rows is None else part.values[rows[0] : rows[1]]
        selector[part.axis] = indices
        value[tuple(selector)] = _f32(source)
        return
    first, last = np.searchsorted(indices, rows)
    value[indices[first:last] - rows[0]] = _f32(part.values[first:last])
