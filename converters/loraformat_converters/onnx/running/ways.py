"""How an attached model is told which adapter acts: by the record in its metadata, what each choice feeds.

swap      the slots, a pair for each target
stack     ``lora.index`` or ``lora.weights``, an entry for each row
branch    ``lora.scale`` of each adapter, with --live-scale
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import canonical
from loraformat.errors import fault
from loraformat.names import nearest
from loraformat_converters.onnx.attaching.slots import Slots

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Choice", "Ways", "known", "weights_of"]

Choice = str | Mapping[str, float] | None
"""One adapter, a blend, or the bare base."""


@dataclass(frozen=True)
class Ways:
    """What the record of a model says.

    Attributes:
        path: of the model, for its faults.
        attached: the names of what is in it, or was written beside it.
        slots: of a swap.
        rows, select: of a stack: input → the axis that counts the rows, and ``index`` or ``weights``.
        strengths: the inputs of --live-scale.
    """

    path: str
    attached: Sequence[str] = ()
    slots: Slots | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    select: str = ""
    strengths: Sequence[str] = ()

    @classmethod
    def of(cls, props: Mapping[str, str], path: str) -> Ways:
        """From a model's metadata; LF-613 where the record cannot be read."""
        if "loraformat.attached" not in props:
            return cls(path)
        try:
            names = [str(entry["name"]) for entry in canonical.loads(props["loraformat.attached"])]
            base = dict(canonical.loads(props["loraformat.base"]))
            if "slots" in base:
                return cls(path, names, Slots.from_json(base["slots"], str(base["sha256"])))
            if "stack" in base:
                rows = {str(name): int(axis) for name, axis in base["stack"]["rows"].items()}
                if (select := base["stack"]["select"]) not in ("index", "weights"):
                    raise ValueError(select)
                return cls(path, names, None, rows, select)
            return cls(path, names, strengths=[str(name) for name in base.get("inputs", ())])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise fault(
                "LF-613", "the record of what is attached cannot be read", fix="attach to the original model again"
            ) from None

    @property
    def stacked(self) -> bool:
        """Whether each row chooses."""
        return bool(self.select)

    @property
    def dtypes(self) -> dict[str, str]:
        """What attach made inputs of: input → numpy's word for its type."""
        if self.stacked:
            return {"lora.index": "int64"} if self.select == "index" else {"lora.weights": "float32"}
        return self.slots.dtypes if self.slots else dict.fromkeys(self.strengths, "float32")

    def by_row(
        self, feeds: Mapping[str, Array], rows: Sequence[Mapping[str, float]] | None, every: Mapping[str, float]
    ) -> dict[str, Array]:
        """What a stack is fed: the choice of each row, or ``every`` where no rows are told apart."""
        counts = {_rows(name, feeds[name], axis) for name, axis in self.rows.items() if name in feeds}
        given = [every] * max(counts, default=0) if rows is None else rows
        if counts and counts != {len(given)}:
            raise fault(
                "LF-705", f"{len(given)} rows are chosen for, and the inputs have {' and '.join(map(str, counts))}"
            )
        if self.select == "index":
            place = {name: n for n, name in enumerate(self.attached, 1)}
            return {"lora.index": np.array([place[next(iter(row))] if row else 0 for row in given], np.int64)}
        return {"lora.weights": np.array([[row.get(name, 0.0) for name in self.attached] for row in given], np.float32)}

    def check_rows(self, rows: Sequence[Mapping[str, float]]) -> None:
        """LF-705 where a row asks for more than the model chooses by."""
        if self.select == "index" and any(list(row.values()) not in ([], [1.0]) for row in rows):
            raise fault(
                "LF-705",
                "each row of this model chooses one adapter, as it is",
                fix="attach with --select weights for a mixture",
            )

    def by_strength(self, weights: Mapping[str, float]) -> dict[str, Array]:
        """The inputs of --live-scale; an adapter that is not named is off. LF-705 where the model has none."""
        if not self.strengths or len(self.strengths) != len(self.attached):
            fix = "attach with --mode swap, --mode stack or --live-scale"
            raise fault("LF-705", f"{self.path} has no input by which an adapter could be chosen", fix=fix)
        named = zip(self.strengths, self.attached, strict=True)
        return {at: np.array(weights.get(name, 0.0), np.float32) for at, name in named}


def _rows(name: str, value: Any, axis: int) -> int:
    """How many rows an input has: an array, or an OrtValue."""
    sizes = value.shape() if callable(getattr(value, "shape", None)) else np.shape(value)
    if axis >= len(sizes):
        raise fault("LF-705", f"its axis {axis} counts the rows, and it has sizes {list(sizes)}", where=name)
    return int(sizes[axis])


def weights_of(choice: Choice, names: Sequence[str]) -> dict[str, float]:
    """Name → weight; what weighs nothing is left out. LF-705 of a name that is none of these, or no number."""
    if not (choice is None or isinstance(choice, (str, Mapping))):
        raise fault("LF-705", f"an adapter is chosen by its name, several by names and weights, not by {choice!r}")
    weights = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else dict(choice)
    for name in weights:
        known(name, names)
    if not all(isinstance(weight, (Real, np.bool_)) and math.isfinite(weight) for weight in weights.values()):
        raise fault("LF-705", f"weights must be finite numbers, not {list(weights.values())}")
    return {name: float(weight) for name, weight in sorted(weights.items()) if weight}


def known(name: str, names: Sequence[str]) -> None:
    """LF-705 of a name that is none of these."""
    if name not in names:
        close = nearest(str(name), names, 1)
        mean = f"did you mean {close[0]}?" if close else f"there is {', '.join(names) or 'none'}"
        raise fault("LF-705", f"no adapter is called {name}", fix=mean)
