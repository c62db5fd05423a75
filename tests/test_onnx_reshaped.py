"""A weight that a Reshape makes a matrix of: its own tensor holds the change, where the axes that are one are all out, or all in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import feeds, lora, model, run, save, session, stored
from onnx import numpy_helper

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import attach, merge, prepare

KEY = "m.q.weight"
VERBS = {"merge": merge, "attach": attach}
SHAPE = "s = Constant <value_ints = [{}]> ()"
QUERY = '["/m/q/MatMul"]'
FORMS = {
    "out of two axes": ("float[5,3,4] w", f"{SHAPE.format('5, 12')} v = Reshape(w, s) {QUERY} y = MatMul(x, v)", "0;1,2"),
    "in of two axes": ("float[5,1,7] w", f"{SHAPE.format('-1, 7')} v = Reshape(w, s) {QUERY} y = MatMul(x, v)", "0,1;2"),
    "a kernel of width 1": (
        "float[7,5,1,1] w",
        f"{SHAPE.format('0, 5')} v = Reshape(w, s) t = Transpose <perm = [1, 0]> (v) {QUERY} y = MatMul(x, t)",
        "1,2,3;0",
    ),
    "turned, then joined": (
        "float[3,5,4] w",
        f"t = Transpose <perm = [1, 2, 0]> (w) {SHAPE.format('5, 12')} v = Reshape(t, s) {QUERY} y = MatMul(x, v)",
        "1;2,0",
    ),
    "joined, then turned": (
        "float[3,4,5] w",
        f"{SHAPE.format('12, 5')} v = Reshape(w, s) t = Transpose(v) {QUERY} y = MatMul(x, t)",
        "2;0,1",
    ),
    "joined twice": (
        "float[5,2,3,2] w",
        f"""{SHAPE.format("5, 6, 2")} u = Reshape(w, s) p = Constant <value_ints = [5, 12]> ()
            v = Reshape(u, p) {QUERY} y = MatMul(x, v)""",
        "0;1,2,3",
    ),
    "a Gemm": ("float[3,4,5] w", f"""{SHAPE.format("12, -1")} v = Reshape(w, s)
        ["/m/q/Gemm"] y = Gemm <transB = 1> (x, v)""", "2;0,1"),
}  # fmt: skip
"""Form → (the weight, what the graph does, which of its axes are in; which are out)."""


def made(form, *, rank=2):
    declared, body, _ = FORMS[form]
    rows = "N" if rank == 2 else "N,T"
    return model(f"g (float[{rows},5] x) => (float[{rows},M] y) <{declared}> {{ {body} }}")


def matrix(form, weight):
    """[out, in] of the stored tensor, by numpy."""
    in_, out = ([int(a) for a in axes.split(",")] for axes in FORMS[form][2].split(";"))
    return weight.transpose(*out, *in_).reshape(-1, 5)


@pytest.mark.parametrize("kind", ["lora", "delta"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("form", FORMS)
def test_the_tensor_is_changed_in_its_own_shape(form, verb, kind, tmp_path):
    path, out = save(made(form), tmp_path / "base.onnx"), tmp_path / "out.onnx"
    held = matrix(form, stored(path)["w"])
    update = lora(*held.shape)
    wanted = held + update.matrix()
    if kind == "delta":
        update = lf.Update((lf.Delta(update.matrix(), 1.0, "factor"),))
    ours, fed, base = lf.Adapter({KEY: update}), feeds(session(path)), open_base(path)
    plan = prepare(verb, [("default", ours)], base, Options(out))
    base.apply(plan)
    assert prove(base, plan).holds
    onnx.checker.check_model(out, full_check=True)
    assert relative_error(run(path)["y"], fed["x"] @ held.T) <= 1e-6
    assert relative_error(run(out)["y"], fed["x"] @ wanted.T) <= 1e-6
    if verb == "merge":
        assert stored(out)["w"].shape == stored(path)["w"].shape
        assert relative_error(matrix(form, stored(out)["w"]), wanted) <= 1e-6
    else:
        assert lf.digest(extract(open_base(out))) == lf.digest(ours)
        detach(open_base(out), tmp_path / "again.onnx")
        assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_a_replacement_takes_the_stored_axes(tmp_path):
    path = save(made("out of two axes"), tmp_path / "base.onnx")
    new = np.random.default_rng(4).standard_normal((5, 3, 4)).astype(np.float32)
    update = lf.Update((lf.Replace(new),), lf.Placement((5, 3, 4), (1, 2), (0,)))
    merge(lf.Adapter({KEY: update}), open_base(path), tmp_path / "out.onnx")
    np.testing.assert_array_equal(stored(tmp_path / "out.onnx")["w"], new)


def test_a_bias_of_several_axes_is_one_vector(tmp_path):
    path = save(model(f"""g (float[N,5] x) => (float[N,12] y) <float[5,12] w, float[3,4] b>
      {{ {SHAPE.format('12')} {QUERY} u = MatMul(x, w) v = Reshape(b, s) ["/m/q/Add"] y = Add(u, v) }}"""), tmp_path / "base.onnx")  # fmt: skip
    change = np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)
    ours = lf.Adapter(
        {"m.q.bias": lf.Update((lf.Delta(change.reshape(12, 1), 1.0, "factor"),), lf.Placement((3, 4), (0, 1), ()))}
    )
    for verb, act in VERBS.items():
        act(ours, open_base(path), tmp_path / f"{verb}.onnx")
        assert (
            relative_error(run(tmp_path / f"{verb}.onnx")["y"] - run(path)["y"], np.tile(change.ravel(), (3, 1)))
            <= 1e-5
        )


APART = {
    "an axis divided": (
        "float[5,12] w",
        f"""{SHAPE.format("5, 3, 4")} v = Reshape(w, s)
            ["/m/q/Einsum"] y = Einsum <equation = "ni,iab->nab"> (x, v)""",
    ),
    "in and out mixed": ("float[6,10] w", f"{SHAPE.format('5, 12')} v = Reshape(w, s) {QUERY} y = MatMul(x, v)"),
    "experts of two axes": (
        "float[2,3,5,4] w",
        f"{SHAPE.format('6, 5, 4')} v = Reshape(w, s) {QUERY} y = MatMul(x, v)",
    ),
}
"""What is no matrix of the stored tensor's own axes."""


