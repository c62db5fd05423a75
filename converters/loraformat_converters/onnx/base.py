"""An ONNX model as a base: parameters are its stored tensors, targets are found by what the graph calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from loraformat import canonical
from loraformat.atomic import check_free
from loraformat.axes import Placement
from loraformat.base import Options, Parameter
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.identity import digest
from loraformat.metadata import part_json
from loraformat.plan import Job, Outcome, Plan, size
from loraformat.resolve import Hints, Match, Resolution
from loraformat.tiles import Norms
from loraformat_converters.onnx.attach import Branch
from loraformat_converters.onnx.how import how
from loraformat_converters.onnx.index import Index, Site
from loraformat_converters.onnx.info import describe
from loraformat_converters.onnx.ladder import PREFIX, Found, climb
from loraformat_converters.onnx.merge import Spot, merge, spots
from loraformat_converters.onnx.model import FLOATS, array, load
from loraformat_converters.onnx.names import names_of
from loraformat_converters.onnx.part import Part
from loraformat_converters.onnx.store import Addition, Patch, Storage
from loraformat_converters.onnx.values import Values

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["RECORD", "OnnxBase"]

RECORD = "loraformat.attached"
"""metadata_props key: what was attached, so that it can be told, checked and taken out again."""


Data = list[Patch | Addition]
"""What is written outside the model."""


class OnnxBase:
    """An opened model; its weights are read only when they are needed."""

    verbs = frozenset({"merge", "attach"})

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = load(path)
        self.index = Index(self.model)
        self.values = Values(self.index, path.parent)

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
        named = ((self._key(site), site.placement) for site in self.index.sites if site.refusal is None)
        return {key: Placement(p.matrix_shape, (0,), (1,)) for key, p in named if key}

    def _key(self, site: Site) -> str | None:
        module = names_of(site, "name_scopes") or names_of(site, "node_name")
        return f"{module}.weight" if module else names_of(site, "initializer")

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The values of a stored tensor, or a run of its rows."""
        values = array(self.index.roots[name], self.path.parent)
        return values if rows is None else values[slice(*rows)]

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
        unresolved += [problem for key, place in found.items() for problem in _contradicted(key, place, hints)]
        targets = {key: tuple(self._match(f, site) for site in f.sites) for key, f in found.items()}
        return Resolution(targets, tuple(unresolved), tuple(ambiguous))

    def _match(self, found: Found, site: Site) -> Match:
        evidence = (*found.evidence, f"operator: {site.node.op_type} reads the weight as [{site.placement.spec}]")
        where = (self.path.name, site.node.name, site.root_name, site.placement)
        return Match(*where, evidence, found.confidence, handle=site)

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """What ``verb`` changes; every refusal that the graph gives reason for, at once."""
        if len(jobs) != 1:
            raise fault("LF-608", "several adapters in one graph are not put together yet", where=str(self.path))
        adapter, resolution = jobs[0].adapter, jobs[0].resolution
        found = {key: tuple(m.handle for m in places) for key, places in resolution.require().targets.items()}
        problems = [p for key in adapter for p in _obstacles(verb, key, adapter[key], found[key])]
        if verb == "attach" and any(p.key == RECORD for p in self.model.metadata_props):
            what = "the model has an adapter attached already"
            problems.append(Problem("LF-608", what, str(self.path), "attach to the original model"))
        if problems:
            raise LoraFormatError(problems)
        places = spots(self.model, self.index, found, self.path.parent)
        data = [d for spot in places.values() if (d := spot.written_data)] if verb == "merge" else []
        storage = Storage(self.model, self.path, options.out, data, digest(adapter)[:8])
        evidence = dict.fromkeys(e for matches in resolution.targets.values() for m in matches for e in m.evidence)
        notes = (*(e for e in evidence if e.startswith(PREFIX)), *_notes(verb, places))
        if storage.copied:
            notes += (f"copies {', '.join(storage.copied)} ({size(storage.data_bytes)}) beside the output",)
        graph = self.path.stat().st_size
        added = sum(t.nbytes for u in adapter.values() for t in _factors(u)) if verb == "attach" else 0
        steps = tuple(_step(verb, key, found[key]) for key in adapter)
        writes, peak = graph + storage.data_bytes + added, 3 * graph + (32 << 20)
        return Plan(verb, tuple(jobs), options, steps, graph, writes, peak, notes, places)

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Write a changed copy of the model; the opened one stays as it is."""
        check_free(plan.options.out, force)
        storage, norms = self.changed(plan)
        written = storage.write(force)
        return Outcome(norms, written, plan.options.out.stat().st_size - self.path.stat().st_size)

    def changed(self, plan: Plan) -> tuple[Storage, Mapping[str, Norms]]:
        """The changed copy, ready to be written, and the norms, which are known when it has been."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        index = Index(model)
        places: Mapping[str, Spot] = {
            key: replace(spot, sites=tuple(index.sites[site.number] for site in spot.sites))
            for key, spot in plan.state.items()
        }
        adapter = plan.jobs[0].adapter
        norms = {key: Norms() for key in adapter}
        data = self._merge(index, plan, places, norms) if plan.verb == "merge" else []
        if plan.verb == "attach":
            _attach(index, plan, places, norms)
            onnx.helper.set_model_props(model, {**_props(model), RECORD: _record(plan)})
        return Storage(model, self.path, plan.options.out, data, digest(adapter)[:8]), norms

    def _merge(self, index: Index, plan: Plan, places: Mapping[str, Spot], norms: Mapping[str, Norms]) -> Data:
        folder = self.path.parent
        changes = [
            merge(index, key, plan.jobs[0].adapter[key], spot, folder, norms[key]) for key, spot in places.items()
        ]
        return [change for change in changes if change is not None]


