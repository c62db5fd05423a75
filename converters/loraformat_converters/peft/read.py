"""PEFT → Adapter: every tensor understood, every rank and alpha checked against the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.container import dtype_name
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Reading, ReadOptions
from loraformat.names import key_fault
from loraformat.parts import Lora
from loraformat.scale import ScaleRule
from loraformat.shapes import FLOATS, shape_problems
from loraformat.updates import Update
from loraformat_converters.peft import config as configs

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.source import Source

    Array = npt.NDArray[Any]

__all__ = ["PREFIX", "read"]

PREFIX = "base_model.model."
"""PeftModel's own wrapping; a model that adapters were injected into has none."""

_ENDINGS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
# peft 0.21.2: what else a LoRA adapter can hold, by the end of the key after the module's path; the first that fits.
_REFUSED: tuple[tuple[str, str], ...] = (
    (r"\.lora_magnitude_vector(\.weight)?", "a DoRA magnitude, which is not read yet"),
    (r"\.lora_B\.bias", "a trained bias of B (lora_bias), which is not read yet"),
    (r"\.lora_diag", "KaSA's diagonal, which also changes the base"),
    (r"\.token_adapter\.trainable_tokens_delta", "trained token rows, which are not read yet"),
    (r"\.base_layer\.bias", "a trained bias, which is not read yet"),
    (r"\.base_layer\.weight", "a base weight saved beside its factors (save_embedding_layers), which is not read yet"),
    (r"\.base_layer\.out_proj\.lora_[AB]\.weight", "part of an nn.MultiheadAttention, which is not read yet"),
    (r"(\.base_layer)+\.lora_[AB]\.weight", "a factor of an expert parameter (target_parameters), not read yet"),
    (r"\.base_layer\..*", "inside a layer that an adapter wraps, which is not read yet"),
    (
        r"\.lora_(embedding_)?[AB]\.[^.]+(\.weight)?",
        "of a live model, its adapter's name in the key: use save_pretrained",
    ),
)
_GATHER = "was the adapter saved before its parameters were gathered (ZeRO-3, FSDP)?"
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})


@dataclass(frozen=True, slots=True)
class _Pair:
    module: str
    embedding: bool
    a: Array
    b: Array


def read(source: Source, options: ReadOptions) -> Reading:
    """The adapter of a PEFT folder or of its tensor file.

    Raises:
        LoraFormatError: LF-503 … LF-509, all that were found; LF-3xx where factors do not fit each other.
    """
    text = source.sidecar(configs.FILE)
    config, warnings = configs.parse(text) if text is not None else (None, [])
    _check_kind(source)
    problems: list[Problem] = []
    targets: dict[str, Update] = {}
    for pair in _pairs(source.tensors, problems):
        key = f"{pair.module}.weight"
        if why := key_fault(key):
            problems.append(Problem("LF-301", why, repr(key)))
            continue
        if key in targets:
            problems.append(Problem("LF-506", "lora_A/lora_B and lora_embedding_A/lora_embedding_B: which is it?", key))
            continue
        update = _update(pair, config, options, problems)
        if config and len(alphas := config.alphas(pair.module)) > 1:
            warnings.append(_overlap(pair.module, alphas))
        if update is not None:
            targets[key] = update
            problems += shape_problems(key, update)
    if not targets and not problems:
        what = "no lora_A/lora_B pair in the file: it would change nothing"
        problems.append(Problem("LF-304", what, str(source.path), _GATHER))
    if problems:
        raise LoraFormatError(problems)
    extensions = {"peft": config.text} if config else {}
    return Reading(Adapter(targets, "torch", base_model=_base_model(config), extensions=extensions), warnings)


def _check_kind(source: Source) -> None:
    """LF-701 where the tensors lie in a pickle: it can run code on loading, and has no header to read."""
    beside = [p.name for p in sorted(source.folder.glob("adapter_model.*")) if p.suffix in _PICKLES]
    named = source.file.name if source.file is not None and source.file.suffix in _PICKLES else None
    if named or (source.file is None and beside):
        fix = "load the adapter with PEFT once and save it again: save_pretrained writes .safetensors"
        raise fault("LF-701", f"{named or beside[0]} is a pickle, which can run code: it is not read", fix=fix)


def _pairs(tensors: Mapping[str, Array], problems: list[Problem]) -> Iterator[_Pair]:
    """Both factors of every module, in the order of the module's names."""
    found: dict[tuple[str, bool], dict[str, Array]] = {}
    prefixed = {name.startswith(PREFIX) for name in tensors}
    for name in tensors:
        ending = next((e for e in _ENDINGS if name.endswith(e)), None)
        module = name.removeprefix(PREFIX) if prefixed == {True} else name
        if ending is None or "base_layer" in module.split("."):
            problems.append(_not_understood(name))
            continue
        role, embedding = _ENDINGS[ending]
        found.setdefault((module.removesuffix(ending), embedding), {})[role] = tensors[name]
    for (module, embedding), roles in sorted(found.items()):
        if len(roles) == 2:
            yield _Pair(module, embedding, roles["A"], roles["B"])
        else:
            missing = "B" if "A" in roles else "A"
            what = f"lora_{missing} is missing: a lone factor says nothing"
            problems.append(Problem("LF-303", what, module, "the file is incomplete"))


