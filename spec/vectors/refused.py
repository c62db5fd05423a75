"""What a reader must refuse with a base at hand: a conforming file, one of its targets, a base tensor, the rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from vector import numbers


@dataclass(frozen=True)
class Refusal:
    """One request to apply a target that has to be refused.

    Attributes:
        path: of the file, below the folder of the vectors.
        base: shape of the base tensor, None where the base has none of that name.
        fill: its values, where they are not to be drawn.
        seed: of its values; default: the title.
        times: what they are multiplied by.
    """

    rule: str
    title: str
    path: str
    key: str
    base: tuple[int, ...] | None
    fill: float | None = None
    seed: str = ""
    times: float = 1

    def as_json(self) -> dict[str, Any]:
        """The entry in the index."""
        entry: dict[str, Any] = {"path": self.path, "key": self.key, "rule": self.rule, "title": self.title}
        if self.base is None:
            return entry | {"base": None}
        drawn = np.float32(self.times) * numbers(self.seed or self.title, *self.base)
        values = drawn if self.fill is None else np.full(self.base, self.fill)
        return entry | {"base": {"shape": list(self.base), "values": values.reshape(-1).tolist()}}


REFUSALS = [
    Refusal("LF-602", "a replaced tensor that the base lacks", "valid/replace.safetensors", "head.weight", None),
    Refusal("LF-602", "a changed tensor that the base lacks", "valid/linear.safetensors", "layer.weight", None),
    Refusal("LF-604", "an unplaced pair", "valid/linear_unplaced.safetensors", "layer.weight", (5, 7)),
    Refusal("LF-606", "a base tensor of another width", "valid/linear.safetensors", "layer.weight", (5, 8)),
    Refusal("LF-606", "a base tensor that lies transposed", "valid/linear.safetensors", "layer.weight", (7, 5)),
    Refusal("LF-606", "replace without resize", "valid/replace.safetensors", "head.weight", (4, 2)),
    Refusal("LF-606", "rows beyond the base tensor", "valid/rows_unplaced.safetensors", "wte.weight", (8, 6)),
    Refusal("LF-606", "rows of another width", "valid/rows_unplaced.safetensors", "wte.weight", (11, 5)),
    Refusal("LF-607", "another base of the same shape", "valid/bound.safetensors", "linear", (5, 7)),
    Refusal("LF-607", "a base that no sketch recognises", "valid/recognised.safetensors", "rounded", (9, 7)),
    Refusal("LF-607", "another base where the sketch tells no scale", "valid/recognised.safetensors", "unit", (9, 7)),
    *(
        Refusal(
            "LF-616",
            f"{what} the base",
            "valid/recognised.safetensors",
            "rounded",
            (9, 7),
            None,
            "recognised/rounded/W",
            times,
        )
        for what, times in (("an eighth of", 0.125), ("1/√2 of", 0.5**0.5), ("√2 times", 2**0.5), ("twice", 2))
    ),
    Refusal("LF-612", "a magnitude of nothing", "valid/magnitude_alone.safetensors", "w", (5, 7), 0.0),
]
