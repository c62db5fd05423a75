"""The verbs that put an adapter into a base: everything is checked in ``prepare``, before the first byte is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.base import Base, Options
from loraformat.bound import check_bound
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.naming.spaces import space_of
from loraformat.plan import Job
from loraformat.resolve import Hints
from loraformat.strength import weighed

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from loraformat.adapter import Adapter
    from loraformat.plan import Outcome, Plan
    from loraformat.resolve import Resolution

__all__ = ["attach", "merge", "prepare"]


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
        LoraFormatError: LF-6xx; LF-703 the output would be the base itself.
    """
    if options.out.exists() and options.out.resolve() == base.path.resolve():
        raise fault(
            "LF-703", f"{options.out} is the base itself", fix="write to another name: the base is the way back"
        )
    jobs = [Job(adapter, _resolved(adapter, base, hints or Hints()), name) for name, adapter in adapters]
    if not any_base:
        for job in jobs:
            check_bound(job.adapter, base, job.resolution)
    return base.plan(verb, jobs, options)


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


def attach(
    adapter: Adapter | Sequence[tuple[Adapter, float]],
    base: Base,
    out: str | os.PathLike[str],
    hints: Hints | None = None,
    *,
    prefold: bool = False,
    any_base: bool = False,
    force: bool = False,
) -> Outcome:
    """Write ``base``, an ONNX model, with the branch s·B·A·x beside each target; its own weights are not touched.

    Args:
        prefold: store what a runtime that optimises would compute once, for one that does not.

    The other arguments and the errors are those of ``merge``; LF-608 the base is no graph.
    """
    options = Options(Path(out), prefold=prefold)
    plan = prepare("attach", weighed(adapter), base, options, hints, any_base=any_base)
    return base.apply(plan, force=force)
