"""A weight W with the factors of its change: W + s·a·b, which is formed only where something needs the numbers.

Every axis of W has a label. ``a`` has the axes of the in side and then r, ``b`` r and then those of the out side; a
batch axis is in both, or in one where the other is shared over it. What only moves axes moves the labels; a product
with W is one with W and one through the factors, whichever side it contracts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from loraformat.axes import Placement
    from loraformat.parts import Lora

__all__ = ["RANK", "Factored", "factors_of", "pair_of"]

RANK = -1
"""The label of the rank."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "a", "b"),
    meta_fields=("scale", "labels", "a_labels", "b_labels", "name"),
)
@dataclass(frozen=True)
class Factored:
    """W [*labels] + scale · a [*a_labels] · b [*b_labels]; a ends with the rank, b begins with it.

    Attributes:
        name: the parameter that it began as.
    """

    weight: Any
    a: Any
    b: Any
    scale: float
    labels: tuple[int, ...]
    a_labels: tuple[int, ...]
    b_labels: tuple[int, ...]
    name: str

    def whole(self) -> Any:
        """W + ΔW, in W's dtype."""
        added = jnp.einsum(self.a, _ids(self.a_labels), self.b, _ids(self.b_labels), _ids(self.labels))
        total = self.weight.astype(jnp.float32) + self.scale * added.astype(jnp.float32)
        return total.astype(self.weight.dtype)

    def side(self, labels: Sequence[int]) -> str | None:
        """Which factor has all of these axes, the other none of them: ``a`` or ``b``."""
        for side, mine, others in (("a", self.a_labels, self.b_labels), ("b", self.b_labels, self.a_labels)):
            if all(label in mine and label not in others for label in labels):
                return side
        return None

    def transposed(self, order: Sequence[int]) -> Factored:
        """The axes of W in another order: only labels move."""
        labels = tuple(self.labels[axis] for axis in order)
        return replace(self, weight=jnp.transpose(self.weight, order), labels=labels)

    def along(self, change: Callable[[Any, int, int], Any]) -> Factored:
        """Every axis of W changed alike in W and in the factors that have it: change(tensor, its axis, W's axis)."""
        weight, a, b = self.weight, self.a, self.b
        for at, label in enumerate(self.labels):
            weight = change(weight, at, at)
            a = change(a, self.a_labels.index(label), at) if label in self.a_labels else a
            b = change(b, self.b_labels.index(label), at) if label in self.b_labels else b
        return replace(self, weight=weight, a=a, b=b)

    def without(self, axes: Sequence[int]) -> Factored:
        """Without axes of size 1."""
        gone = {self.labels[axis] for axis in axes}
        return replace(
            self,
            weight=jnp.squeeze(self.weight, tuple(axes)),
            a=jnp.squeeze(self.a, tuple(i for i, label in enumerate(self.a_labels) if label in gone)),
            b=jnp.squeeze(self.b, tuple(i for i, label in enumerate(self.b_labels) if label in gone)),
            labels=_less(self.labels, gone),
            a_labels=_less(self.a_labels, gone),
            b_labels=_less(self.b_labels, gone),
        )

    def reshaped(self, sizes: Sequence[int]) -> Factored | None:
        """W in another shape, where every merged or divided run of axes belongs to one factor; else None."""
        if 1 in sizes or 1 in self.weight.shape or 0 in sizes:
            return None
        groups = _groups(self.weight.shape, sizes)
        fresh = max((*self.labels, *self.a_labels, *self.b_labels)) + 1
        a, b, labels = (self.a, self.a_labels), (self.b, self.b_labels), []
        for old, new in groups:
            mine = [self.labels[axis] for axis in old]
            if len(mine) == len(new) == 1:
                labels += mine
                continue
            names = tuple(range(fresh, fresh + len(new)))
            fresh += len(new)
            side = self.side(mine)
            if side is None:
                return None
            sides = [sizes[axis] for axis in new]
            a, b = (_regrouped(f, mine, names, sides) if side == s else f for s, f in (("a", a), ("b", b)))
            labels += names
        weight = jnp.reshape(self.weight, sizes)
        return replace(self, weight=weight, a=a[0], a_labels=a[1], b=b[0], b_labels=b[1], labels=tuple(labels))

    def stacked(self) -> Factored | None:
        """With the first axis of W first in both factors, as a loop over it takes them; None where none has it."""
        first, size = self.labels[0], self.weight.shape[0]
        if first not in (*self.a_labels, *self.b_labels):
            return None
        moved = []
        for factor, labels in ((self.a, self.a_labels), (self.b, self.b_labels)):
            if first in labels:
                moved.append((jnp.moveaxis(factor, labels.index(first), 0), (first, *_less(labels, {first}))))
            else:
                moved.append((jnp.broadcast_to(factor, (size, *factor.shape)), (first, *labels)))
        (a, a_labels), (b, b_labels) = moved
        return replace(self, a=a, b=b, a_labels=a_labels, b_labels=b_labels)

    def inner(self) -> Factored:
        """What one turn of such a loop sees, where the tensors have lost their first axis."""
        return replace(self, labels=self.labels[1:], a_labels=self.a_labels[1:], b_labels=self.b_labels[1:])


