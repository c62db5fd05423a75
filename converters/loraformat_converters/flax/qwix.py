"""Qwix and Tunix (qwix 0.1.8): ``<weight>_lora_a`` and ``<weight>_lora_b`` beside the weight; alpha is in the rule only.

Measured on qwix.LoraProvider, r the rank, K the weight's axes:

    dot_general (Linear, LinearGeneral)   a [prod(in), r], b [r, prod(out)]; batched a [*batch, in, r], b [*batch, r, out]
    einsum                                a [axes of K that the input has too, r], b [r, the other axes of K]
    a batched einsum                      the same: b is shared over the batch
    a convolution                         a [*kernel, in, r], b [r, out]
    layers that MaxText scans             each of these with the layers as axis 0, or as axis 1, of a, b and K

In each of them a axes times b axes are axes of K, in K's order: a contraction over two axes and a batch with a shared b
change K alike. Which axes they are the shapes of K tell, where a base is given; without it the pair is unplaced, and
refused where it may or may not have layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat.errors import LoraFormatError, Problem
from loraformat.layout import Output, Reading
from loraformat.parts import Lora
from loraformat_converters.flax import open_tree
from loraformat_converters.flax.factors import as_arrays, as_matrices, layers_first, layers_second, ways
from loraformat_converters.flax.pairs import Draft, OfTrees, form_of, grouped, kept_form, one_scale, scale_stated

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.axes import Placement
    from loraformat.layout import ReadOptions, WriteOptions
    from loraformat.source import Source
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    Shape = tuple[int, ...]

__all__ = ["Qwix", "layout"]

_ROLES = ("_lora_a", "_lora_b")


class Qwix(OfTrees):
    """The factors that qwix.apply_lora_to_model adds, in any container."""

    name = "qwix"
    describes = "Qwix and Tunix: <weight>_lora_a, <weight>_lora_b, as Orbax, msgpack, npz or safetensors"
    scale = "nowhere: alpha / rank of the rule, to be stated"

    def detect(self, source: Source) -> str | None:
        """Paths that end with _lora_a and _lora_b, behind the name of a weight."""
        tree = open_tree(source)
        found = next((path for path in tree or () if _split(path)), None)
        return f"the tree has {found}" if found else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """Every pair under the scale that is stated; placed where the base's shapes tell how.

        Raises:
            LoraFormatError: LF-509 no alpha is stated; LF-507 another rank than the one stated; LF-506, LF-303, LF-309.
        """
        tree = open_tree(source)
        draft = Draft(tree or {})
        stems, others = grouped(draft.tree, _split)
        draft.strays(others, "save the factors alone: nnx.state(model, nnx.LoRAParam)")
        scale = scale_stated(options, draft, str(source.path))
        shapes = {} if options.base is None else {k: p.shape for k, p in options.base.parameters().items()}
        for stem, a, b in draft.pairs(stems, _ROLES):
            rank = a.shape[-1]
            if options.rank is not None and rank != options.rank:
                draft.say("LF-507", f"the rank is {rank}, {options.rank} is stated", stem)
            elif scale is not None:
                _add(draft, stem, a, b, scale, shapes.get(stem))
        form = form_of(tree) | {"flat": {s: [a.ndim, b.ndim] for s, a, b in draft.pairs(stems, _ROLES)}}
        return Reading(draft.finish("flax", {"qwix": json.dumps(form, sort_keys=True)}, str(source.path)))

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``leaves``; the one scale of all, which no file of this layout holds, is said."""
        made = super().write(adapter, options)
        scale = next(iter(adapter.values()))["lora"].scale
        what = f"the scale {scale:g} is in no file of this layout: give the rule alpha = {scale:g} · rank"
        return Output(made.files, made.folder, [Problem("LF-509", what, severity="warning")])

    def leaves(self, adapter: Adapter) -> dict[str, Array]:
        """Path → array, in the shapes that qwix would give them.

        Raises:
            LoraFormatError: LF-508 scales that differ; a target whose shape in the base is not known.
        """
        problems = list(one_scale(adapter))
        arrays: dict[str, Array] = {}
        form = kept_form(adapter, self.name)
        for key, update in adapter.items():
            try:
                a, b = _stored(update, _ndims(form, key))
                arrays |= {f"{key}{_ROLES[0]}": a, f"{key}{_ROLES[1]}": b}
            except ValueError as error:
                problems.append(Problem("LF-508", str(error), key))
        if problems:
            raise LoraFormatError(problems)
        return arrays


def _split(path: str) -> tuple[str, str] | None:
    folder, slash, leaf = path.rpartition("/")
    role = leaf[-7:]
    return (f"{folder}{slash}{leaf[:-7]}", role) if role in _ROLES and leaf != role else None


