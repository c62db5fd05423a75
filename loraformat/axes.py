"""Placement: how the matrix of an update lies in its base tensor.

A factor pair gives a matrix [*batch, out, in]. A base tensor holds the same numbers in its own order of axes:
``matrix = transpose(W, batch + out + in)`` reshaped row-major. A torch Linear is out [0], in [1]; a Conv1D of
Hugging Face or a JAX kernel out [1], in [0]; a torch convolution out [0], in [1, 2, 3].
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Placement", "Rows"]

Group = Literal["out", "in", "batch"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Which part of the matrix a run of rows of the base tensor (its axis 0) is.

    Attributes:
        placement: of the run itself.
        group: the side of the matrix that axis 0 belongs to.
        index: into that side of the flattened matrix; for ``batch``, into batch axis number ``position``.
    """

    placement: Placement
    group: Group
    index: slice | npt.NDArray[np.intp]
    position: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Shape of the base tensor and which of its axes are out, in and batch, each list in order."""

    shape: tuple[int, ...]
    out: tuple[int, ...]
    in_: tuple[int, ...]
    batch: tuple[int, ...] = ()

    @classmethod
    def of(cls, shape: tuple[int, ...], spec: str) -> Placement:
        """From one word an axis: ``out,in`` (Linear), ``in,out`` (Conv1D), ``in1,in2,in0,out`` (JAX conv).

        A number fixes the position in an ordered list; without numbers the order is that of the axes.

        >>> Placement.of((3, 3, 8, 16), "in1,in2,in0,out").in_
        (2, 0, 1)
        """
        groups: dict[str, list[tuple[int, int]]] = {"out": [], "in": [], "batch": []}
        words = [w.strip() for w in spec.split(",")]
        if len(words) != len(shape):
            raise ValueError(f"{spec!r} names {len(words)} axes, the tensor has {len(shape)}: {list(shape)}")
        for axis, word in enumerate(words):
            match = re.fullmatch(r"(out|in|batch)(\d*)", word)
            if match is None:
                raise ValueError(f"{word!r} in {spec!r} is not out, in or batch (optionally with a number)")
            groups[match[1]].append((int(match[2] or axis), axis))
        out, in_, batch = (tuple(axis for _, axis in sorted(groups[g])) for g in ("out", "in", "batch"))
        return cls(shape, out, in_, batch)

    @property
    def spec(self) -> str:
        """The words that ``of`` takes, for messages."""
        lists = (("out", self.out), ("in", self.in_), ("batch", self.batch))
        words = {axis: (name, i, len(axes)) for name, axes in lists for i, axis in enumerate(axes)}
        ordered = all(list(axes) == sorted(axes) for _, axes in lists)
        return ",".join(
            words[a][0] if ordered or words[a][2] == 1 else f"{words[a][0]}{words[a][1]}"
            for a in range(len(self.shape))
        )

    def fault(self) -> str | None:
        """Why this is no placement, or None: every axis stands in exactly one list, and there is an out axis."""
        axes = [*self.batch, *self.out, *self.in_]
        if sorted(axes) != list(range(len(self.shape))):
            return f"axes {self.as_json()['axes']} must name each of the {len(self.shape)} axes exactly once"
        if not self.out and self.shape:
            return "axes.out is empty"
        if any(n < 1 for n in self.shape):
            return f"shape {list(self.shape)} has an empty axis"
        return None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[a] for a in self.batch)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*batch, out, in)."""
        sizes = (math.prod(self.shape[a] for a in axes) for axes in (self.out, self.in_))
        return (*self.batch_sizes, *sizes)

    def without(self, axis: int) -> Placement:
        """The placement in one slice of the tensor along a batch axis."""
        lower = (tuple(a - (a > axis) for a in axes if a != axis) for axes in (self.out, self.in_, self.batch))
        return Placement((*self.shape[:axis], *self.shape[axis + 1 :]), *lower)

    def to_matrix(self, tensor: Array) -> Array:
        """The base tensor as a matrix [*batch, out, in]; a view where numpy can give one."""
        return tensor.transpose(*self.batch, *self.out, *self.in_).reshape(self.matrix_shape)

    def from_matrix(self, matrix: Array) -> Array:
        """A matrix [*batch, out, in] as the base tensor; a batch size of 1 is broadcast."""
        order = (*self.batch, *self.out, *self.in_)
        if matrix.shape != self.matrix_shape:
            import numpy as np

            matrix = np.broadcast_to(matrix, self.matrix_shape)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape([self.shape[a] for a in order]).transpose(inverse)

    def rows(self, start: int, stop: int) -> Rows:
        """The run [start, stop) of axis 0: what a tile of the base tensor is in terms of the matrix."""
        part = replace(self, shape=(stop - start, *self.shape[1:]))
        if 0 in self.batch:
            return Rows(part, "batch", slice(start, stop), self.batch.index(0))
        group: Group = "out" if 0 in self.out else "in"
        axes = self.out if group == "out" else self.in_
        sizes = [self.shape[a] for a in axes]
        if axes[0] == 0:  # the leading axis of its side: a run of rows is a run of the matrix
            inner = math.prod(sizes[1:])
            return Rows(part, group, slice(start * inner, stop * inner))
        import numpy as np

        grid = np.arange(math.prod(sizes)).reshape(sizes)
        return Rows(part, group, grid.take(range(start, stop), axis=axes.index(0)).reshape(-1))

    def as_json(self) -> dict[str, Any]:
        """``shape`` and ``axes`` as the file stores them."""
        axes: dict[str, list[int]] = {"out": list(self.out), "in": list(self.in_)}
        if self.batch:
            axes["batch"] = list(self.batch)
        return {"shape": list(self.shape), "axes": axes}
