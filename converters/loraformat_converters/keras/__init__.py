"""KerasHub's ``.lora.h5`` (keras 3.15.1, keras-hub 0.32.0): K + a·b for layers that are known by a number alone.

``lora/<index>/vars/lora_kernel_a`` is kernel.shape[:-1] + [r], ``lora_kernel_b`` [r, kernel.shape[-1]]; beside them
``lora/vars/rank``. The index counts the layers with weights in the flattened model; embeddings are never among them.
No alpha is stored: KerasHub loads with alpha = rank, so that the scale is 1.

Keys are ``<index>/kernel``, in the name space ``keras``; what they are called elsewhere the model or the user must say
(``retarget --names``). A kernel of two axes is [in, out]. One of more is a product over the
last axis either way, but which of the others are inputs only the layer's equation tells: it is read unplaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.faults import brief
from loraformat.layout import Output, Reading
from loraformat.parts import Lora
from loraformat.shapes import shape_problems
from loraformat.unpacked import check_unpacked
from loraformat.updates import Update

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.layout import ReadOptions, WriteOptions
    from loraformat.scale import ScaleRule
    from loraformat.source import Source

    Array = npt.NDArray[Any]

__all__ = ["Keras", "layout"]

_MAGIC = b"\x89HDF\r\n\x1a\n"
_INDEX = r"(0|[1-9][0-9]{0,8})"
_LEAF = re.compile(rf"lora/{_INDEX}/vars/lora_(kernel)_([ab])")
_RANK = "lora/vars/rank"
_KEY = re.compile(rf"{_INDEX}/kernel")


class Keras:
    """One HDF5 file of factors by the layers' numbers."""

    name = "keras"
    carries = frozenset({"lora"})
    writes = True
    describes = "KerasHub: save_lora_weights, one .lora.h5 of layers by number"
    scale = "not stored: alpha = rank, a scale of 1"
    markers: frozenset[str] = frozenset()
    endings = (".lora.h5",)
    names = frozenset({"keras"})

    def detect(self, source: Source) -> str | None:
        """The first bytes of HDF5; whether it holds an adapter is read's to say."""
        return "an HDF5 file" if source.head.startswith(_MAGIC) else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """Every pair, under the scale that KerasHub computes with, or the one that is stated.

        Raises:
            LoraFormatError: LF-503 damaged; LF-504 weights, and no adapter; LF-303, LF-309, LF-506, LF-507.
        """
        arrays = _arrays(source)
        if not any(name.startswith("lora/") for name in arrays):
            what = "Keras stores kernels with the adapter merged into them here: no adapter can be taken out"
            raise fault("LF-504", what, where=str(source.path), fix="backbone.save_lora_weights('x.lora.h5')")
        problems: list[Problem] = []
        updates = dict(_updates(arrays, options, problems))
        if not updates and not problems:
            problems.append(Problem("LF-304", "no pair of factors", str(source.path)))
        if problems:
            raise LoraFormatError(problems)
        warnings = [] if options.alpha is not None else [_assumed(next(iter(updates.values())))]
        return Reading(Adapter(updates, names="keras"), warnings)

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """Pairs of one rank whose scale is 1, under their numbers; LF-508 for any other."""
        problems = list(_obstacles(adapter))
        if problems:
            raise LoraFormatError(problems)
        arrays: dict[str, Array] = {_RANK: np.asarray(next(iter(adapter.values()))["lora"].r, np.int64)}
        for key, update in adapter.items():
            index = key.partition("/")[0]
            part, place = update["lora"], update.placement
            a = part.lora_A.T
            if place is not None:
                a = a.reshape(*(place.shape[axis] for axis in place.in_), part.r)
            stem = f"lora/{index}/vars/lora_kernel"
            arrays |= {f"{stem}_a": a, f"{stem}_b": part.lora_B.T}
        return Output({"": lambda file: _save(file, arrays)}, folder=False)


def _arrays(source: Source) -> dict[str, Array]:
    """Path → array of every dataset, under each name that it has; a link, which may lead to any file, is a fault."""
    library, path = _library(), source.file
    assert path is not None  # detect has seen its first bytes
    links: list[tuple[str | bytes, Any]] = []
    found: dict[str, Array] = {}
    try:
        with library.File(path, "r") as file:
            file.visititems_links(lambda name, link: links.append((name, link)))  # h5py hides what is raised in there
            for name, link in links:
                if isinstance(name, bytes) or not isinstance(link, library.HardLink):
                    raise ValueError(f"{name!r} is no UTF-8, or a link to another place")
                if isinstance(item := file[name], library.Dataset):
                    if item.shape is None or item.external or item.is_virtual:
                        raise ValueError(f"{name} holds nothing, or lies in another file")
                    check_unpacked(path, int(item.nbytes) + sum(array.nbytes for array in found.values()))
                    found[name] = np.asarray(item[()])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, MemoryError, SystemError) as error:
        raise fault("LF-503", f"{source.path} is no sound HDF5 file: {error}") from None
    return found


