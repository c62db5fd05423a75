"""A model with adapters, run by ONNX Runtime: which adapter acts is chosen for each call, from any thread.

    session = Session("model.onnx")                      # written by attach, in any mode
    session.load("style", "style.lora.safetensors")      # swap: any layout; once
    session.use("style").run(feeds)                      # output name → array
    session.use({"style": 0.7, "tone": 0.3}).run(feeds)  # a blend
    session.use(["style", None, "tone"]).run(feeds)      # stack: one for each row; None is the base
    session.run(feeds)                                   # as the model is when nothing is chosen

What is chosen is held in no state: two threads that use two adapters do not meet. Needs onnxruntime, not onnx.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import canonical, registry
from loraformat.adapter import Adapter
from loraformat.errors import fault
from loraformat.names import nearest
from loraformat.source import existing, open_source
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.blend import blend
from loraformat_converters.onnx.slots import Slots

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Chosen", "Session"]

Choice = str | Mapping[str, float] | None
"""One adapter, a blend, or the bare base."""


@dataclass(frozen=True)
class Chosen:
    """A choice, ready to run any number of times."""

    session: Session
    made: Callable[[Mapping[str, Array]], Mapping[str, Any]]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Output name → values.

        Raises:
            LoraFormatError: LF-705 the feeds name an input that the choice feeds, or rows that are not as many.
        """
        return self.session._run(feeds, outputs, self.made(feeds))


