"""Attentions that multiply by their weight themselves: taken apart where something runs beside the product, and put together again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import lora, model, save, session
from onnx import numpy_helper

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx.attaching import apart
from loraformat_converters.onnx.changing.record import Record
from loraformat_converters.onnx.runtime import Session

HIDDEN, HEADS = 24, 4

# name → (attributes, inputs behind the bias, what they are, outputs, sizes of q, k and v)
FORMS = {
    "plain": ("", "", "", "y", (24, 24, 24)),
    "causal": ("unidirectional = 1", "", "", "y", (24, 24, 24)),
    "lengths": ("", "m", "int32[N] m", "y", (24, 24, 24)),
    "padding": ("", "m", "int32[N,T] m", "y", (24, 24, 24)),
    "mask of each token": ("mask_filter_value = -3.0", "m", "int32[N,T,T] m", "y", (24, 24, 24)),
    "added to scores, scaled": ("scale = 0.3", ", , a", "float[N,4,T,T] a", "y", (24, 24, 24)),
    "v of another size": ("qkv_hidden_sizes = [24, 24, 40], unidirectional = 1", "m", "int32[N,T] m", "y", (24, 24, 40)),
    "present": ("unidirectional = 1", "", "", "y, present", (24, 24, 24)),
    "past": ("unidirectional = 1", "m, past", "int32[N,M] m, float[2,N,4,P,6] past", "y, present", (24, 24, 24)),
}  # fmt: skip
NAMES = ("q", "k", "v")


def attention(form, *, opset=18):
    """The operator with its output projected, as others' graphs have it."""
    more, behind, declared, outputs, sizes = FORMS[form]
    present = ", float[2,N,4,M,6] present" if "present" in outputs else ""
    given = f", {declared}" if declared else ""
    attributes = ", ".join(filter(None, (f"num_heads = {HEADS}", more)))
    return model(f"""g (float[N,T,{HIDDEN}] x{given}) => (float[N,T,9] z{present})
      <float[{HIDDEN},{sum(sizes)}] w, float[{sum(sizes)}] b, float[{sizes[2]},9] o>
      {{ ["/m/attn/Attention"] {outputs} = com.microsoft.Attention <{attributes}> (x, w, b{"," if behind else ""} {behind})
         ["/m/o/MatMul"] z = MatMul(y, o) }}""", opset=opset)  # fmt: skip


