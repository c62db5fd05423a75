"""An ONNX model as a base: parameters are its stored tensors, targets are found by what the graph calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from loraformat import canonical
from loraformat.axes import Placement
from loraformat.base import Options, Parameter
from loraformat.digest import digest
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.metadata import part_json
from loraformat.plan import Outcome, Plan, size
from loraformat.resolve import Hints, Match, Resolution
from loraformat.tiles import Norms
from loraformat_converters.onnx.attach import Branch
from loraformat_converters.onnx.index import Index
from loraformat_converters.onnx.ladder import Found, climb
from loraformat_converters.onnx.merge import merge, shared_with
from loraformat_converters.onnx.model import FLOATS, array, external, load
from loraformat_converters.onnx.names import names_of
from loraformat_converters.onnx.store import Patch, Storage

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["RECORD", "OnnxBase"]

RECORD = "loraformat.attached"
"""metadata_props key: what was attached, so that it can be told, checked and taken out again."""


@dataclass(frozen=True)
class _State:
    found: Mapping[str, Found]


class OnnxBase:
    """An opened model; its weights are read only when they are needed."""

    verbs = frozenset({"merge", "attach"})

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = load(path)
        self.index = Index(self.model)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every stored tensor of a float type, by its name in the file."""
        return {
            name: Parameter(name, tuple(tensor.dims), FLOATS[tensor.data_type])
            for name, tensor in self.index.roots.items()
            if tensor.data_type in FLOATS
        }

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """Module path + ``.weight`` → (out, in) of every site that can be changed, in torch's orientation."""
        named = ((self._key(site), site.placement) for site in self.index.sites if site.refusal is None)
        return {key: Placement(p.matrix_shape, (0,), (1,)) for key, p in named if key}

    def _key(self, site: Any) -> str | None:
        module = names_of(site, "name_scopes") or names_of(site, "node_name")
        return f"{module}.weight" if module else names_of(site, "initializer")

    def read(self, name: str) -> Array:
        """The values of a stored tensor."""
        return array(self.index.roots[name], self.path.parent)

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """By the user's map, the exporter's metadata, tensor names and node names, which must agree."""
        if adapter.components or adapter.names != "torch":
            what = "components" if adapter.components else f"the name space {adapter.names!r}"
            raise fault(
                "LF-602",
                f"the adapter's keys are in {what}; this graph's names are of one torch model",
                fix="retarget it first",
            )
        found, unresolved, ambiguous = climb(self.index, adapter, hints)
        targets = {key: tuple(self._match(f, site) for site in f.sites) for key, f in found.items()}
        return Resolution(targets, tuple(unresolved), tuple(ambiguous))

    def _match(self, found: Found, site: Any) -> Match:
        evidence = (*found.evidence, f"operator: {site.node.op_type} reads the weight as [{site.placement.spec}]")
        return Match(self.path.name, site.node.name, site.root_name, site.placement, evidence, handle=site)

    def plan(self, verb: str, adapter: Adapter, resolution: Resolution, options: Options) -> Plan:
        """What ``verb`` changes; every refusal that the graph gives reason for, at once."""
        resolution.require()
        found = {
            k: Found(tuple(m.handle for m in places), places[0].evidence) for k, places in resolution.targets.items()
        }
        problems = [p for key in adapter for p in _obstacles(verb, key, adapter[key], found[key])]
        if verb == "attach" and any(p.key == RECORD for p in self.model.metadata_props):
            problems.append(
                Problem(
                    "LF-608",
                    "the model has an adapter attached already",
                    str(self.path),
                    "attach to the original model",
                )
            )
        if problems:
            raise LoraFormatError(problems)
        steps = tuple(self._step(verb, key, found[key]) for key in adapter)
        notes = tuple(_notes(verb, self.index, found))
        storage = Storage(self.model, self.path, options.out, self._planned(verb, found), digest(adapter)[:8])
        graph = self.path.stat().st_size
        added = sum(t.nbytes for u in adapter.values() for t in _factors(u)) if verb == "attach" else 0
        if storage.copied:
            notes += (f"copies {', '.join(storage.copied)} ({size(storage.data_bytes)}) beside the output",)
        writes = graph + storage.data_bytes + added
        return Plan(
            verb, adapter, resolution, options, steps, graph, writes, 3 * graph + (32 << 20), notes, _State(found)
        )

    def _planned(self, verb: str, found: Mapping[str, Found]) -> list[Patch]:
        """The external ranges that a merge will change, without their bytes yet."""
        if verb != "merge":
            return []
        places = (
            external(f.sites[0].root, self.path.parent) for f in found.values() if not shared_with(self.index, f.sites)
        )
        return [Patch(place, lambda: iter(())) for place in places if place is not None]

    def _step(self, verb: str, key: str, found: Found) -> str:
        nodes = ", ".join(site.node.name for site in found.sites)
        return f"{verb} {key} at {nodes} ({found.sites[0].root_name} {list(found.sites[0].root.dims)})"

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Write the changed model. The opened one is used up: its graph is the new one afterwards."""
        before = self.path.stat().st_size
        norms = {key: Norms() for key in plan.adapter}
        patches = self._merge(plan, norms) if plan.verb == "merge" else self._attach(plan, norms)
        storage = Storage(self.model, self.path, plan.options.out, patches, digest(plan.adapter)[:8])
        written = storage.write(force)
        return Outcome(norms, written, plan.options.out.stat().st_size - before)

    def _merge(self, plan: Plan, norms: Mapping[str, Norms]) -> list[Patch]:
        patches = []
        for key, found in plan.state.found.items():
            patch = merge(self.index, key, plan.adapter[key], found.sites, self.path.parent, norms[key])
            patches += [patch] if patch else []
        return patches

    def _attach(self, plan: Plan, norms: Mapping[str, Norms]) -> list[Patch]:
        branch = Branch(self.index)
        for key, found in plan.state.found.items():
            update = plan.adapter[key]
            branch.add(key, update["lora"], found.sites)
            norms[key].delta = update.norm() ** 2
        branch.finish()
        record = {
            "version": 1,
            "name": plan.options.name,
            "mode": plan.options.mode,
            "digest": digest(plan.adapter),
            "targets": {key: [part_json(p) for p in update.parts] for key, update in plan.adapter.items()},
        }
        onnx.helper.set_model_props(self.model, {**_props(self.model), RECORD: canonical.dumps(record)})
        return []


def _props(model: onnx.ModelProto) -> dict[str, str]:
    return {p.key: p.value for p in model.metadata_props}


def _factors(update: Update) -> Iterator[Array]:
    return (t for t in (update["lora"].lora_A, update["lora"].lora_B) if "lora" in update)


def _obstacles(verb: str, key: str, update: Update, found: Found) -> Iterator[Problem]:
    if len({site.gemm_alpha for site in found.sites}) > 1:
        yield Problem("LF-608", "its uses multiply it by different alphas of Gemm", key)
        return
    for site in found.sites:
        if site.refusal:
            yield Problem("LF-608", f"{site.node.name}: {site.refusal}", key)
            return
    if update.op == "embedding":
        yield Problem("LF-608", f"an embedding's update cannot act on {found.sites[0].node.op_type}", key)
        return
    if not update.linear:
        yield Problem(
            "LF-608", f"a {update.kind} update is not put into ONNX graphs yet (lora, loha, lokr and delta are)", key
        )
        return
    if verb == "attach" and (update.kind != "lora" or update["lora"].mid is not None):
        yield Problem("LF-608", f"a {update.kind} update has no pair A, B to attach", key, "merge it")
        return
    matrix, wanted = update.matrix_shape(), found.sites[0].placement.matrix_shape
    if matrix != wanted:
        what = f"the update gives [out, in] = {list(matrix or ())}, {found.sites[0].node.name} computes with {list(wanted)}"
        yield Problem("LF-606", what, key, "is this the base that the adapter was trained on?")


def _notes(verb: str, index: Index, found: Mapping[str, Found]) -> Iterator[str]:
    for key, place in found.items():
        others = shared_with(index, place.sites)
        if others and verb == "merge":
            yield f"{place.sites[0].root_name} is used by {', '.join(others[:3])} too: {key} gets a copy of its own"
        if len(place.sites) > 1:
            yield f"{key} is used {len(place.sites)} times: the change acts at every use"
