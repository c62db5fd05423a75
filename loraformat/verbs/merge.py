"""The verbs that put an adapter into a base: everything is checked in ``prepare``, before the first byte is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from loraformat.apart import check_apart
from loraformat.base import Base, Options
from loraformat.bound import check_bound
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.naming.spaces import space_of
from loraformat.plan import Job
from loraformat.resolve import Hints
from loraformat.strength import weighed

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from loraformat.adapter import Adapter
    from loraformat.plan import Outcome, Plan
    from loraformat.resolve import Resolution

__all__ = ["How", "attach", "merge", "prepare"]


def prepare(
    verb: str,
    adapters: Sequence[tuple[str, Adapter]],
    base: Base,
    options: Options,
    hints: Hints | None = None,
    *,
    any_base: bool = False,
) -> Plan:
    """The plan of ``merge`` or ``attach``, every target resolved and every obstacle found.

    Args:
        adapters: (name, adapter), applied in this order.
        any_base: apply an adapter that was bound to other weights.

    Raises:
        LoraFormatError: LF-6xx; LF-703 the output would be a file of the base.
    """
    check_apart(options.out, base)
    _check_ending(options.out, base.path)
    jobs = [Job(adapter, _resolved(adapter, base, hints or Hints()), name) for name, adapter in adapters]
    if not any_base:
        for job in jobs:
            check_bound(job.adapter, base, job.resolution)
    return base.plan(verb, jobs, options)


_ENDINGS = {
    ".safetensors": "safetensors",
    ".onnx": "ONNX",
    ".gguf": "GGUF",
    **dict.fromkeys((".bin", ".pt", ".pth"), "PyTorch"),
}


def _check_ending(out: Path, base: Path) -> None:
    """LF-703 where the output's name promises another kind of file than the base is: nothing here converts a model."""
    wanted, given = _ENDINGS.get(out.suffix.lower()), _ENDINGS.get(base.suffix.lower())
    if wanted and given and wanted != given:
        fix = f"name it {out.with_suffix(base.suffix).name}; another kind of model is made by its own exporter"
        raise fault("LF-703", f"{out} is a name of {wanted}, and what is written is {given}, as the base", fix=fix)


def _resolved(adapter: Adapter, base: Base, hints: Hints) -> Resolution:
    """Where every target lies; where the adapter has names of another space than the base, its refusal says so first."""
    try:
        return base.resolve(adapter, hints).require()
    except LoraFormatError as error:
        if adapter.names == (space := space_of(base)):
            raise
        what = f"the adapter has names of the space {adapter.names}, the base of {space}"
        fix = f"loraformat retarget ADAPTER --base {base.path} -o OUT"
        raise LoraFormatError([Problem("LF-602", what, fix=fix), *error.problems]) from None


def merge(
    adapter: Adapter | Sequence[tuple[Adapter, float]],
    base: Base,
    out: str | os.PathLike[str],
    hints: Hints | None = None,
    *,
    any_base: bool = False,
    requantize: bool = False,
    survival: float = 0.1,
    force: bool = False,
) -> Outcome:
    """Write ``base`` with W + ΔW in the place of W, in W's own dtype and orientation.

    Args:
        adapter: one, or several with their weights, applied one after the other.
        out: a file; of a base that is a folder, a folder.
        any_base: apply an adapter that was bound to other weights.
        requantize: round to few bits again where the base stores them: fp8, LLM.int8, NF4, FP4, GPTQ; Q8_0 … of GGUF; in
            ONNX int8, int4.
        survival: of a checkpoint, a model in GGUF or ONNX codes, the least share of ΔW that must survive; 0 takes what there is.
        force: replace ``out`` if it exists.

    Returns:
        Per target ‖W‖, ‖ΔW‖ and what rounding lost of it; the bytes written.

    Raises:
        LoraFormatError: LF-602 … LF-609 a target is not found, not placed or does not fit; LF-615 too little
            of ΔW survives; LF-702, LF-703 the output.
    """
    options = Options(Path(out), requantize=requantize, survival=survival)
    plan = prepare("merge", weighed(adapter), base, options, hints, any_base=any_base)
    return base.apply(plan, force=force)


class How(TypedDict, total=False):
    """The ways to attach: see ``loraformat.base.Options``."""

    mode: Literal["branch", "swap", "stack"]
    prefold: bool
    slots: Literal["optional", "required"]
    pad_rank: int | None
    slot_names: Literal["native", "olive", "genai"]
    targets: Sequence[str]
    rows: Sequence[str]
    select: Literal["index", "weights"]
    provider: Literal["cpu", "cuda"]
    topology: Literal["auto", "separate", "concat", "folded"]
    live_scale: bool


def attach(
    adapter: Adapter | Sequence[tuple[Adapter, float]] | Mapping[str, Adapter],
    base: Base,
    out: str | os.PathLike[str],
    hints: Hints | None = None,
    *,
    any_base: bool = False,
    force: bool = False,
    **how: Unpack[How],
) -> Outcome:
    """Write ``base``, an ONNX model, with adapters beside its weights, which are not touched: s·B·A·x for each target.

    Args:
        adapter: as in ``merge``, or several by the names by which a swap and a stack know them.
        how: ``mode="swap"``, ``topology="concat"``, …: those of ``loraformat.base.Options``.

    The other arguments and the errors are those of ``merge``; LF-608 the base is no graph; LF-705 what does not go together.
    """
    given: dict[str, Any] = {**how}
    options = Options(Path(out), **given | {name: tuple(given[name]) for name in ("targets", "rows") if name in given})
    plan = prepare("attach", weighed(adapter), base, options, hints, any_base=any_base)
    return base.apply(plan, force=force)