@dataclass(frozen=True, eq=False, slots=True)
class _Reading:
    """One way to understand the axes of a pair.

    Attributes:
        a, b: with the batch in front.
        batch: how many axes that is.
        scan: whether the layers were axis 1 of both, and of the weight.
    """

    a: Array
    b: Array
    batch: int = 0
    scan: bool = False

    def places(self, shape: Shape) -> Iterator[Placement]:
        """Where it lies in a weight of this shape: every way that its sizes allow."""
        front = (1,) if self.scan else tuple(range(self.batch))
        if len(shape) > len(front) and tuple(shape[axis] for axis in front) == self.a.shape[: self.batch]:
            yield from ways(shape, front, self.a.shape[self.batch : -1], self.b.shape[self.batch + 1 :])


def _readings(a: Array, b: Array) -> Iterator[_Reading]:
    rank = a.shape[-1]
    if b.shape[0] == rank:
        yield _Reading(a, b)
        if min(a.ndim, b.ndim) > 2 and a.shape[1] == b.shape[1]:
            yield _Reading(layers_first(a), layers_first(b), 1, scan=True)
    if a.ndim == b.ndim > 2 and b.shape[-2] == rank and a.shape[:-2] == b.shape[:-2]:
        yield _Reading(a, b, a.ndim - 2)


def _add(draft: Draft, stem: str, a: Array, b: Array, scale: Any, shape: Shape | None) -> None:
    """One target: the factors as matrices, and where they lie in the weight if that is known."""
    told, readings = f"a {list(a.shape)} and b {list(b.shape)}", list(_readings(a, b))
    if not readings:
        draft.say("LF-309", f"a {list(a.shape)} ends with r, b {list(b.shape)} must begin with it", stem)
        return
    places = {reading: list(reading.places(shape)) for reading in readings} if shape is not None else {}
    if shape is not None and not (readings := [reading for reading in readings if places[reading]]):
        draft.say("LF-606", f"{told} do not make up {list(shape)}", stem)
        return
    if len(readings) > 1:
        draft.say("LF-504", f"{told} may have a batch or not", stem, "the shape of the weight tells: --base BASE")
        return
    (reading,) = readings
    found = places.get(reading, [])
    part = Lora(*as_matrices(reading.a, reading.b, reading.batch), *scale)
    draft.target(stem, part, found[0] if len(found) == 1 else None)


def _stored(update: Update, ndims: Any) -> tuple[Array, Array]:
    """a and b as qwix keeps them: flattened, or axis by axis where that is how they came (``ndims``), or a convolution's.

    ValueError: why it does not, or why nobody can tell.
    """
    part, place = update["lora"], update.placement
    if part.mid is not None:
        raise ValueError("qwix has no core between two factors")
    a, b = as_arrays(part, part.lora_A.shape[-1:], part.lora_B.shape[-2:-1])
    n = a.ndim - 2
    if a.shape[:n] != b.shape[:n] or (place is not None and a.shape[:n] != place.batch_sizes):
        raise ValueError("qwix keeps a batch in both factors")
    if place is not None and place.batch not in (tuple(range(n)), (1,)):
        raise ValueError("qwix keeps a batch first, or as the second axis of a scan")
    if place is None or len(place.in_) == len(place.out) == 1:
        if ndims not in (None, [n + 2, n + 2]):
            raise ValueError("the shape of the weight is not known: bind the adapter to its base")
    else:
        convolution = place.in_ != tuple(sorted(place.in_))
        if ndims is None and not convolution:
            what = "qwix flattens the axes of a dot_general and not those of an einsum; nothing tells which it is"
            raise ValueError(what)
        ins, outs = (tuple(place.shape[axis] for axis in axes) for axes in (place.in_, place.out))
        wide_a, wide_b = as_arrays(part, ins, outs)
        wide_a, wide_b = _in_order(wide_a, place.in_, n), _in_order(wide_b, place.out, n + 1)
        a = wide_a if convolution or ndims[0] > n + 2 else wide_a.reshape(a.shape)
        b = wide_b if not convolution and ndims[1] > n + 2 else wide_b.reshape(b.shape)
    scan = place is not None and place.batch == (1,)
    return (layers_second(a), layers_second(b)) if scan else (a, b)


def _in_order(tensor: Array, axes: Shape, first: int) -> Array:
    """The tensor whose axes from ``first`` on are these of the weight, with them in the weight's order."""
    order = [first + axes.index(axis) for axis in sorted(axes)]
    return tensor.transpose([*range(first), *order, *range(first + len(axes), tensor.ndim)])


def _ndims(form: Mapping[str, Any], key: str) -> Any:
    """How many axes a and b of a target had."""
    flat = form.get("flat")
    found = flat.get(key) if isinstance(flat, dict) else None
    whole = isinstance(found, list) and len(found) == 2 and all(type(n) is int for n in found)
    return found if whole else None


layout = Qwix()
