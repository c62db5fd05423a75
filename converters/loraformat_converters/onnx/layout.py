"""``.onnx_adapter`` as a layout: what ``LoraAdapter`` of ONNX Runtime and ``Adapters`` of ONNX Runtime GenAI load."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.adapter import Adapter
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output, Reading
from loraformat.updates import Update
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.attaching.pairs import laid, pair_of
from loraformat_converters.onnx.attaching.slot_names import inputs_of, is_olives, key_of
from loraformat_converters.onnx.attaching.slots import OWN, Slots

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import BinaryIO

    import numpy.typing as npt

    from loraformat.base import Base
    from loraformat.layout import ReadOptions, WriteOptions
    from loraformat.scale import ScaleRule
    from loraformat.source import Source

    Array = npt.NDArray[Any]

__all__ = ["OnnxAdapter", "layout"]


class OnnxAdapter:
    """ONNX Runtime's file: A [in, r] and B [r, out] with the scale in B, by the names of a model's inputs.

    Of a DoRA it holds m/‖V‖ − 1, and B times m/‖V‖, which are of one model's weights: it is written for a model, and read
    back with that model at hand.
    """

    name = "onnx_adapter"
    carries = frozenset({"lora", "magnitude"})
    writes = True
    describes = "ONNX Runtime's LoraAdapter (.onnx_adapter)"
    scale = "folded into B"
    markers: frozenset[str] = frozenset()
    endings: tuple[str, ...] = (".onnx_adapter",)
    names: frozenset[str] = frozenset()

    def detect(self, source: Source) -> str | None:
        """The flatbuffer's identifier."""
        return "bytes 4 to 8 are TORT" if source.head[4:8] == tort.MAGIC else None

    def read(self, source: Source, options: ReadOptions) -> Reading:
        """By the names of our slots, of Olive's and of ONNX Runtime GenAI's.

        Raises:
            LoraFormatError: LF-506 another tensor; LF-509 a file of Olive's, and no scale is stated.
        """
        assert source.file is not None
        contents = tort.read(source.file)
        if options.model is not None and _has_gain(contents):
            return Reading(_trained(contents, options.model, source))
        pairs, problems = _pairs(contents.tensors)
        scale = _OF_B
        if _is_olives(contents):
            if options.alpha is None or options.scale_rule is None:
                raise _unstated(source)
            scale = options.alpha, options.scale_rule
        targets: dict[str, Update] = {}
        for key, (a, b) in pairs.items():
            try:
                with np.errstate(invalid="ignore"):  # a NaN is told by what looks at values
                    changes = a.any() or b.any()
                if changes:  # rank 0, or zeros, is what required slots take where the adapter has no target
                    targets[key] = Update((replace(pair_of(key, a, b), alpha=scale[0], scale_rule=scale[1]),))
            except LoraFormatError as error:
                problems += error.problems
        if options.rank is not None:
            problems += [
                Problem("LF-507", f"rank {u.rank}, and --rank says {options.rank}", k)
                for k, u in targets.items()
                if u.rank != options.rank
            ]
        stated = {"alpha": options.alpha, "scale-rule": options.scale_rule}
        if scale is _OF_B and (given := [f"--{flag}" for flag, value in stated.items() if value is not None]):
            problems.append(
                Problem("LF-507", f"B holds the scale already, and {given[0]} states another", str(source.path))
            )
        if not targets and not problems:
            problems.append(
                Problem("LF-304", "every pair of the file is of rank 0, or zero: it changes nothing", str(source.path))
            )
        if problems:
            raise LoraFormatError(problems)
        return Reading(Adapter(targets))

    def write(self, adapter: Adapter, options: WriteOptions) -> Output:
        """For a model with slots, where one is given: by its names, in its dtypes; else by the names of our slots."""
        slots = _slots_of(options.model) if options.model is not None else None
        _check_folded(adapter, slots)
        if slots is not None and options.model is not None:
            fed = slots.fed(adapter, options.model.norms)  # type: ignore[attr-defined]
            tensors, version = _exact(adapter, slots.feeds(fed)), slots.version
        else:
            tensors, version = _named(adapter), 0

        def write(file: BinaryIO) -> None:
            tort.write(file, tensors, version)

        return Output({"": write}, folder=False)


layout = OnnxAdapter()


def _has_gain(contents: tort.Contents) -> bool:
    """Whether a target of it is a DoRA."""
    return any(tensor.any() for name, tensor in contents.tensors.items() if (key_of(name) or ("", ""))[1] == "gain")


def _trained(contents: tort.Contents, model: Base, source: Source) -> Adapter:
    """With the magnitudes that the weights of its model tell; LF-607 of another model."""
    slots = _slots_of(model)
    if contents.model_version != slots.version:
        what = f"it was written for another model than {model.path}, whose weights are others"
        raise fault("LF-607", what, where=str(source.path), fix=OWN)
    return slots.trained(slots.read(contents.tensors), model.norms)  # type: ignore[attr-defined]


_OF_B: tuple[float, ScaleRule] = (1.0, "factor")


def _is_olives(contents: tort.Contents) -> bool:
    """Whether Olive may have written it: its names, and no version of ours, which our files for such slots have."""
    return not contents.stated and any(map(is_olives, contents.tensors))


