"""Qwix and Tunix (qwix 0.1.8): ``<weight>_lora_a`` and ``<weight>_lora_b`` beside the weight; alpha is in the rule only.

Measured on qwix.LoraProvider, r the rank, K the weight's axes:

    dot_general (Linear, LinearGeneral)   a [prod(in), r], b [r, prod(out)]; batched a [*batch, in, r], b [*batch, r, out]
    einsum                                a [axes of K that the input has too, r], b [r, the other axes of K]
    a batched einsum                      the same: b is shared over the batch
    a convolution                         a [*kernel, in, r], b [r, out]

In each of them a axes times b axes are axes of K, in K's order: a contraction over two axes and a batch with a shared b
change K alike. Which axes they are the shapes of K tell, where a base is given; without it the pair is unplaced.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem
from loraformat.layout import Output, Reading
from loraformat.parts import Lora
from loraformat_converters.flax import open_tree, output
from loraformat_converters.flax.pairs import Draft, grouped, scale_stated

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.layout import ReadOptions, WriteOptions
    from loraformat.source import Source
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    Shape = tuple[int, ...]

__all__ = ["Qwix", "layout"]

_ROLES = ("_lora_a", "_lora_b")


class Qwix:
    """The factors that qwix.apply_lora_to_model adds, in any container."""

    name = "qwix"
    carries = frozenset({"lora"})
    writes = True
    describes = "Qwix and Tunix: <weight>_lora_a, <weight>_lora_b, as Orbax, msgpack, npz or safetensors"
    scale = "nowhere: alpha / rank of the rule, to be stated"
    markers = frozenset({"_METADATA"})
    endings: tuple[str, ...] = ()
    names = frozenset({"flax"})

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
        form = {
            "value": bool(tree and tree.value),
            "flat": {s: [a.ndim, b.ndim] for s, a, b in draft.pairs(stems, _ROLES)},
        }
        return Reading(draft.finish("flax", {"qwix": json.dumps(form, sort_keys=True)}, str(source.path)))

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``leaves``; the one scale of all, which no file of this layout holds, is said."""
        made = output(self.leaves(adapter), options.ending, value=_form(adapter).get("value") is True)
        scale = next(iter(adapter.values()))["lora"].scale
        what = f"the scale {scale:g} is in no file of this layout: give the rule alpha = {scale:g} · rank"
        return Output(made.files, made.folder, [Problem("LF-509", what, severity="warning")])

    def leaves(self, adapter: Adapter) -> dict[str, Array]:
        """Path → array, in the shapes that qwix would give them.

        Raises:
            LoraFormatError: LF-508 scales that differ; a target whose shape in the base is not known.
        """
        problems: list[Problem] = []
        arrays: dict[str, Array] = {}
        scales = {update["lora"].scale for update in adapter.values()}
        if len(scales) > 1:
            what = f"one rule has one scale, here they are {min(scales):g} to {max(scales):g}"
            problems.append(Problem("LF-508", what, "", "--fold-scale"))
        form = _form(adapter)
        for key, update in adapter.items():
            try:
                a, b = _stored(update, form.get("flat", {}).get(key))
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


def _add(draft: Draft, stem: str, a: Array, b: Array, scale: Any, shape: Shape | None) -> None:
    """One target: the factors as matrices, and where they lie in the weight if that is known."""
    rank = a.shape[-1]
    batched = a.ndim == b.ndim and a.ndim > 2 and b.shape[-2] == rank and a.shape[:-2] == b.shape[:-2]
    if batched and b.shape[0] == rank and a.ndim == 3:
        draft.say("LF-504", f"a {list(a.shape)} and b {list(b.shape)} may be batched or not", stem)
        return
    if not batched and b.shape[0] != rank:
        draft.say("LF-309", f"a {list(a.shape)} ends with r, b {list(b.shape)} must begin with it", stem)
        return
    if batched:
        place, found = _batched_place(shape, a, b), tuple[Shape, ...]()
    else:
        place, found = _place(shape, a.shape[:-1], b.shape[1:])
    if shape is not None and place is None and not found:
        draft.say("LF-606", f"a {list(a.shape)} and b {list(b.shape)} do not make up {list(shape)}", stem)
        return
    lora_A = np.moveaxis(a if batched else a.reshape(-1, rank), -1, -2)
    lora_B = np.moveaxis(b if batched else b.reshape(rank, -1), -2, -1)
    draft.add(stem, Lora(np.ascontiguousarray(lora_A), np.ascontiguousarray(lora_B), *scale), place)


