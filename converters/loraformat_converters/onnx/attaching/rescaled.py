"""The magnitudes of DoRAs in a stack: each row is rescaled by the g = m/‖V‖ of the adapter that it chose.

g of every slot lies in a table [N + 1, out]; slot 0, and an adapter that has no magnitude, has 1 there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from onnx import helper

from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.attaching.branches import FORMS
from loraformat_converters.onnx.attaching.choice import Choice
from loraformat_converters.onnx.attaching.magnitude import Ratio, Rescaling
from loraformat_converters.onnx.attaching.weight import wide
from loraformat_converters.onnx.graph.index import Site
from loraformat_converters.onnx.graph.nodes import Nodes

__all__ = ["rescaled", "table"]

Rescaled = Callable[[Nodes, str, str], str]


def table(make: Nodes, site: Site, ratios: Mapping[int, Sequence[Ratio]], count: int) -> Rescaling | None:
    """g and 1 − g of every slot, of ``count`` adapters; None where none has a magnitude."""
    if not ratios:
        return None
    kind, out = wide(site.dtype), site.operand.matrix_shape[-2]
    numpy = helper.tensor_dtype_to_np_dtype(kind)
    none = make.store("magnitude/none", np.ones((1, out), numpy))
    whole = {n: magnitude.of_all(make, own, site) for n, own in ratios.items()}
    rows = [make.reshape(whole[n], [out], [1, out], "magnitude/row") if n in whole else none for n in range(-1, count)]
    every = make.node("Concat", rows, "magnitude/all", axis=0)
    rest = make.node("Sub", [make.store("magnitude/one", np.ones((), numpy)), every], "magnitude/rest")
    return Rescaling(make.cast(every, site.dtype, "magnitude/cast", kind), rest)


def rescaled(choice: Choice, site: Site, axes: int | None, every: Rescaling | None) -> Rescaled | None:
    """Lays g ⊙ (y − bias) + bias. ``axes``: of y, where the first counts the rows and nothing else; else None."""
    if every is None:
        return None

    def lay(run: Nodes, base: str, bias: str) -> str:
        y = base if axes is not None else _tall(choice, run, site, base)
        kept = run.node("Mul", [y, _of_row(choice, run, every.ratio, axes, "magnitude/of_row")], "rescaled")
        if bias:
            rest = magnitude.rest(run, FORMS[site.like], site, bias, every.rest)
            kept = run.node("Add", [kept, _of_row(choice, run, rest, axes, "bias/of_row")], "bias")
        if axes is not None:
            return kept
        return run.node("Reshape", [kept, run.node("Shape", [base], "base/shape")], "rescaled/shaped")

    return lay


def _of_row(choice: Choice, run: Nodes, every: str, axes: int | None, role: str) -> str:
    """The entry that each row chose, as it meets y."""
    taken = run.node("Gather", [every, choice.index], role)
    shape = run.store(f"{role}/shape", np.array([0, *[1] * ((axes or 3) - 2), -1]))
    return run.node("Reshape", [taken, shape], f"{role}/spread")


def _tall(choice: Choice, run: Nodes, site: Site, base: str) -> str:
    """y as [rows, tokens, out]."""
    rest = run.store("base/rest", np.array([-1, site.operand.matrix_shape[-2]]))
    return run.node("Reshape", [base, run.node("Concat", [choice.rows, rest], "base/rows", axis=0)], "base/tall")