def _unstated(source: Source) -> LoraFormatError:
    # olive-ai 0.13.0: cli/convert_adapters.py multiplies B by the scale; passes/onnx/extract_adapters.py leaves that to a
    # Mul of the graph.
    what = "Olive's convert-adapters has the scale in B, and its ExtractAdapters leaves it in the graph: the file is silent"
    fix = "--alpha 1 --scale-rule factor of the first; of the second as it was trained, --alpha A --scale-rule alpha/r"
    return fault("LF-509", what, where=str(source.path), fix=fix)


def _slots_of(model: Base) -> Slots:
    """LF-705 of a model without slots."""
    slots: Slots | None = getattr(model, "slots", None)
    if slots is None:
        fix = "make one: loraformat attach … --mode swap"
        raise fault("LF-705", f"{model.path} has no inputs for an adapter", fix=fix)
    return slots


def _pairs(tensors: Mapping[str, Array]) -> tuple[dict[str, tuple[Array, Array]], list[Problem]]:
    """Key → (A, B), and every tensor that is neither, or is alone."""
    sides: dict[str, dict[str, Array]] = {}
    problems = []
    for name, tensor in tensors.items():
        found = key_of(name)
        if found is None:
            fix = "lora/KEY/A, MODULE.lora_A.weight and MODULE.lora_A.MatMul.weight are known"
            problems.append(Problem("LF-506", "the tensor has a name of no known style", name, fix))
        elif found[1] == "gain":
            if tensor.any():  # zeros are what required slots take where the adapter is no DoRA
                fix = f"--for MODEL.onnx, for which it was written, tells V; or {OWN}"
                problems.append(Problem("LF-506", "it is m/‖V‖ − 1 of a DoRA, whose V is the model's", found[0], fix))
        elif found[1] in sides.setdefault(found[0], {}):
            problems.append(Problem("LF-507", f"two tensors are the {found[1]} of one target", found[0]))
        else:
            sides[found[0]][found[1]] = tensor
    problems += [
        Problem("LF-303", f"the target has {next(iter(own))} alone", key) for key, own in sides.items() if len(own) == 1
    ]
    return {key: (own["A"], own["B"]) for key, own in sides.items() if len(own) == 2}, problems


def _check_folded(adapter: Adapter, slots: Slots | None) -> None:
    """LF-508 where a scale has no place: the file has no field for it, and the graph's own, in float32, is another."""
    held = {key: np.float32(slot.scale) for key, slot in slots.slots.items()} if slots else {}
    problems = [
        Problem(
            "LF-508",
            f"the layout has no scale, and this target's is {u.scale:g}",
            key,
            "--fold-scale multiplies it into B",
        )
        for key, u in adapter.items()
        if "lora" in u and u.scale != 1.0 and np.float32(u.scale) != held.get(key)
    ]
    if problems:
        raise LoraFormatError(problems)


def _named(adapter: Adapter) -> dict[str, Array]:
    """By the names of our own slots."""
    tensors: dict[str, Array] = {}
    problems: list[Problem] = []
    for key, update in adapter.items():
        place = update.placement
        conv = place is not None and len(place.shape) > 2 and not place.batch
        kernel = [place.shape[axis] for axis in place.in_[1:]] if place is not None and conv else []
        try:
            if update.kind == "dora":
                fix = "--for MODEL.onnx, a swap that was given it; or --to-lora R, whose residual is printed"
                raise fault("LF-508", "m/‖V‖ of a DoRA is of one model's weights", where=key, fix=fix)
            a, b = laid(key, update, "conv" if conv else "linear", kernel)
            if a.dtype not in tort.DTYPES.values() or b.dtype not in tort.DTYPES.values():
                raise fault(
                    "LF-508", f"ONNX Runtime takes no factors of {a.dtype.name}", where=key, fix="--dtype float32"
                )
            again = pair_of(key, a, b)
            if not np.array_equal(again.lora_A.shape, update["lora"].lora_A.shape):
                raise fault("LF-508", "its shapes would be read as those of another pair", where=key)
            tensors |= dict(zip(inputs_of(key, "native"), (a, b), strict=True))
        except LoraFormatError as error:
            problems += (replace(p, rule="LF-508") for p in error.problems)
    if problems:
        raise LoraFormatError(problems)
    return tensors


def _exact(adapter: Adapter, feeds: dict[str, Array]) -> dict[str, Array]:
    """The feeds, where the slots' dtype holds the factors exactly; LF-508 names the flag that asks for rounding."""
    kinds = {t.dtype for t in feeds.values()}
    lossy = {
        p.dtype.name for u in adapter.values() for p in (u["lora"].lora_A, u["lora"].lora_B)
        if not all(np.array_equal(p.astype(kind).astype(np.float64), p.astype(np.float64)) for kind in kinds)
    }  # fmt: skip
    if lossy:
        (kind, *_) = sorted(k.name for k in kinds)
        raise fault(
            "LF-508",
            f"the model's slots are {kind}, which rounds factors of {', '.join(sorted(lossy))}",
            fix=f"--dtype {kind}",
        )
    return feeds
