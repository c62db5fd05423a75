"""A slot: the inputs of a graph through which one target is fed. Zeros in all of them change nothing, and nor does a pair of rank 0.

    y' = y ⊙ (1 + gain) − bias ⊙ gain + x·A·B

The gain is there where a DoRA is to be fed: m/‖V‖ − 1, by which B is multiplied too. ``pairs`` says how A and B lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from loraformat.errors import fault
from loraformat.parts import Lora
from loraformat_converters.onnx.attaching.pairs import Form

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Gain", "Slot"]


@dataclass(frozen=True)
class Gain:
    """The input for m/‖V‖ − 1 of a DoRA.

    Attributes:
        shape: [out] as it meets the output.
        weight: the stored tensor that V is made of.
        out: the axes of that tensor which are out.
        rows: [start, stop) of its matrix that V is, where it holds several parameters.
    """

    name: str
    shape: tuple[int, ...]
    weight: str
    out: tuple[int, ...]
    rows: tuple[int, int] | None = None

    def as_json(self) -> list[Any]:
        """For the model's metadata."""
        return [self.name, list(self.shape), self.weight, list(self.out), *([list(self.rows)] if self.rows else [])]

    @classmethod
    def from_json(cls, held: Any) -> Gain:
        """The way back; ValueError or TypeError where it is none."""
        name, shape, weight, out, *more = held
        rows = None
        if more:
            ((start, stop),) = more
            rows = int(start), int(stop)
        return cls(str(name), tuple(map(int, shape)), str(weight), tuple(map(int, out)), rows)