def _attach(index: Index, plan: Plan, places: Mapping[str, Spot], norms: Mapping[str, Norms]) -> None:
    branch = Branch(index)
    for key, spot in places.items():
        update = plan.jobs[0].adapter[key]
        branch.add(key, update["lora"], spot.sites)
        norms[key].delta = update.norm() ** 2
    branch.finish()


def _record(plan: Plan) -> str:
    (job,) = plan.jobs
    record = {
        "version": 1,
        "name": job.name,
        "mode": plan.options.mode,
        "digest": digest(job.adapter),
        "targets": {key: [part_json(p) for p in update.parts] for key, update in job.adapter.items()},
    }
    return canonical.dumps(record)


def _step(verb: str, key: str, sites: tuple[Site, ...]) -> str:
    nodes = ", ".join(site.node.name for site in sites)
    return f"{verb} {key} at {nodes} ({sites[0].root_name} {list(sites[0].root.dims)})"


def _contradicted(key: str, found: Found, hints: Hints) -> Iterator[Problem]:
    """What the user says of the axes must be what the operator computes."""
    spec, placement = hints.spec(key), found.sites[0].placement
    if spec is None:
        return
    try:
        stated = Placement.of(placement.shape, spec)
    except ValueError as error:
        yield Problem("LF-705", f"--axes: {error}", key)
        return
    if stated != placement:
        what = f"--axes says {spec}, {found.sites[0].node.op_type} reads {found.sites[0].root_name} as {placement.spec}"
        yield Problem("LF-605", what, key, "a graph needs no --axes: its operators tell")


def _props(model: onnx.ModelProto) -> dict[str, str]:
    return {p.key: p.value for p in model.metadata_props}


def _factors(update: Update) -> Iterator[Array]:
    if "lora" in update:
        yield from (update["lora"].lora_A, update["lora"].lora_B)


def _obstacles(verb: str, key: str, update: Update, sites: tuple[Site, ...]) -> Iterator[Problem]:
    """What keeps a target from being changed: at most one problem, the first that matters."""
    first = sites[0]
    refused = next((site for site in sites if site.refusal), None)
    matrix, wanted = update.matrix_shape(), first.placement.matrix_shape
    if refused is not None:
        yield Problem("LF-608", f"{refused.node.name or refused.node.op_type}: {refused.refusal}", key)
    elif len({(site.gemm_alpha, site.placement) for site in sites}) > 1:
        what = "its uses read the weight in two orientations, or scale it differently"
        yield Problem("LF-608", what, key, "name the node that is meant: --names")
    elif update.op == "embedding":
        yield Problem("LF-608", f"an embedding's update cannot act on {first.node.op_type}", key)
    elif not update.linear:
        what = f"a {update.kind} update is not put into ONNX graphs yet (lora, loha, lokr and delta are)"
        yield Problem("LF-608", what, key)
    elif verb == "attach" and (update.kind != "lora" or update["lora"].mid is not None):
        yield Problem("LF-608", f"a {update.kind} update has no pair A, B to attach", key, "merge it")
    elif matrix != wanted:
        what = f"the update gives [out, in] = {list(matrix or ())}, {first.node.name} computes with {list(wanted)}"
        yield Problem("LF-606", what, key, "is this the base that the adapter was trained on?")


def _notes(verb: str, places: Mapping[str, Spot]) -> Iterator[str]:
    for key, spot in places.items():
        if spot.others and verb == "merge":
            others = ", ".join(spot.others[:3])
            yield f"{spot.sites[0].root_name} is used by {others} too: {key} gets a copy of its own"
        if len(spot.sites) > 1:
            yield f"{key} is used {len(spot.sites)} times: the change acts at every use"
