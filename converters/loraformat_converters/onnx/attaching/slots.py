"""Slots: the inputs of a graph through which a pair A, B is fed.

``pairs`` says how a pair lies in them, ``slot_names`` what they are called.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import canonical
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import nearest
from loraformat.parts import Lora
from loraformat.sketch import ACCEPT, SIZE, cosine
from loraformat_converters.onnx.attaching.pairs import Form, folded, laid
from loraformat_converters.onnx.tort import version_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter

    Array = npt.NDArray[Any]

__all__ = ["Slot", "Slots"]


@dataclass(frozen=True)
class Slot:
    """One target's two inputs.

    Attributes:
        a, b: their names.
        a_shape, b_shape: None is the rank.
        dtype: numpy's word.
        rank: what an adapter of a smaller rank is filled up to; None where any rank is taken.
    """

    key: str
    a: str
    b: str
    a_shape: tuple[int | None, ...]
    b_shape: tuple[int | None, ...]
    dtype: str
    form: Form = "linear"
    rank: int | None = None

    def default(self) -> tuple[Array, Array]:
        """A pair that changes nothing."""
        from ml_dtypes import bfloat16

        dtype = bfloat16 if self.dtype == "bfloat16" else self.dtype
        a, b = ([self.rank or 0 if n is None else n for n in shape] for shape in (self.a_shape, self.b_shape))
        return np.zeros(a, dtype), np.zeros(b, dtype)

    def filled(self, a: Array, b: Array) -> tuple[Array, Array]:
        """A and B as they are fed, in the slot's own dtype and rank.

        Raises:
            LoraFormatError: LF-606 other sizes, or a rank over the slot's; LF-612 a value beyond the dtype.
        """
        none_a, none_b = self.default()
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
        cast = [self._cast(value, none.dtype) for value, none in ((a, none_a), (b, none_b))]
        if self.rank is None:
            return cast[0], cast[1]
        more = [
            [(0, (self.rank or 0) - ranks[0] if n is None else 0) for n in shape]
            for shape in (self.a_shape, self.b_shape)
        ]
        return np.pad(cast[0], more[0]), np.pad(cast[1], more[1])

    def pair(self, a: Array, b: Array) -> Lora:
        """What two tensors that are fed mean; LF-606 where they do not fit the slot."""
        a, b = self.filled(a, b)
        if self.form == "linear":
            one, other = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
        else:
            one, other = a.reshape(len(a), -1 if len(a) else 1), b.reshape(b.shape[:2])
        rank = np.arange(other.ndim - 1)  # all axes of B but the last, and of A but that before the last
        used = one.any(axis=tuple(i for i in range(one.ndim) if i != one.ndim - 2)) | other.any(axis=tuple(rank))
        return Lora(one[..., used, :], other[..., used], 1.0, "factor")

    def _cast(self, value: Array, dtype: np.dtype[Any]) -> Array:
        with np.errstate(over="ignore"):
            made = np.ascontiguousarray(value.astype(dtype))
        if not np.isfinite(made.astype(np.float64)).all():
            raise fault("LF-612", f"a value is beyond {self.dtype}", where=self.key)
        return made

    @staticmethod
    def _axis(shape: Sequence[int | None]) -> int:
        return list(shape).index(None)


@dataclass(frozen=True)
class Slots:
    """All slots of a model, and the SHA-256 of the model without them.

    Attributes:
        sketches: of the weights that the slots stand beside, as far as they are known: where a bound adapter was attached.
    """

    slots: Mapping[str, Slot]
    base: str
    required: bool = False
    sketches: Mapping[str, Array] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """What ``model_version`` says in an adapter's file that is for these slots of this model."""
        return version_of(canonical.dumps([self.base, self.as_json()["slots"]]).encode())

    def as_json(self) -> dict[str, Any]:
        """For the model's metadata."""
        held = {
            key: {
                "a": s.a, "b": s.b, "a_shape": list(s.a_shape), "b_shape": list(s.b_shape),
                "dtype": s.dtype, "form": s.form, "rank": s.rank,
            }
            for key, s in self.slots.items()
        }  # fmt: skip
        drawn = {key: base64.b64encode(values.tobytes()).decode() for key, values in self.sketches.items()}
        return {"slots": held, "required": self.required} | ({"sketches": drawn} if drawn else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any], base: str) -> Slots:
        """The way back; ValueError, KeyError or TypeError where it is no such object."""
        slots = {}
        for key, entry in value["slots"].items():
            a, b = (tuple(None if n is None else int(n) for n in entry[side]) for side in ("a_shape", "b_shape"))
            if any(shape.count(None) != 1 for shape in (a, b)) or entry["form"] not in ("linear", "conv"):
                raise ValueError(f"no slot: {key}")
            rank = None if entry["rank"] is None else int(entry["rank"])
            slots[key] = Slot(key, str(entry["a"]), str(entry["b"]), a, b, str(entry["dtype"]), entry["form"], rank)
        sketches = {k: np.frombuffer(base64.b64decode(v), np.float32) for k, v in value.get("sketches", {}).items()}
        if any(drawn.size != SIZE for drawn in sketches.values()):
            raise ValueError("no sketch")
        return cls(slots, base, bool(value["required"]), sketches)

    def check_base(self, adapter: Adapter) -> None:
        """LF-607 where the adapter is bound to weights that are not like those of the slots, as far as both are known."""
        problems = []
        for key, update in adapter.items():
            drawn = self.sketches.get(key)
            if drawn is None or update.sketch is None or not update.sketch.any():
                continue
            if (like := cosine(update.sketch, drawn)) < ACCEPT:
                what = f"the model's weight is not like the tensor that the adapter was bound to: their sketches have cosine {like:.2f}"
                problems.append(
                    Problem("LF-607", what, key, "is this the model that it is for? any_base=True takes it")
                )
        if problems:
            raise LoraFormatError(problems)

    def feeds(self, adapter: Adapter) -> dict[str, Array]:
        """Input → values: of the slots that the adapter has; of all where the model requires them.

        Raises:
            LoraFormatError: LF-602 a target without a slot; LF-508 a change that is no plain pair; LF-606, LF-612.
        """
        problems: list[Problem] = []
        found: dict[str, Array] = {}
        for key, update in adapter.items():
            try:
                slot = self.slots.get(key) or self._missing(key)
                a, b = slot.filled(*laid(key, folded(update), slot.form, slot.a_shape[2:]))
                found |= {slot.a: a, slot.b: b}
            except LoraFormatError as error:
                problems += error.problems
        if problems:
            raise LoraFormatError(problems)
        if self.required:
            for slot in self.slots.values():
                if slot.a not in found:
                    found |= dict(zip((slot.a, slot.b), slot.default(), strict=True))
        return found

    def adapter(self, tensors: Mapping[str, Array]) -> Adapter:
        """The way back: what is fed as an adapter, without the columns of zeros that fill a rank up.

        Raises:
            LoraFormatError: LF-602 a tensor that no slot takes; LF-606 sizes that do not fit.
        """
        from loraformat.adapter import Adapter
        from loraformat.updates import Update

        names = {name for slot in self.slots.values() for name in (slot.a, slot.b)}
        if strange := [name for name in tensors if name not in names]:
            raise LoraFormatError([Problem("LF-602", "the model has no input of this name", name) for name in strange])
        targets = {}
        for key, slot in self.slots.items():
            if slot.a in tensors or slot.b in tensors:
                pair = slot.pair(
                    *(tensors.get(name, none) for name, none in zip((slot.a, slot.b), slot.default(), strict=True))
                )
                if pair.r:
                    targets[key] = Update((pair,))
        return Adapter(targets)

    def _missing(self, key: str) -> Slot:
        close = nearest(key, self.slots, 2)
        near = f"; nearest: {', '.join(close)}" if close else ""
        fix = "attach again with --targets, or with this adapter among the others"
        raise fault("LF-602", f"the model has no slot for it{near}", where=key, fix=fix)


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or n == w for n, w in zip(shape, wanted, strict=True))


def _told(shape: Iterable[int | None]) -> str:
    return f"[{', '.join('r' if n is None else str(n) for n in shape)}]"