class Session:
    """An opened model.

    Args:
        path: of the model.
        providers: onnxruntime's; the CPU's alone, if not given. Adapters lie in the memory of the first one's device.
        options: onnxruntime's ``SessionOptions``.
        resident: how many choices are kept there, the latest used; an older one is made anew when it is used again.

    Raises:
        LoraFormatError: LF-701 no such file; LF-613 a record of attach that cannot be read; LF-704 no onnxruntime.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        options: Any = None,
        *,
        resident: int = 16,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise fault(
                "LF-704", f"running a model needs onnxruntime: {error}", fix="pip install 'loraformat[onnx]'"
            ) from None
        self.path = existing(path)
        self._runtime = onnxruntime
        self.inference = onnxruntime.InferenceSession(
            str(self.path), options or _quiet(onnxruntime), providers=list(providers)
        )
        first = providers[0] if isinstance(providers[0], str) else providers[0][0]
        self.device = "cuda" if first.startswith(("CUDA", "Tensorrt")) else "cpu"
        self.attached, self._base = _record(self.inference.get_modelmeta().custom_metadata_map)
        self.slots = Slots.from_json(self._base["slots"], self._base["sha256"]) if "slots" in self._base else None
        self.resident = resident
        self._adapters: dict[str, Adapter] = {}
        self._held: OrderedDict[tuple[tuple[str, float], ...], Mapping[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The adapters that can be used: those that were loaded; of a stack or a branch, those in the model."""
        return list(self._adapters) if self.slots else self.attached

    def load(self, name: str, adapter: Adapter | str | os.PathLike[str], *, any_base: bool = False) -> None:
        """Have an adapter ready under a name, in the place of an older one of that name.

        Args:
            adapter: one in memory, or the path of one in any layout.
            any_base: take an ``.onnx_adapter`` file that was not written for this model.

        Raises:
            LoraFormatError: what reading says; LF-705 a model without slots; LF-607 a file for another model, or one that
                does not say for which; LF-508, LF-602, LF-606, LF-612 an adapter that does not fit the slots.
        """
        slots = self._slots()
        if not isinstance(adapter, Adapter):
            adapter = self._read(Path(adapter), slots, any_base)
        slots.feeds(adapter)  # or its faults, now
        with self._lock:
            self._adapters = {**self._adapters, name: adapter}
            for choice in [choice for choice in self._held if name in dict(choice)]:
                del self._held[choice]

    def unload(self, name: str) -> None:
        """Forget an adapter; runs that use it go on."""
        self._known(name)
        with self._lock:
            self._adapters = {other: one for other, one in self._adapters.items() if other != name}
            for choice in [choice for choice in self._held if name in dict(choice)]:
                del self._held[choice]

    def use(self, choice: Choice | Sequence[Choice]) -> Chosen:
        """An adapter by its name, several by their weights, None for the base; of a stack, one of these for each row.

        Raises:
            LoraFormatError: LF-705 a name that is not loaded, or a choice that the model has no way to make.
        """
        if "stack" in self._base:
            rows = None if choice is None or isinstance(choice, (str, Mapping)) else [self._weights(c) for c in choice]
            every = self._weights(choice) if rows is None else {}  # type: ignore[arg-type]
            self._check_rows(rows if rows is not None else [every])
            return Chosen(self, lambda feeds: self._by_row(feeds, rows, every))
        if not (choice is None or isinstance(choice, (str, Mapping))):
            raise fault("LF-705", "only a stack has an adapter for each row", fix="loraformat attach … --mode stack")
        weights = self._weights(choice)
        fed = self._strengths(weights) if self.slots is None else self._prepared(tuple(weights.items()))
        return Chosen(self, lambda feeds: fed)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Output name → values, of the model as it is when nothing is chosen: a swap and a stack are the bare base."""
        none = self.use(None) if self.slots or "stack" in self._base else Chosen(self, lambda feeds: {})
        return none.run(feeds, outputs)

    # What is fed.

    def _prepared(self, choice: tuple[tuple[str, float], ...]) -> Mapping[str, Any]:
        """The slots' values on the device, kept for the next time."""
        with self._lock:
            if choice in self._held:
                self._held.move_to_end(choice)
                return self._held[choice]
            adapters = self._adapters
        slots = self._slots()
        for name, _ in choice:
            if name not in adapters:  # unloaded since it was asked for
                self._known(name)
        blended = blend([(adapters[name], weight) for name, weight in choice])
        made = {name: self._value(tensor) for name, tensor in slots.feeds(blended).items()}
        with self._lock:
            if all(self._adapters.get(name) is adapters[name] for name, _ in choice):  # none was loaded anew meanwhile
                self._held[choice] = made
            while len(self._held) > self.resident:
                self._held.popitem(last=False)
        return made

    def _by_row(
        self, feeds: Mapping[str, Array], rows: Sequence[Mapping[str, float]] | None, every: Mapping[str, float]
    ) -> Mapping[str, Any]:
        """``lora.index`` or ``lora.weights``."""
        counts = {np.shape(feeds[name])[axis] for name, axis in self._base["stack"]["rows"].items() if name in feeds}
        given = [every] * max(counts, default=0) if rows is None else rows
        if counts and counts != {len(given)}:
            raise fault(
                "LF-705", f"{len(given)} rows are chosen for, and the inputs have {' and '.join(map(str, counts))}"
            )
        if self._base["stack"]["select"] == "index":
            place = {name: n for n, name in enumerate(self.attached, 1)}
            return {"lora.index": np.array([place[next(iter(row))] if row else 0 for row in given], np.int64)}
        return {"lora.weights": np.array([[row.get(name, 0.0) for name in self.attached] for row in given], np.float32)}

    def _check_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        if self._base["stack"]["select"] == "index" and any(list(row.values()) not in ([], [1.0]) for row in rows):
            raise fault(
                "LF-705",
                "each row of this model chooses one adapter, as it is",
                fix="attach with --select weights for a mixture",
            )

    def _strengths(self, weights: Mapping[str, float]) -> Mapping[str, Any]:
        """The inputs of --live-scale; an adapter that is not named is off."""
        inputs = self._base.get("inputs", [])
        if len(inputs) != len(self.attached) or not inputs:
            fix = "attach with --mode swap, --mode stack or --live-scale"
            raise fault("LF-705", f"{self.path} has no input by which an adapter could be chosen", fix=fix)
        return {
            at: np.array(weights.get(name, 0.0), np.float32) for at, name in zip(inputs, self.attached, strict=True)
        }

    def _weights(self, choice: Choice) -> dict[str, float]:
        """Name → weight; what weighs nothing is left out."""
        weights = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else dict(choice)
        for name in weights:
            self._known(name)
        if not all(np.isfinite(weight) for weight in weights.values()):
            raise fault("LF-705", f"weights must be finite numbers, not {list(weights.values())}")
        return {name: float(weight) for name, weight in sorted(weights.items()) if weight}

    def _known(self, name: str) -> None:
        if name not in self.names:
            close = nearest(name, self.names, 1)
            mean = f"did you mean {close[0]}?" if close else f"there is {', '.join(self.names) or 'none'}"
            raise fault("LF-705", f"no adapter is called {name}", fix=mean)

    # The run.

    def _run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None, more: Mapping[str, Any]
    ) -> dict[str, Array]:
        if both := feeds.keys() & more.keys():
            raise fault("LF-705", "what is chosen feeds it already", where=", ".join(sorted(both)))
        names = list(outputs) if outputs is not None else [output.name for output in self.inference.get_outputs()]
        binding = self.inference.io_binding()  # 2.5 µs a slot where a dictionary of arrays takes 7 (ORT 1.32, CPU)
        for name, value in {**feeds, **more}.items():
            held = value if isinstance(value, self._runtime.OrtValue) else self._value(np.asarray(value), "cpu")
            binding.bind_ortvalue_input(name, held)
        for name in names:
            binding.bind_output(name)
        self.inference.run_with_iobinding(binding)
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def _value(self, tensor: Array, device: str | None = None) -> Any:
        return tort.value(
            self._runtime.OrtValue, np.ascontiguousarray(tensor).reshape(tensor.shape), device or self.device
        )

    def _slots(self) -> Slots:
        if self.slots is None:
            fix = "loraformat attach … --mode swap"
            raise fault("LF-705", f"{self.path} has no inputs for adapters that are loaded", fix=fix)
        return self.slots

    def _read(self, path: Path, slots: Slots, any_base: bool) -> Adapter:
        """An adapter in any layout; one written for a model must be written for this one."""
        source = open_source(path)
        if source.head[4:8] != tort.MAGIC:
            return registry.read_source(source)[0].adapter
        assert source.file is not None
        contents = tort.read(source.file)
        if contents.model_version != slots.version and not any_base:
            what = f"{path} was not written for the slots of {self.path}"
            raise fault("LF-607", what, fix=f"loraformat convert ADAPTER {path} --for {self.path}; or any_base=True")
        return slots.adapter(contents.tensors)


def _record(props: Mapping[str, str]) -> tuple[list[str], dict[str, Any]]:
    """(names of what is attached, the record of the base) of the model's metadata; LF-613 where it cannot be read."""
    if "loraformat.attached" not in props:
        return [], {}
    try:
        names = [str(entry["name"]) for entry in canonical.loads(props["loraformat.attached"])]
        base = dict(canonical.loads(props["loraformat.base"]))
        if "slots" in base:
            Slots.from_json(base["slots"], str(base["sha256"]))
        if "stack" in base:
            _ = {str(name): int(axis) for name, axis in base["stack"]["rows"].items()}, base["stack"]["select"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise fault(
            "LF-613", "the record of what is attached cannot be read", fix="attach to the original model again"
        ) from None
    return names, base


def _quiet(runtime: Any) -> Any:
    """Without a warning for each slot: that it can be fed is what it is for."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    return options
