"""An ONNX model as a base: parameters are its stored tensors, targets are found by what the graph calls them."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat.atomic import check_free
from loraformat.axes import Placement
from loraformat.base import Options, Parameter
from loraformat.blas import one_blas_thread
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.identity import digest
from loraformat.parts import roles_of
from loraformat.plan import Job, Outcome, Plan, Proof, size
from loraformat.resolve import Hints, Match, Resolution
from loraformat.tiles import Norms
from loraformat_converters.onnx.dense import beside as beside_dense
from loraformat_converters.onnx.how import how
from loraformat_converters.onnx.index import Index, Site
from loraformat_converters.onnx.info import describe
from loraformat_converters.onnx.inputs import generated, stated
from loraformat_converters.onnx.ladder import Found, climb
from loraformat_converters.onnx.merge import merge, written_data
from loraformat_converters.onnx.model import FLOATS, array, load
from loraformat_converters.onnx.modes import Way, beside, cases, jobs_of, way
from loraformat_converters.onnx.modes import notes as notes_of_mode
from loraformat_converters.onnx.modes import obstacles as obstacles_of_mode
from loraformat_converters.onnx.names import names_of
from loraformat_converters.onnx.orient import parameter_of
from loraformat_converters.onnx.part import Part
from loraformat_converters.onnx.prove import ROUNDED, compare, tolerance
from loraformat_converters.onnx.record import Record, base_sha256
from loraformat_converters.onnx.refuse import obstacles
from loraformat_converters.onnx.slot_names import file_of
from loraformat_converters.onnx.slots import Slots
from loraformat_converters.onnx.spots import Change, Spot, by_tensor, every_change, gathered, spots
from loraformat_converters.onnx.store import Addition, Patch, Storage
from loraformat_converters.onnx.tied import moves_along, partners
from loraformat_converters.onnx.told import notes, prefixes, step
from loraformat_converters.onnx.values import Values

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["OnnxBase"]

Data = list[Patch | Addition]
"""What is written outside the model."""


class OnnxBase:
    """An opened model; its weights are read only when they are needed."""

    verbs = frozenset({"merge", "attach", "detach", "extract", "inline", "prove"})

    def __init__(self, path: Path, model: onnx.ModelProto | None = None) -> None:
        self.path = path
        self.model = model or load(path)
        self.index = Index(self.model)
        self.values = Values(self.index, path.parent)
        self._last: tuple[str, Array] = ("", np.empty(0))

    @cached_property
    def record(self) -> Record | None:
        """What is attached; LF-613 where the record cannot be read."""
        return Record.read(self.model)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every stored tensor of a float type, by its name in the file."""
        return {
            name: Parameter(name, tuple(tensor.dims), FLOATS[tensor.data_type])
            for name, tensor in self.index.roots.items()
            if tensor.data_type in FLOATS
        }

    def describe(self) -> Mapping[str, Any]:
        """See ``loraformat_converters.onnx.info``."""
        return describe(self.model, self.index, self.path)

    def how(self, language: str) -> str:
        """See ``loraformat_converters.onnx.how``."""
        return how(self.describe(), self.path, language)

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """Module path + ``.weight`` → (out, in) of every site that can be changed, in torch's orientation."""
        sites = (s for s in self.index.sites if s.refusal is None and not s.vector and len(s.placement.shape) == 2)
        named = ((self._key(site), site.placement) for site in sites if not site.looks_up)
        return {key: Placement(p.matrix_shape, (0,), (1,)) for key, p in named if key}

    def _key(self, site: Site) -> str | None:
        module = names_of(site, "name_scopes") or names_of(site, "node_name")
        return f"{module}.weight" if module else names_of(site, "initializer")

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The values of a stored tensor, or a run of its rows."""
        if name != self._last[0]:  # protobuf copies a tensor's bytes at each access: once is enough for all its runs
            self._last = (name, array(self.index.roots[name], self.path.parent))
        return self._last[1] if rows is None else self._last[1][slice(*rows)]

    def sketch(self, match: Match) -> Array | None:
        """Of what is computed with at a place, where its weight is quantised or packed."""
        return self.values.sketch(match.handle)

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """By the user's map, the exporter's metadata, tensor names and node names, which must agree."""
        if adapter.components or adapter.names != "torch":
            what = "components" if adapter.components else f"the name space {adapter.names!r}"
            raise fault(
                "LF-602",
                f"the adapter's keys are in {what}; this graph's names are of one torch model",
                fix="retarget it first",
            )
        return self.resolve_part(adapter, hints, None, hints.unused(adapter))

    def resolve_part(
        self, adapter: Adapter, hints: Hints, part: Part | None, problems: Sequence[Problem] = ()
    ) -> Resolution:
        """The same for one of several graphs that are one model, where ``part`` says what the file's name tells."""
        found, unresolved, ambiguous = climb(self.index, adapter, hints, self.values, part)
        unresolved = [*problems, *unresolved]
        targets = {}
        meant = {site.number for place in found.values() for site in place.sites}
        for key, place in found.items():
            try:
                targets[key] = tuple(self._match(key, adapter[key], place, site, hints) for site in place.sites)
                if moves_along(adapter[key]):
                    targets[key] += partners(targets[key][0], self.index, meant, self.path.parent)
            except LoraFormatError as error:
                unresolved += error.problems
        return Resolution(targets, tuple(unresolved), tuple(ambiguous))

    def _match(self, key: str, update: Update, found: Found, site: Site, hints: Hints) -> Match:
        evidence = (*found.evidence, f"operator: {site.node.op_type} reads the weight as [{site.placement.spec}]")
        whole = site.refusal or found.rows
        parameter = None if whole else parameter_of(key, update, site, hints.spec(key))
        where = (self.path.name, site.node.name, site.root_name, site.placement)
        return Match(*where, evidence, found.confidence, parameter, site, rows=found.rows)

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """What ``verb`` changes; every refusal that the graph gives reason for, at once."""
        if attaches := verb == "attach":
            jobs = jobs_of(self, jobs, options)
        changes = gathered(jobs)
        problems = list(obstacles(verb, changes, self.index.opset))
        if self.record is not None:
            fix = f"loraformat detach {self.path} -o ORIGINAL.onnx, or take the original model"
            problems.append(Problem("LF-608", "the model has an adapter attached already", str(self.path), fix))
        if problems:
            raise LoraFormatError(problems)
        changed = by_tensor(changes) if verb == "merge" else changes
        places = spots(self.model, self.index, changed, self.path.parent)
        if attaches and (problems := list(obstacles_of_mode(self.model, self.index, places, jobs, options))):
            raise LoraFormatError(problems)
        data = [d for spot in places if (d := written_data(spot))] if verb == "merge" else []
        storage = Storage(self.model, self.path, options.out, data, _tag(jobs))
        said = (*prefixes(jobs), *notes(verb, places), *(notes_of_mode(places, jobs, options) if attaches else ()))
        if storage.copied:
            said += (f"copies {', '.join(storage.copied)} ({size(storage.data_bytes)}) beside the output",)
        graph = self.path.stat().st_size
        added = sum(t.nbytes for c in every_change(places) for p in c.update.parts for _, t in roles_of(p))
        writes, peak = graph + storage.data_bytes + (added if verb == "attach" else 0), 3 * graph + (32 << 20)
        steps = tuple(step(verb, spot) for spot in places)
        return Plan(verb, tuple(jobs), options, steps, graph, writes, peak, said, places)

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Write a changed copy of the model; the opened one stays as it is."""
        check_free(plan.options.out, force)
        storage, norms = self.changed(plan)
        written = storage.write(force)
        return Outcome(norms, written, plan.options.out.stat().st_size - self.path.stat().st_size)

    @one_blas_thread()
    def changed(self, plan: Plan) -> tuple[Storage, Mapping[str, Norms]]:
        """The changed copy, ready to be written, and the norms, which are known when it has been."""
        model, index, places = self._copied(plan.state)
        norms = {change.key: Norms() for change in every_change(places)}
        if plan.verb == "merge":
            data = self._merge(index, places, norms)
            return Storage(model, self.path, plan.options.out, data, _tag(plan.jobs)), norms
        made = self._attach(model, index, plan, places, norms)
        return Storage(model, self.path, plan.options.out, [], _tag(plan.jobs), beside(made, plan.jobs)), norms

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
            data.append(merge(index, spot, self.path.parent, norms[spot.key]))
        return [change for change in data if change is not None]

    def _attach(
        self, model: onnx.ModelProto, index: Index, plan: Plan, places: Sequence[Spot], norms: Mapping[str, Norms]
    ) -> Way:
        identity = self.identity
        attachment = way(self.model, index, plan.options, self.path.parent, identity, plan.jobs)
        attachment.add(places)
        attachment.finish()
        for spot in places:
            for change in spot.changes:
                norms[change.key].delta += self._size(spot, change) ** 2
        Record.of(plan.jobs, attachment, identity).write(model)
        return attachment

    def _size(self, spot: Spot, change: Change) -> float:
        """‖ΔW‖ of one change of the weight as it is stored."""
        if change.update.linear:
            return change.update.norm()
        weight, place = self.values.read(self.index.sites[spot.sites[0].number]) or (None, spot.sites[0].placement)
        return float(np.linalg.norm(change.turned(place).delta(weight)))

    @property
    def slots(self) -> Slots | None:
        """The inputs for adapters, where ``attach --mode swap`` made some."""
        return self.record.slots if self.record else None

    @property
    def fed(self) -> list[str]:
        """The files that ``attach --mode swap`` wrote beside the model."""
        return [file_of(self.path.name, name) for name in self.attached] if self.slots else []

    @property
    def attached(self) -> list[str]:
        """The names of the adapters that are attached."""
        return [entry["name"] for entry in self.record.attached] if self.record else []

    @property
    def identity(self) -> str:
        """SHA-256 of the graph, whatever its data files are called."""
        return base_sha256(self.model)

    def detach(self, out: Path, *, force: bool = False) -> Outcome:
        """Write the model as it was before ``attach``; LF-613 where nothing is attached or the model was changed."""
        check_free(out, force)
        written = self.detached(out).write(force)
        return Outcome(written=written, grown=out.stat().st_size - self.path.stat().st_size)

    def detached(self, out: Path) -> Storage:
        """The model as it was before ``attach``, ready to be written."""
        return Storage(self._detached(), self.path, out, [], self.identity[:8])

    def extract(self) -> list[tuple[str, Adapter]]:
        """(name, adapter) of everything that is attached, bit for bit."""
        return self._recorded().adapters(self.model)

    def without(self) -> OnnxBase:
        """The model as it was before ``attach``, in memory."""
        return OnnxBase(self.path, self._detached())

    def inlined(self) -> OnnxBase:
        """The model with its local functions written into the graph, where their weights can be changed."""
        if not self.model.functions:
            return self
        from onnx import inliner

        return OnnxBase(self.path, inliner.inline_local_functions(self.model))

    def prove(self, plan: Plan, inputs: Path | None = None) -> Proof:
        """Run what ``apply`` wrote against the other verb's result, which is made beside it and deleted."""
        feeds = stated(inputs) if inputs else generated(self.model, self.index)
        out = plan.options.out
        other = out.with_name(f".{out.name}.proof.onnx")
        limit = tolerance({spot.sites[0].dtype for spot in plan.state})
        if any(spot.rounds for spot in plan.state):
            limit = max(limit, ROUNDED)
        try:
            proofs = []
            for case, jobs in cases(plan):
                if jobs and plan.verb == "merge":
                    self.apply(self.plan("attach", jobs, Options(other)), force=True)
                elif jobs:
                    self._put_together(jobs, other).write(force=True)
                proofs.append(compare(out, other if jobs else self.path, self.path, {**feeds, **case(feeds)}, limit))
            worst = max(proofs, key=lambda proof: proof.error)
            return replace(worst, moved=min(p.moved for p in proofs if p.moved or len(proofs) == 1))
        finally:
            for path in (other, *out.parent.glob(f"{glob.escape(other.name)}.*.data")):
                path.unlink(missing_ok=True)

    @one_blas_thread()
    def _put_together(self, jobs: Sequence[Job], out: Path) -> Storage:
        """Base and adapter without a branch: merged, and beside weights that hold no change one product more."""
        changes = gathered(jobs)
        sealed = {sites: wanted for sites, wanted in changes.items() if any(site.sealed for site in sites)}
        whole = by_tensor({sites: wanted for sites, wanted in changes.items() if sites not in sealed})
        found = [spots(self.model, self.index, some, self.path.parent) for some in (whole, sealed)]
        model, index, places = self._copied([*found[0], *found[1]])
        merged, dense = places[: len(found[0])], places[len(found[0]) :]
        data = self._merge(index, merged, {change.key: Norms() for change in every_change(merged)})
        beside_dense(index, self.values, dense)
        return Storage(model, self.path, out, data, _tag(jobs))

    def _recorded(self) -> Record:
        if self.record is None:
            raise fault("LF-613", f"{self.path} has nothing attached by loraformat", fix="is this the attached model?")
        return self.record

    def _detached(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        self._recorded().detach(model)
        return model


def _tag(jobs: Sequence[Job]) -> str:
    """What tells the data files of one change from another's: the adapters' digests."""
    return hashlib.sha256("".join(digest(job.adapter) for job in jobs).encode()).hexdigest()[:8]
