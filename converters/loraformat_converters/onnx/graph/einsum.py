"""An Einsum of x and a stored weight, by its letters: what the weight's axes are, and the two steps of its branch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["DOTS", "Letters", "read"]

DOTS = "..."


@dataclass(frozen=True)
class Letters:
    """The terms of ``x, W → y``, and which axes of W are out, in and batch. ``x`` and ``y`` may begin with dots.

    >>> read("abc,cde->abde", 1, 3)
    Letters(x='abc', w='cde', y='abde', out=(1, 2), in_=(0,), batch=())
    """

    x: str
    w: str
    y: str
    out: tuple[int, ...]
    in_: tuple[int, ...]
    batch: tuple[int, ...]

    def steps(self, shared: Collection[int] = ()) -> tuple[str, str]:
        """``x, A → h`` and ``h, B → y``, A as [*batch, r, *in], B as [*batch, *out, r].

        Args:
            shared: 0 if A, 1 if B has no batch axes: the factor loses their letters.
        """
        rank = next(letter for letter in "rstuvwxyzRSTUVWXYZ" if letter not in self.x + self.w + self.y)
        batch, in_, out = ("".join(self.w[axis] for axis in axes) for axes in (self.batch, self.in_, self.out))
        hidden = "".join(c for c in self.x if c in self.y or c in batch or c == ".") + rank
        a = f"{'' if 0 in shared else batch}{rank}{in_}"
        b = f"{'' if 1 in shared else batch}{out}{rank}"
        return f"{self.x},{a}->{hidden}", f"{hidden},{b}->{self.y}"


def read(equation: str, position: int, rank: int) -> Letters:
    """The letters of an equation whose weight of ``rank`` axes is operand ``position``.

    Raises:
        ValueError: why such an Einsum is no x·W.
    """
    inputs, arrow, y = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        raise ValueError(f"the equation {equation!r} is not of the form x,W->y")
    w, x = terms[position], terms[1 - position]
    if DOTS in w or len(w) != rank or any(len(set(t)) < len(t) for t in (w, x.replace(DOTS, ""), y.replace(DOTS, ""))):
        raise ValueError(f"the equation {equation!r} names the axes of its weight not one by one")
    alone = [c for c in w if c not in x and c not in y]
    if alone or (DOTS in x) != (DOTS in y):
        raise ValueError(f"the equation {equation!r} sums over {', '.join(alone) or 'the dots'} on one side only")
    groups: dict[tuple[bool, bool], list[int]] = {}
    for axis, c in enumerate(w):
        groups.setdefault((c in x, c in y), []).append(axis)
    out, in_, batch = (tuple(groups.get(key, ())) for key in ((False, True), (True, False), (True, True)))
    if not out or not in_:
        raise ValueError(f"the equation {equation!r} gives its weight no {'in' if out else 'out'} axis")
    return Letters(x, w, y, out, in_, batch)
