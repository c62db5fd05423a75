"""A changed copy of a model: with merged weights, with adapters attached, or with both put together otherwise, for a proof."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat.blas import one_blas_thread
from loraformat.checkpoint.survival import too_little
from loraformat.errors import LoraFormatError
from loraformat.identity import digest
from loraformat.tiles import Norms, moved
from loraformat_converters.onnx.attaching.apart import Apart, wanted
from loraformat_converters.onnx.attaching.modes import Way, beside, way
from loraformat_converters.onnx.changing.identity import base_sha256
from loraformat_converters.onnx.changing.merge import merge, updates_in
from loraformat_converters.onnx.changing.record import Record
from loraformat_converters.onnx.changing.requantised import Kept, kept
from loraformat_converters.onnx.changing.spots import Change, Spot, by_tensor, every_change, gathered, spots
from loraformat_converters.onnx.graph.index import Index
from loraformat_converters.onnx.graph.store import Addition, Patch, Storage
from loraformat_converters.onnx.graph.values import Values
from loraformat_converters.onnx.proving.dense import beside as beside_dense

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.plan import Job, Plan

    Array = npt.NDArray[Any]

__all__ = ["Rewriting", "tag"]

Data = list[Patch | Addition]
"""What is written outside the model."""


@dataclass(frozen=True)
class _Rounded:
    """A quantised weight that was rounded to its codes again."""

    name: str
    form: str
    norms: Norms = field(default_factory=Norms)


@dataclass(frozen=True)
class Rewriting:
    """What is rewritten: an opened model, which stays as it is."""

    path: Path
    model: onnx.ModelProto
    values: Values

    @one_blas_thread()
    def changed(self, plan: Plan) -> tuple[Storage, Mapping[str, Norms]]:
        """The changed copy, ready to be written, and the norms, which are known when it has been."""
        model, index, places = self._copied(plan.state)
        norms = {change.key: Norms() for change in every_change(places)}
        if plan.verb == "merge":
            data = self._merge(index, places, norms)
            return Storage(model, self.path, plan.options.out, data, tag(plan.jobs)), norms
        made = self._attach(model, index, plan, places, norms)
        return Storage(model, self.path, plan.options.out, [], tag(plan.jobs), beside(made, plan.jobs)), norms

    @one_blas_thread()
    def put_together(self, jobs: Sequence[Job], out: Path, merged: Path | None = None) -> Storage:
        """Base and adapter without a branch: merged, and beside weights that hold no change one product more.

        Args:
            merged: a model in which codes were rounded again: what is put beside them is the change that it has.
        """
        changes = gathered(jobs)
        sealed = {sites: wanted for sites, wanted in changes.items() if any(site.sealed for site in sites)}
        whole = by_tensor({sites: wanted for sites, wanted in changes.items() if sites not in sealed})
        found = [spots(self.model, self.values.index, some, self.path.parent) for some in (whole, sealed)]
        model, index, places = self._copied([*found[0], *found[1]])
        floats, dense = places[: len(found[0])], places[len(found[0]) :]
        data = self._merge(index, floats, {change.key: Norms() for change in every_change(floats)})
        beside_dense(index, self.values, dense, _values_of(merged) if merged else None)
        return Storage(model, self.path, out, data, tag(jobs))

    def estimate(self, places: Sequence[Spot]) -> Mapping[str, float]:
        """Target → what of ΔW is lost where codes are rounded again."""
        return {spot.key: one.norms.loss for spot, one in self._rounded(places)}

    def check_survival(self, places: Sequence[Spot], limit: float) -> None:
        """LF-615 where codes leave less than ``limit`` of what changes in them."""
        rounded = [one for _, one in self._rounded(places)]
        if rounded and (problem := too_little(rounded, limit)):
            raise LoraFormatError(problem)

    @one_blas_thread()
    def _rounded(self, places: Sequence[Spot]) -> list[tuple[Spot, _Rounded]]:
        found = []
        for spot in places:
            if (codes := self._kept(spot)) is not None:
                one = _Rounded(spot.sites[0].root_name, _named(codes))
                codes.changed(updates_in(codes, spot), one.norms)
                found.append((spot, one))
        return found

    def _kept(self, spot: Spot) -> Kept | None:
        """The codes of a quantised weight that is merged into."""
        site = self.values.index.sites[spot.sites[0].number]
        return kept(site, self.values) if site.sealed else None

    def _copied(self, places: Iterable[Spot]) -> tuple[onnx.ModelProto, Index, list[Spot]]:
        """A copy of the model to be changed, and the same spots in it."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        index = Index(model)
        return model, index, [replace(s, sites=tuple(index.sites[site.number] for site in s.sites)) for s in places]

    def _merge(self, index: Index, places: Sequence[Spot], norms: dict[str, Norms]) -> Data:
        data = []
        for spot in places:
            for change in spot.changes:
                norms[change.key] = norms[spot.key]
            data.append(merge(index, spot, self.path.parent, norms[spot.key], self._kept(spot)))
        return [change for change in data if change is not None]

    def _attach(
        self, model: onnx.ModelProto, index: Index, plan: Plan, places: Sequence[Spot], norms: Mapping[str, Norms]
    ) -> Way:
        identity = base_sha256(self.model)
        attachment = way(self.model, index, plan.options, self.path.parent, identity, plan.jobs)
        apart = Apart(index)
        attachment.add(apart.taken(places) if wanted(plan.options) else places)
        attachment.finish()
        for spot in places:
            for change in spot.changes:
                norms[change.key].delta += self._size(spot, change) ** 2
        Record.of(plan.jobs, attachment, identity, apart.was).write(model)
        return attachment

    def _size(self, spot: Spot, change: Change) -> float:
        """‖ΔW‖ of one change of the weight as it is stored."""
        if change.update.linear:
            return change.update.norm()
        site = self.values.index.sites[spot.sites[0].number]
        found = self.values.read(site)
        if found is None:
            return float(np.linalg.norm(change.turned(spot.sites[0].placement).delta()))
        return moved(change.turned(found[1]), found[0])


def tag(jobs: Sequence[Job]) -> str:
    """What tells the data files of one change from another's: the adapters' digests."""
    return hashlib.sha256("".join(digest(job.adapter) for job in jobs).encode()).hexdigest()[:8]


def _values_of(path: Path) -> Values:
    """The weights of another model."""
    return Values(Index(onnx.load(str(path), load_external_data=False)), path.parent)


def _named(codes: Kept) -> str:
    kind = onnx.TensorProto.DataType.Name(codes.site.root.data_type)
    return kind if codes.codes.bits == 8 else f"{codes.codes.bits} bits"
