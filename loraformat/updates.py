"""Updates: what happens to one base parameter, part after part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement, Rows
from loraformat.errors import fault
from loraformat.magnitudes import kept_axes, norm, rescale
from loraformat.parts import ADDITIVE, Additive, Magnitude, Part, roles_of
from loraformat.parts import Rows as RowsPart
from loraformat.products import product, single

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["Update"]


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
    def tensors(self) -> tuple[Array, ...]:
        """All that its parts store."""
        return tuple(tensor for part in self.parts for _, tensor in roles_of(part))

    @property
    def nbytes(self) -> int:
        """Of all that its parts store."""
        return sum(tensor.nbytes for tensor in self.tensors)

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

    @property
    def replaces(self) -> bool:
        """Whether W' is ``replace`` itself, which is then converted and not computed with."""
        return all(part.kind == "replace" for part in self.parts)

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
            return self._added(rows)
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

        Raises:
            LoraFormatError: LF-602 no base tensor; LF-604 unplaced; LF-606 the base tensor does not fit; LF-612 a
                magnitude of a slice that is zero.
        """
        value = self._start(base, rows)
        if self.additive:
            value += self._added(rows)
        for part in self.parts:
            if isinstance(part, Magnitude):
                value = rescale(part, value, self.placement or _unplaced(), rows)
            elif isinstance(part, RowsPart):
                _set_rows(part, value, rows)
        return value

    def replaced(self, base: Array | None, rows: tuple[int, int] | None = None) -> Array:
        """What takes the place of W, or of a run of its rows, as it is stored; LF-602, LF-606 as ``apply``."""
        part = self["replace"]
        value: Array = part.replace if rows is None else part.replace[slice(*rows)]
        if base is None and "add" not in part.allows:
            raise fault("LF-602", "the update replaces a tensor that the base must have", fix="pass base")
        if base is not None and base.shape != value.shape and "resize" not in part.allows:
            raise fault("LF-606", f"the base tensor is {list(base.shape)}, its replacement {list(value.shape)}")
        return value

    def norms(self, base: Array | None) -> F32:
        """What the magnitude divides by, ‖V‖ + eps with V the sum before it, in the shape of ``magnitude``."""
        return self.laid_as_magnitude(norm(self["magnitude"], self.unscaled.apply(base), self.placement or _unplaced()))

    def laid_as_magnitude(self, length: Array) -> F32:
        """What meets the tensor (``Magnitude.length``) in the shape of ``magnitude``."""
        part, place = self["magnitude"], self.placement or _unplaced()
        kept = kept_axes(part, place)
        laid = length.reshape([place.shape[a] for a in sorted(kept)])
        return laid.transpose([sorted(kept).index(a) for a in kept]).reshape(part.magnitude.shape)

    @property
    def unscaled(self) -> Update:
        """What the magnitude rescales."""
        return replace(self, parts=tuple(p for p in self.parts if p.kind not in ("magnitude", "rows")))

    @property
    def tileable(self) -> bool:
        """Whether runs of rows of the base can be served alone: no norm runs over axis 0, or it is known."""
        if "magnitude" not in self or self.placement is None or self["magnitude"].length is not None:
            return True
        return 0 in kept_axes(self["magnitude"], self.placement)

    def _start(self, base: Array | None, rows: tuple[int, int] | None) -> F32:
        """W, or what replaces it, as float32 of its own."""
        if "replace" in self:
            return np.array(self.replaced(base, rows), np.float32)
        if base is None:
            raise fault("LF-602", f"a {self.kind} update changes a tensor; it cannot add one", fix="pass base")
        if self.placement is not None:
            shape = self.placement.shape if rows is None else (rows[1] - rows[0], *self.placement.shape[1:])
            if base.shape != shape:
                raise fault("LF-606", f"the base tensor is {list(base.shape)}, the update is for {list(shape)}")
        elif "rows" in self and rows is None and (why := self["rows"].misfit(base.shape)):
            raise fault("LF-606", why, fix="is this the base that the adapter was trained on?")
        return np.array(base, np.float32)

    def _added(self, rows: tuple[int, int] | None) -> F32:
        """The sum of the additive parts in the base tensor's shape, or a run of its rows."""
        place = self.placement or _unplaced()
        if rows is None:
            return place.from_matrix(self._sum(None))
        tile = place.rows(*rows)
        return tile.placement.from_matrix(self._sum(tile))

    def _sum(self, tile: Rows | None) -> F32:
        terms = (_scaled(p, tile) for p in self.additive)
        total = next(terms)
        for term in terms:
            total = total + term
        return total


def _scaled(part: Additive, tile: Rows | None) -> F32:
    """scale · P, an array of its own."""
    matrix = product(part, tile)
    if part.kind == "lora":  # nobody else has it yet
        return np.multiply(matrix, np.float32(part.scale), out=matrix) if part.scale != 1.0 else matrix
    return matrix * np.float32(part.scale)


def _no_part(kind: str) -> Any:
    raise KeyError(kind)


def _unplaced() -> Placement:
    raise fault(
        "LF-604",
        "the update is unplaced: its file does not say how the matrix lies in the base tensor",
        fix="bind it to a base (loraformat bind FILE --base B) or say it (--axes PATTERN=out,in)",
    )


def _set_rows(part: RowsPart, value: F32, rows: tuple[int, int] | None) -> None:
    indices = np.asarray(part.indices)
    selector: list[Any] = [slice(None)] * value.ndim
    if rows is None or part.axis != 0:
        source: Array = part.values if rows is None else part.values[rows[0] : rows[1]]
        selector[part.axis] = indices
        value[tuple(selector)] = single(source)
        return
    first, last = np.searchsorted(indices, rows)
    value[indices[first:last] - rows[0]] = single(part.values[first:last])
