"""One update → the tensors of its module, or why this layout has none for it (LF-508)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loraformat.parts import Delta, Loha, Lokr, Lora, Magnitude, roles_of
from loraformat.scale import alpha_for
from loraformat_converters.kohya import magnitudes, names, scales

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.axes import Placement
    from loraformat.parts import Part
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["alpha", "fault", "tensors"]

_FOLD = "--fold-scale multiplies it into a factor"


def fault(key: str, update: Update, axes: int | None) -> tuple[str, str] | None:
    """(why, the way out) where this layout cannot carry the update; None where it can.

    Args:
        axes: of the weight, where the placement does not tell and the source did.
    """
    module, _, leaf = key.rpartition(".")
    kinds = [part.kind for part in update.parts]
    if leaf not in ("weight", "bias") or not module:
        return f"a module has a weight and a bias, and no {leaf!r}", ""
    if any(names.parse(f"{module}.{ending}") != names.Name(module, role) for ending, role in names.ROLES.items()):
        return f"tensors of a module called {module!r} would be taken for another's", "rename the target"
    if update.op is not None:
        return f"no reader applies a pair to an {update.op}", "--drop lora, or keep the native file"
    if len(update.additive) != 1 or kinds.count("magnitude") + 1 != len(kinds):
        return f"a {update.kind} update: a reader applies one method to a weight", "--to-lora R makes one pair of all"
    vector = kinds == ["delta"] and update["delta"].delta.ndim == 1
    if leaf == "bias" and not vector:
        return f"a bias changes by a whole difference alone, not by {update.kind}", ""
    flat = update.additive[0].kind != "lora" and update.placement is None and axes is None
    if "magnitude" in update and flat:
        return "how many axes the weight has, and so dora_scale, is not known: a kernel may be flattened", "--base B"
    return _unlike(update.placement) or _kernel(update) or _part(update)


def _unlike(place: Placement | None) -> tuple[str, str] | None:
    """Why a placement is not that of torch's Linear and convolutions."""
    if place is None or (place.out == (0,) and place.in_ == tuple(range(1, len(place.shape)))):
        return None
    what = f"the weight is {place.spec} {list(place.shape)}: readers know [out, in] and [out, in, *kernel]"
    return what, "loraformat retarget turns it into a torch module's" if not place.batch else ""


def _cores(part: Part) -> Iterator[tuple[str, Array]]:
    """The tensors of a part that have the axes of a kernel, behind two of their own."""
    for role, tensor in roles_of(part):
        if role in ("mid", "t1", "t2") or (role == "lokr_w2" and tensor.ndim > 2):
            yield role, tensor


def _kernel(update: Update) -> tuple[str, str] | None:
    """Why the axes of a core are not those of the weight's kernel; axes of size 1 come and go (PEFT's of a Conv1d)."""
    for role, core in _cores(update.additive[0]):
        place = update.placement
        if place is None and core.shape[-1] == 1:
            return f"{role} is {list(core.shape)}: whether the kernel has the last axis is not known", "--base B"
        if place is not None and [n for n in core.shape[2:] if n > 1] != [n for n in place.shape[2:] if n > 1]:
            return f"{role} is {list(core.shape)}, the kernel of the weight {list(place.shape[2:])}", ""
    return None


