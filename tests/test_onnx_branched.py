"""An adapter that somebody else put into a graph is found by what its nodes compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import lora, model, run, save, session
from onnx import numpy_helper

import loraformat as lf
from loraformat.parts import Magnitude
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract
from loraformat.verbs.merge import attach
from loraformat_converters.onnx.changing.record import ATTACHED

KEY = "m.q.weight"


def tensors(made):
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in made.graph.initializer}


# name → (graph, ΔW of its tensors)
FORMS = {
    "PEFT, a Linear over a sequence": (
        """g (float[N,T,5] x) => (float[N,T,7] y) <float[5,7] w, float[7] b, float[5,3] a, float[3,7] c, float s>
        { ["/m/q/base_layer/MatMul"] h = MatMul(x, w)  ["/m/q/base_layer/Add"] u = Add(b, h)
          ["/m/q/lora_A/default/MatMul"] r = MatMul(x, a)  ["/m/q/lora_B/default/MatMul"] v = MatMul(r, c)
          ["/m/q/Mul"] d = Mul(v, s)  ["/m/q/Add"] y = Add(u, d) }""",
        lambda t: t["s"] * (t["a"] @ t["c"]).T,
    ),
    "PEFT, a Linear over rows": (
        """g (float[N,5] x) => (float[N,7] y) <float[7,5] w, float[7] b, float[3,5] a, float[7,3] c, float[1] s>
        { ["/m/q/base_layer/Gemm"] u = Gemm <transB = 1> (x, w, b)
          ["/m/q/lora_A/default/Gemm"] r = Gemm <transB = 1> (x, a)
          ["/m/q/lora_B/default/Gemm"] v = Gemm <transB = 1> (r, c)
          d = Mul(s, v)  y = Add(d, u) }""",
        lambda t: t["s"] * (t["c"] @ t["a"]),
    ),
    "the scale in B, a base that is multiplied": (
        """g (float[N,5] x) => (float[N,7] y) <float[7,5] w, float[5,3] a, float[3,7] c>
        { ["/m/q/Gemm"] u = Gemm <transB = 1, alpha = 0.5> (x, w)  r = MatMul(x, a)  v = MatMul(r, c)  y = Add(u, v) }""",
        lambda t: (t["a"] @ t["c"]).T / 0.5,
    ),
    "casts, a scale between the factors": (
        """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float16[5,3] a, float16[3,7] c, float16 s>
        { ["/m/q/MatMul"] u = MatMul(x, w)  i = Identity(x)  k = Cast <to = 10> (i)  r = MatMul(k, a)  l = Mul(r, s)
          v = MatMul(l, c)  f = Cast <to = 1> (v)  y = Add(u, f) }""",
        lambda t: t["s"] * (t["a"] @ t["c"]).T,
    ),
    "what ONNX Runtime makes of it": (
        """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[7] b, float[5,3] a, float[3,7] c>
        { ["/m/q/Gemm"] u = Gemm (x, w, b)  r = com.microsoft.FusedMatMul <alpha = 1.5> (x, a)  y = Gemm (r, c, u) }""",
        lambda t: 1.5 * (t["a"] @ t["c"]).T,
    ),
    "a convolution": (
        """g (float[N,5,11] x) => (float[N,7,L] y) <float[7,5,4] w, float[7] b, float[3,5,4] a, float[7,3,1] c, float s>
        { ["/m/q/base_layer/Conv"] u = Conv <strides = [2], pads = [1, 0]> (x, w, b)
          r = Conv <strides = [2], pads = [1, 0]> (x, a)  v = Conv (r, c)  d = Mul(v, s)  y = Add(u, d) }""",
        lambda t: t["s"] * t["c"][..., 0] @ t["a"].reshape(3, -1),
    ),
    "an embedding": (
        """g (int64[N,T] x) => (float[N,T,7] y) <float[9,7] w, float[9,3] a, float[3,7] c, float s>
        { ["/m/q/base_layer/Gather"] u = Gather(w, x)  r = Gather(a, x)  v = MatMul(r, c)  d = Mul(v, s)  y = Add(u, d) }""",
        lambda t: t["s"] * (t["a"] @ t["c"]).T,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_beside_a_weight_is_found_in_every_form(form, tmp_path):
    text, wanted = FORMS[form]
    made = model(text)
    found = extract(open_base(save(made, tmp_path / "base.onnx")))
    assert list(found) == [KEY]
    assert relative_error(found[KEY].matrix(), wanted(tensors(made))) <= 1e-6
    assert found[KEY].rank == 3


def test_what_was_found_does_the_same_beside_the_bare_weight(tmp_path):
    text, _ = FORMS["PEFT, a Linear over a sequence"]
    path = save(model(text), tmp_path / "theirs.onnx")
    bare = model("""g (float[N,T,5] x) => (float[N,T,7] y) <float[5,7] w, float[7] b>
      { ["/m/q/MatMul"] h = MatMul(x, w)  y = Add(b, h) }""")
    theirs = {t.name: t for t in onnx.load(path).graph.initializer}
    for tensor in bare.graph.initializer:
        tensor.CopyFrom(theirs[tensor.name])
    attach(extract(open_base(path)), open_base(save(bare, tmp_path / "bare.onnx")), tmp_path / "ours.onnx")
    assert relative_error(run(tmp_path / "ours.onnx")["y"], run(path)["y"]) <= 1e-6


SHARED = """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[5,3] a, float[7,7] u, float[7,3] e, float[3,7] zero>
  { ["/m/q/MatMul"] h = MatMul(x, w)  r = MatMul(x, a)  v = MatMul(r, zero)  p = Add(h, v)
    ["/m/k/MatMul"] i = MatMul(p, u)  l = MatMul(p, e)  o = MatMul(l, zero)  y = Add(i, o) }"""


def test_a_b_that_two_targets_share_belongs_to_each(tmp_path):
    """torch stores all B that are still zero as one tensor."""
    made = model(SHARED)
    next(t for t in made.graph.initializer if t.name == "zero").raw_data = bytes(4 * 3 * 7)
    found = extract(open_base(save(made, tmp_path / "base.onnx")))
    assert sorted(found) == ["m.k.weight", KEY]
    own, other = (found[key]["lora"].lora_B for key in sorted(found))
    assert not np.shares_memory(own, other)
    assert not own.any()
    np.testing.assert_allclose(found[KEY]["lora"].lora_A, tensors(made)["a"].T, rtol=1e-7)


# what the nodes are called → what PEFT calls the target, where the model that is exported is PEFT's own
WRAPPED = {
    "/model/m/q/base_layer": "m.q.weight",  # without a task it calls the model
    "/base_model/model/m/q/base_layer": "m.q.weight",  # with one, what is around that too
    "/outer/base_model/model/q/base_layer": "outer.q.weight",
    "/outer/model/model/q/base_layer": "outer.model.q.weight",
}


@pytest.mark.parametrize("node", WRAPPED)
@pytest.mark.parametrize("wrapped", [True, False])
def test_what_peft_puts_around_a_model_is_no_part_of_a_name(node, wrapped, tmp_path):
    outer = "outer." if "outer" in node else ""
    kept = f"{outer}base_model.model.n.weight" if wrapped else f"{outer}n.weight"
    made = model(f"""g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[5,3] a, float[3,7] c, float[7] "{kept}">
        {{ ["{node}/MatMul"] u = MatMul(x, w) r = MatMul(x, a) v = MatMul(r, c) h = Add(u, v) y = Mul(h, "{kept}") }}""")
    plain = f"{node.removesuffix('/base_layer')[1:].replace('/', '.')}.weight"
    assert list(extract(open_base(save(made, tmp_path / "base.onnx")))) == [WRAPPED[node] if wrapped else plain]


def test_scopes_tell_what_peft_puts_around_a_model_too(tmp_path):
    text, _ = FORMS["PEFT, a Linear over rows"]
    made = model(text)
    for node in made.graph.node:
        node.name = node.output[0]
    scopes = ["", "base_model.model", "base_model.model.m.q", "base_model.model.m.q.base_layer", "linear"]
    made.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=repr(scopes))
    assert list(extract(open_base(save(made, tmp_path / "base.onnx")))) == [KEY]


MAGNITUDE = "base_model.model.q.lora_magnitude_vector.default.weight"


def test_a_magnitude_that_no_dora_has_is_an_error(tmp_path):
    made = model(f"""g (float[N,5] x) => (float[N,7] z)
        <float[5,7] w, float[5,3] a, float[3,7] c, float[7] "{MAGNITUDE}">
        {{ u = MatMul(x, w) r = MatMul(x, a) v = MatMul(r, c) y = Add(u, v) h = Relu(y) z = Mul(h, "{MAGNITUDE}") }}""")
    with pytest.raises(lf.LoraFormatError, match=r"LF-613 .*1 magnitudes of DoRAs are stored, and 0 DoRAs are found"):
        extract(open_base(save(made, tmp_path / "base.onnx")))


BARE = {
    "a Linear": 'g (float[N,T,5] x) => (float[N,T,7] y) <float[5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }',
    "a Linear with a bias": """g (float[N,T,5] x) => (float[N,T,7] y) <float[5,7] w, float[7] b>
        { ["/m/q/MatMul"] h = MatMul(x, w)  ["/m/q/Add"] y = Add(b, h) }""",
    "a Linear over rows": """g (float[N,5] x) => (float[N,7] y) <float[7,5] w, float[7] b>
        { ["/m/q/Gemm"] y = Gemm <transB = 1> (x, w, b) }""",
    "a Linear in 16 bits": """g (float16[N,T,5] x) => (float16[N,T,7] y) <float16[5,7] w, float16[7] b>
        { ["/m/q/MatMul"] h = MatMul(x, w)  ["/m/q/Add"] y = Add(b, h) }""",
    "a convolution": """g (float[N,5,11] x) => (float[N,7,L] y) <float[7,5,4] w, float[7] b>
        { ["/m/q/Conv"] y = Conv <strides = [2], pads = [1, 0]> (x, w, b) }""",
    "an embedding": 'g (int64[N,T] x) => (float[N,T,7] y) <float[9,7] w> { ["/m/q/Gather"] y = Gather(w, x) }',
}


@pytest.mark.parametrize("prefold", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("form", BARE)
def test_what_attach_made_is_found_without_its_record(form, dora, prefold, tmp_path):
    """A tool on the way may drop the metadata, and with it the record."""
    ours = attached(form, tmp_path, dora=dora, prefold=prefold)
    made = onnx.load(tmp_path / "out.onnx")
    del made.metadata_props[:]
    found = extract(open_base(save(made, tmp_path / "bare.onnx")))
    alike(found, ours, 2e-3 if "16 bits" in form else 1e-6)


def attached(form, folder, *, dora, prefold=False):
    """The adapter that is attached in ``out.onnx``."""
    folder.mkdir(exist_ok=True)
    shape = {"an embedding": (7, 9), "a convolution": (7, 20)}.get(form, (7, 5))
    length = Magnitude(np.random.default_rng(3).uniform(0.5, 2, 7).astype(np.float32))
    parts = (*lora(*shape).parts, length) if dora else lora(*shape).parts
    ours = lf.Adapter({KEY: lf.Update(parts, op="embedding" if form == "an embedding" else None)})
    attach(ours, open_base(save(model(BARE[form]), folder / "base.onnx")), folder / "out.onnx", prefold=prefold)
    return ours


def alike(found, ours, limit=1e-6):
    """The same target, kind, ΔW and magnitude."""
    assert list(found) == [KEY]
    assert found[KEY].kind == ours[KEY].kind
    assert relative_error(found[KEY].matrix(), ours[KEY].matrix()) <= limit
    if ours[KEY].kind == "dora":
        assert relative_error(found[KEY]["magnitude"].magnitude, ours[KEY]["magnitude"].magnitude) <= limit


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("form", [form for form in BARE if "16 bits" not in form])
def test_what_is_folded_under_its_record_is_what_the_record_says(form, dora, tmp_path):
    """ONNX Runtime's optimiser keeps the record, folds the tensors, and the g of a convolution into its weight."""
    ours = attached(form, tmp_path, dora=dora)
    session(tmp_path / "out.onnx", optimised=tmp_path / "optimised.onnx")
    assert ATTACHED in {entry.key for entry in onnx.load(tmp_path / "optimised.onnx").metadata_props}
    if dora and form == "a convolution":
        made = onnx.load(tmp_path / "optimised.onnx")
        del made.metadata_props[:]
        with pytest.raises(lf.LoraFormatError, match=r"LF-613 .*called a factor, and is in no branch"):
            extract(open_base(save(made, tmp_path / "bare.onnx")))
        with pytest.raises(lf.LoraFormatError, match=r"LF-613"):
            extract(open_base(tmp_path / "optimised.onnx"))
    else:
        alike(extract(open_base(tmp_path / "optimised.onnx")), ours)


