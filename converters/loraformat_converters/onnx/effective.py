"""Adapters in the weights themselves: W + ΔW is made where the model runs, when the adapter changes.

    session = Effective("model.onnx", {"style": "style.lora.safetensors", "tone": tone}, ["CUDAExecutionProvider"])
    session.use("style")                      # W + ΔW of every target, made from W, which stays beside it
    session.run(feeds)                        # output name → array; as fast as the model without an adapter
    session.use({"style": 0.7, "tone": 0.3})  # a blend
    session.use(None)                         # W again, bit for bit

The model is as it was exported: nothing is attached to it. In memory, the weights that the adapters change become its
inputs, and a second small graph makes what they are fed, W + L·R in float32 with one rounding, on the same device.
The price is memory, for these weights twice; and one choice acts at a time, for all threads. What is no pair (DoRA,
LoHa, trained weights) is computed by numpy and brought to the device.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from loraformat import registry
from loraformat.adapter import Adapter
from loraformat.base import Options
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.parts import Lora
from loraformat.strength import strengthen
from loraformat.tiles import Norms, changed
from loraformat.verbs.merge import prepare
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.base import OnnxBase
from loraformat_converters.onnx.graph.model import array
from loraformat_converters.onnx.running.adding import Adding
from loraformat_converters.onnx.running.captured import Captured
from loraformat_converters.onnx.running.kept import kept
from loraformat_converters.onnx.running.opened import device_of, opened, runtime
from loraformat_converters.onnx.running.pooled import Bound, Pooled
from loraformat_converters.onnx.running.ways import Choice, weights_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.axes import Placement
    from loraformat.updates import Update
    from loraformat_converters.onnx.changing.spots import Spot
    from loraformat_converters.onnx.graph.scopes import Scope
    from loraformat_converters.onnx.graph.site import Site

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["Effective"]

_KEPT = 64
"""Choices whose places are remembered: a blend may have any weights."""


class Effective:
    """A model whose weights take adapters.

    Args:
        path: of the model, which no adapter is attached to.
        adapters: by name, in memory or the paths of any layout; what they change is what can change.
        providers: onnxruntime's. W and W + ΔW lie in the memory of the first one's device.
        options: onnxruntime's ``SessionOptions``.
        captured: run by CUDA graphs, one for each set of input shapes.
        any_base: take adapters that were bound to other weights.

    Attributes:
        values: input → W + ΔW, an ``OrtValue`` on the device, for those who run ``inference`` by bindings of their own.

    Raises:
        LoraFormatError: what reading and resolving say; LF-608 a weight that cannot be an input; LF-704 no onnxruntime;
            LF-705 ONNX Runtime cannot open the model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        adapters: Mapping[str, Adapter | str | os.PathLike[str]],
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        options: Any = None,
        *,
        captured: bool = False,
        any_base: bool = False,
    ) -> None:
        ort, base = runtime(), registry.open_base(Path(path))
        if not isinstance(base, OnnxBase):
            raise fault("LF-608", f"{base.path} is not one ONNX model", fix="give the path of a model")
        self._base = base
        self._any_base, self._lock = any_base, threading.Lock()
        self._adapters = {
            name: kept(one if isinstance(one, Adapter) else registry.load(one)) for name, one in adapters.items()
        }
        self._choices: dict[tuple[tuple[str, float], ...], Mapping[str, Sequence[Update]]] = {}
        self._seats = {seat.name: seat for seat in self._found(self._adapters)}
        if problems := [problem for seat in self._seats.values() for problem in seat.problems()]:
            raise LoraFormatError(problems)
        folder = self._base.path.parent
        self.inference = opened(_model(self._base.model, self._seats), folder, providers, options, captured)
        self.device = device_of(self.inference, providers)
        self._added = Adding(providers)
        self._w = {name: self._value(seat.values(folder)) for name, seat in self._seats.items()}
        # A value on the CPU is the array that it was made of: not W's own.
        self.values = {name: self._value(np.array(seat.values(folder))) for name, seat in self._seats.items()}
        self._acts: tuple[tuple[str, float], ...] = ()
        self._changed: frozenset[str] = frozenset()
        if captured:
            self._runs: Captured | Pooled = Captured(ort, self.inference, self.device, None, self.values)
            self._held: Any = self._runs.hold({})
        else:
            self._runs, self._held = Pooled(ort, self.inference, self.device), Bound(self.inference, self.values)

    @property
    def names(self) -> list[str]:
        """The adapters that can be used."""
        return list(self._adapters)

    def use(self, choice: Choice) -> None:
        """Have an adapter act from now on, or several by their weights; None for W itself.

        Raises:
            LoraFormatError: LF-705 a name that there is not; LF-611, LF-612 what is no pair, and beyond the range of the
                weight's type: then W is back. Of pairs such a sum is infinite, as it would be in a branch.
        """
        weights = tuple(weights_of(choice, self.names).items())
        with self._lock:
            if weights == self._acts:
                return
            wanted = self._updates(weights)
            try:
                self._restore(self._changed - wanted.keys())
                for name, updates in wanted.items():
                    self._make(self._seats[name], updates)
            except BaseException:  # never a part of one
                self._restore(self._seats)
                self._acts, self._changed = (), frozenset()
                raise
            self._acts, self._changed = weights, frozenset(wanted)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Output name → values, with what acts now."""
        names = list(outputs) if outputs is not None else [output.name for output in self.inference.get_outputs()]
        with self._lock:
            return dict(zip(names, self._runs.run(self._held, feeds, names), strict=True))

    def _restore(self, names: Iterable[str]) -> None:
        for name in names:
            self._added.copy(self._w[name], self.values[name])

    def _make(self, seat: _Seat, updates: Sequence[Update]) -> None:
        pairs = [_factors(update, seat.place) for update in updates]
        out = self.values[seat.name]
        if all(pairs):
            left = np.concatenate([pair[0] for pair in pairs if pair], axis=1)
            right = np.concatenate([pair[1] for pair in pairs if pair], axis=0)
            self._added(self._w[seat.name], left, right, out)
            return
        made = np.concatenate(list(changed(updates, seat.values(self._base.path.parent), Norms())))
        self._added.copy(self._value(made.reshape(seat.place.shape)), out)

    def _updates(self, weights: tuple[tuple[str, float], ...]) -> Mapping[str, Sequence[Update]]:
        """Input → what is added to it, of one choice; resolved the first time."""
        if weights not in self._choices:
            if len(self._choices) >= _KEPT:
                self._choices.pop(next(iter(self._choices)))
            adapters = {name: strengthen(self._adapters[name], weight) for name, weight in weights}
            self._choices[weights] = {seat.name: seat.updates for seat in self._found(adapters)}
        return self._choices[weights]

    def _found(self, adapters: Mapping[str, Adapter]) -> Iterator[_Seat]:
        if not adapters:
            return
        given = list(adapters.items())
        plan = prepare("merge", given, self._base, Options(Path(os.devnull)), any_base=self._any_base)
        for spot in plan.state:
            yield from _seats(spot)

    def _value(self, tensor: Array) -> Any:
        return tort.value(runtime().OrtValue, np.ascontiguousarray(tensor), *self.device)


@dataclass(frozen=True)
class _Seat:
    """A weight as its operators read it, which becomes an input by that name."""

    spot: Spot
    site: Site

    @property
    def name(self) -> str:
        return self.site.values[-1].name

    @property
    def home(self) -> Scope:
        return self.site.values[-1].scope

    @property
    def dtype(self) -> int:
        """The data type that the operator reads."""
        return self.site.dtype if self.site.chain else self.site.root.data_type

    @property
    def place(self) -> Placement:
        return self.site.operand

    @property
    def updates(self) -> tuple[Update, ...]:
        """In the axes that the operator reads."""
        return tuple(change.turned(self.place) for change in self.spot.changes)

    def problems(self) -> Iterator[Problem]:
        """LF-608 for every reason why it cannot be an input."""
        fix = "attach a branch, or merge"
        if self.spot.others:
            yield Problem("LF-608", f"{self.spot.others[0]} depends on its weight too", self.spot.key, fix)
        if self.home.outer is not None or self.home.graph is None:
            yield Problem(
                "LF-608", "its weight is in an inner graph or a function, which has no inputs", self.spot.key, fix
            )

    def values(self, folder: Path) -> Array:
        """What the operator reads: the stored tensor, and what the nodes between make of it."""
        stored = array(self.site.root, folder)
        if not self.site.chain:
            return stored
        kind = helper.tensor_dtype_to_np_dtype(self.site.dtype)
        return self.site.as_read(stored).astype(kind)


def _seats(spot: Spot) -> Iterator[_Seat]:
    """One for each value that operators read the weight as."""
    yield from {site.values[-1].name: _Seat(spot, site) for site in spot.sites}.values()


def _model(model: onnx.ModelProto, seats: Mapping[str, _Seat]) -> onnx.ModelProto:
    """The same with these values as inputs, which nothing in it makes."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    graph = twin.graph
    for field in (graph.initializer, graph.node):
        kept = [one for one in field if (one.name if field is graph.initializer else one.output[0]) not in seats]
        del field[:]
        field.extend(kept)
    there = {value.name for value in graph.input}
    for name, seat in seats.items():
        if name not in there:
            graph.input.append(helper.make_tensor_value_info(name, seat.dtype, seat.place.shape))
    return twin


def _factors(update: Update, place: Placement) -> tuple[F32, F32] | None:
    """L [first axis, r] and R [r, the others] with ΔW = L·R as it lies, the scale in it; None of what is no such pair."""
    parts = update.parts
    if len(parts) != 1 or not isinstance(lora := parts[0], Lora) or lora.mid is not None or place.batch:
        return None
    a, b = lora.lora_A.astype(np.float32), lora.lora_B.astype(np.float32) * np.float32(lora.scale)
    if a.ndim != 2 or b.ndim != 2:
        return None
    if place.out == (0,) and place.in_ == tuple(range(1, len(place.shape))):
        return b, a
    if place.in_ == (0,) and place.out == tuple(range(1, len(place.shape))):
        return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    return None
