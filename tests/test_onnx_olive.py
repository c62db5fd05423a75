"""Graphs of Olive's ExtractAdapters: the slots that it made are found, with the scale that it left in the graph."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import adapter, lora, model, save, session
from onnx import numpy_helper

import loraformat as lf
from loraformat import Adapter, LoraFormatError
from loraformat.layout import ReadOptions
from loraformat.registry import open_base, read
from loraformat.strength import strengthen
from loraformat.testing import relative_error
from loraformat.verbs.convert import convert
from loraformat.verbs.graph import extract
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.attaching import slots
from loraformat_converters.onnx.attaching.slot import Slot
from loraformat_converters.onnx.runtime import Session

OLIVE = Path(__file__).parent / "golden/olive"
GOLDEN = json.loads((OLIVE / "golden.json").read_text())
X = {"input_ids": np.arange(14).reshape(2, 7) % 5, "attention_mask": np.ones((2, 7), np.int64)}


@pytest.fixture(scope="module")
def trained():
    """PEFT's adapter as Olive took it, with the scale as it was trained."""
    told = ReadOptions(alpha=float(GOLDEN["alpha"]), scale_rule="alpha/r")
    return read(OLIVE / "extracted.onnx_adapter", options=told)[0].adapter


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """(strength) → what the base gives with that much of ΔW, as PEFT computed it, in its weights."""
    with np.load(OLIVE / "deltas.npz") as held:
        deltas = {f"m.{key.removeprefix('m.')}": held[key] for key in held.files}
    path = tmp_path_factory.mktemp("truth") / "merged.onnx"

    def of(strength):
        made = onnx.load(OLIVE / "extracted.onnx")
        stored = {tensor.name: tensor for tensor in made.graph.initializer}
        for key, delta in deltas.items():
            node = "/" + key.removesuffix(".weight").replace("layers.", "layers@").replace(".", "/").replace("@", ".")
            (found,) = (n for n in made.graph.node if n.name == f"{node}/base_layer/MatMul")
            weight = numpy_helper.to_array(stored[found.input[1]])
            changed = (weight + strength * delta.T).astype(np.float32)
            stored[found.input[1]].CopyFrom(numpy_helper.from_array(changed, found.input[1]))
        return session(save(made, path)).run(None, X)[0]

    return of


