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
from loraformat.errors import LoraFormatError, Problem
from loraformat.parts import Lora
from loraformat.plan import Job
from loraformat.resolve import Hints, matches
from loraformat.updates import Update
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.attaching.branches import FORMS, Pair
from loraformat_converters.onnx.attaching.ends import Ends
from loraformat_converters.onnx.attaching.pairs import Form, laid
from loraformat_converters.onnx.attaching.slot import Gain, Slot
from loraformat_converters.onnx.attaching.slot_names import file_of, gain_of, inputs_of
from loraformat_converters.onnx.attaching.slots import Slots
from loraformat_converters.onnx.attaching.swappable import FORMS_FED
from loraformat_converters.onnx.changing.spots import Spot
from loraformat_converters.onnx.graph.index import Index, Site
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
        """A slot for each weight."""
        if self.weights is not None:
            drawn = ((spot.key, self.weights.sketch(spot.sites[0])) for spot in spots)
            self.slots = replace(self.slots, sketches={key: found for key, found in drawn if found is not None})
        for spot in spots:
            make = Nodes(self.index, self.index.stem(spot.key))
            for change in spot.changes:
                self.stems[change.job, change.key] = make.stem
                self._keys[change.job, change.key] = spot.key
            slot = _slot(spot, self.options)
            self.slots = replace(self.slots, slots={**self.slots.slots, spot.key: slot})
            self._declare(slot, make.stem)
            self._run(make, spot, slot)

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

    def _declare(self, slot: Slot, stem: str) -> None:
        """The inputs, and their defaults."""
        for name, none in slot.off().items():
            self.index.taken.add(name)
            kind = onnx.helper.np_dtype_to_tensor_dtype(none.dtype)
            sizes = [(slot.rank or f"{stem}/r") if n is None else n for n in slot.inputs[name]]
            self.index.graph.input.append(helper.make_tensor_value_info(name, kind, sizes))
            if not self.slots.required:
                self.index.graph.initializer.append(numpy_helper.from_array(none, name))

    def _run(self, make: Nodes, spot: Spot, slot: Slot) -> None:
        first, form = spot.sites[0], FORMS[spot.sites[0].like]
        pair = _fitted(make, first, slot)
        self.editor.lay(self.index.scopes[0], "", make.list)
        for i, site in enumerate(spot.sites):
            run = Nodes(self.index, make.stem if len(spot.sites) == 1 else f"{make.stem}/{i}")
            kept = partial(magnitude.kept, form, site, slot.gain.name) if slot.gain else None
            self.ends.add(site, run, lambda run, site=site: form.run(run, site, pair), kept)  # type: ignore[misc]


def _slot(spot: Spot, options: Options) -> Slot:
    site = spot.sites[0]
    names = inputs_of(spot.key, options.slot_names)  # type: ignore[arg-type]
    dtype = helper.tensor_dtype_to_np_dtype(site.dtype).name
    form = FORMS_FED[site.like]
    *batch, out, in_ = site.operand.matrix_shape
    none = Update((Lora(np.zeros((*batch, 0, in_)), np.zeros((*batch, out, 0)), 1.0, "factor"),))
    a, b = _laid_empty(none, form, [site.operand.shape[axis] for axis in site.operand.in_])
    # Nothing else in the shapes of a pair of rank 0 is 0.
    a_shape, b_shape = (tuple(n or None for n in shape) for shape in (a, b))
    gain = None
    if any("magnitude" in change.update for change in spot.changes):
        sizes = tuple(magnitude.sizes(FORMS[site.like], site))
        name = gain_of(spot.key, options.slot_names)  # type: ignore[arg-type]
        gain = Gain(name, sizes, site.root_name, site.placement.out)
    return Slot(spot.key, *names, a_shape, b_shape, dtype, form, options.pad_rank, gain)


def _laid_empty(none: Update, form: Form, in_sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a pair of rank 0: no -1 can be found where there is no value."""
    if form == "conv":
        out = none["lora"].lora_B.shape[0]
        return (0, *in_sizes), (out, 0, *(1 for _ in in_sizes[1:]))
    a, b = laid("", none, form)
    return a.shape, b.shape


def _fitted(make: Nodes, site: Site, slot: Slot) -> Pair:
    """The inputs as the operator's branch takes them."""
    a, b, rank = slot.a, slot.b, len(slot.a_shape)
    if site.like == "ConvTranspose":  # its kernels are [in, r, *kernel]
        a = make.transpose(a, [1, 0, *range(2, rank)], "A/T")
    elif site.like != "Gather" and site.side == 0:
        a, b = make.turn(a, rank, "A/T"), make.turn(b, rank, "B/T")
    if site.factor != 1.0:
        dtype = helper.tensor_dtype_to_np_dtype(site.dtype)
        b = make.node("Mul", [b, make.store("factor", np.asarray(site.factor, dtype))], "B/scaled")
    return Pair(a, b, (), ())


def wanted(base: Base, patterns: Sequence[str]) -> Job:
    """A job without a name that has slots made for what the patterns mean; LF-705 for one that means nothing."""
    known = {key: place for key, place in base.linears(Hints()).items() if place is not None}
    unused = [p for p in patterns if not any(matches(key, (p,)) for key in known)]
    if unused:
        raise LoraFormatError([Problem("LF-705", "no weight of the model is meant by this pattern", p) for p in unused])
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
        stored = exact.astype(part.lora_B.dtype).astype(kind).astype(np.float64)
    size = float(np.linalg.norm(exact))
    return float(np.linalg.norm(stored - exact)) / size if size else 0.0
