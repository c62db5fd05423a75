"""Several ONNX models in one folder as one base: the components of a pipeline, the encoder and decoder of a model.

A component (``unet``, ``text_encoder`` beside ``model_index.json``) has names of its own. The parts of one component are
graphs over the same weights: a target belongs to every part that has its module, and all of them are changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loraformat.atomic import write_folder
from loraformat.errors import fault
from loraformat.folders import files_in
from loraformat.names import join
from loraformat.outputs import check_free, check_room
from loraformat.parted import check_outside, norms_by_key, plans_of, share, whole_plan
from loraformat.plan import Job, Outcome, Plan, Proof
from loraformat.resolve import Hints, Match, Resolution
from loraformat_converters.onnx.base import OnnxBase
from loraformat_converters.onnx.changing.branched import branched
from loraformat_converters.onnx.finding.components import in_components
from loraformat_converters.onnx.finding.doubt import Model
from loraformat_converters.onnx.finding.part import parts
from loraformat_converters.onnx.finding.pipeline import components_of
from loraformat_converters.onnx.finding.shares import whole
from loraformat_converters.onnx.graph.model import external
from loraformat_converters.onnx.graph.scopes import tensors
from loraformat_converters.onnx.graph.store import Storage

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.atomic import Writer
    from loraformat.axes import Placement
    from loraformat.base import Options, Parameter
    from loraformat.tiles import Norms
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["OnnxFolder"]


class OnnxFolder:
    """An opened folder. ``components``: name → its models; the name is None in a folder that has none."""

    verbs = frozenset({"merge", "attach", "detach", "extract", "prove"})

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = files_in(path)
        self.components = {
            name: [Model(file, OnnxBase(path / file), part) for file, part in parts(files).items()]
            for name, files in components_of(path).items()
        }
        self.models = {model.file: model for models in self.components.values() for model in models}

    def parameters(self) -> Mapping[str, Parameter]:
        """Every stored float tensor, as ``FILE:NAME``."""
        return {
            f"{file}:{name}": replace(parameter, name=f"{file}:{name}")
            for file, model in self.models.items()
            for name, parameter in model.base.parameters().items()
        }

    def stored(self) -> Iterator[Path]:
        """The models with their data files; see ``loraformat.base.Stored``."""
        return (path for m in self.models.values() for path in (m.base.path, *m.base.stored()))

    def describe(self) -> Mapping[str, Any]:
        """kind, components (name, or the empty text → its files), models (file → see ``…onnx.info``)."""
        components = {name or "": [m.file for m in models] for name, models in self.components.items()}
        models = {file: dict(model.base.describe()) for file, model in self.models.items()}
        return {"kind": "onnx-folder", "components": components, "models": models}

    def how(self, language: str) -> str:
        """Of its one model; LF-705 where it has several."""
        if len(self.models) > 1:
            what = f"{self.path} holds several models: {', '.join(sorted(self.models))}"
            raise fault("LF-705", what, fix="name one of them: its runtime feeds them one after the other")
        (model,) = self.models.values()
        return model.base.how(language)

    def linears(self, hints: Hints) -> Mapping[str, Placement | None]:
        """As each file has them; keys begin with the component where the folder has components."""
        found: dict[str, Placement | None] = {}
        for component, models in self.components.items():
            for model in models:
                found |= {join(component, name): place for name, place in model.base.linears(hints).items()}
        return found

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The values of ``FILE:NAME``."""
        file, _, tensor = name.partition(":")
        return self.models[file].base.read(tensor, rows)

    def requantised(
        self, name: str, updates: Sequence[Update], norms: Norms | None = None
    ) -> Iterator[tuple[tuple[int, int], Array]] | None:
        """What a merge with ``--requantize`` stores in ``FILE:NAME``."""
        file, _, tensor = name.partition(":")
        return self.models[file].base.requantised(tensor, updates, norms) if file in self.models else None

    def sketch(self, match: Match) -> Array | None:
        """Of what is computed with at a place of one of the files."""
        return self.models[match.file].base.sketch(match)

    def resolve(self, adapter: Adapter, hints: Hints) -> Resolution:
        """Every target in every part that has its module; LF-602 where a part may have it and nothing says so."""
        return in_components(self.components, adapter, hints)

    def plan(self, verb: str, jobs: Sequence[Job], options: Options) -> Plan:
        """The plans of the parts that change; the other files are copied."""
        check_outside(self.path, options.out)
        bases = {file: model.base for file, model in self.models.items()}
        plans = plans_of(verb, jobs, options, bases, share)
        rest = [self.path / name for name in self._rest(plans)]
        note = f"{len(plans)} of {len(self.models)} models change, {len(rest)} files are copied as they are"
        return whole_plan(verb, jobs, options, plans, rest, note)

    def apply(self, plan: Plan, *, force: bool = False) -> Outcome:
        """Write the whole folder, or nothing."""
        check_free(plan.options.out, force)
        check_room(plan.options.out, plan.writes, plan.copies)
        changed = {file: self.models[file].base.changed(own) for file, own in plan.state.items()}
        found = {file: norms for file, (_, norms) in changed.items()}
        storages = {file: storage for file, (storage, _) in changed.items()}
        return self._write(plan.options.out, storages, norms_by_key(plan, found), force)

    def _write(
        self,
        out: Path,
        storages: Mapping[str, Storage],
        norms: Mapping[str, Norms],
        force: bool,
        without: Container[str] = (),
    ) -> Outcome:
        """The changed models, and the rest as it is."""
        kept = [name for name in self._rest(storages) if name not in without]
        writers: dict[str, Writer] = {name: partial(_copy, self.path / name) for name in kept}
        for file, storage in storages.items():
            inside = Path(file).parent
            taken = set(self.files) - self._own_data(file)
            storage.name_in_new_folder({os.path.relpath(name, inside) for name in taken})
            writers |= {(inside / name).as_posix(): writer for name, writer in storage.writers().items()}
        write_folder(out, dict(sorted(writers.items())), force=force)
        total = sum((out / name).stat().st_size for name in writers)
        before = sum((self.path / name).stat().st_size for name in self.files)
        return Outcome(norms, total, total - before)

    # What is attached.

    @property
    def attached(self) -> list[str]:
        """The names of the adapters that are attached, in any of the files."""
        return list(dict.fromkeys(name for model in self.models.values() for name in model.base.attached))

    @property
    def identity(self) -> str:
        """SHA-256 of the graphs by the files' names."""
        graphs = {file: model.base.identity for file, model in self.models.items()}
        return hashlib.sha256(json.dumps(graphs, sort_keys=True).encode()).hexdigest()

    def extract(self) -> list[tuple[str, Adapter]]:
        """(name, adapter) of all that is attached, put together of what the files hold; else what others put into one of them."""
        bases = [model.base for model in self.models.values()]
        if not any(base.record for base in bases):
            theirs = [found for base in bases if (found := branched(base.index, base.values)) is not None]
            if len(theirs) == 1:
                return [("default", theirs[0])]
        return self._attached()

    def _attached(self) -> list[tuple[str, Adapter]]:
        """Bit for bit; LF-613 where nothing is."""
        held = ((c, model.base) for c, models in self.components.items() for model in models if model.base.attached)
        found = whole(held)
        if not found:
            raise fault("LF-613", f"{self.path} has nothing attached by loraformat", fix="is this the attached folder?")
        return found

    def without(self) -> OnnxFolder:
        """The models as they were before ``attach``, in memory."""
        before = copy(self)
        before.components = {name: [_before(model) for model in models] for name, models in self.components.items()}
        before.models = {model.file: model for models in before.components.values() for model in models}
        return before

    def detach(self, out: Path, *, force: bool = False) -> Outcome:
        """Write the folder as it was before ``attach``; LF-613 where nothing is attached or a model was changed."""
        check_free(out, force)
        check_outside(self.path, out)
        swaps = any(model.base.record and model.base.slots for model in self.models.values())
        if not swaps:  # of a swap the adapters lie in files of their own
            self._attached()
        check_room(out, sum((self.path / name).stat().st_size for name in self.files), self._others)
        storages = {f: m.base.detached(out / f) for f, m in self.models.items() if m.base.record}
        fed = {(Path(f).parent / name).as_posix() for f, m in self.models.items() for name in m.base.fed}
        return self._write(out, storages, {}, force, without=fed)

    def check_provable(self, plan: Plan, inputs: Path | None = None) -> None:
        """The same of each model that changes."""
        for file, own in plan.state.items():
            self.models[file].base.check_provable(own, inputs)

    def prove(self, plan: Plan, inputs: Path | None = None) -> Proof:
        """The worst of what running each changed model proves."""
        proofs = [
            replace(proof, output=f"{file}: {proof.output}")
            for file, own in plan.state.items()
            for proof in [self.models[file].base.prove(own, inputs, plan.options.out)]
        ]
        return max(proofs, key=lambda proof: proof.error / proof.limit)

    @property
    def _others(self) -> list[Path]:
        """The files that are no models."""
        return [self.path / name for name in self.files if name not in self.models]

    def _own_data(self, file: str) -> set[str]:
        """Data files that this model alone refers to."""
        return set(self._data(file)) - {name for other in self.models if other != file for name in self._data(other)}

    def _rest(self, plans: Iterable[str]) -> list[str]:
        """What is copied as it is: not the models that change, nor data that only they refer to."""
        data = {file: self._data(file) for file in self.models}
        kept = {name for file, names in data.items() if file not in plans for name in names}
        gone = {name for file, names in data.items() if file in plans for name in (file, *names)} - kept
        return [name for name in self.files if name not in gone]

    def _data(self, file: str) -> set[str]:
        """The external data files of one model, by their paths in the folder."""
        folder = (self.path / file).parent
        places = (external(tensor, folder) for tensor in tensors(self.models[file].base.model))
        return {(Path(file).parent / place.location).as_posix() for place in places if place is not None}


def _before(model: Model) -> Model:
    return replace(model, base=model.base.without()) if model.base.record else model


def _copy(source: Path, file: BinaryIO) -> None:
    with open(source, "rb") as opened:
        shutil.copyfileobj(opened, file, 8 << 20)
