"""Buffers that stay where they are, for CUDA graphs.

A captured graph reads and writes the addresses that it was captured with: an input that is bound to another value is
ignored in silence (onnxruntime#29782). So every input and output has a buffer of its own, and all slots lie in one, filled
up to their rank: another adapter is one copy into it, from where it lies on the device. Runs follow each other, because
the buffers are one.

Where nothing is captured (on the CPU) all of it works alike.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from loraformat_converters.onnx import tort
from loraformat_converters.onnx.attaching.slots import Slots
from loraformat_converters.onnx.running.pooled import Device

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Captured"]

_ALIGNMENT = 256
"""Of every slot in the buffer: what cudaMalloc gives, on which the kernels of cuBLAS may count."""

_NOT_CAPTURED = -1
"""The graph's number with which a run is only run (onnxruntime_run_options_config_keys.h, gpu_graph_id)."""

_BFLOAT16 = 16
"""TensorProto's number: numpy has no word for it that ONNX Runtime knows."""


@dataclass(frozen=True)
class _Place:
    """Where a slot lies in the buffer."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class _Capture:
    """What one set of input shapes is run with: its graph's number is in the options."""

    binding: Any
    inputs: Mapping[str, Any]
    options: Any


@dataclass(frozen=True, eq=False)
class _Held:
    """The bytes of the whole buffer with one choice in it."""

    value: Any = field(repr=False)


class Captured:
    """Runs choices by copying them into one buffer.

    Args:
        slots: of a swap, with a rank (--pad-rank).
        fixed: input → a value on the device whose owner changes it in place.
    """

    def __init__(
        self, runtime: Any, inference: Any, device: Device, slots: Slots | None, fixed: Mapping[str, Any] | None = None
    ) -> None:
        self._runtime, self._inference, self._device = runtime, inference, device
        self._fixed = fixed or {}
        self._places, size = _laid(slots)
        self._buffer = self._value(np.zeros(max(size, 1), np.uint8))
        self._between = _copies(self._value(np.zeros(1, np.uint8)), self._value(np.zeros(1, np.uint8)))
        self._acts: _Held | None = None
        self._captures: dict[object, _Capture] = {}
        self._lock = threading.Lock()

    def hold(self, tensors: Mapping[str, Array]) -> _Held:
        """What a choice feeds, as the buffer will hold it, on the device where that can be copied from."""
        flat = np.zeros(self._buffer.shape(), np.uint8)
        for name, tensor in tensors.items():
            place = self._places[name]
            flat[place.offset : place.offset + tensor.nbytes] = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        return _Held(self._value(flat) if self._between else flat)

    def run(self, chosen: _Held, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[Array]:
        """The outputs, as arrays of the caller's own. Feeds are arrays or OrtValues."""
        arrays = {name: self._array(value) for name, value in feeds.items()}
        key = tuple((name, a.shape, a.dtype.str) for name, a in sorted(arrays.items())), tuple(outputs)
        with self._lock:
            if self._acts is not chosen:
                self._acts = None  # until the copy is whole
                self._buffer.update_inplace(chosen.value)
                self._acts = chosen
            if key not in self._captures:
                self._captures[key] = self._captured(arrays, outputs)
            capture = self._captures[key]
            for name, array in arrays.items():
                capture.inputs[name].update_inplace(array)
            capture.binding.synchronize_inputs()  # the copies are of another stream than the run
            self._inference.run_with_iobinding(capture.binding, capture.options)
            capture.binding.synchronize_outputs()
            return [np.array(output) for output in capture.binding.copy_outputs_to_cpu()]

    def _captured(self, arrays: Mapping[str, Array], outputs: Sequence[str]) -> _Capture:
        """Buffers for inputs of these shapes and what the model gives for them; the next run is captured."""
        binding = self._inference.io_binding()
        inputs = {name: self._value(array.copy()) for name, array in arrays.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, place in self._places.items():
            kind = _BFLOAT16 if place.dtype == ml_dtypes.bfloat16 else place.dtype.type
            address = self._buffer.data_ptr() + place.offset
            binding.bind_input(name, *self._device, kind, list(place.shape), address)
        for name, value in self._fixed.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, *self._device)
        binding.synchronize_inputs()
        self._inference.run_with_iobinding(binding, self._options(_NOT_CAPTURED))  # it tells the shapes of the outputs
        for name, value in zip(outputs, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, value)
        return _Capture(binding, inputs, self._options(len(self._captures) + 1))

    def _options(self, number: int) -> Any:
        options = self._runtime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        return options

    def _array(self, value: Any) -> Array:
        held = value.numpy() if isinstance(value, self._runtime.OrtValue) else np.asarray(value)
        return np.ascontiguousarray(held, held.dtype.newbyteorder("=")).reshape(held.shape)

    def _value(self, tensor: Array) -> Any:
        return tort.value(self._runtime.OrtValue, tensor, *self._device)


def _laid(slots: Slots | None) -> tuple[dict[str, _Place], int]:
    """(input → its place, the size of all)."""
    places, end = {}, 0
    for name, none in slots.off().items() if slots else ():
        places[name] = _Place(end, none.shape, none.dtype)
        end += -(-none.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _copies(one: Any, other: Any) -> bool:
    """Whether this onnxruntime copies from one of its values into another; older ones take arrays alone."""
    try:
        one.update_inplace(other)
    except Exception:  # a TypeError of pybind11, or an error of the provider
        return False
    return True