@pytest.mark.parametrize("dora", [False, True])
def test_a_gain_that_onnxsim_put_into_a_kernel_is_told(dora, tmp_path):
    """Without a bias g·(W·x) becomes a convolution by g·W, whose name tells nothing: beside it runs no plain pair of W."""
    simplify = pytest.importorskip("onnxsim", reason="needs onnxsim: the peers extra").simplify
    made = model("""g (float[N,5,6,6] x) => (float[N,7,6,6] y) <float[7,5,1,1] w> { ["/m/q/Conv"] y = Conv (x, w) }""")
    length = (Magnitude(np.random.default_rng(3).uniform(0.5, 2, 7).astype(np.float32)),) if dora else ()
    ours = lf.Adapter({KEY: lf.Update((*lora(7, 5).parts, *length))})
    attach(ours, open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx")
    made = onnx.load(tmp_path / "out.onnx")
    del made.metadata_props[:]
    made, _ = simplify(made)
    assert "Mul" not in {node.op_type for node in made.graph.node}
    path = save(made, tmp_path / "simple.onnx")
    if not dora:
        alike(extract(open_base(path)), ours)
        return
    with pytest.raises(lf.LoraFormatError, match=r"LF-613  .*its weight is _v_\d+, computed of W and") as caught:
        extract(open_base(path))
    assert [problem.where for problem in caught.value.problems] == [KEY]


def test_a_record_of_another_kind_is_no_evidence(tmp_path):
    attached("a Linear", tmp_path, dora=True)
    made = onnx.load(tmp_path / "out.onnx")
    record = next(entry for entry in made.metadata_props if entry.key == ATTACHED)
    attached("a Linear", tmp_path / "plain", dora=False)
    session(tmp_path / "plain" / "out.onnx", optimised=tmp_path / "optimised.onnx")
    made = onnx.load(tmp_path / "optimised.onnx")
    next(entry for entry in made.metadata_props if entry.key == ATTACHED).value = record.value
    with pytest.raises(lf.LoraFormatError, match=r"LF-613 .*a part of the adapter is gone"):
        extract(open_base(save(made, tmp_path / "mixed.onnx")))


NONE = {
    "another x": """g (float[N,5] x, float[N,5] z) => (float[N,7] y) <float[5,7] w, float[5,3] a, float[3,7] c>
        { u = MatMul(x, w)  r = MatMul(z, a)  v = MatMul(r, c)  y = Add(u, v) }""",
    "a function between the factors": """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[5,3] a, float[3,7] c>
        { u = MatMul(x, w)  r = MatMul(x, a)  t = Relu(r)  v = MatMul(t, c)  y = Add(u, v) }""",
    "a factor that the input gives": """g (float[N,5] x, float s) => (float[N,7] y) <float[5,7] w, float[5,3] a, float[3,7] c>
        { u = MatMul(x, w)  r = MatMul(x, a)  v = MatMul(r, c)  d = Mul(v, s)  y = Add(u, d) }""",
    "a bias in a factor": """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[5,3] a, float[3,7] c, float[3] b>
        { u = MatMul(x, w)  r = Gemm(x, a, b)  v = MatMul(r, c)  y = Add(u, v) }""",
    "a function after the weight": """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[5,3] a, float[3,7] c>
        { u = MatMul(x, w)  t = Relu(u)  r = MatMul(x, a)  v = MatMul(r, c)  y = Add(t, v) }""",
    "a convolution that moves otherwise": """
        g (float[N,5,11] x) => (float[N,7,L] y) <float[7,5,3] w, float[3,5,3] a, float[7,3,1] c>
        { u = Conv <pads = [2, 0]> (x, w)  r = Conv <pads = [1, 1]> (x, a)  v = Conv (r, c)  y = Add(u, v) }""",
}


@pytest.mark.parametrize("form", NONE)
def test_what_is_no_pair_beside_a_weight_is_none(form, tmp_path):
    base = open_base(save(model(NONE[form]), tmp_path / "base.onnx"))
    with pytest.raises(lf.LoraFormatError, match=r"LF-613 .* nothing attached by loraformat, and no pair"):
        extract(base)


def rescaled(kept="k", less="l", biased=True, twice=False):
    """DoRA as PEFT's layer computes it; without a bias the product itself is what g − 1 rescales."""
    base = "h = Add(u, b)" if biased else "h = Identity(u)"
    base = "q = Add(u, bb) h = Add(q, b)" if twice else base
    return f"""g (float[N,5] x) => (float[N,7] y)
      <float[5,7] w, float[7] b, float[7] bb, float[5,3] a, float[3,7] c, float[1,7] g, float s, float one, float[1,7] other>
      {{ ["/m/q/MatMul"] u = MatMul(x, w) {base} r = MatMul(x, a) v = MatMul(r, c) l = Sub(g, one) k = Sub(h, b)
         e = Mul({less}, {kept}) d = Mul(g, v) p = Mul(d, s) i = Add(e, p) y = Add(h, i) }}"""


def dora(text):
    made = model(text)
    next(t for t in made.graph.initializer if t.name == "one").CopyFrom(numpy_helper.from_array(np.float32(1), "one"))
    return made


@pytest.mark.parametrize("biased", [True, False])
def test_a_dora_is_found_with_its_magnitude(biased, tmp_path):
    made = dora(rescaled(kept="k" if biased else "h", biased=biased))
    held = tensors(made)
    found = extract(open_base(save(made, tmp_path / "base.onnx")))
    update, g = found[KEY], held["g"].astype(np.float64).ravel()
    assert update.kind == "dora"
    whole = held["w"].T + float(held["s"]) * (held["a"] @ held["c"]).T
    assert relative_error(update["magnitude"].magnitude, g * np.linalg.norm(whole, axis=1)) <= 1e-6
    placed = replace(update, placement=lf.Placement((7, 5), (0,), (1,)))
    assert relative_error(placed.apply(np.ascontiguousarray(held["w"].T)), g[:, None] * whole) <= 1e-6


@pytest.mark.parametrize("form", ["biased", "bare", "Gemm"])
def test_a_dora_behind_another_product_is_no_pair_of_it(form, tmp_path):
    """Two products one after the other look like the factors of a branch, and a bias like what it is added to."""
    text = rescaled(kept="h" if form == "bare" else "k", biased=form != "bare").replace(
        "float[N,5] x)", "float[N,4] z)"
    )
    text = text.replace("<float[5,7] w,", "<float[4,5] first, float[5,7] w,").replace(
        "{ [", "{ x = MatMul(z, first) [", 1
    )
    if form == "Gemm":
        text = text.replace('["/m/q/MatMul"] u = MatMul(x, w) h = Add(u, b)', '["/m/q/Gemm"] h = Gemm(x, w, b)')
        assert "Gemm" in text
    held = tensors(made := dora(text))
    found = extract(open_base(save(made, tmp_path / "base.onnx")))
    assert list(found) == [KEY]
    assert found[KEY].kind == "dora"
    assert relative_error(found[KEY].matrix(), float(held["s"]) * (held["a"] @ held["c"]).T) <= 1e-6


def test_a_convolution_that_is_rescaled_is_found_too(tmp_path):
    made = dora("""g (float[N,5,11] x) => (float[N,7,L] y)
      <float[7,5,3] w, float[7] b, float[3,5,3] a, float[7,3,1] c, float[1,7,1] g, float one>
      { h = Conv(x, w, b) r = Conv(x, a) v = Conv(r, c) l = Sub(g, one) k = Sub(h, n) e = Mul(l, k) d = Mul(g, v)
        i = Add(e, d) y = Add(h, i) }""")
    held = tensors(made)
    made.graph.initializer.append(numpy_helper.from_array(held["b"].reshape(1, 7, 1), "n"))
    update = extract(open_base(save(made, tmp_path / "base.onnx")))["w"]
    whole = held["w"] + np.einsum("or,rik->oik", held["c"][..., 0], held["a"])
    assert relative_error(update.apply(held["w"]), held["g"].reshape(7, 1, 1) * whole) <= 1e-6


@pytest.mark.parametrize(
    "otherwise", [{"kept": "h"}, {"less": "other"}, {"kept": "k", "biased": False}, {"twice": True}]
)
def test_what_is_rescaled_otherwise_is_no_dora(otherwise, tmp_path):
    with pytest.raises(lf.LoraFormatError, match=r"LF-613 .* nothing attached by loraformat, and no pair"):
        extract(open_base(save(dora(rescaled(**otherwise)), tmp_path / "base.onnx")))


REFUSED = {
    "a tensor by the name of a factor": (
        """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[5,3] a, float[3,7] c, float[7,2] q_lora_A>
        { u = MatMul(x, w)  r = MatMul(x, a)  v = MatMul(r, c)  h = Add(u, v)
          t = Relu(h)  z = MatMul(t, q_lora_A)  k = Shape(z)  s = Cast <to = 1> (k)  n = ReduceSum(s)  y = Mul(h, n) }""",
        "called a factor, and is in no branch",
    ),
    "a factor that is fed": (
        """g (float[N,5] x, float[5,R] q_lora_A, float[R,7] q_lora_B) => (float[N,7] y) <float[5,7] w>
        { u = MatMul(x, w)  r = MatMul(x, q_lora_A)  v = MatMul(r, q_lora_B)  y = Add(u, v) }""",
        "it is fed to the model, which does not hold it",
    ),
    "a magnitude over the factors": (
        """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[5,3] a, float[3,7] c, float[7] g>
        { ["/m/q/MatMul"] u = MatMul(x, w)  ["/m/q/lora_A/default/MatMul"] r = MatMul(x, a)
          ["/m/q/lora_B/default/MatMul"] v = MatMul(r, c)  d = Mul(v, g)  y = Add(u, d) }""",
        "called a factor, and is in no branch",
    ),
    "two adapters": (
        """g (float[N,5] x) => (float[N,7] y)
        <float[5,7] w, float[5,3] a, float[3,7] c, float[5,2] d, float[2,7] e>
        { u = MatMul(x, w)  r = MatMul(x, a)  v = MatMul(r, c)  h = Add(u, v)
          i = MatMul(x, d)  j = MatMul(i, e)  y = Add(h, j) }""",
        "two branches run beside this weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_half_of_an_adapter_is_an_error(case, tmp_path):
    text, reason = REFUSED[case]
    with pytest.raises(lf.LoraFormatError, match=rf"LF-613 .*{reason}"):
        extract(open_base(save(model(text), tmp_path / "base.onnx")))


def test_a_folder_gives_what_one_of_its_models_has(tmp_path):
    text, wanted = FORMS["PEFT, a Linear over a sequence"]
    made = model(text)
    save(made, tmp_path / "model.onnx")
    save(model("g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { y = MatMul(x, w) }"), tmp_path / "other.onnx")
    found = extract(open_base(tmp_path))
    assert relative_error(found[KEY].matrix(), wanted(tensors(made))) <= 1e-6
    with pytest.raises(lf.LoraFormatError, match=r"LF-613 .*nothing attached by loraformat"):
        detach(open_base(tmp_path), tmp_path.with_name("detached"))