def _batched_place(shape: Shape | None, a: Array, b: Array) -> Placement | None:
    whole = (*a.shape[:-1], b.shape[-1])
    n = a.ndim - 2
    return Placement(whole, (n + 1,), (n,), tuple(range(n))) if shape == whole else None


def _place(shape: Shape | None, ins: Shape, outs: Shape) -> tuple[Placement | None, tuple[Shape, ...]]:
    """(the only placement, every choice of in axes that fits): in axes whose sizes are a's, the rest b's, in order."""
    if shape is None:
        return None, ()
    axes = range(len(shape))
    found = []
    for count in range(1, len(shape)):
        for chosen in itertools.combinations(axes, count):
            rest = tuple(axis for axis in axes if axis not in chosen)
            if _same([shape[axis] for axis in chosen], ins) and _same([shape[axis] for axis in rest], outs):
                found.append(chosen)
    if len(found) != 1:
        return None, tuple(found)
    rest = tuple(axis for axis in axes if axis not in found[0])
    return Placement(shape, rest, found[0]), tuple(found)


def _same(sizes: list[int], stored: Shape) -> bool:
    """Whether axes of these sizes are stored so: one by one, or flattened."""
    return tuple(sizes) == stored or (len(stored) == 1 and math.prod(sizes) == stored[0])


def _stored(update: Update, ndims: Any) -> tuple[Array, Array]:
    """a and b as qwix keeps them: flattened, or axis by axis where that is how they came (``ndims``), or a convolution's.

    ValueError: why it does not, or why nobody can tell.
    """
    part, place = update["lora"], update.placement
    if part.mid is not None:
        raise ValueError("qwix has no core between two factors")
    a, b = np.moveaxis(part.lora_A, -2, -1), np.moveaxis(part.lora_B, -1, -2)
    if a.ndim > 2:
        n = a.ndim - 2
        if a.shape[:-2] != b.shape[:-2] or (place is not None and place.batch != tuple(range(n))):
            raise ValueError("qwix keeps a batch first, and in both factors")
        return a, b
    if place is None or len(place.shape) == 2:
        if ndims not in (None, [2, 2]):
            raise ValueError("the shape of the weight is not known: bind the adapter to its base")
        return a, b
    convolution = place.in_ != tuple(sorted(place.in_))
    if ndims is None and not convolution:
        raise ValueError(
            "qwix flattens the axes of a dot_general and not those of an einsum; nothing tells which it is"
        )
    wide_a = _in_order(a.reshape(*(place.shape[axis] for axis in place.in_), part.r), place.in_, 0)
    wide_b = _in_order(b.reshape(part.r, *(place.shape[axis] for axis in place.out)), place.out, 1)
    flat_a, flat_b = wide_a.reshape(-1, part.r), wide_b.reshape(part.r, -1)
    if convolution:
        return wide_a, flat_b
    return wide_a if ndims[0] > 2 else flat_a, wide_b if ndims[1] > 2 else flat_b


def _in_order(tensor: Array, axes: Shape, first: int) -> Array:
    """The tensor whose axes from ``first`` on are these of the weight, with them in the weight's order."""
    order = [first + axes.index(axis) for axis in sorted(axes)]
    return tensor.transpose([*range(first), *order, *range(first + len(axes), tensor.ndim)])


def _form(adapter: Adapter) -> Mapping[str, Any]:
    try:
        form = json.loads(adapter.extensions.get("qwix", "{}"))
    except ValueError:
        return {}
    return form if isinstance(form, dict) else {}


layout = Qwix()