def test_what_is_written_for_its_graph_is_what_it_wrote_itself(trained, truth, tmp_path):
    """B bit for bit: the graph multiplies by the scale that the adapter has."""
    lf.save(trained, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a.onnx_adapter", model=OLIVE / "extracted.onnx")
    ours, theirs = (tort.read(path).tensors for path in (tmp_path / "a.onnx_adapter", OLIVE / "extracted.onnx_adapter"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert relative_error(fed(tmp_path / "a.onnx_adapter"), truth(1.0)) <= 1e-5
    assert relative_error(truth(0.0), truth(1.0)) > 0.1


def fed(path):
    """What Olive's graph gives with a file active."""
    options, held = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    held.Load(str(path))
    options.add_active_adapter(held)
    return session(OLIVE / "extracted.onnx").run(None, X, options)[0]


def test_another_scale_is_folded_when_asked(trained, truth, tmp_path, run):
    lf.save(strengthen(trained, -0.5), tmp_path / "a.safetensors")
    done = run("convert", "a.safetensors", "a.onnx_adapter", "--for", OLIVE / "extracted.onnx")
    assert (done.code, "LF-508" in done.err, "--fold-scale" in done.err) == (1, True, True)
    assert (
        run("convert", "a.safetensors", "a.onnx_adapter", "--for", OLIVE / "extracted.onnx", "--fold-scale").code == 0
    )
    assert relative_error(fed(tmp_path / "a.onnx_adapter"), truth(-0.5)) <= 1e-5


def test_the_runtime_feeds_its_graph(trained, truth):
    running = Session(OLIVE / "extracted.onnx")
    running.load("ours", trained)
    running.load("half", strengthen(trained, 0.5))
    with pytest.raises(LoraFormatError, match="LF-607"):
        running.load("theirs", OLIVE / "extracted.onnx_adapter")
    running.load("theirs", OLIVE / "extracted.onnx_adapter", any_base=True)
    choices = {"ours": 1.0, "half": 0.5, "theirs": 1.0, None: 0.0}
    for choice, strength in choices.items():
        assert relative_error(next(iter(running.use(choice).run(X).values())), truth(strength)) <= 1e-5
    blended = next(iter(running.use({"theirs": 0.5, "half": -2.0}).run(X).values()))
    assert relative_error(blended, truth(-0.5)) <= 1e-5


def test_buffers_that_stay_need_slots_of_one_rank(trained):
    running = Session(OLIVE / "extracted.onnx", captured=True)
    assert (
        relative_error(next(iter(running.run(X).values())), session(OLIVE / "extracted.onnx").run(None, X)[0]) <= 1e-6
    )
    for _ in range(2):
        with pytest.raises(LoraFormatError, match=r"LF-705.*any rank"):
            running.load("ours", trained)


def test_a_graph_that_does_not_hold_the_adapter_gives_none():
    with pytest.raises(LoraFormatError, match=r"LF-613.*fed to the model, which does not hold it") as refused:
        extract(open_base(OLIVE / "extracted.onnx"))
    assert len(refused.value.problems) == 2 * 15


def test_inputs_whose_values_lie_nowhere_are_refused():
    """``optional_inputs=False``: ONNX Runtime 1.32 does not open such a graph either."""
    with pytest.raises(LoraFormatError, match=r"LF-610.*dummy-location.bin"):
        extract(open_base(OLIVE / "required.onnx"))
    with pytest.raises(LoraFormatError, match=r"LF-705.*cannot open"):
        Session(OLIVE / "required.onnx")


# What is like it, and is none.


def given(text, path):
    """A graph whose values ``a`` and ``b`` are inputs with a default of rank 0."""
    made = model(text)
    for tensor in made.graph.initializer:
        if tensor.name in ("a", "b", "c"):
            made.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, 1, [None, None]))
    return open_base(save(made, path))


HEAD = "g (float[N,5] x) => (float[N,7] y) <float[5,7] w, "
SLOTTED = (
    HEAD
    + """float[5,0] a, float[0,7] b, float s>
  { ["/m/q/MatMul"] h = MatMul(x, w)  r = MatMul(x, a)  v = MatMul(r, b)  d = Mul(v, s)  y = Add(h, d) }"""
)
TWICE = SLOTTED.replace(
    "y = Add(h, d)",
    """u = Add(h, d)
    ["/m/q_1/MatMul"] i = MatMul(x, w)  k = MatMul(x, a)  l = MatMul(k, b)  e = Mul(l, s)  z = Add(i, e)  y = Mul(u, z)""",
)
FACTOR = SLOTTED.replace('["/m/q/MatMul"] h = MatMul(x, w)', '["/m/q/Gemm"] h = Gemm <alpha = 0.5> (x, w)')
NONE = {
    "one pair of two weights": TWICE.replace("<float[5,7] w, ", "<float[5,7] w, float[5,7] m, ").replace(
        '["/m/q_1/MatMul"] i = MatMul(x, w)', '["/m/k/MatMul"] i = MatMul(x, m)'
    ),
    "two scales of one pair": TWICE.replace("e = Mul(l, s)", "e = Mul(l, o)").replace("float s>", "float s, float o>"),
    "a scale of its own that is 0": SLOTTED.replace("float s", "float s = {0}"),
    "PEFT's own axes": HEAD + """float[0,5] a, float[7,0] b>
      { ["/m/q/MatMul"] h = MatMul(x, w)  r = Gemm <transB = 1> (x, a)  v = Gemm <transB = 1> (r, b)  y = Add(h, v) }""",
    "a function between": HEAD + """float[5,0] a, float[0,7] b>
      { ["/m/q/MatMul"] h = MatMul(x, w)  r = MatMul(x, a)  t = Relu(r)  v = MatMul(t, b)  y = Add(h, v) }""",
    "one input more": HEAD + """float[5,0] a, float[0,7] b, float[5,0] c>
      { ["/m/q/MatMul"] h = MatMul(x, w)  r = MatMul(x, a)  v = MatMul(r, b)  z = MatMul(x, c)
        k = Shape(z)  f = Cast <to = 1> (k)  n = ReduceSum(f)  u = Add(h, v)  y = Mul(u, n) }""",
}  # fmt: skip


def test_slots_are_known_by_what_is_computed(tmp_path):
    base = given(SLOTTED, tmp_path / "m.onnx")
    (scale,) = (numpy_helper.to_array(t) for t in base.model.graph.initializer if t.name == "s")
    (slot,) = base.slots.slots.values()
    assert (slot.key, slot.a, slot.b, slot.scale) == ("m.q.weight", "a", "b", float(scale))
    assert lf.Adapter(dict(base.slots.read(base.slots.feeds(slots.Fed(adapter({"m.q.weight": (7, 5)})))).pairs))
    one = adapter({"m.q.weight": lora(7, 5, rank=3)})
    again = base.slots.read(base.slots.feeds(slots.Fed(one))).pairs
    assert relative_error(again["m.q.weight"].matrix(), one["m.q.weight"].matrix()) <= 1e-6


def test_what_the_operator_multiplies_by_is_in_the_scale(tmp_path):
    base = given(FACTOR, tmp_path / "m.onnx")
    one = adapter({"m.q.weight": lora(7, 5, rank=3)})
    stored = {t.name: numpy_helper.to_array(t) for t in base.model.graph.initializer}
    fed = base.slots.feeds(slots.Fed(one))
    x = np.random.default_rng(3).standard_normal((4, 5)).astype(np.float32)
    wanted = 0.5 * x @ (stored["w"] + one["m.q.weight"].matrix().T)
    assert relative_error(session(base.path).run(None, {"x": x, **fed})[0], wanted) <= 1e-5


def test_a_module_that_is_called_twice_has_one_slot(tmp_path):
    assert list(given(TWICE, tmp_path / "m.onnx").slots.slots) == ["m.q.weight"]


@pytest.mark.parametrize("case", NONE)
def test_an_input_of_rank_0_that_is_no_factor_is_an_error(case, tmp_path):
    text = NONE[case].replace("float s = {0}", "float s")
    base = given(text, tmp_path / "m.onnx")
    if "= {0}" in NONE[case]:
        tensor = next(t for t in base.model.graph.initializer if t.name == "s")
        tensor.CopyFrom(numpy_helper.from_array(np.zeros((), np.float32), "s"))
        base = open_base(save(base.model, tmp_path / "zero.onnx"))
    with pytest.raises(LoraFormatError, match=r"LF-613.*(rank 0 that is no factor|called a factor)"):
        _ = base.slots
    running = Session(base.path)
    with pytest.raises(LoraFormatError, match="LF-613"):
        running.load("a", adapter({"m.q.weight": (7, 5)}))
    x = {"x": np.ones((2, 5), np.float32)}
    assert np.array_equal(running.run(x)["y"], session(base.path).run(None, x)[0])


def test_a_model_whose_inputs_have_other_defaults_has_no_slots(tmp_path):
    made = model("g (float[N,5] x, float[5,7] w) => (float[N,7] y) <float[7] b> { h = MatMul(x, w)  y = Add(h, b) }")
    made.graph.initializer.append(numpy_helper.from_array(np.ones((5, 7), np.float32), "w"))
    path = save(made, tmp_path / "m.onnx")
    assert open_base(path).slots is None
    with pytest.raises(LoraFormatError, match="LF-705"):
        Session(path).load("a", Adapter({"w": lora(7, 5)}))


# No test that cannot fail.


def test_a_scale_that_is_applied_twice_is_red(monkeypatch, trained, truth):
    whole = slots.folded
    monkeypatch.setattr(slots, "folded", lambda update, by=1.0: whole(update))
    with pytest.raises(AssertionError):
        test_the_runtime_feeds_its_graph(trained, truth)


def test_a_scale_that_is_lost_is_red(monkeypatch, trained, truth):
    whole = Slot.read
    lost = lambda self, tensors: (replace((found := whole(self, tensors))[0], alpha=1.0), found[1])  # noqa: E731
    monkeypatch.setattr(Slot, "read", lost)
    with pytest.raises(AssertionError):
        test_the_runtime_feeds_its_graph(trained, truth)