def _updates(
    arrays: Mapping[str, Array], options: ReadOptions, problems: list[Problem]
) -> Iterator[tuple[str, Update]]:
    pairs: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        if match := _LEAF.fullmatch(name):
            pairs.setdefault(f"{match[1]}/{match[2]}", {})[match[3]] = array
        elif name != _RANK:
            problems.append(Problem("LF-506", "the dataset is no factor", name))
    stated = arrays.get(_RANK)
    if stated is not None and (stated.ndim or stated.dtype.kind not in "iu"):
        problems.append(Problem("LF-503", f"the rank is {brief(stated.tolist())}, no whole number", _RANK))
        stated = None
    for key, pair in sorted(pairs.items(), key=lambda item: int(item[0].partition("/")[0])):
        if len(pair) < 2:
            problems.append(Problem("LF-303", f"lora_{next(iter(pair))} stands alone", key))
            continue
        a, b = pair["a"], pair["b"]
        if a.ndim < 2 or b.ndim != 2 or a.dtype.kind != "f" or b.dtype.kind != "f":
            problems.append(
                Problem("LF-309", f"a {a.dtype} {list(a.shape)} and b {b.dtype} {list(b.shape)} are no pair", key)
            )
            continue
        for what, rank in ((_RANK, stated), ("--rank", options.rank)):
            if rank is not None and rank != a.shape[-1]:
                problems.append(Problem("LF-507", f"the rank is {a.shape[-1]}, {what} says {rank}", key))
        update = _update(a, b, options)
        faults = [update["lora"].fault()] if update["lora"].fault() else []
        problems += [Problem("LF-309", why, key) for why in faults if why]
        problems += [] if faults else shape_problems(key, update)
        yield key, update


def _update(a: Array, b: Array, options: ReadOptions) -> Update:
    alpha, rule = _scale(options)
    flat = np.ascontiguousarray(a.reshape(-1, a.shape[-1]).T)
    place = Placement((a.shape[0], b.shape[1]), (1,), (0,)) if a.ndim == 2 else None
    return Update((Lora(flat, np.ascontiguousarray(b.T), alpha, rule),), place)


def _scale(options: ReadOptions) -> tuple[float, ScaleRule]:
    if options.alpha is None:
        return 1.0, "factor"
    return options.alpha, options.scale_rule or "alpha/r"


def _assumed(update: Update) -> Problem:
    what = f"no alpha is stored; the scale is 1, as KerasHub loads it (alpha = rank = {update.rank})"
    return Problem(
        "LF-509", what, fix="a model trained with enable_lora(…, lora_alpha=A): --alpha A", severity="warning"
    )


def _obstacles(adapter: Adapter) -> Iterator[Problem]:
    ranks = {update["lora"].r for update in adapter.values() if "lora" in update}
    if len(ranks) > 1:
        yield Problem("LF-508", f"one rank for all; here {min(ranks)} to {max(ranks)}", "", "--pad-rank")
    for key, update in adapter.items():
        part, place = update["lora"], update.placement
        if not _KEY.fullmatch(key):
            what = "layers are known by number here, such as 8/kernel"
            yield Problem("LF-508", what, key, "retarget --to keras --names MAP")
        elif part.mid is not None or part.lora_A.ndim != 2:
            yield Problem("LF-508", "only pairs without a batch or a core", key)
        elif part.scale != 1.0:
            yield Problem("LF-508", f"no scale is stored, here it is {part.scale:g}", key, "--fold-scale")
        elif place is None:
            yield Problem("LF-508", "the kernel's own axes are not known", key, "bind the adapter to its base")
        elif place.out != (len(place.shape) - 1,) or place.in_ != tuple(range(len(place.shape) - 1)):
            yield Problem("LF-508", f"a kernel's last axis is its out, here [{place.spec}]", key)


def _save(file: BinaryIO, arrays: Mapping[str, Array]) -> None:
    with _library().File(file, "w") as target:
        for name, array in arrays.items():
            target.create_dataset(name, data=array)


def _library() -> Any:
    try:
        import h5py
    except ImportError:
        raise fault("LF-704", "Keras's HDF5 files are read by h5py", fix="pip install 'loraformat[keras]'") from None
    return h5py


layout = Keras()