def _part(update: Update) -> tuple[str, str] | None:
    match part := update.additive[0]:
        case Lora():
            if part.lora_A.ndim != 2:
                return "factors with a batch axis", ""
            if part.mid is not None and part.mid.shape[0] != part.mid.shape[1]:
                return f"the core {list(part.mid.shape)} has two ranks", "--to-lora R"
        case Loha():
            if part.hada_w2_b.shape[0] != part.r:
                return "the two products have different ranks, and a file has one alpha for both", "--to-lora R"
        case Lokr() if _ranks(part) == set():
            if part.scale != 1.0:
                return f"scale {part.scale:g}, and readers take 1 for two whole factors", _FOLD
        case Lokr() if len(_ranks(part)) > 1:
            return "the two products have different ranks, and readers differ in which divides alpha", "--to-lora R"
        case Delta() if part.scale != 1.0:
            return f"scale {part.scale:g}, and a whole difference has none", _FOLD
        case Delta() if part.delta.ndim > 2 and update.placement is None:
            return "a difference of more than two axes that is not placed", "--base B"
    if (stated := alpha(part)) == 0.0:
        return "scale 0: sd-scripts and LyCORIS take an alpha of 0 for the rank", _FOLD
    if stated is not None and abs(stated) > scales.LARGEST:
        return f"a scale of {part.scale:g} needs an alpha beyond float32", _FOLD
    return _magnitude(update)


def _magnitude(update: Update) -> tuple[str, str] | None:
    if "magnitude" not in update:
        return None
    part: Magnitude = update["magnitude"]
    if part.magnitude_axes not in (None, (0,), (1,)):
        return f"a norm that keeps the axes {list(part.magnitude_axes or ())}: readers keep the first or the second", ""
    if part.eps not in (0.0, magnitudes.EPS):
        return f"eps {part.eps:g}: LyCORIS adds {magnitudes.EPS:.3g} to the norm", ""
    if update.additive[0].kind == "delta":
        return "a magnitude beside a whole difference", "--to-lora R"
    return None


def _ranks(part: Lokr) -> set[int]:
    return {int(t.shape[0]) for t in (part.lokr_w1_b, part.lokr_w2_b) if t is not None}


def alpha(part: Part) -> float | None:
    """The alpha that gives the part's scale in this layout; None where no scale comes from it."""
    match part:
        case Lora() | Loha():
            r = part.r
        case Lokr() if ranks := _ranks(part):
            r = ranks.pop()
        case _:
            return None
    return part.alpha if part.scale_rule == "alpha/r" and part.r == r else alpha_for(part.scale, r)


def tensors(key: str, update: Update, axes: int | None) -> Iterator[tuple[str, Array]]:
    """(role, tensor) of everything but alpha; ``axes`` as for ``fault``."""
    shape = update.placement.shape if update.placement is not None else ()
    leaf = key.rpartition(".")[2]
    for part in update.parts:
        match part:
            case Lora():
                yield from _pair(part, shape)
            case Magnitude():
                yield "dora_scale", part.magnitude.reshape(_norm_shape(part, len(shape) or axes or 2))
            case Delta():
                vector = part.delta.ndim == 1
                role = ("diff_b" if leaf == "bias" else "w_norm") if vector else "diff"
                yield role, part.delta.reshape(shape or part.delta.shape)
            case _:
                prefix = "hada" if part.kind == "loha" else "lokr"
                cores = dict(_cores(part))
                for role, tensor in roles_of(part):
                    if role in cores and shape:
                        tensor = tensor.reshape(*tensor.shape[:2], *shape[2:])
                    yield (f"{prefix}_{role}" if role in ("t1", "t2") else role), tensor


def _pair(part: Lora, shape: tuple[int, ...]) -> Iterator[tuple[str, Array]]:
    """The pair [r, in, *kernel] and [out, r, 1, …]; around a core both have a kernel of ones."""
    kernel = shape[2:] if shape or part.mid is None else part.mid.shape[2:]
    ones = (1,) * len(kernel)
    of_down = kernel if part.mid is None else ones
    yield "down", part.lora_A.reshape(part.lora_A.shape[0], part.lora_A.shape[1] // math.prod(of_down), *of_down)
    yield "up", part.lora_B.reshape(*part.lora_B.shape, *ones)
    if part.mid is not None:
        yield "mid", part.mid.reshape(*part.mid.shape[:2], *kernel)


def _norm_shape(part: Magnitude, axes: int) -> tuple[int, ...]:
    kept = 1 if part.magnitude_axes == (1,) else 0
    return tuple(-1 if axis == kept else 1 for axis in range(axes))
