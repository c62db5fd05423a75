"""Swap: A and B of every target are inputs of the graph, fed at run time; fed nothing, or a pair of rank 0, it is the base.

    x ──┬── MatMul(W) ── Add(bias) ─────────────────── lora/T/base ──┐
        └── MatMul( lora/T/A ) ── MatMul( lora/T/B ) ── lora/T/change ── Add ── y

Where one of the adapters is a DoRA at a weight, y is also multiplied by 1 + lora/T/gain there, its bias left alone.

*Optional* slots have a default, of rank 0 or of zeros: what onnxruntime calls an overridable initializer, which its
LoraAdapter fills. *Required* ones are plain inputs, for hosts that cannot feed the others: onnxruntime-web 1.30 throws,
and onnxruntime-node 1.30 ignores the feed and computes the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from loraformat import progress
from loraformat.errors import LoraFormatError
from loraformat.parts import Lora
from loraformat.plan import Job
from loraformat.resolve import Hints, matches, unmeant
from loraformat.updates import Update
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.attaching.branches import FORMS
from loraformat_converters.onnx.attaching.ends import Ends
from loraformat_converters.onnx.attaching.fitting import fitted, gained, slot_of
from loraformat_converters.onnx.attaching.slot import Slot
from loraformat_converters.onnx.attaching.slot_names import file_of
from loraformat_converters.onnx.attaching.slots import Slots
from loraformat_converters.onnx.changing.spots import Spot
from loraformat_converters.onnx.graph.index import Index
from loraformat_converters.onnx.graph.nodes import Editor, Nodes
from loraformat_converters.onnx.graph.values import Values

if TYPE_CHECKING:
    from typing import BinaryIO

    import numpy.typing as npt

    from loraformat.atomic import Writer
    from loraformat.base import Base, Options

    Array = npt.NDArray[Any]

__all__ = ["Swap", "rounded", "wanted"]


class Swap:
    """Slots being put into one graph.

    Args:
        values: of the weights, where their sketches are to be kept with the slots: what is loaded later is compared.

    Attributes:
        stems: (job, key) → below what our nodes are named.
        slots: what is fed.
    """

    mode = "swap"
    prefold = False

    def __init__(
        self, index: Index, options: Options, folder: Path, base_sha256: str, values: Values | None = None
    ) -> None:
        self.index, self.options, self.folder, self.weights = index, options, folder, values
        self.editor = Editor(index)
        self.ends = Ends(index, self.editor)
        self.stems: dict[tuple[int, str], str] = {}
        self.slots = Slots({}, base_sha256, options.slots == "required")
        self._keys: dict[tuple[int, str], str] = {}

    @property
    def values(self) -> dict[str, str]:
        """A value of ours → the value of the base in whose place it stands."""
        return self.ends.values

    @property
    def record(self) -> dict[str, Any]:
        """The slots."""
        return {"slots": self.slots.as_json()}

    def add(self, spots: Sequence[Spot]) -> None:
        """A slot for each parameter of each weight."""
        if self.weights is not None:
            parts = [part for spot in spots for part in spot.parts()]
            drawn = ((part.key, self.weights.sketch(part.sites[0], rows=part.changes[0].rows)) for part in parts)
            self.slots = replace(self.slots, sketches={key: found for key, found in drawn if found is not None})
        for spot in spots:
            self._run(spot, [self._slotted(part) for part in spot.parts()])

    def finish(self) -> None:
        """Lay the new nodes into the graphs."""
        self.editor.finish()

    def files(self, jobs: Sequence[Job]) -> dict[str, Writer]:
        """What is written beside the model: an adapter of each name for these slots."""
        return {
            file_of(self.options.out.name, job.name): self._writer(n, job) for n, job in enumerate(jobs) if job.name
        }

    def feeds(self, number: int, job: Job) -> dict[str, Array]:
        """What is fed to use one of the jobs."""
        targets = {self._keys[number, key]: update for key, update in job.adapter.items()}
        adapter = replace(job.adapter, targets=targets)
        return self.slots.feeds(self.slots.fed(adapter, magnitude.beside(self.index, self.folder)))

    def _writer(self, number: int, job: Job) -> Writer:
        tensors = self.feeds(number, job)

        def write(file: BinaryIO) -> None:
            tort.write(file, tensors, self.slots.version)
            progress.advance(sum(tensor.nbytes for tensor in tensors.values()))

        return write

    def _slotted(self, part: Spot) -> Slot:
        """The slot of one parameter, declared."""
        stem, slot = self.index.stem(part.key), slot_of(part, self.options)
        for change in part.changes:
            self.stems[change.job, change.key] = stem
            self._keys[change.job, change.key] = part.key
        self.slots = replace(self.slots, slots={**self.slots.slots, part.key: slot})
        self._declare(slot, stem)
        return slot

    def _declare(self, slot: Slot, stem: str) -> None:
        """The inputs, and their defaults."""
        for name, none in slot.off().items():
            self.index.taken.add(name)
            kind = onnx.helper.np_dtype_to_tensor_dtype(none.dtype)
            sizes = [(slot.rank or f"{stem}/r") if n is None else n for n in slot.inputs[name]]
            self.index.graph.input.append(helper.make_tensor_value_info(name, kind, sizes))
            if not self.slots.required:
                self.index.graph.initializer.append(numpy_helper.from_array(none, name))

    def _run(self, spot: Spot, slots: Sequence[Slot]) -> None:
        change, form = spot.changes[0], FORMS[spot.sites[0].like]
        make = Nodes(self.index, self.stems[change.job, change.key])
        pair, gain = fitted(make, spot, slots), gained(make, spot, slots)
        self.editor.lay(self.index.scopes[0], "", make.list)
        for i, site in enumerate(spot.sites):
            run = Nodes(self.index, make.stem if len(spot.sites) == 1 else f"{make.stem}/{i}")
            kept = partial(magnitude.kept, form, site, gain) if gain else None
            self.ends.add(site, run, lambda run, site=site: form.run(run, site, pair), kept)  # type: ignore[misc]


def wanted(base: Base, patterns: Sequence[str]) -> Job:
    """A job without a name that has slots made for what the patterns mean; LF-705 for one that means nothing."""
    known = {key: place for key, place in base.linears(Hints()).items() if place is not None}
    if unused := unmeant(patterns, known, "weight of the model"):
        raise LoraFormatError(unused)
    from loraformat.adapter import Adapter

    targets = {
        key: Update(
            (
                Lora(
                    np.zeros((1, place.matrix_shape[-1]), np.float32),
                    np.zeros((place.matrix_shape[-2], 1), np.float32),
                    1.0,
                    "factor",
                ),
            )
        )
        for key, place in known.items()
        if matches(key, patterns)
    }
    adapter = Adapter(targets)
    return Job(adapter, base.resolve(adapter, Hints()).require(), "")


def rounded(spots: Sequence[Spot]) -> str:
    """What folding the scale into B costs, for a person; "" where nothing."""
    worst = 0.0
    for spot in spots:
        kind = helper.tensor_dtype_to_np_dtype(spot.sites[0].dtype)
        for change in spot.changes:
            if change.job >= 0 and "lora" in change.update:
                worst = max(worst, _lost(change.update["lora"], kind))
    return f"the scale is folded into B, which moves ΔW by up to {worst:.1e} of its size" if worst else ""


def _lost(part: Lora, kind: np.dtype[Any]) -> float:
    exact = part.lora_B.astype(np.float64) * part.scale
    with np.errstate(over="ignore"):
        stored = exact.astype(kind).astype(np.float64)
    size = float(np.linalg.norm(exact))
    return float(np.linalg.norm(stored - exact)) / size if size else 0.0
