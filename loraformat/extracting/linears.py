"""The linears of two models, each with its counterpart, and the matrix by which the two differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import progress
from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.base import FewBits
from loraformat.errors import LoraFormatError, Problem
from loraformat.huggingface import is_embedding
from loraformat.names import components_of
from loraformat.parts import Lora
from loraformat.placing import unplaced
from loraformat.quantised import form_of
from loraformat.registry import model_config
from loraformat.resolve import Hints, Match, matches
from loraformat.rounding import widened
from loraformat.tiles import runs, values_of
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.base import Base, Parameter

    F32 = npt.NDArray[np.float32]

__all__ = ["Linear", "linears", "quantised_problems"]


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of two models.

    Attributes:
        key: the name of its weight, as an adapter calls it.
        before, after: the stored tensors.
        places: how the matrix [out, in] lies in each.
        placement: what an adapter says of it: of a graph nothing, whose tensors are not the named parameters.
    """

    key: str
    before: Parameter
    after: Parameter
    places: tuple[Placement, Placement]
    placement: Placement | None

    def beside(self, base: Base, tuned: Base) -> set[str]:
        """The tensors of either model that only say what numbers of a few bits mean: all of the module's but the bias."""
        names: set[str] = set()
        for model, stored in ((base, self.before.name), (tuned, self.after.name)):
            if isinstance(model, FewBits) and model.dequantised(stored) is not None:
                module = stored.rpartition(".")[0]
                names |= {n for n in model.parameters() if n.startswith(f"{module}.") and n != f"{module}.bias"}
        return names

    def difference(self, base: Base, tuned: Base) -> F32:
        """W' − W, float32 [out, in]: in float64 where both are, rounded once."""
        here, there = self.places
        before, after = values_of(base, self.before), values_of(tuned, self.after)
        stored = np.empty(after.shape, np.float32)
        if here == there:
            for rows in runs(after.shape):
                tile = before[slice(*rows)]
                stored[slice(*rows)] = _minus(after[slice(*rows)], tile)
                progress.advance(2 * tile.nbytes)
            return there.to_matrix(stored)
        old = np.empty(before.shape, np.float32)
        for values, tensor in ((stored, after), (old, before)):
            for rows in runs(tensor.shape):
                values[slice(*rows)] = tensor[slice(*rows)]
        progress.advance(2 * old.nbytes)
        return np.asarray(there.to_matrix(stored) - here.to_matrix(old), np.float32)


def _minus(new: Any, old: Any) -> Any:
    if new.dtype == np.float64 and old.dtype == np.float64:
        return new - old
    return widened(new) - widened(old)


def linears(base: Base, tuned: Base, only: Sequence[str], hints: Hints) -> list[Linear]:
    """Every weight of two axes that both models multiply by; embeddings, and what ``only`` does not mean, left out.

    A weight that the tuned model has in another size is none of them: no pair makes the one of the other.

    Raises:
        LoraFormatError: LF-602 … LF-605 a linear without a counterpart or a known orientation; LF-608 one that is
            quantised in a form whose values are not known.
    """
    problems = [*quantised_problems(base, only), *quantised_problems(tuned, only)]
    if problems:
        raise LoraFormatError(problems)
    known = base.linears(Hints(axes=hints.axes))
    meant = {key: p for key, p in known.items() if not is_embedding(key) and (not only or matches(key, only))}
    problems = [unplaced(key) for key, place in meant.items() if place is None and key.endswith("weight")]
    probe = Adapter(
        {key: _probe(place) for key, place in meant.items() if place is not None}, components=components_of(meant)
    )
    own = base.resolve(probe, Hints(axes=_used(hints.axes, probe)))
    theirs = tuned.resolve(probe, Hints(_used_names(hints.names, probe), _used(hints.axes, probe)))
    resized = {p.where for p in theirs.unresolved if p.rule == "LF-606"}
    problems += [*own.unresolved, *own.ambiguous, *theirs.ambiguous]
    problems += [p for p in theirs.unresolved if p.where not in resized]
    if problems:
        raise LoraFormatError(problems)
    keep = "attach" not in base.verbs
    return list(_pairs(base, tuned, own.targets, theirs.targets, keep))


def _pairs(
    base: Base,
    tuned: Base,
    own: Mapping[str, tuple[Match, ...]],
    theirs: Mapping[str, tuple[Match, ...]],
    keep: bool,
) -> Iterator[Linear]:
    old, new = base.parameters(), tuned.parameters()
    for key, (here, *_) in own.items():
        if key not in theirs:
            continue
        there = theirs[key][0]
        before, after = here.name_in(old), there.name_in(new)
        assert before is not None
        assert after is not None
        named = (here.parameter or here.placement) if keep else None
        yield Linear(key, old[before], new[after], (here.placement, there.placement), named)


def _probe(place: Placement) -> Update:
    """A pair of the right size that holds nothing, to ask a base where it would go."""
    out, in_ = place.matrix_shape
    zero = np.zeros((), np.float32)
    return Update((Lora(np.broadcast_to(zero, (1, in_)), np.broadcast_to(zero, (out, 1)), 1.0, "factor"),))


def _used(axes: Mapping[str, str], probe: Adapter) -> dict[str, str]:
    """Only what means a linear: of the others the user may have said something too."""
    return {pattern: spec for pattern, spec in axes.items() if any(matches(key, (pattern,)) for key in probe)}


def _used_names(names: Mapping[str, str], probe: Adapter) -> dict[str, str]:
    stated = Hints(names)
    return {key: name for key in probe if (name := stated.mapped(key)) is not None}


def quantised_problems(base: Base, only: Sequence[str] = ()) -> Iterator[Problem]:
    """LF-608 for every weight of ``base`` that is quantised, and whose values nobody here knows."""
    known, config = base.parameters(), model_config(base)
    modules = {name.rpartition(".")[0].removesuffix(".weight") for name in known}
    for module in sorted(modules):
        weight = f"{module}.weight"
        if only and not matches(weight, only):
            continue
        stored = known.get(weight)
        held = stored.name if stored else f"{module}.qweight"
        if isinstance(base, FewBits) and base.dequantised(held) is not None:
            continue
        if form := form_of(weight, known, config, stored.dtype if stored else None):
            what = f"the weight is quantised in {base.path.name}: {form.name} ({form.evidence})"
            yield Problem("LF-608", what, weight, f"compare with the unquantised checkpoint; {form.fix}")