@dataclass(frozen=True)
class Slot:
    """One target's inputs.

    Attributes:
        a, b: the names of two.
        a_shape, b_shape: None is the rank.
        dtype: numpy's word.
        rank: what an adapter of a smaller rank is filled up to; None where any rank is taken.
        gain: the third; None where only plain pairs are fed.
        scale: what the graph multiplies x·A·B by: 1, but in what others made.
    """

    key: str
    a: str
    b: str
    a_shape: tuple[int | None, ...]
    b_shape: tuple[int | None, ...]
    dtype: str
    form: Form = "linear"
    rank: int | None = None
    gain: Gain | None = None
    scale: float = 1.0

    @property
    def inputs(self) -> dict[str, tuple[int | None, ...]]:
        """Name → shape."""
        more = {self.gain.name: self.gain.shape} if self.gain else {}
        return {self.a: self.a_shape, self.b: self.b_shape, **more}

    @property
    def matrix_shape(self) -> tuple[int | None, int]:
        """(out, in) of what a pair without a batch gives."""
        if self.form == "linear":
            return self.b_shape[-1], int(self.a_shape[-2] or 0)
        return self.b_shape[0], math.prod(n or 0 for n in self.a_shape[1:])

    def off(self) -> dict[str, Array]:
        """What changes nothing, by input."""
        sizes = {name: [self._least if n is None else n for n in shape] for name, shape in self.inputs.items()}
        return {name: np.zeros(shape, self._dtype) for name, shape in sizes.items()}

    def feeds(self, a: Array, b: Array, gain: Array | None = None) -> dict[str, Array]:
        """What is fed of a pair, and of a gain [out], in the slot's own dtype and rank.

        Raises:
            LoraFormatError: LF-606 other sizes, or a rank over the slot's; LF-612 a value beyond the dtype.
        """
        found = dict(zip((self.a, self.b), self._filled(a, b), strict=True))
        if gain is not None and self.gain is not None:
            found[self.gain.name] = self._cast(gain.reshape(self.gain.shape))
        return found

    def read(self, tensors: Mapping[str, Array]) -> tuple[Lora, Array | None]:
        """The pair and the gain that are fed, without what fills a rank up; LF-606 where they do not fit the slot."""
        given = {**self.off(), **{name: tensors[name] for name in self.inputs if name in tensors}}
        a, b = self._filled(given[self.a], given[self.b])
        if self.form == "linear":
            one, other = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
        else:
            one, other = a.reshape(len(a), -1 if len(a) else 1), b.reshape(b.shape[:2])
        rank = np.arange(other.ndim - 1)  # all axes of B but the last, and of A but that before the last
        used = one.any(axis=tuple(i for i in range(one.ndim) if i != one.ndim - 2)) | other.any(axis=tuple(rank))
        return Lora(one[..., used, :], other[..., used], self.scale, "factor"), self._gain(given)

    def as_json(self) -> dict[str, Any]:
        """For the model's metadata."""
        held: dict[str, Any] = {
            "a": self.a, "b": self.b, "a_shape": list(self.a_shape), "b_shape": list(self.b_shape),
            "dtype": self.dtype, "form": self.form, "rank": self.rank,
        }  # fmt: skip
        if self.gain is not None:
            held["gain"] = self.gain.as_json()
        return held if self.scale == 1.0 else {**held, "scale": self.scale}

    @classmethod
    def from_json(cls, key: str, entry: Mapping[str, Any]) -> Slot:
        """The way back; ValueError, KeyError or TypeError where it is no such object."""
        a, b = (tuple(None if n is None else int(n) for n in entry[side]) for side in ("a_shape", "b_shape"))
        rank = None if entry["rank"] is None else int(entry["rank"])
        sizes = [n for n in (*a, *b, rank) if n is not None]
        if any(shape.count(None) != 1 for shape in (a, b)) or entry["form"] not in ("linear", "conv"):
            raise ValueError(f"no slot: {key}")
        if any(not 0 < n < 2**31 for n in sizes):
            raise ValueError(f"no sizes: {sizes}")
        gain = Gain.from_json(entry["gain"]) if "gain" in entry else None
        return cls(key, str(entry["a"]), str(entry["b"]), a, b, str(entry["dtype"]), entry["form"], rank, gain)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def _least(self) -> int:
        """The smallest rank that is fed. A convolution of no channels is not 0 in ONNX Runtime before 1.32: it writes nothing."""
        least = 1 if self.form == "conv" else 0
        return least if self.rank is None else self.rank

    def _filled(self, a: Array, b: Array) -> tuple[Array, Array]:
        ranks = [
            shape[self._axis(own)]
            for shape, own in ((a.shape, self.a_shape), (b.shape, self.b_shape))
            if len(shape) == len(own)
        ]
        if not (_fits(a.shape, self.a_shape) and _fits(b.shape, self.b_shape) and len(set(ranks)) == 1):
            what = f"the pair lies as A {list(a.shape)}, B {list(b.shape)}; the slots are {_told(self.a_shape)}, {_told(self.b_shape)}"
            raise fault("LF-606", what, where=self.key, fix="is this the model that the adapter is for?")
        if self.rank is not None and ranks[0] > self.rank:
            what = f"rank {ranks[0]}, and the model was given slots of rank {self.rank}"
            raise fault("LF-606", what, where=self.key, fix="attach again with a larger --pad-rank")
        cast, lacking = [self._cast(value) for value in (a, b)], self._least - ranks[0]
        if lacking <= 0:
            return cast[0], cast[1]
        more = [[(0, lacking if n is None else 0) for n in shape] for shape in (self.a_shape, self.b_shape)]
        return np.pad(cast[0], more[0]), np.pad(cast[1], more[1])

    def _gain(self, given: Mapping[str, Array]) -> Array | None:
        """[out]; None where it is 0."""
        if self.gain is None or not (found := given[self.gain.name]).any():
            return None
        if found.shape != self.gain.shape:
            what = f"its gain is {list(found.shape)}; the slot is {list(self.gain.shape)}"
            raise fault("LF-606", what, where=self.key, fix="is this the model that the adapter is for?")
        return found.reshape(-1)

    def _cast(self, value: Array) -> Array:
        with np.errstate(over="ignore"):
            made = np.ascontiguousarray(value.astype(self._dtype))
        if not np.isfinite(made.astype(np.float64)).all():
            raise fault("LF-612", f"a value is beyond {self.dtype}", where=self.key)
        return made

    @staticmethod
    def _axis(shape: Sequence[int | None]) -> int:
        return list(shape).index(None)


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or n == w for n, w in zip(shape, wanted, strict=True))


def _told(shape: Iterable[int | None]) -> str:
    return f"[{', '.join('r' if n is None else str(n) for n in shape)}]"
