"""DeepMind's gemma (gemma 3.3.0, peft/_lora.py and gm/nn/_lora.py): ``lora/a`` and ``lora/b``. There is no scale.

    Einsum ``X``, weight ``X/w``          X/_LoRAEinsum_0/lora/a, b
    Einsum of the weight ``mlp/linear``   mlp/_LoRAEinsum_linear/lora/a, b
    Dense, DenseGeneral, nn.Einsum        X/lora/a, b                          beside X/kernel

a has the axes of the weight that the input has too, in the weight's order, and r; b has r and the others. A batch of an
einsum is among a's, and b is shared over it: both change the weight as a contraction over all of a's axes would. Only a
DenseGeneral with a batch has one in b as well.

Which axes of a weight are a's its equation tells, which no file holds: gemma's own modules have theirs here; of any
other, and of ``gating_einsum``, which lies in two ways, the shapes of a base tell.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem
from loraformat.layout import Reading
from loraformat.parts import Lora
from loraformat_converters.flax import open_tree
from loraformat_converters.flax.factors import as_arrays, as_matrices, ways
from loraformat_converters.flax.pairs import Draft, OfTrees, form_of, grouped, unscaled

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.layout import ReadOptions
    from loraformat.source import Source
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    Shape = tuple[int, ...]

__all__ = ["Gemma", "layout"]

_ROLES = ("a", "b")
_WRAPPER = re.compile(r"(?:(?P<module>.*)/)?_LoRAEinsum_(?P<weight>.+)")

# The weights of gm/nn/_modules.py and, read at 7691fd4, of gemma3n and gemma4: their equations' axes.
_EQUATIONS = {
    "q_einsum/w": "out,in,out",
    "k_einsum/w": "out,in,out",
    "kv_einsum/w": "out,out,in,out",
    "qkv_einsum/w": "out,out,in,out",
    "attn_vec_einsum/w": "in,in,out",
    "mlp/linear": "in,out",
    "mm_input_projection/w": "in,out",
    "per_layer_input_gate/w": "in,out",
    "per_layer_projection/w": "in,out",
}


class Gemma(OfTrees):
    """The ``lora`` branches of a gemma model's parameters, in any container."""

    name = "gemma"
    describes = "DeepMind's gemma: the lora branches of peft.split_params, as Orbax, msgpack, npz or safetensors"
    scale = "there is none: it has to be in the factors"

    def detect(self, source: Source) -> str | None:
        """Paths that end with lora/a and lora/b."""
        tree = open_tree(source)
        found = next((path for path in tree or () if _split(path)), None)
        return f"the tree has {found}" if found else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """Every pair, with the factor 1; placed by gemma's own equations and the base's shapes.

        Raises:
            LoraFormatError: LF-506 leaves of the base beside them; LF-303, LF-309, LF-504, LF-606.
        """
        tree = open_tree(source)
        draft = Draft(tree or {})
        stems, others = grouped(draft.tree, _split)
        draft.strays(others, "save the factors alone: peft.split_params(params).lora")
        shapes = {} if options.base is None else {k: p.shape for k, p in options.base.parameters().items()}
        for stem, a, b in draft.pairs(stems, _ROLES):
            key = _weight(stem)
            try:
                part, place = _read(key, a, b, shapes.get(key))
                draft.target(key, part, place)
            except LoraFormatError as error:
                draft.problems += error.problems
        return Reading(draft.finish("flax", {"gemma": json.dumps(form_of(tree))}, str(source.path)))

    def leaves(self, adapter: Adapter) -> dict[str, Array]:
        """Path → array, of pairs whose scale is 1 and whose placement is known; LF-508 for any other."""
        arrays: dict[str, Array] = {}
        problems = []
        for key, update in adapter.items():
            found = list(_obstacles(key, update))
            problems += found
            if not found:
                a, b = as_arrays(update["lora"], *_sizes(update))
                arrays |= {f"{_stem(key)}/lora/a": a, f"{_stem(key)}/lora/b": b}
        if problems:
            raise LoraFormatError(problems)
        return arrays


def _split(path: str) -> tuple[str, str] | None:
    stem, _, leaf = path.rpartition("/lora/")
    return (stem, leaf) if stem and leaf in _ROLES else None


def _weight(stem: str) -> str:
    """The parameter that the factors of ``stem`` change."""
    match = _WRAPPER.fullmatch(stem)
    if match is None:
        return f"{stem}/kernel"
    weight = "w" if match["weight"] == "0" else match["weight"]
    return f"{match['module']}/{weight}" if match["module"] else weight


