"""A quantised tensor of a model in GGUF: its blocks are quantised anew, each with a scale of its own, as llama.cpp does it.

That is the work of the package gguf, whose numpy code gives the bytes that ggml's gives. Of a block in which nothing
changes the bytes stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.errors import fault
from loraformat_converters.gguf.file import TYPES, GgufFile, dequantised

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["QUANTISED", "Blocks"]

QUANTISED = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that gguf 0.19.0 quantises to; the K-types, which search for their scales, only llama.cpp itself."""

_SIZES = {name: (values, width) for name, values, width in TYPES.values()}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A ``loraformat.checkpoint.requantised.Grid`` of the tensor ``tensor``; only of ``QUANTISED`` there is a nearest."""

    file: GgufFile
    tensor: str
    step = 1

    @property
    def name(self) -> str:
        """ggml's name of the type."""
        return self.file.infos[self.tensor].type

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.file.infos[self.tensor].shape

    @property
    def nbytes(self) -> int:
        """As stored."""
        info = self.file.infos[self.tensor]
        return info.stop - info.start

    def run(self, start: int, stop: int) -> _Run:
        """The rows [start, stop) of the first axis."""
        shape = (stop - start, *self.shape[1:])
        return _Run(self.tensor, self.name, shape, self.file.stored(self.tensor, (start, stop)))


@dataclass(frozen=True, slots=True)
class _Run:
    tensor: str
    type: str
    shape: tuple[int, ...]
    stored: Array

    def means(self, stored: Array) -> F32:
        return np.asarray(dequantised(self.tensor, self.type, stored), np.float32).reshape(self.shape)

    def nearest(self, wanted: F32) -> Array:
        try:
            from gguf import GGMLQuantizationType, quants
        except ImportError:
            what = f"the tensor is quantised as {self.type}, to which the package gguf rounds"
            raise fault("LF-704", what, where=self.tensor, fix="pip install 'loraformat[gguf]'") from None
        count, width = _SIZES[self.type]
        new = quants.quantize(wanted, GGMLQuantizationType[self.type]).reshape(-1, width)
        same = (wanted == self.means(self.stored)).reshape(-1, count).all(axis=1, keepdims=True)
        return np.asarray(np.where(same, self.stored.reshape(-1, width), new), np.uint8).reshape(self.stored.shape)
