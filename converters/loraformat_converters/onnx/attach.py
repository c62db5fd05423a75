"""Attach: the change beside a weight that is not touched.

The adapter's tensors are stored as it has them. Transposing, scaling and casting are constant subgraphs that ONNX
Runtime folds when it loads the model, so that attaching writes only the adapter, and nothing is lost.

    x ──┬── MatMul(W) ── Add(bias) ───────────────────── lora/T/base ──┐
        └── MatMul(Aᵀ) ── MatMul((s·B)ᵀ) ── lora/T/change ──────────── Add ── y

What is no plain pair changes the weight instead, in a constant subgraph between W and its operator (``weight``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from loraformat.errors import fault
from loraformat_converters.onnx.branches import FORMS, Form, Pair, unchanged
from loraformat_converters.onnx.ends import Ends
from loraformat_converters.onnx.index import Index, Site
from loraformat_converters.onnx.nodes import Editor, Nodes
from loraformat_converters.onnx.operators import attribute
from loraformat_converters.onnx.rounding import balance
from loraformat_converters.onnx.spots import Change, Spot
from loraformat_converters.onnx.values import Values
from loraformat_converters.onnx.weight import Weight, wide

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from loraformat.axes import Placement
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["Attachment", "has_branch"]


def has_branch(spot: Spot) -> bool:
    """Whether every change of this weight is a pair, or a pair with a magnitude, that its operators can run beside it."""
    first, form = spot.sites[0], FORMS.get(spot.sites[0].like)
    if form is None or first.vector or any(s.operand != first.operand for s in spot.sites):
        return False
    if any(FORMS.get(site.like) is not form for site in spot.sites):
        return False
    return all(_is_pair(change.update, form, first) for change in spot.changes)


def _is_pair(update: Update, form: Form, site: Site) -> bool:
    if update.kind not in ("lora", "dora") or update["lora"].mid is not None:
        return False
    return update.kind == "lora" or (update["magnitude"].magnitude_axes is None and form.spread(site) is not None)


@dataclass(frozen=True)
class _Rescaling:
    """m/‖V‖ of a DoRA as the output meets it, and 1 − it."""

    ratio: str
    rest: str


class Attachment:
    """Adapters being attached to one graph. Nodes are collected and laid into it by ``finish``.

    Attributes:
        stems: (job, key) → below what the adapter's tensors and our nodes are named.
    """

    mode = "branch"

    def __init__(self, index: Index, folder: Path, *, prefold: bool = False, live: Sequence[str] = ()) -> None:
        self.index, self.folder, self.prefold = index, folder, prefold
        self.editor = Editor(index)
        self.ends = Ends(index, self.editor)
        self.stems: dict[tuple[int, str], str] = {}
        self.live = self._inputs(live)

    def add(self, spots: Sequence[Spot]) -> None:
        """Every change of every weight, at each of its uses."""
        for spot in spots:
            if not has_branch(spot):
                self._folded(spot) if self.prefold else self._weights(spot)
        for spot in spots:  # last: a branch under a magnitude reads the bias, which may have changed
            if has_branch(spot):
                for n, change in enumerate(spot.changes):
                    self._branch(spot, n, change)

    @property
    def values(self) -> dict[str, str]:
        """A value of ours → the value of the base in whose place it stands."""
        return self.ends.values

    @property
    def record(self) -> dict[str, Any]:
        """The inputs of --live-scale."""
        return {"inputs": list(self.live)} if self.live else {}

    def finish(self) -> None:
        """Lay the new nodes into the graphs."""
        self.editor.finish()

    # The branch.

    def _branch(self, spot: Spot, n: int, change: Change) -> None:
        make, first = self._nodes(change), spot.sites[0]
        form = FORMS[first.like]
        norms = self._norms(spot, n) if "magnitude" in change.update else None
        pair, rescaling = self._constants(make, form, first, change, norms)
        self.editor.lay(self.index.scopes[0], "", make.list)
        for i, site in enumerate(spot.sites):
            run = make if len(spot.sites) == 1 else make.below(str(i))
            self._use(run, form, site, pair, rescaling, self.live[change.job] if self.live else "")

    def _inputs(self, names: Sequence[str]) -> list[str]:
        """The strength of each adapter as an input: 1, unless it is fed."""
        made = [f"lora.scale.{name}" if len(names) > 1 else "lora.scale" for name in names]
        for name in made:
            self.index.taken.add(name)
            self.index.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []))
            self.index.graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), name))
        return made

    def _constants(
        self, make: Nodes, form: Form, site: Site, change: Change, norms: Array | None
    ) -> tuple[Pair, _Rescaling | None]:
        """A and s·B in the graph's dtype, from A, B and s as stored; with a magnitude, what rescales the output."""
        update, dtype = change.update, site.dtype
        lora = update["lora"]
        kind = np.float64 if wide(dtype) == onnx.TensorProto.DOUBLE else np.float32
        k, _ = balance(lora, site.factor, dtype)
        a, b = make.store("lora_A", lora.lora_A), make.store("lora_B", lora.lora_B)
        scale = make.store("scale", np.asarray(lora.scale * site.factor * 2.0**k, kind))
        # fp16 arithmetic has no CPU kernel to fold it, so products are taken in fp32 and cast last (ORT 1.32).
        b = make.node("Mul", [make.cast(b, wide(dtype), "lora_B/wide"), scale], "lora_B/scaled")
        ratio = None if norms is None else self._ratio(make, update, norms, wide(dtype))
        if ratio is not None:
            column = make.reshape(ratio, lora.lora_B.shape[:1], [lora.lora_B.shape[0], 1], "magnitude/column")
            b = make.node("Mul", [b, column], "lora_B/rescaled")
        b, b_shape = make.spread(b, lora.lora_B.shape, change.rows, site.operand.matrix_shape[-2], "lora_B/rows")
        b = make.cast(b, dtype, "lora_B/cast", wide(dtype))
        if k:
            half = make.store("lora_A/power", np.asarray(2.0**-k, kind))
            a = make.node("Mul", [make.cast(a, wide(dtype), "lora_A/wide"), half], "lora_A/balanced")
            a = make.cast(a, dtype, "lora_A/cast", wide(dtype))
        else:
            a = make.cast(a, dtype, "lora_A/cast")
        pair = form.constants(make, site, Pair(a, b, lora.lora_A.shape, b_shape))
        rescaling = None if ratio is None else self._rescaling(make, form, site, ratio)
        if self.prefold:
            make.fold(pair.a, pair.b, *((rescaling.ratio, rescaling.rest) if rescaling else ()))
        return pair, rescaling

    @staticmethod
    def _ratio(make: Nodes, update: Update, norms: Array, kind: int) -> str:
        m = make.cast(make.store("magnitude", update["magnitude"].magnitude), kind, "magnitude/wide")
        norm = make.store("norm", norms.astype(helper.tensor_dtype_to_np_dtype(kind)))
        return make.node("Div", [m, norm], "magnitude/ratio")

    @staticmethod
    def _rescaling(make: Nodes, form: Form, site: Site, ratio: str) -> _Rescaling:
        kind, out = wide(site.dtype), site.operand.matrix_shape[-2]
        spread = make.reshape(ratio, [out], _sizes(form, site), "magnitude/spread")
        one = make.store("one", np.ones((), helper.tensor_dtype_to_np_dtype(kind)))
        rest = make.node("Sub", [one, spread], "magnitude/rest")
        return _Rescaling(make.cast(spread, site.dtype, "magnitude/cast", kind), rest)

    def _use(
        self, make: Nodes, form: Form, site: Site, pair: Pair, rescaling: _Rescaling | None, strength: str
    ) -> None:
        """The branch beside one use."""

        def rescaled(run: Nodes, base: str, bias: str) -> str:
            assert rescaling is not None
            kept = run.node("Mul", [base, rescaling.ratio], "rescaled")
            return run.node("Add", [kept, self._rest(run, form, site, bias, rescaling)], "bias") if bias else kept

        run = Nodes(self.index, make.stem)
        between = partial(_strengthened, run, site, strength) if strength else unchanged
        self.ends.add(site, run, lambda run: form.run(run, site, pair, between), rescaled if rescaling else None)

    @staticmethod
    def _rest(make: Nodes, form: Form, site: Site, bias: str, rescaling: _Rescaling) -> str:
        """(1 − m/‖V‖) ⊙ bias: the magnitude rescales W, and W alone."""
        dtype = site.dtype
        bias = make.cast(bias, wide(dtype), "bias/wide", dtype)
        if (beta := attribute(site.node, "beta", 1.0)) != 1.0 and site.operator == "Gemm":
            scale = np.asarray(beta, helper.tensor_dtype_to_np_dtype(wide(dtype)))
            bias = make.node("Mul", [bias, make.store("bias/beta", scale)], "bias/scaled")
        if site.like in ("Conv", "ConvTranspose"):
            bias = make.reshape(bias, [site.operand.matrix_shape[-2]], _sizes(form, site), "bias/spread")
        rest = make.node("Mul", [bias, rescaling.rest], "bias/rest")
        return make.cast(rest, dtype, "bias/cast", wide(dtype))

    # The weight.

    def _weights(self, spot: Spot) -> None:
        """W' of each value that the sites read, in the graph where that value is."""
        read = {site.number: site.values[-1] for site in spot.sites}
        now = {value: value.name for value in read.values()}
        for n, change in enumerate(spot.changes):
            make, norms = self._nodes(change), None
            place = change.parameter or spot.sites[0].operand
            if "magnitude" in change.update:
                norms = self._norms(spot, n)
            weight = Weight(make, change.update, place, spot.sites[0].dtype, norms, change.rows, change.permute)
            self.editor.lay(self.index.scopes[0], "", make.list)
            for value in now:
                site = next(site for site in spot.sites if read[site.number] == value)
                nodes = Nodes(self.index, make.stem)
                now[value] = weight.change(nodes, now[value], site.operand)
                self.editor.lay(value.scope, value.name if value.name in value.scope.producers else "", nodes.list)
                self.values[now[value]] = value.name
        for site in spot.sites:
            site.node.input[site.position] = now[read[site.number]]

    def _folded(self, spot: Spot) -> None:
        """W' itself, stored beside W."""
        value, place = self._read(spot)
        for change in spot.changes:
            value = change.turned(place).apply(value)
        make, matrix = self._nodes(spot.changes[0]), place.to_matrix(value)
        kind = helper.tensor_dtype_to_np_dtype(spot.sites[0].dtype)
        for site in spot.sites:
            name = make.store("weight", site.operand.from_matrix(matrix).astype(kind))
            self.values[name] = site.values[-1].name
            site.node.input[site.position] = name

    def _nodes(self, change: Change) -> Nodes:
        if (stem := self.stems.get((change.job, change.key))) is not None:  # another tensor of the same target
            return Nodes(self.index, f"{stem}/tied")
        stem = self.index.stem(change.key)
        self.stems[change.job, change.key] = stem
        return Nodes(self.index, stem)

    def _norms(self, spot: Spot, n: int) -> Array:
        """What the magnitude of change number ``n`` divides by, on the weight that the changes before it leave."""
        value, root = self._read(spot)
        for change in spot.changes[:n]:
            value = change.turned(root).apply(value)
        change = spot.changes[n]
        place = change.parameter or root
        return replace(change.update, placement=place).norms(place.from_matrix(root.to_matrix(value)))

    def _read(self, spot: Spot) -> tuple[Array, Placement]:
        """The weight as float32, and how [out, in] lies in it."""
        site = spot.sites[0]
        found = Values(self.index, self.folder).read(site)
        if found is None:
            what = f"{site.node.name or site.operator}: its weight cannot be computed, and {spot.key} needs its values"
            raise fault("LF-608", what, where=spot.key, fix="loraformat convert --to-lora R makes a plain pair of it")
        return found[0].astype(np.float32), found[1]


def _strengthened(make: Nodes, site: Site, strength: str, hidden: str) -> str:
    """A·x times an input."""
    scale = make.cast(strength, site.dtype, "strength", onnx.TensorProto.FLOAT)
    return make.node("Mul", [hidden, scale], "hidden/strengthened")


def _sizes(form: Form, site: Site) -> list[int]:
    out = site.operand.matrix_shape[-2]
    return [out if n == -1 else n for n in form.spread(site) or ()]
