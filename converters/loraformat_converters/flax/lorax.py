"""jax-lorax 0.3.1 (lorax/transform.py, helpers.py): W + alpha / r · b·a, so that b is what others call a, and a their b.

A ``LoraWeight`` stands in the place of a parameter W [M, N], with b [M, r] and a [r, N]; of a convolution's kernel
[*kernel, in, out] b is [*kernel, in, r] and a [1, …, 1, r, out]. alpha is no leaf of the tree but a field beside them,
1 unless the program says otherwise: it has to be stated.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem
from loraformat.layout import Output, Reading
from loraformat.parts import Lora
from loraformat_converters.flax import open_tree
from loraformat_converters.flax.factors import as_arrays, as_matrices
from loraformat_converters.flax.pairs import Draft, OfTrees, form_of, grouped, one_scale, scale_stated

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.layout import ReadOptions, WriteOptions
    from loraformat.source import Source
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Lorax", "layout"]

_ROLES = ("b", "a")  # the input side first, as in the other layouts


class Lorax(OfTrees):
    """The factors of ``lorax.LoraWeight``, in any container."""

    name = "lorax"
    describes = "jax-lorax: a and b of LoraWeight in the place of a weight, as Orbax, msgpack, npz or safetensors"
    scale = "nowhere: alpha / rank of the program (its default is 1 / rank), to be stated"

    def detect(self, source: Source) -> str | None:
        """Two leaves a and b of one parameter, whose shapes are those of b·a."""
        tree: Mapping[str, Array] = open_tree(source) or {}
        for path in tree:
            if (found := _split(path)) and found[1] == "a" and f"{found[0]}/b" in tree:
                fits = _fit(tree[path], tree[f"{found[0]}/b"])
                return f"the tree has {path}, and b fits it" if fits else None
        return None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """Every pair under the scale that is stated; all of them placed.

        Raises:
            LoraFormatError: LF-509 no alpha is stated; LF-507 another rank than the one stated; LF-506, LF-303, LF-309.
        """
        tree = open_tree(source)
        draft = Draft(tree or {})
        stems, others = grouped(draft.tree, _split)
        draft.strays(others, "save the factors alone: lorax.split_lora_params(params, spec)")
        scale = scale_stated(options, draft, str(source.path))
        for key, b, a in draft.pairs(stems, _ROLES):
            rank = b.shape[-1]
            if not _fit(a, b):
                draft.say("LF-309", f"b {list(b.shape)} and a {list(a.shape)} are not multiplied as b·a", key)
            elif options.rank is not None and rank != options.rank:
                draft.say("LF-507", f"the rank is {rank}, {options.rank} is stated", key)
            elif scale is not None:
                shape = (*b.shape[:-1], a.shape[-1])
                place = Placement(shape, (len(shape) - 1,), tuple(range(len(shape) - 1)))
                draft.target(key, Lora(*as_matrices(b, a.reshape(rank, -1)), *scale), place)
        return Reading(draft.finish("flax", {"lorax": json.dumps(form_of(tree))}, str(source.path)))

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """See ``leaves``; the one scale of all, which no file of this layout holds, is said."""
        made = super().write(adapter, options)
        scale = next(iter(adapter.values()))["lora"].scale
        what = f"the scale {scale:g} is in no file of this layout: give init_lora alpha = {scale:g} · rank"
        return Output(made.files, made.folder, [Problem("LF-509", what, severity="warning")])

    def leaves(self, adapter: Adapter) -> dict[str, Array]:
        """Path → array, of pairs of one scale in weights of two axes or kernels [*kernel, in, out]; LF-508 for any other."""
        problems = list(one_scale(adapter))
        arrays: dict[str, Array] = {}
        for key, update in adapter.items():
            try:
                b, a = _stored(key, update)
                arrays |= {f"{key}/a": a, f"{key}/b": b}
            except ValueError as error:
                problems.append(Problem("LF-508", str(error), key))
        if problems:
            raise LoraFormatError(problems)
        return arrays


def _split(path: str) -> tuple[str, str] | None:
    stem, _, leaf = path.rpartition("/")
    return (stem, leaf) if stem and leaf in _ROLES and stem.rpartition("/")[2] != "lora" else None


def _fit(a: Array, b: Array) -> bool:
    """Whether b·a is a weight, and what stands before a's last two axes is of size 1."""
    return a.ndim == b.ndim >= 2 and a.shape[-2] == b.shape[-1] and set(a.shape[:-2]) <= {1}


def _stored(key: str, update: Update) -> tuple[Array, Array]:
    """b and a as lorax has them. ValueError: why it has none such."""
    part, place = update["lora"], update.placement
    if part.mid is not None or part.lora_A.ndim != 2:
        raise ValueError("lorax has pairs of two axes only")
    if place is None and key.rpartition("/")[2] != "kernel":
        raise ValueError("nothing says which axis of the weight is in: bind the adapter to its base")
    if place is not None and len(place.shape) == 2 and place.in_ == (1,):  # b·a is B·A itself
        return part.lora_B, part.lora_A
    last = len(place.shape) - 1 if place is not None else 1
    if place is not None and (place.out != (last,) or place.in_ != tuple(range(last))):
        raise ValueError(f"lorax multiplies over the last axis of a weight, here [{place.spec}]")
    ins = (part.lora_A.shape[-1],) if place is None else place.shape[:-1]
    b, a = as_arrays(part, ins, (part.lora_B.shape[-2],))
    return b, a.reshape(*[1] * (last - 1), *a.shape)


layout = Lorax()