def fed(form, tokens=5, past=3):
    """Values for all inputs, of four rows."""
    draw = np.random.default_rng(5)
    found = {"x": draw.standard_normal((4, tokens, HIDDEN)).astype(np.float32)}
    if form == "lengths":
        found["m"] = np.array([2, 5, 3, 4], np.int32)
    elif form == "mask of each token":
        found["m"] = draw.integers(0, 2, (4, tokens, tokens)).astype(np.int32)
    elif "int32[N," in FORMS[form][2]:
        whole = tokens + (past if form == "past" else 0)
        found["m"] = (np.arange(whole) >= np.array([[0], [1], [0], [2]])).astype(np.int32)
    if form == "past":
        found["past"] = draw.standard_normal((2, 4, HEADS, past, HIDDEN // HEADS)).astype(np.float32)
    if "a" in FORMS[form][1].split(", "):
        found["a"] = draw.standard_normal((4, HEADS, tokens, tokens)).astype(np.float32)
    return found


def ours(made, sizes, names, seed=1):
    """Pairs for q, k, v, and for the projection behind them, bound to their rows of the weight."""
    w = next(numpy_helper.to_array(t) for t in made.graph.initializer if t.name == "w").T
    ends, targets = np.cumsum((0, *sizes)), {}
    for n, name in enumerate(NAMES):
        if name in names:
            rows, place = w[ends[n] : ends[n + 1]], lf.Placement((sizes[n], HIDDEN), (0,), (1,))
            pair = replace(lora(sizes[n], HIDDEN, n + 2, seed=seed + n)["lora"], alpha=0.1, scale_rule="factor")
            targets[f"m.{name}_proj.weight"] = lf.Update((pair,), place, sketch=sketch(rows, place))
    targets["m.o.weight"] = lora(9, sizes[2], seed=seed + 7)
    return lf.Adapter(targets)


def outputs(path, feeds):
    return session(path).run(None, feeds)


def near(found, wanted, limit=1e-5):
    """Whether all outputs are as near as an attached model must be to the merged one."""
    return all(relative_error(one, other) <= limit for one, other in zip(found, wanted, strict=True))


class Case:
    """A base, two adapters of it, and what each of them makes of it when it is merged."""

    def __init__(self, form, folder, **how):
        self.made, self.feeds = attention(form, **how), fed(form)
        self.path, self.out, self.folder = save(self.made, folder / "base.onnx"), folder / "out.onnx", folder
        self.base, sizes = open_base(self.path), FORMS[form][4]
        self.given = {"all": ours(self.made, sizes, "qkv"), "some": ours(self.made, sizes, "vq", seed=20)}
        self.before = outputs(self.path, self.feeds)
        self.merged = {name: self.merge(adapter) for name, adapter in self.given.items()}
        for other in (self.before, self.merged["some"]):
            assert not near(self.merged["all"], other, 0.05)

    def merge(self, adapter, feeds=None):
        merge(adapter, self.base, self.folder / "merged.onnx", force=True)
        return outputs(self.folder / "merged.onnx", feeds or self.feeds)

    def attach(self, **options):
        plan = prepare("attach", list(self.given.items()), self.base, Options(self.out, **options))
        assert "1 × Attention is taken apart, into MatMul and MultiHeadAttention" in plan.notes
        self.base.apply(plan)
        onnx.checker.check_model(self.out, full_check=True)
        return plan

    def restored(self):
        """Whether what was attached comes out again, and leaves the model as it was."""
        detach(open_base(self.out), self.folder / "again.onnx")
        return (self.folder / "again.onnx").read_bytes() == self.path.read_bytes()


def swapped(form, folder, *, opset=18, **options):
    case = Case(form, folder, opset=opset)
    plan = case.attach(mode="swap", **options)
    running = Session(case.out)
    for name, adapter in case.given.items():
        running.load(name, case.folder / f"out.{name}.onnx_adapter")
        running.load(f"{name}, itself", adapter)
    for choice in ("all", "some", {"all, itself": 1.0}):
        wanted = case.merged[choice if isinstance(choice, str) else "all"]
        assert near(list(running.use(choice).run(case.feeds).values()), wanted)
    assert near(list(running.run(case.feeds).values()), case.before, 1e-6)
    assert prove(case.base, plan, _file(case)).holds
    assert case.restored()


def _file(case):
    np.savez(case.folder / "inputs.npz", **case.feeds)
    return case.folder / "inputs.npz"


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_an_attention_are_swapped(form, tmp_path):
    swapped(form, tmp_path)


@pytest.mark.parametrize("options", [{"slots": "required"}, {"pad_rank": 8}, {"opset": 12}])
def test_adapters_of_an_attention_are_swapped_otherwise(options, tmp_path):
    swapped("past", tmp_path, **options)


def stacked(form, provider, select, folder):
    """Each row computes with what it chose; of a mixture with the sum."""
    case = Case(form, folder)
    plan = case.attach(mode="stack", rows=("x",), provider=provider, select=select)
    index = np.array([0, 1, 2, 1])
    of_row = [case.before, case.merged["all"], case.merged["some"], case.merged["all"]]
    chosen = {"lora.index": index} if select == "index" else {"lora.weights": np.eye(3, 2, -1, dtype=np.float32)[index]}
    found = outputs(case.out, {**case.feeds, **chosen})
    for row, wanted in enumerate(of_row):
        limit = 1e-5 if index[row] else 1e-6
        assert near([found[0][row]], [wanted[0][row]], limit)
        assert near([value[:, row] for value in found[1:]], [value[:, row] for value in wanted[1:]], limit)
    assert prove(case.base, plan, _file(case)).holds
    for name, adapter in case.given.items():
        assert lf.digest(extract(open_base(case.out), name=name)) == lf.digest(adapter)
    assert case.restored()
    return case


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("provider", "select"), [("cpu", "index"), ("cuda", "index"), ("cpu", "weights")])
def test_rows_choose_among_adapters_of_an_attention(form, provider, select, tmp_path):
    stacked(form, provider, select, tmp_path)


def test_rows_mix_adapters_of_an_attention_and_refuse_none_that_there_is(tmp_path):
    case = Case("padding", tmp_path)
    case.attach(mode="stack", rows=("x",), select="weights")
    weights = np.array([[0, 0], [0.7, 0], [0.4, -0.3], [1, 1]], np.float32)
    found = Session(case.out).use([None, {"all": 0.7}, {"all": 0.4, "some": -0.3}, {"all": 1.0, "some": 1.0}]).run(case.feeds)["z"]
    for row, (one, other) in enumerate(weights):
        mixed = {}
        for name, weight in (("all", one), ("some", other)):
            for key, update in case.given[name].items():
                part = replace(update["lora"], alpha=update["lora"].scale * float(weight), scale_rule="factor")
                mixed.setdefault(key, []).append(replace(update, parts=(part,)))
        sums = {key: lf.Update((lf.Delta(sum(u.matrix() for u in own)),), own[0].placement, sketch=own[0].sketch) for key, own in mixed.items()}
        assert near([found[row]], [case.merge(lf.Adapter(sums))[0][row]])


def test_an_index_that_is_no_adapters_is_an_error(tmp_path):
    case = Case("plain", tmp_path)
    case.attach(mode="stack", rows=("x",))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="indices element out of data bounds"):
        outputs(case.out, {**case.feeds, "lora.index": np.array([0, 1, 3, 0])})
