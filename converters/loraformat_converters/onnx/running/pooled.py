"""What a choice feeds, bound once and run many times, from any thread.

An input costs a microsecond or two to bind (ONNX Runtime 1.32, CPU), a dictionary of arrays seven: 224 targets have 448
inputs. So a binding keeps what its choice feeds, and a run binds the caller's own inputs alone. One run at a time uses a
binding; as many are made as run at once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat_converters.onnx import tort

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Bound", "Device", "Pooled"]

Device = tuple[str, int]
"""Its kind, and which of that kind: cuda, 0."""

_CPU: Device = ("cpu", 0)


class Bound:
    """The tensors of one choice in the memory of the device, and the bindings that nobody uses now."""

    def __init__(self, inference: Any, held: Mapping[str, Any]) -> None:
        self.held, self._inference = held, inference
        self._new = [self._made()]  # now, and not in the first run after a change of adapters
        self._free: dict[tuple[str, ...], list[Any]] = {}
        self._lock = threading.Lock()

    def take(self, names: tuple[str, ...]) -> Any:
        """A binding for runs that feed these names, and no other: what is bound cannot be taken out of it again."""
        with self._lock:
            if free := self._free.get(names) or self._new:
                return free.pop()
        return self._made()

    def _made(self) -> Any:
        binding = self._inference.io_binding()
        for name, value in self.held.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def give_back(self, names: tuple[str, ...], binding: Any) -> None:
        """For the next run."""
        with self._lock:
            self._free.setdefault(names, []).append(binding)


class Pooled:
    """Runs choices by bindings of their own. ``device`` is where adapters lie."""

    def __init__(self, runtime: Any, inference: Any, device: Device) -> None:
        self._runtime, self._inference, self._device = runtime, inference, device
        self._nothing = runtime.OrtValue.ortvalue_from_numpy(np.zeros(0, np.float32))

    def hold(self, tensors: Mapping[str, Array]) -> Bound:
        """What a choice feeds, brought to the device."""
        return Bound(self._inference, {name: self._value(t, self._device) for name, t in tensors.items()})

    def run(self, chosen: Bound, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Array]:
        """The outputs, as arrays of the caller's own. Feeds are arrays or OrtValues."""
        names = tuple(sorted(feeds))
        binding = chosen.take(names)
        for name, value in feeds.items():
            held = value if isinstance(value, self._runtime.OrtValue) else self._value(np.asarray(value), _CPU)
            binding.bind_ortvalue_input(name, held)
        binding.clear_binding_outputs()
        for name in outputs:
            binding.bind_output(name)
        self._inference.run_with_iobinding(binding)  # what fails is not given back
        found: list[Array] = binding.copy_outputs_to_cpu()
        for name in names:  # a caller's inputs, a cache of keys and values perhaps, are let go
            binding.bind_ortvalue_input(name, self._nothing)
        binding.clear_binding_outputs()
        chosen.give_back(names, binding)
        return found

    def _value(self, tensor: Array, device: Device) -> Any:
        return tort.value(self._runtime.OrtValue, np.ascontiguousarray(tensor).reshape(tensor.shape), *device)
