"""The tensors of two bases side by side: which have a counterpart of the same meaning, and how far the two are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import progress
from loraformat.base import FewBits
from loraformat.rounding import widened
from loraformat.shapes import FLOATS
from loraformat.tiles import read_runs, runs, values_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base, Parameter
    from loraformat.resolve import Hints

    Array = npt.NDArray[Any]

__all__ = ["Apart", "Counterparts", "apart", "common_prefix", "counterparts"]


@dataclass(frozen=True, slots=True)
class Counterparts:
    """The tensors of ``base`` by name, each with its counterpart in ``tuned``.

    Attributes:
        pairs: name in the base → (there, in the tuned one).
        missing: of the base, and not of the tuned one.
        new: of the tuned one, and not of the base.
    """

    pairs: Mapping[str, tuple[Parameter, Parameter]]
    missing: Mapping[str, Parameter] = field(default_factory=dict)
    new: Mapping[str, Parameter] = field(default_factory=dict)

    def of(self, meant: Callable[[str], bool]) -> Counterparts:
        """Only the names that are meant."""
        pairs = {name: pair for name, pair in self.pairs.items() if meant(name)}
        missing, new = ({n: p for n, p in part.items() if meant(n)} for part in (self.missing, self.new))
        return Counterparts(pairs, missing, new)


@dataclass(frozen=True, slots=True)
class Apart:
    """How far two tensors of one shape are apart.

    Attributes:
        norm: ‖tuned − base‖ (Frobenius), of values that are no floats the number of those that differ.
        base: ‖base‖; of values that are no floats how many they are.
        equal: bit for bit, dtypes included.
    """

    norm: float
    base: float
    equal: bool

    @property
    def change(self) -> float | None:
        """‖tuned − base‖ / ‖base‖; None of a tensor that was zero."""
        return self.norm / self.base if self.base else None


def counterparts(base: Base, tuned: Base, hints: Hints) -> Counterparts:
    """By equal names, or by those that the user gave for the tuned one (``--names``)."""
    old, new = base.parameters(), tuned.parameters()
    names = {name: hints.mapped(name) or name for name in old}
    pairs = {name: (old[name], new[names[name]]) for name in old if names[name] in new}
    taken = {after.name for _, after in pairs.values()} | {names[name] for name in pairs}
    missing = {name: parameter for name, parameter in old.items() if name not in pairs}
    return Counterparts(pairs, missing, {name: p for name, p in new.items() if name not in taken})


def common_prefix(found: Counterparts) -> str | None:
    """What turns the missing names into the new ones, as an entry of ``--names``: ``"*": "model.*"``; None if nothing does.

    A model that was saved with a head calls its body by one name more: ``encoder.…`` and ``bert.encoder.…``.
    """
    first = next(iter(found.missing), "")
    for name in found.new:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            if sum(f"{prefix}{old}" in found.new for old in found.missing) * 2 > len(found.missing):
                return f'"*": "{prefix}*"'
        if first.endswith(f".{name}"):
            prefix = first.removesuffix(name)
            if sum(f"{prefix}{new}" in found.missing for new in found.new) * 2 > len(found.new):
                return f'"{prefix}*": "*"'
    return None


def apart(base: Base, before: Parameter, tuned: Base, after: Parameter) -> Apart:
    """Tile by tile, in float32 sums of float64; the two have one shape. Of weights in few bits by what they mean."""
    if any(isinstance(m, FewBits) and m.dequantised(p.name) for m, p in ((base, before), (tuned, after))):
        return _few_apart(base, before, tuned, after)
    floats = before.dtype in FLOATS and after.dtype in FLOATS
    equal, square, whole = before.dtype == after.dtype, [0.0], [0.0]
    for old, new in _tiles(base, before, tuned, after):
        progress.advance(old.nbytes)
        same = old.dtype == new.dtype and np.array_equal(_bits(old), _bits(new))
        equal = equal and same
        if not floats:
            square.append(0.0 if same else float(np.count_nonzero(old != new)) if old.dtype == new.dtype else old.size)
            whole.append(float(old.size))
            continue
        wide = _wide(old)
        whole.append(_square(wide))
        if not same:
            square.append(_square(_wide(new) - wide))
    if not floats:
        return Apart(sum(square), sum(whole), equal)
    return Apart(math.sqrt(math.fsum(square)), math.sqrt(math.fsum(whole)), equal)


def _few_apart(base: Base, before: Parameter, tuned: Base, after: Parameter) -> Apart:
    old, new = values_of(base, before), values_of(tuned, after)
    equal = before.dtype == after.dtype and all(
        np.array_equal(_bits(a), _bits(b)) for a, b in _tiles(base, before, tuned, after)
    )
    tiles = ((_wide(old[slice(*rows)]), _wide(new[slice(*rows)])) for rows in runs(old.shape))
    squares = [(_square(there - here), _square(here)) for here, there in tiles]
    far, whole = (math.sqrt(math.fsum(part)) for part in zip(*squares, strict=True))
    return Apart(far, whole, equal)


def _tiles(base: Base, before: Parameter, tuned: Base, after: Parameter) -> Iterator[tuple[Array, Array]]:
    for rows, tile in read_runs(base, before):
        yield tile, tuned.read(after.name, rows)


def _wide(tile: Array) -> Array:
    return tile if tile.dtype == np.float64 else widened(tile)


def _square(values: Array) -> float:
    flat = np.ascontiguousarray(values).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(flat, flat))


def _bits(values: Array) -> Array:
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(np.uint8)