@pytest.mark.parametrize("form", APART)
def test_what_divides_or_mixes_axes_takes_a_branch_and_no_merge(form, tmp_path):
    declared, body = APART[form]
    rows = {"an axis divided": "[N,3,4]", "in and out mixed": "[N,12]", "experts of two axes": "[6,N,4]"}[form]
    path = save(model(f"g (float[N,5] x) => (float{rows} y) <{declared}> {{ {body} }}"), tmp_path / "base.onnx")
    update = lora(4 if form == "experts of two axes" else 12, 5)
    if form == "experts of two axes":
        pair = update["lora"]
        update = lf.Update((replace(pair, lora_A=np.stack([pair.lora_A] * 6), lora_B=np.stack([pair.lora_B] * 6)),))
    base, ours = open_base(path), lf.Adapter({KEY: update})
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*Reshape lies between its weight and it"):
        merge(ours, base, tmp_path / "merged.onnx")
    attach(ours, base, tmp_path / "out.onnx")
    x = feeds(session(path))["x"].astype(np.float64)
    change = (x @ np.swapaxes(update.matrix(), -1, -2)).reshape(run(path)["y"].shape)
    assert relative_error(run(tmp_path / "out.onnx")["y"] - run(path)["y"], change) <= 1e-5


def test_codes_behind_a_reshape_are_rounded_again(tmp_path):
    draw = np.random.default_rng(3)
    path = save(model(f"""g (float[N,5] x) => (float[N,12] y) <float z>
      {{ d = DequantizeLinear(q, step) {SHAPE.format('5, 12')} v = Reshape(d, s) {QUERY} y = MatMul(x, v) }}"""), tmp_path / "base.onnx")  # fmt: skip
    proto = onnx.load(path)
    codes = draw.integers(-100, 100, (5, 3, 4)).astype(np.int8)
    proto.graph.initializer.extend(
        [numpy_helper.from_array(codes, "q"), numpy_helper.from_array(np.float32(0.01), "step")]
    )
    update = lora(12, 5)
    size = replace(update["lora"], alpha=0.02, scale_rule="factor")
    merge(lf.Adapter({KEY: lf.Update((size,))}), open_base(save(proto, path)), tmp_path / "out.onnx", requantize=True)
    wanted = codes.reshape(5, 12) + lf.Update((size,)).matrix().T / 0.01
    assert (np.abs(stored(tmp_path / "out.onnx")["q"].reshape(5, 12) - np.clip(wanted, -127, 127)) <= 0.501).all()
