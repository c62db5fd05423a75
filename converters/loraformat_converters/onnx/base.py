"""An ONNX model as a base: parameters are its stored tensors, targets are found by what the graph calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat.axes import Placement
from loraformat.base import Options, Parameter
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.outputs import check_free, check_room
from loraformat.plan import Job, Outcome, Plan, Proof
from loraformat.resolve import Hints, Match, Resolution
from loraformat.tiles import Norms
from loraformat.turned import turned
from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.attaching.slot_names import file_of
from loraformat_converters.onnx.attaching.slots import Slots, check_taken
from loraformat_converters.onnx.changing.branched import branched
from loraformat_converters.onnx.changing.identity import base_sha256
from loraformat_converters.onnx.changing.record import Record
from loraformat_converters.onnx.changing.requantised import kept
from loraformat_converters.onnx.changing.rewriting import Rewriting
from loraformat_converters.onnx.changing.slotted import slotted
from loraformat_converters.onnx.finding.names import names_of
from loraformat_converters.onnx.finding.part import Part
from loraformat_converters.onnx.finding.resolving import resolved
from loraformat_converters.onnx.graph.index import Index, Site
from loraformat_converters.onnx.graph.model import FLOATS, External, Rows, array, light, load
from loraformat_converters.onnx.graph.scopes import tensors
from loraformat_converters.onnx.graph.store import Storage
from loraformat_converters.onnx.graph.values import Values
from loraformat_converters.onnx.how import how
from loraformat_converters.onnx.info import describe, values_of
from loraformat_converters.onnx.planned import planned
from loraformat_converters.onnx.proof import check_provable, prove

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update
    from loraformat_converters.onnx.attaching.slot import Gain

    Array = npt.NDArray[Any]

__all__ = ["OnnxBase"]


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

    def stored(self) -> Iterator[Path]:
        """The data files; see ``loraformat.base.Stored``."""
        locations = {e.value for t in tensors(self.model) for e in t.external_data if e.key == "location"}
        return (self.path.parent / location for location in locations)

    def describe(self) -> Mapping[str, Any]:
        """See ``loraformat_converters.onnx.info``."""
        index = self.index
        with suppress(LoraFormatError):  # of what cannot be read, or is no graph without it: as it is
            if self.record is not None:
                self.record.undo(before := light(self.model))
                index = Index(before)
        return describe(self.model, index, self.path)

    def how(self, language: str) -> str:
        """See ``loraformat_converters.onnx.how``; LF-613 where what was attached cannot be fed any more."""
        if self.record is not None:
            _ = self.slots
        return how(self.describe(), self.path, language)

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """Module path + ``.weight`` → (out, in) of every site that can be changed, in torch's orientation."""
        sites = (s for s in self.bare.index.sites if s.refusal is None and not s.vector and _is_matrix(s))
        named = ((self._key(site), site.placement) for site in sites if not site.looks_up)
        return {key: Placement(p.matrix_shape, (0,), (1,)) for key, p in named if key}

    def _key(self, site: Site) -> str | None:
        module = names_of(site, "name_scopes") or names_of(site, "node_name")
        return f"{module}.weight" if module else names_of(site, "initializer")

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The values of a stored tensor, or a run of its rows."""
        tensor = self.index.roots[name]
        if rows is not None and tensor.data_location == tensor.EXTERNAL and tensor.data_type in FLOATS:
            return Rows(External(tensor, self.path.parent), tensor)[
                slice(*rows)
            ]  # pages of a mapped file stay in the resident set
        if name != self._last[0]:  # protobuf copies a tensor's bytes at each access: once is enough for all its runs
            self._last = (name, array(tensor, self.path.parent))
        return self._last[1] if rows is None else self._last[1][slice(*rows)]

    def requantised(
        self, name: str, updates: Sequence[Update], norms: Norms | None = None
    ) -> Iterator[tuple[tuple[int, int], Array]] | None:
        """What a merge with ``--requantize`` stores in a quantised weight: all its rows at once; None of any other."""
        site = next((site for site in self.index.uses(name) if site.sealed), None)
        codes = kept(site, self.values) if site is not None else None
        if site is None or codes is None:
            return None
        laid = [turned(update, site.placement, site.operand) for update in updates]
        return (((0, dim), codes.changed(laid, norms or Norms())) for dim in site.root.dims[:1])

    def sketch(self, match: Match) -> Array | None:
        """Of what is computed with at a place, where its weight is quantised or packed."""
        return self.bare.values.sketch(match.handle, match.permute, match.rows)

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """By the user's map, the exporter's metadata, tensor and node names, and values, which must agree.

        The names of a graph are torch's: targets in another name space are found by the user's map and by values.
        """
        if adapter.components:
            what = "the adapter's keys are in components; this graph's names are of one model"
            raise fault("LF-602", what, fix="retarget it first")
        return self.resolve_part(adapter, hints, None, hints.unused(adapter))

    def resolve_part(
        self, adapter: Adapter, hints: Hints, part: Part | None, problems: Sequence[Problem] = ()
    ) -> Resolution:
        """The same for one of several graphs that are one model, where ``part`` says what the file's name tells."""
        return resolved(self.path, self.bare.index, self.bare.values, adapter, hints, part, problems)

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """What ``verb`` changes; every refusal that the graph gives reason for, at once."""
        if self.record is not None:
            fix = f"loraformat detach {self.path} -o ORIGINAL.onnx, or take the original model"
            raise fault("LF-608", "the model has an adapter attached already", where=str(self.path), fix=fix)
        return planned(self, verb, jobs, options)

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Write a changed copy of the model; the opened one stays as it is."""
        check_free(plan.options.out, force)
        check_room(plan.options.out, plan.writes, plan.copies)
        storage, norms = self.changed(plan)
        written = storage.write(force)
        return Outcome(norms, written, plan.options.out.stat().st_size - self.path.stat().st_size)

    def changed(self, plan: Plan) -> tuple[Storage, Mapping[str, Norms]]:
        """The changed copy, ready to be written, and the norms, which are known when it has been; LF-615."""
        if plan.verb == "merge" and plan.options.requantize:
            self.rewriting.check_survival(plan.state, plan.options.survival)
        return self.rewriting.changed(plan)

    @property
    def rewriting(self) -> Rewriting:
        """What makes changed copies of the model."""
        return Rewriting(self.path, self.model, self.values)

    @cached_property
    def slots(self) -> Slots | None:
        """The inputs for adapters, where ``attach --mode swap``, or somebody else, made some; LF-613 where they are gone."""
        if self.record is None:
            return slotted(self.index, self.values, lambda: self.identity)
        if found := self.record.slots:
            taken = {value["name"]: value["dtype"] for value in values_of(self.model.graph.input)}
            check_taken(found.dtypes, taken, str(self.path))
        return found

    def norms(self, gain: Gain, update: Update) -> Array:
        """What the magnitude of an update divides by, on the weight beside a slot."""
        return magnitude.beside(self.index, self.path.parent)(gain, update)

    @property
    def fed(self) -> list[str]:
        """The files that ``attach --mode swap`` wrote beside the model."""
        return [file_of(self.path.name, name) for name in self.attached] if self.record and self.record.slots else []

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
        storage = self.detached(out)
        check_room(out, self.path.stat().st_size + storage.data_bytes, storage.copies)
        written = storage.write(force)
        return Outcome(written=written, grown=out.stat().st_size - self.path.stat().st_size)

    def detached(self, out: Path) -> Storage:
        """The model as it was before ``attach``, ready to be written."""
        return Storage(self._detached(), self.path, out, [], self.identity[:8])

    def extract(self) -> list[tuple[str, Adapter]]:
        """(name, adapter) of everything that is attached, bit for bit; else what somebody else put beside the weights.

        Tools that fold constants keep the record and not the tensors (onnxslim 0.1, onnxsim 0.6, onnxruntime 1.32): then what
        the nodes compute is given, where it has the targets, kinds and ranks that the record tells.
        """
        wanted = self.record.folded(self.model) if self.record else None
        found = branched(self.index, self.values) if self.record is None or wanted else None
        if found is not None and (self.record is None or wanted == _told(found)):
            return [(self.attached[0] if self.record else "default", found)]
        return self._recorded().adapters(self.model)

    def without(self) -> OnnxBase:
        """The model as it was before ``attach``, in memory."""
        return OnnxBase(self.path, self._detached())

    @cached_property
    def bare(self) -> OnnxBase:
        """What targets are looked for in: of an attached model, whose operators may have given up their weights, ``without``."""
        return self.without() if self.record else self

    def inlined(self) -> OnnxBase:
        """The model with its local functions written into the graph, where their weights can be changed."""
        if not self.model.functions:
            return self
        from onnx import inliner

        return OnnxBase(self.path, inliner.inline_local_functions(self.model))

    def check_provable(self, plan: Plan, inputs: Path | None = None) -> None:
        """See ``proof``."""
        check_provable(self, plan, inputs)

    def prove(self, plan: Plan, inputs: Path | None = None, whole: Path | None = None) -> Proof:
        """See ``proof``; ``whole``: the output, of which this model is one in a folder."""
        return prove(self, plan, inputs, whole or plan.options.out)

    def _recorded(self) -> Record:
        if self.record is None:
            what = f"{self.path} has nothing attached by loraformat, and no pair s·B·A·x runs beside a weight of it"
            raise fault("LF-613", what, fix="is this the attached model?")
        return self.record

    def _detached(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        self._recorded().detach(model)
        return model


def _is_matrix(site: Site) -> bool:
    """Whether it is stored, or read, as one: no kernel, no stack."""
    return 2 in (len(site.placement.shape), len(site.operand.shape))


def _told(adapter: Adapter) -> dict[str, list[tuple[str, int | None]]]:
    """What a record tells of an adapter's targets: (kind, rank) of each part."""
    return {key: [(part.kind, getattr(part, "r", None)) for part in update.parts] for key, update in adapter.items()}