def factors_of(part: Lora, place: Placement) -> tuple[Any, Any, tuple[int, ...], tuple[int, ...]]:
    """(a, b, the labels of a, the labels of b) of a pair, labelled by the axes of its tensor.

    A [*batch, r, in] becomes a [*batch, *in axes, r], B [*batch, out, r] b [*batch, r, *out axes]; a batch axis of
    size 1 that is larger in the tensor is dropped: the factor is shared over it.
    """
    sizes = place.shape
    batch = [len(place.batch)]
    a_batch, b_batch = (
        [i for i in range(batch[0]) if factor.shape[i] == sizes[place.batch[i]]]
        for factor in (part.lora_A, part.lora_B)
    )
    a = np.moveaxis(np.asarray(part.lora_A), -2, -1)
    b = np.moveaxis(np.asarray(part.lora_B), -1, -2)
    a = a.reshape(*(a.shape[i] for i in a_batch), *(sizes[axis] for axis in place.in_), part.r)
    b = b.reshape(*(b.shape[i] for i in b_batch), part.r, *(sizes[axis] for axis in place.out))
    a_labels = (*(place.batch[i] for i in a_batch), *place.in_, RANK)
    b_labels = (*(place.batch[i] for i in b_batch), RANK, *place.out)
    return jnp.asarray(a), jnp.asarray(b), a_labels, b_labels


def pair_of(a: Any, b: Any, part: Lora, place: Placement) -> tuple[Any, Any]:
    """(lora_A, lora_B) in the shapes of ``part``, of factors that ``factors_of`` gave and that were trained since."""
    n = len(place.batch)
    a_batch, b_batch = part.lora_A.shape[:n], part.lora_B.shape[:n]
    lora_A = np.moveaxis(np.asarray(a).reshape(*a_batch, -1, part.r), -1, -2)
    lora_B = np.moveaxis(np.asarray(b).reshape(*b_batch, part.r, -1), -2, -1)
    return np.ascontiguousarray(lora_A), np.ascontiguousarray(lora_B)


def _ids(labels: Sequence[int]) -> list[int]:
    """Labels as einsum takes them: none is negative."""
    return [label + 1 for label in labels]


def _less(labels: Sequence[int], gone: set[int]) -> tuple[int, ...]:
    return tuple(label for label in labels if label not in gone)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of two shapes that hold the same values: [0, 1] of the one are [0] of the other."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        mine, theirs = [i], [j]
        m, n = old[i], new[j]
        i, j = i + 1, j + 1
        while m != n:
            if m < n:
                m *= old[i]
                mine.append(i)
                i += 1
            else:
                n *= new[j]
                theirs.append(j)
                j += 1
        groups.append((mine, theirs))
    return groups


def _regrouped(
    factor: tuple[Any, tuple[int, ...]], mine: Sequence[int], names: tuple[int, ...], sizes: Sequence[int]
) -> tuple[Any, tuple[int, ...]]:
    """A factor whose axes ``mine`` become axes ``names`` of these sizes."""
    tensor, labels = factor
    others = [label for label in labels if label not in mine]
    order = [labels.index(label) for label in (*others, *mine)]
    tensor = jnp.transpose(tensor, order)
    tensor = tensor.reshape(*tensor.shape[: len(others)], *sizes)
    return tensor, (*others, *names)