def _stem(key: str) -> str:
    """Where the factors of a parameter lie."""
    module, slash, weight = key.rpartition("/")
    return module if weight == "kernel" else f"{module}{slash}_LoRAEinsum_{'0' if weight == 'w' else weight}"


def _read(key: str, a: Array, b: Array, shape: Shape | None) -> tuple[Lora, Placement | None]:
    """The pair, and where it lies if that is known; LF-309, LF-504 or LF-606 where it is none."""
    rank = a.shape[-1]
    if key.endswith("/kernel"):
        most = min(a.ndim, b.ndim) - 1
        batches = [n for n in range(most) if a.shape[:n] == b.shape[:n] and b.shape[n] == rank]
    else:
        batches = [0] if b.shape[0] == rank else []
    told = f"a {list(a.shape)} and b {list(b.shape)}"
    if not batches:
        raise LoraFormatError([Problem("LF-309", f"{told}: a ends with r, b must begin with it", key)])
    if shape is not None:
        found = [(n, place) for n in batches for place in _fitting(shape, a, b, n)]
        if not found:
            raise LoraFormatError([Problem("LF-606", f"{told} do not make up {list(shape)}", key)])
        batches = sorted({n for n, _ in found})
    else:
        known = _by_name(key, a, b)
        found = [(0, known)] if known is not None else []
    if len(batches) > 1:
        what = f"{told} may have a batch of {' or '.join(map(str, batches))} axes"
        raise LoraFormatError([Problem("LF-504", what, key, "the shape of the weight tells: --base BASE")])
    own = [place for _, place in found]
    if len(own) > 1 and (known := _by_name(key, a, b)) in own:
        own = [known]
    part = Lora(*as_matrices(a, b, batches[0]), 1.0, "factor")
    return part, own[0] if len(own) == 1 else None


def _fitting(shape: Shape, a: Array, b: Array, batch: int) -> Iterator[Placement]:
    axes = tuple(range(batch))
    if shape[:batch] == a.shape[:batch]:
        for place in ways(shape, axes, a.shape[batch:-1], b.shape[batch + 1 :]):
            if len(place.in_) == a.ndim - 1 - batch and len(place.out) == b.ndim - 1 - batch:  # gemma flattens nothing
                yield place


def _by_name(key: str, a: Array, b: Array) -> Placement | None:
    """By the equation of the module that the weight belongs to; of a Dense by its kernel [in, out]."""
    words = next((spec for name, spec in _EQUATIONS.items() if f"/{key}".endswith(f"/{name}")), "").split(",")
    if words == [""] and key.endswith("/kernel") and a.ndim == b.ndim == 2:
        words = ["in", "out"]
    if (words.count("in"), words.count("out")) != (a.ndim - 1, b.ndim - 1):
        return None
    ins, outs = iter(a.shape[:-1]), iter(b.shape[1:])
    return Placement.of(tuple(next(ins if word == "in" else outs) for word in words), ",".join(words))


def _obstacles(key: str, update: Update) -> Iterator[Problem]:
    """Why gemma cannot hold this target, and the way out."""
    part, place = update["lora"], update.placement
    dense = key.endswith("/kernel")
    if part.mid is not None:
        yield Problem("LF-508", "gemma has no core between two factors", key, "--to-lora R")
    elif place is None and not (dense and part.lora_A.ndim == 2):
        yield Problem("LF-508", "the axes of the weight are not known, which a and b have", key, "--base BASE")
    elif place is not None and any(list(axes) != sorted(axes) for axes in (place.in_, place.out)):
        yield Problem("LF-508", f"gemma's factors keep the order of the axes, here [{place.spec}]", key)
    elif part.lora_A.ndim > 2 and not (dense and _whole_batch(part, place)):
        yield Problem("LF-508", "gemma has a batch in DenseGeneral alone, first and in both factors", key)
    yield from unscaled(key, part, "gemma")


def _whole_batch(part: Lora, place: Placement | None) -> bool:
    """Whether both factors have the batch, and the weight has it in front."""
    batch = part.lora_A.shape[:-2]
    front = place is not None and place.batch == tuple(range(len(batch))) and place.batch_sizes == batch
    return front and part.lora_B.shape[:-2] == batch


def _sizes(update: Update) -> tuple[Shape, Shape]:
    """Of the in axes and of the out axes."""
    place = update.placement
    if place is None:
        return (update["lora"].lora_A.shape[-1],), (update["lora"].lora_B.shape[-2],)
    return tuple(place.shape[axis] for axis in place.in_), tuple(place.shape[axis] for axis in place.out)


layout = Gemma()
