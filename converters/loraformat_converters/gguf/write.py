"""Adapter → GGUF: one alpha for all, each pair as llama.cpp's loader checks it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from loraformat.algebra.refactored import under_scale
from loraformat.dtypes import dtype_name
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output, WriteOptions
from loraformat_converters.gguf import architectures, keys, store
from loraformat_converters.gguf.file import LONGEST_NAME
from loraformat_converters.gguf.read import EMBEDDING, ROLES

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.parts import Lora
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["write"]


def write(adapter: Adapter, options: WriteOptions) -> Output:
    """One file.

    llama.cpp multiplies a pair of rank r by alpha / r, with one alpha for the file. The commonest is stored; a pair that
    needs another has the ratio multiplied into its lora_b, and that is a warning. alpha is a float32, as the product is.

    Raises:
        LoraFormatError: LF-508 with everything that llama.cpp cannot hold.
    """
    if adapter.names != "gguf" or adapter.components:
        what = f"names are in the space {adapter.names!r}" if adapter.names != "gguf" else "the model has components"
        raise fault("LF-508", f"llama.cpp names the tensors of one GGUF model; here {what}")
    source = keys.restored(adapter.extensions["gguf"]) if "gguf" in adapter.extensions else {}
    problems = [
        Problem("LF-508", what, key, fix) for key, u in adapter.items() for what, fix in _misfits(key, u, options)
    ]
    architecture = _architecture(source, options, problems)
    if problems:
        raise LoraFormatError(problems)
    parts: dict[str, Lora] = {key: update["lora"] for key, update in adapter.items()}
    alpha = _alpha(parts)
    tensors: dict[str, Array] = {}
    warnings: list[Problem] = []
    for key, part in parts.items():
        try:
            b = _under(key, part, alpha, warnings)
        except LoraFormatError as error:
            problems += (Problem("LF-508", problem.what, key) for problem in error.problems)
            continue
        a = part.lora_A
        count = tuple(map(max, zip(a.shape[:-2], b.shape[:-2], strict=True)))  # each expert has factors of its own
        a, b = (f if f.shape[:-2] == count else np.broadcast_to(f, (*count, *f.shape[-2:])) for f in (a, b))
        tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"] = a.T if key.endswith(EMBEDDING) else a, b
    if problems:
        raise LoraFormatError(problems)
    values = keys.metadata(architecture, alpha, source)

    def write_file(file: BinaryIO) -> None:
        store.write(file, values, tensors)

    return Output({"": write_file}, False, warnings)


def _single(number: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(number))


def _alpha(parts: Mapping[str, Lora]) -> float:
    """The alpha that most pairs have, as float32; not 0, which llama.cpp takes for a scale of 1."""
    wanted = Counter(_single(_own_alpha(part)) for part in parts.values())
    return next((alpha for alpha, _ in wanted.most_common() if alpha and math.isfinite(alpha)), 1.0)


def _own_alpha(part: Lora) -> float:
    """The alpha under which alpha / r is the scale of this pair."""
    return part.alpha if part.scale_rule == "alpha/r" else part.scale * part.r


def _under(key: str, part: Lora, alpha: float, warnings: list[Problem]) -> Array:
    """lora_b under the file's alpha."""
    own = _own_alpha(part)
    if _single(own) == alpha:
        return part.lora_B
    b, residual = under_scale(part, alpha / part.r)
    exact = "exact" if residual == 0 else f"residual {residual:.1e}"
    what = f"an alpha of {own:g} is folded into lora_b: llama.cpp has one, {alpha:g}, for all; {exact}"
    warnings.append(Problem("LF-508", what, key, severity="warning"))
    return b


def _architecture(source: Mapping[str, Any], options: WriteOptions, problems: list[Problem]) -> str:
    """The name by which llama.cpp knows the base's architecture: by the source, the base or its config.json."""
    kept = source.get(keys.ARCHITECTURE)
    told = {
        "the source": kept.value if kept is not None and kept.type == "str" else None,
        "the base": getattr(options.base, "architecture", None),
        "config.json": architectures.named(options.config),
    }
    found = {who: name for who, name in told.items() if name}
    if not found:
        fix = "give the base or its config.json: --base model.gguf, or --base config.json"
        what = "llama.cpp wants the architecture of the base, which is not known"
        if options.config:
            what += f": no table for model_type {options.config.get('model_type')!r}"
        problems.append(Problem("LF-508", what, keys.ARCHITECTURE, fix))
    elif len(set(found.values())) > 1:
        said = ", ".join(f"{name} by {who}" for who, name in found.items())
        problems.append(Problem("LF-508", f"the architecture is {said}", keys.ARCHITECTURE))
    return next(iter(found.values()), "")


def _misfits(key: str, update: Update, options: WriteOptions) -> list[tuple[str, str]]:
    """Why llama.cpp cannot apply this update, and the ways out."""
    if update.kind != "lora":
        return [(f"a {update.kind} update: llama.cpp applies plain pairs alone", "")]
    part: Lora = update["lora"]
    found = []
    if len(f"{key}.lora_a".encode()) > LONGEST_NAME:
        found.append((f"a tensor's name has at most {LONGEST_NAME} bytes", ""))
    if any(f".{role}" in key for role in ROLES):  # llama-adapter.cpp takes the role out wherever it stands
        found.append((f"llama.cpp would misread a name with .{' or .'.join(ROLES)} in it", ""))
    if part.mid is not None:
        found.append(("a pair around a core", "--to-lora R, whose residual is printed"))
    if others := {dtype_name(factor.dtype) for factor in (part.lora_A, part.lora_B)} - store.DTYPES:
        written = ", ".join(sorted(store.DTYPES))
        found.append((f"a factor is {', '.join(sorted(others))}; written are {written}", "--dtype float32"))
    if part.lora_A.ndim > 3:
        found.append((f"{part.lora_A.ndim - 2} batch axes: ggml stacks experts along one", ""))
    if key.endswith(EMBEDDING) and architectures.tied(options.config):
        found.append(
            ("of a model whose head is its embedding: llama.cpp ends where the head is computed", "leave it out")
        )
    return [*found, *_displaced(key, update)]


def _displaced(key: str, update: Update) -> list[tuple[str, str]]:
    """ggml multiplies [*experts, out, in], and looks up the rows of one tensor alone."""
    place, lookup = update.placement, key.endswith(EMBEDDING)
    if update.op == "embedding" and not lookup:
        return [(f"llama.cpp looks up the rows of {EMBEDDING} alone with an adapter", "")]
    if lookup and update["lora"].lora_A.ndim != 2:
        return [("a stack of embeddings", "")]
    if place is None:
        return []
    n = len(place.batch)
    wanted = ((1,), (0,), ()) if lookup else ((n,), (n + 1,), tuple(range(n)))
    if (place.out, place.in_, place.batch) != wanted:
        return [(f"the placement {place.spec} of {list(place.shape)} is not that of this tensor in ggml", "")]
    return []
