"""PEFT's combination types, number for number: peft 0.21.2 ``LoraModel.add_weighted_adapter`` and ``utils.merge_utils``.

Those without ``svd`` in their name combine the factors A and B entry by entry, each with √(weight · scale): what becomes
of ΔW follows from no formula. The others work on ΔW, but elect signs without the weights. They are here for people who
must reproduce a result; ``svd``, ``ties`` and the rest are defined on ΔW.

PEFT draws with torch. Its generator on a CPU is MT19937, whose numbers numpy has too: after ``torch.manual_seed(SEED)``
PEFT draws what is drawn here, if the modules of its model come in the order of the targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.algebra.factors import lowrank
from loraformat.algebra.lowrank import total
from loraformat.algebra.svd import SVD, svd
from loraformat.algebra.truncated import truncated
from loraformat.combining.entries import elect, trim
from loraformat.errors import Problem
from loraformat.parts import Lora

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.combining.settings import How
    from loraformat.combining.terms import Term
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    F32 = npt.NDArray[np.float32]

__all__ = ["DRAWS", "Stream", "problems", "together"]


DRAWS = frozenset({"peft_dare_linear", "peft_dare_linear_svd", "peft_dare_ties", "peft_dare_ties_svd"})
"""Those that draw, target after target, from one stream."""


class Stream:
    """What ``torch.manual_seed`` starts on a CPU: 24 bits of each number of MT19937."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.RandomState(seed & 0xFFFFFFFF)

    def below(self, density: float, shape: tuple[int, ...]) -> Array:
        """``torch.bernoulli`` of a float32 tensor that is ``density`` everywhere."""
        drawn = self._bits.randint(0, 1 << 32, size=shape, dtype=np.uint32)
        return (drawn & 0xFFFFFF) * np.float32(2.0**-24) < np.float32(density)


def problems(key: str, terms: Sequence[Term], method: str) -> Iterator[Problem]:
    """LF-612 for what PEFT would not combine, or would scale by another factor."""
    for term in terms:
        update = term.update
        if update.kind != "lora" or update["lora"].mid is not None or update["lora"].lora_A.ndim != 2:
            what = f"PEFT combines plain pairs; this is a {update.kind} update"
            yield Problem("LF-612", what, key, "take svd or ties, which are defined on ΔW")
            return
    if terms and terms[0].update["lora"].scale_rule == "alpha/sqrt(r)":  # the new configuration is the first's
        what = "peft 0.21.2 gives what it combines of rsLoRA adapters the scale √r, where it means 1"
        yield Problem("LF-612", what, key, "the methods without peft_ have the right scale")
    ranks = {term.update["lora"].r for term in terms}
    if len(ranks) > 1 and not method.endswith(("svd", "cat")):
        what = f"PEFT adds A to A and B to B, whose ranks are {' and '.join(map(str, sorted(ranks)))}"
        yield Problem("LF-612", what, key, "take peft_svd or peft_cat")


def together(terms: Sequence[Term], how: How, rank: int, stream: Stream) -> tuple[Lora, float | None]:
    """What PEFT makes of one target, and how far it is from what it approximates; None for the types on A and B."""
    name = how.method.removeprefix("peft_")
    if name == "cat":
        return _cat(terms), None
    if name == "svd":
        exact = svd(total((term.weight, lowrank(term.update)) for term in terms))
        return _pair(exact, rank), exact.residual(rank)
    if name.endswith("_svd"):
        return _of_deltas(terms, how, name.removesuffix("_svd"), rank, stream)
    scales = [term.weight * term.update["lora"].scale for term in terms]
    sides = [[_single(getattr(t.update["lora"], role)) for t in terms] for role in ("lora_A", "lora_B")]
    roots = [math.sqrt(abs(s)) for s in scales]
    signed = [math.copysign(root, s) for root, s in zip(roots, scales, strict=True)]  # on one side only
    a, b = (_BY_ENTRIES[name](tensors, w, how, stream) for tensors, w in zip(sides, (signed, roots), strict=True))
    return _stored(a, b), None


def _cat(terms: Sequence[Term]) -> Lora:
    a = [_single(t.update["lora"].lora_A) * np.float32(t.weight) * np.float32(t.update["lora"].scale) for t in terms]
    return _stored(np.concatenate(a), np.concatenate([_single(t.update["lora"].lora_B) for t in terms], axis=1))


def _of_deltas(terms: Sequence[Term], how: How, name: str, rank: int, stream: Stream) -> tuple[Lora, float]:
    turned = [_in_first(term.update) for term in terms]  # PEFT prunes ΔW as it lies in the base
    deltas = [
        np.ascontiguousarray(m.T if turn else m)
        for m, turn in zip((t.change.matrix() for t in terms), turned, strict=True)
    ]
    matrix = _BY_ENTRIES[name](deltas, [term.weight for term in terms], how, stream)
    found, residual = truncated(matrix.T if turned[0] else matrix, rank)
    return _pair(found, rank), residual


def _in_first(update: Update) -> bool:
    place = update.placement
    return update.op == "embedding" or (place is not None and place.in_ == (0,))


def _pair(found: SVD, rank: int) -> Lora:
    return _stored(found.Vt[:rank].astype(np.float32), (found.U[:, :rank] * found.s[:rank]).astype(np.float32))


def _stored(a: F32, b: F32) -> Lora:
    return Lora(a, b, float(a.shape[0]), "alpha/r")  # PEFT's new alpha is its new rank


def _linear(tensors: Sequence[F32], weights: Sequence[float], how: How, stream: Stream) -> F32:
    terms = [tensor * np.float32(weight) for tensor, weight in zip(tensors, weights, strict=True)]
    return sum(terms[1:], start=terms[0])


def _ties(tensors: Sequence[F32], weights: Sequence[float], how: How, stream: Stream) -> F32:
    return elect([_trimmed(tensor, how) for tensor in tensors], weights)


def _prune(tensors: Sequence[F32], weights: Sequence[float], how: How, stream: Stream) -> F32:
    return _linear([_trimmed(tensor, how) for tensor in tensors], weights, how, stream)


def _dare_linear(tensors: Sequence[F32], weights: Sequence[float], how: How, stream: Stream) -> F32:
    return _linear([_dropped(tensor, how, stream) for tensor in tensors], weights, how, stream)


def _dare_ties(tensors: Sequence[F32], weights: Sequence[float], how: How, stream: Stream) -> F32:
    return elect([_dropped(tensor, how, stream) for tensor in tensors], weights)


def _trimmed(tensor: F32, how: How) -> F32:
    copy = np.array(tensor, order="C")
    if how.kept < 1:
        trim(copy, how.kept)
    return copy


def _dropped(tensor: F32, how: How, stream: Stream) -> F32:
    if how.kept >= 1:  # nothing is drawn either
        return tensor
    return np.asarray(tensor * stream.below(how.kept, tensor.shape) / np.float32(how.kept), np.float32)


def _single(tensor: Array) -> F32:
    """PEFT loads factors of 16 bits as float32 (``autocast_adapter_dtype``)."""
    return np.asarray(tensor, np.float32)


_BY_ENTRIES: dict[str, Callable[[Sequence[F32], Sequence[float], How, Stream], F32]] = {
    "linear": _linear,
    "ties": _ties,
    "magnitude_prune": _prune,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
}
