"""The proof of what a verb wrote: it is run beside the other verb's result, an attached model beside a merged one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.base import Options
from loraformat.plan import Plan, Proof
from loraformat.temporaries import scratch
from loraformat_converters.onnx.attaching.modes import cases
from loraformat_converters.onnx.proving.dense import check_products
from loraformat_converters.onnx.proving.fusions import unfused
from loraformat_converters.onnx.proving.inputs import generated, stated
from loraformat_converters.onnx.proving.prove import ROUNDED, compare, tolerance

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.onnx.base import OnnxBase

    Array = npt.NDArray[Any]

__all__ = ["check_provable", "prove"]


def check_provable(base: OnnxBase, plan: Plan, inputs: Path | None) -> None:
    """LF-608 where the other verb's result could not be made; LF-705 where there are no inputs for it."""
    _feeds(base, inputs)
    if plan.verb == "merge" and plan.options.requantize:
        check_products(plan.state)
    elif plan.verb == "merge":
        for _, jobs in cases(plan):
            base.plan("attach", jobs, Options(plan.options.out))


def prove(base: OnnxBase, plan: Plan, inputs: Path | None, whole: Path) -> Proof:
    """Run what ``apply`` wrote against the other verb's result, which is made beside the ``whole`` output and deleted."""
    feeds, out = _feeds(base, inputs), plan.options.out
    limit = tolerance({spot.sites[0].dtype for spot in plan.state})
    if any(spot.rounds for spot in plan.state):
        limit = max(limit, ROUNDED)
    proofs = []
    with scratch(whole, ".onnx") as other:
        for case, jobs in cases(plan):
            if jobs and plan.verb == "merge" and not plan.options.requantize:
                base.apply(base.plan("attach", jobs, Options(other)), force=True)
            elif jobs:
                merged = out if plan.verb == "merge" else None
                base.rewriting.put_together(jobs, other, merged).write(force=True)
            proofs.append(compare(out, other if jobs else base.path, base.path, {**feeds, **case(feeds)}, limit))
    worst = max(proofs, key=lambda proof: proof.error)
    fewer = unfused(base.path, out) if plan.verb == "attach" else {}
    return replace(worst, moved=min(p.moved for p in proofs if p.moved or len(proofs) == 1), unfused=fewer)


def _feeds(base: OnnxBase, inputs: Path | None) -> Mapping[str, Array]:
    return stated(inputs) if inputs else generated(base.model, base.index, base.path.parent)