def _not_understood(name: str) -> Problem:
    for ending, what in _REFUSED:
        if re.search(f"{ending}$", name):
            return Problem("LF-504", f"the tensor is {what}", name)
    return Problem("LF-506", "neither lora_A nor lora_B of a module: a fully trained tensor, or another layout", name)


def _overlap(module: str, alphas: list[float]) -> Problem:
    """peft 0.21.2 writes the configuration with sorted keys: which pattern came first in training is lost."""
    what = f"alpha_pattern gives {' and '.join(map(str, alphas))}: PEFT takes the first in the file, {alphas[0]}"
    fix = "training may have used another: state it in a pattern of its own"
    return Problem("LF-507", what, module, fix, "warning")


def _update(pair: _Pair, config: configs.Config | None, options: ReadOptions, problems: list[Problem]) -> Update | None:
    for role, tensor in (("A", pair.a), ("B", pair.b)):
        dtype, sizes = dtype_name(tensor.dtype), list(tensor.shape)
        if dtype not in FLOATS:
            problems.append(Problem("LF-314", f"lora_{role} is {dtype}; factors are floats", pair.module))
            return None
        if len(sizes) < 2 or (pair.embedding and len(sizes) != 2):
            problems.append(Problem("LF-309", f"lora_{role} is {sizes}; a factor has two axes or more", pair.module))
            return None
        if 0 in sizes:
            problems.append(Problem("LF-311", f"lora_{role} is empty: {sizes}", pair.module, _GATHER))
            return None
    r = pair.a.shape[0]
    alpha, rule = _scale(pair.module, r, config, options, problems)
    if alpha is None:
        return None
    if pair.embedding:
        shape = (pair.a.shape[1], pair.b.shape[0])
        place = Placement(shape, out=(1,), in_=(0,))
        return Update((Lora(pair.a, pair.b, alpha, rule),), place, op="embedding", assumed=("name",))
    if pair.a.ndim == 2:
        return Update((Lora(pair.a, pair.b, alpha, rule),), assumed=("name",))
    return _convolution(pair, alpha, rule, problems)


def _convolution(pair: _Pair, alpha: float, rule: ScaleRule, problems: list[Problem]) -> Update | None:
    """A [r, in, *kernel], B [out, r, 1, …]: the matrix product over all of in and kernel."""
    if pair.b.ndim != pair.a.ndim or any(n != 1 for n in pair.b.shape[2:]):
        what = f"lora_B {list(pair.b.shape)} beside lora_A {list(pair.a.shape)} must be [out, r{', 1' * (pair.a.ndim - 2)}]"
        problems.append(Problem("LF-309", what, pair.module))
        return None
    if pair.b.shape[1] != pair.a.shape[0]:
        # peft 0.21.2: A is never grouped and B is [out, r / groups, 1, 1]; its own merge raises NotImplementedError
        what = f"lora_B {list(pair.b.shape)} does not take lora_A's rank {pair.a.shape[0]}: a grouped convolution"
        fix = "group 0 of B reads the first rows of A only: no ΔW of the base's shape exists"
        problems.append(Problem("LF-504", what, pair.module, fix))
        return None
    place = Placement((pair.b.shape[0], *pair.a.shape[1:]), (0,), tuple(range(1, pair.a.ndim)))
    a, b = pair.a.reshape(pair.a.shape[0], -1), pair.b.reshape(pair.b.shape[:2])
    return Update((Lora(a, b, alpha, rule),), place, assumed=("name",))


def _scale(
    module: str, r: int, config: configs.Config | None, options: ReadOptions, problems: list[Problem]
) -> tuple[float | None, ScaleRule]:
    """(alpha, rule) by the configuration, else by the user's word; both where they agree."""
    alpha = config.alpha(module) if config else None
    rule: ScaleRule | None = config.rule if config and alpha is not None else None
    said: list[tuple[str, Any, Any]] = [
        ("rank", config.rank(module) if config else None, r),
        ("rank", options.rank, r),
        ("alpha", options.alpha, alpha),
        ("scale rule", options.scale_rule, rule),
    ]
    for what, stated, found in said:
        if stated is not None and found is not None and stated != found:
            problems.append(
                Problem(
                    "LF-507",
                    f"the {what} is stated as {stated}, and is {found} by the tensors or {configs.FILE}",
                    module,
                )
            )
            return None, "alpha/r"
    alpha = options.alpha if alpha is None else alpha
    rule = rule or options.scale_rule
    if alpha is None or rule is None:
        fix = "state it: --alpha A --scale-rule alpha/r (or alpha/sqrt(r) for rsLoRA)"
        problems.append(Problem("LF-509", f"no {configs.FILE} with lora_alpha: the scale is unknown", module, fix))
        return None, "alpha/r"
    return alpha, rule


def _base_model(config: configs.Config | None) -> dict[str, str]:
    if config is None:
        return {}
    pairs = (("name", config.value.get("base_model_name_or_path")), ("revision", config.value.get("revision")))
    return {name: value for name, value in pairs if isinstance(value, str) and value}
