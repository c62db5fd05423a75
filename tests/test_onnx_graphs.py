"""What each shape of graph computes after attach and after merge: the same as numpy in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from graphs import adapter, inputs, lora, model, run, save, session, stored

from loraformat import Hints, LoraFormatError
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import attach, merge
from loraformat.verbs.verify import verify

KEY = "m.q.weight"
VERBS = {"attach": attach, "merge": merge}

# name → (graph, how [out, in] is got from the stored w, what the graph computes with W [out, in]); v holds x and biases
SITES = {
    "MatMul of two axes": (
        'g (float[N,IN] x) => (float[N,OUT] y) <float[IN,OUT] w> { ["/m/q/MatMul"] y = MatMul(x, w) }',
        np.transpose,
        lambda W, v: v["x"] @ W.T,
    ),
    "MatMul of three axes": (
        'g (float[T,N,IN] x) => (float[T,N,OUT] y) <float[IN,OUT] w> { ["/m/q/MatMul"] y = MatMul(x, w) }',
        np.transpose,
        lambda W, v: v["x"] @ W.T,
    ),
    "MatMul of one vector": (
        'g (float[IN] x) => (float[OUT] y) <float[IN,OUT] w> { ["/m/q/MatMul"] y = MatMul(x, w) }',
        np.transpose,
        lambda W, v: v["x"] @ W.T,
    ),
    "Gemm as torch writes it": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[OUT,IN] w, float[OUT] b>
           { ["/m/q/Gemm"] y = Gemm <transB = 1> (x, w, b) }""",
        np.asarray,
        lambda W, v: v["x"] @ W.T + v["b"],
    ),
    "Gemm that reads W as it lies": (
        'g (float[N,IN] x) => (float[N,OUT] y) <float[IN,OUT] w> { ["/m/q/Gemm"] y = Gemm(x, w) }',
        np.transpose,
        lambda W, v: v["x"] @ W.T,
    ),
    "Gemm that turns x": (
        """g (float[IN,N] x) => (float[N,OUT] y) <float[OUT,IN] w, float[OUT] b>
           { ["/m/q/Gemm"] y = Gemm <transA = 1, transB = 1> (x, w, b) }""",
        np.asarray,
        lambda W, v: v["x"].T @ W.T + v["b"],
    ),
    "Gemm with alpha and beta": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[IN,OUT] w, float[OUT] b>
           { ["/m/q/Gemm"] y = Gemm <alpha = 0.7, beta = -1.3> (x, w, b) }""",
        np.transpose,
        lambda W, v: 0.7 * (v["x"] @ W.T) - 1.3 * v["b"],
    ),
    "Gemm with a bias for each row": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[OUT,IN] w, float[3,1] b>
           { ["/m/q/Gemm"] y = Gemm <transB = 1> (x, w, b) }""",
        np.asarray,
        lambda W, v: v["x"] @ W.T + v["b"],
    ),
    "bias after": (
        """g (float[T,N,IN] x) => (float[T,N,OUT] y) <float[IN,OUT] w, float[OUT] b>
           { ["/m/q/MatMul"] h = MatMul(x, w)  y = Add(h, b) }""",
        np.transpose,
        lambda W, v: v["x"] @ W.T + v["b"],
    ),
    "bias before, then an activation": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[IN,OUT] w, float[OUT] b>
           { ["/m/q/MatMul"] h = MatMul(x, w)  s = Add(b, h)  y = Relu(s) }""",
        np.transpose,
        lambda W, v: np.maximum(v["x"] @ W.T + v["b"], 0),
    ),
    "bias for each row": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[IN,OUT] w, float[3,1] b>
           { ["/m/q/MatMul"] h = MatMul(x, w)  y = Add(h, b) }""",
        np.transpose,
        lambda W, v: v["x"] @ W.T + v["b"],
    ),
    "bias behind Identity": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[IN,OUT] w, float[OUT] b>
           { c = Identity(b)  ["/m/q/MatMul"] h = MatMul(x, w)  y = Add(h, c) }""",
        np.transpose,
        lambda W, v: v["x"] @ W.T + v["b"],
    ),
    "a sum with itself is no bias": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[IN,OUT] w>
           { ["/m/q/MatMul"] h = MatMul(x, w)  y = Add(h, h) }""",
        np.transpose,
        lambda W, v: 2 * (v["x"] @ W.T),
    ),
    "read before the bias too": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[IN,OUT] w, float[OUT] b>
           { ["/m/q/MatMul"] h = MatMul(x, w)  s = Add(h, b)  t = Sigmoid(h)  y = Mul(s, t) }""",
        np.transpose,
        lambda W, v: (v["x"] @ W.T + v["b"]) / (1 + np.exp(-(v["x"] @ W.T))),
    ),
    "weight behind Identity": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[IN,OUT] w>
           { v = Identity(w)  ["/m/q/MatMul"] y = MatMul(x, v) }""",
        np.transpose,
        lambda W, v: v["x"] @ W.T,
    ),
    "weight behind Transpose": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[OUT,IN] w>
           { v = Transpose <perm = [1, 0]> (w)  ["/m/q/MatMul"] y = MatMul(x, v) }""",
        np.asarray,
        lambda W, v: v["x"] @ W.T,
    ),
    "weight behind Transpose without perm and Identity": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[OUT,IN] w>
           { u = Identity(w)  v = Transpose(u)  ["/m/q/MatMul"] y = MatMul(x, v) }""",
        np.asarray,
        lambda W, v: v["x"] @ W.T,
    ),
    "weight turned for a Gemm that turns it back": (
        """g (float[N,IN] x) => (float[N,OUT] y) <float[IN,OUT] w>
           { v = Transpose(w)  ["/m/q/Gemm"] y = Gemm <transB = 1> (x, v) }""",
        np.transpose,
        lambda W, v: v["x"] @ W.T,
    ),
    "output read by the model's caller and by a node": (
        """g (float[N,IN] x) => (float[N,OUT] h, float[N,OUT] y) <float[IN,OUT] w, float[OUT] b>
           { ["/m/q/MatMul"] h = MatMul(x, w)  y = Add(h, b) }""",
        np.transpose,
        lambda W, v: v["x"] @ W.T + v["b"],
    ),
    "output read inside an If": (
        """g (float[N,IN] x, bool c) => (float[N,OUT] y) <float[IN,OUT] w, float[OUT] b>
           { ["/m/q/MatMul"] h = MatMul(x, w)
             y = If (c) <then_branch = a () => (float[N,OUT] p) { p = Add(h, b) },
                         else_branch = e () => (float[N,OUT] q) { q = Neg(h) }> }""",
        np.transpose,
        lambda W, v: v["x"] @ W.T + v["b"],
    ),
    "read by the bias and inside an If": (
        """g (float[N,IN] x, bool c) => (float[N,OUT] y) <float[IN,OUT] w, float[OUT] b>
           { ["/m/q/MatMul"] h = MatMul(x, w)  s = Add(h, b)
             p = If (c) <then_branch = a () => (float[N,OUT] i) { i = Neg(h) },
                         else_branch = e () => (float[N,OUT] j) { j = Identity(h) }>
             y = Mul(p, s) }""",
        np.transpose,
        lambda W, v: -(v["x"] @ W.T) * (v["x"] @ W.T + v["b"]),
    ),
    "the bias's sum read inside an If": (
        """g (float[N,IN] x, bool c) => (float[N,OUT] y) <float[IN,OUT] w, float[OUT] b>
           { ["/m/q/MatMul"] h = MatMul(x, w)  s = Add(h, b)
             y = If (c) <then_branch = a () => (float[N,OUT] p) { p = Neg(s) },
                         else_branch = e () => (float[N,OUT] q) { q = Identity(s) }> }""",
        np.transpose,
        lambda W, v: -(v["x"] @ W.T + v["b"]),
    ),
}

every_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES.keys())
both_verbs = pytest.mark.parametrize("verb", VERBS)
oblong_and_square = pytest.mark.parametrize(("out", "in_"), [(7, 5), (6, 6)], ids=["7x5", "6x6"])


def changed(verb, made, update, tmp_path, **hints):
    """(path of the base, path of the changed model)."""
    base, out = save(made, tmp_path / "base.onnx"), tmp_path / "out.onnx"
    VERBS[verb](update, open_base(base), out, Hints(**hints))
    return base, out


def sized(text, out, in_):
    return text.replace("IN", str(in_)).replace("OUT", str(out))


def check(base, out, matrix, compute, *, delta, tolerance=2e-6):
    """The changed model computes with W + ΔW; that is checked against the base first, so that the formula is sound."""
    tensors = {name: values.astype(np.float64) for name, values in stored(base).items()}
    values = tensors | inputs(base)
    weight = matrix(tensors["w"])
    assert relative_error(run(base)["y"], compute(weight, values)) <= tolerance
    wanted = compute(weight + delta, values)
    assert relative_error(wanted, compute(weight, values)) > 0.05
    for optimise in (True, False):
        assert relative_error(run(out, optimise=optimise)["y"], wanted) <= tolerance
    onnx.checker.check_model(out, full_check=True)


@every_site
@both_verbs
@oblong_and_square
def test_a_changed_graph_computes_with_the_changed_weight(site, verb, out, in_, tmp_path):
    text, matrix, compute = site
    made = adapter({KEY: (out, in_)})
    base, result = changed(verb, model(sized(text, out, in_)), made, tmp_path)
    check(base, result, matrix, compute, delta=made[KEY].matrix())


@every_site
@both_verbs
def test_a_weight_may_be_in_a_constant_node(site, verb, tmp_path):
    text, matrix, compute = site
    made = model(sized(text, 7, 5))
    weight = next(t for t in made.graph.initializer if t.name == "w")
    update = adapter({KEY: (7, 5)})
    reference = save(made, tmp_path / "reference.onnx")
    made.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=weight))
    made.graph.initializer.remove(weight)
    _, result = changed(verb, made, update, tmp_path)
    check(reference, result, matrix, compute, delta=update[KEY].matrix())


@both_verbs
def test_every_output_that_reads_the_target_sees_the_change(verb, tmp_path):
    text, _, _ = SITES["output read by the model's caller and by a node"]
    base, result = changed(verb, model(sized(text, 7, 5)), adapter({KEY: (7, 5)}), tmp_path)
    bias = stored(base)["b"]
    found = run(result)
    assert relative_error(found["h"], run(base)["h"]) > 0.05
    assert relative_error(found["y"] - bias, found["h"]) <= 2e-6


@both_verbs
@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 2e-3), ("double", 2e-6)])
@pytest.mark.parametrize("stored_as", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_graph_and_adapter_may_differ_in_dtype(verb, kind, tolerance, stored_as, tmp_path):
    text = SITES["bias after"][0].replace("float", kind)
    made = adapter({KEY: lora(7, 5, dtype=stored_as)})
    base, result = changed(verb, model(sized(text, 7, 5)), made, tmp_path)
    check(base, result, *SITES["bias after"][1:], delta=made[KEY].matrix(), tolerance=tolerance)


@both_verbs
def test_a_bfloat16_graph_is_changed_as_its_reference_evaluation_shows(verb, tmp_path):
    from onnx.reference import ReferenceEvaluator  # ONNX Runtime has no bfloat16 MatMul on the CPU

    text = sized(SITES["MatMul of two axes"][0], 7, 5).replace("float", "bfloat16")
    update = adapter({KEY: (7, 5)})
    base, result = changed(verb, model(text), update, tmp_path)
    x = np.random.default_rng(5).standard_normal((3, 5)).astype(ml_dtypes.bfloat16)
    (found,) = ReferenceEvaluator(onnx.load(result)).run(None, {"x": x})
    wanted = x.astype(np.float64) @ (stored(base)["w"].astype(np.float64) + update[KEY].matrix().T)
    assert relative_error(found.astype(np.float64), wanted) <= 2e-2
    if verb == "merge":
        exact = (stored(base)["w"].astype(np.float32) + update[KEY].matrix().T).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(stored(result)["w"], exact)


@both_verbs
@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)", "factor"])
@pytest.mark.parametrize("alpha", [-2.5, 0.25])
def test_the_scale_is_that_of_the_rule(verb, rule, alpha, tmp_path):
    update = adapter({KEY: lora(7, 5, rank=3, alpha=alpha, rule=rule)})
    part = update[KEY]["lora"]
    scale = {"alpha/r": alpha / 3, "alpha/sqrt(r)": alpha / 3**0.5, "factor": alpha}[rule]
    text, matrix, compute = SITES["Gemm with alpha and beta"]
    base, result = changed(verb, model(sized(text, 7, 5)), update, tmp_path)
    check(base, result, matrix, compute, delta=scale * part.lora_B @ part.lora_A)


TWICE = """g (float[N,6] x) => (float[N,6] y) <float[6,6] w>
  { ["/m/q/MatMul"] h = MatMul(x, w)  r = Relu(h)  NAMED y = MatMul(r, w) }"""


@both_verbs
@pytest.mark.parametrize("second", ["/m/q_1/MatMul", "/m/q/MatMul_1"])
def test_a_module_called_twice_is_changed_at_both_calls(verb, second, tmp_path):
    update = adapter({KEY: (6, 6)})
    base, result = changed(verb, model(TWICE.replace("NAMED", f'["{second}"]')), update, tmp_path)
    check(base, result, np.transpose, lambda W, v: np.maximum(v["x"] @ W.T, 0) @ W.T, delta=update[KEY].matrix())


def test_one_pair_of_constants_serves_both_calls(tmp_path):
    base, result = changed(
        "attach", model(TWICE.replace("NAMED", '["/m/q_1/MatMul"]')), adapter({KEY: (6, 6)}), tmp_path
    )
    assert sorted(stored(result).keys() - stored(base).keys()) == [
        f"lora/{KEY}/{name}" for name in ("lora_A", "lora_B", "scale")
    ]


@both_verbs
@pytest.mark.parametrize("through", ["Identity", "two of them", "two transpositions"])
@pytest.mark.parametrize("joint", ["w", "u"])
def test_of_two_modules_tied_to_one_weight_only_the_target_changes(verb, through, joint, tmp_path):
    ways = {"Identity": "u = Identity(w)", "two of them": "t = Identity(w)  u = Identity(t)"}
    turned = ways.get(through, "t = Transpose(w)  u = Transpose(t)")
    text = f"""g (float[N,6] x) => (float[N,6] y) <float[6,6] w>
      {{ {turned}  ["/m/q/MatMul"] h = MatMul(x, u)  r = Relu(h)  ["/m/k/MatMul"] y = MatMul(r, {joint}) }}"""
    update = adapter({KEY: (6, 6)})
    base, result = changed(verb, model(text), update, tmp_path)
    kept = stored(base)["w"].astype(np.float64)
    compute = lambda W, v: np.maximum(v["x"] @ W.T, 0) @ kept  # noqa: E731
    check(base, result, np.transpose, compute, delta=update[KEY].matrix())


@both_verbs
def test_two_targets_tied_to_one_weight_each_get_their_own_change(verb, tmp_path):
    text = TWICE.replace("NAMED", '["/m/k/MatMul"]')
    update = adapter({KEY: (6, 6), "m.k.weight": (6, 6)})
    base, result = changed(verb, model(text), update, tmp_path)
    w, x = stored(base)["w"].astype(np.float64).T, inputs(base)["x"]
    wanted = np.maximum(x @ (w + update[KEY].matrix()).T, 0) @ (w + update["m.k.weight"].matrix()).T
    assert relative_error(run(result)["y"], wanted) <= 2e-6
    onnx.checker.check_model(result, full_check=True)


def test_a_weight_that_an_if_reads_too_is_copied_by_merge(tmp_path):
    text = """g (float[N,6] x, bool c) => (float[N,6] y) <float[6,6] w>
      { ["/m/q/MatMul"] h = MatMul(x, w)
        y = If (c) <then_branch = a () => (float[N,6] p) { ["/m/o/MatMul"] p = MatMul(h, w) },
                    else_branch = e () => (float[N,6] q) { q = Neg(h) }> }"""
    update = adapter({KEY: (6, 6)})
    base, result = changed("merge", model(text), update, tmp_path)
    kept = stored(base)["w"].astype(np.float64)
    check(base, result, np.transpose, lambda W, v: v["x"] @ W.T @ kept, delta=update[KEY].matrix())


@both_verbs
def test_a_weight_that_an_if_reads_under_no_name_is_no_other_modules(verb, tmp_path):
    """As torch's dynamo exporter leaves the calls in a body; the user can say that they are meant."""
    text = """g (float[N,6] x, bool c) => (float[N,6] y) <float[6,6] w>
      { ["/m/q/MatMul"] h = MatMul(x, w)
        y = If (c) <then_branch = a () => (float[N,6] p) { p = MatMul(h, w) },
                    else_branch = e () => (float[N,6] q) { q = Neg(h) }> }"""
    update, path = adapter({KEY: (6, 6)}), save(model(text), tmp_path / "base.onnx")
    with pytest.raises(LoraFormatError, match=r"LF-609 .*reads w too, and has no module's name[^@]*@ m\.q\.weight"):
        VERBS[verb](update, open_base(path), tmp_path / "out.onnx")
    VERBS[verb](update, open_base(path), tmp_path / "out.onnx", Hints(names={KEY: "w"}))
    x = np.random.default_rng(2).standard_normal((3, 6)).astype(np.float32)
    whole = stored(path)["w"] + update[KEY].matrix().T
    found = session(tmp_path / "out.onnx").run(["y"], {"x": x, "c": np.array(True)})[0]
    assert relative_error(found, x @ whole @ whole) <= 2e-6


def test_a_weight_that_is_an_output_too_is_copied_by_merge(tmp_path):
    text = sized(SITES["MatMul of two axes"][0], 7, 5).replace("(float[N,7] y)", "(float[N,7] y, float[5,7] w)")
    base, result = changed("merge", model(text), adapter({KEY: (7, 5)}), tmp_path)
    np.testing.assert_array_equal(run(result)["w"], stored(base)["w"])
    assert relative_error(run(result)["y"], run(base)["y"]) > 0.1


@both_verbs
@pytest.mark.parametrize("ir", [3, 10])
def test_an_initializer_may_be_listed_as_input(verb, ir, tmp_path):
    text, matrix, compute = SITES["Gemm as torch writes it"]
    made = model(sized(text, 7, 5), ir=ir, opset=8)
    for tensor in made.graph.initializer:
        made.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    update = adapter({KEY: (7, 5)})
    base, result = changed(verb, made, update, tmp_path)
    values = {n: v.astype(np.float64) for n, v in stored(base).items()}
    x = np.random.default_rng(2).standard_normal((3, 5)).astype(np.float32)
    found = session(result).run(["y"], {"x": x})[0]
    assert relative_error(found, compute(matrix(values["w"]) + update[KEY].matrix(), values | {"x": x})) <= 2e-6
    onnx.checker.check_model(result, full_check=True)


def test_an_old_graph_takes_a_bfloat16_adapter_widened(tmp_path):
    text, matrix, compute = SITES["MatMul of two axes"]
    update = adapter({KEY: lora(7, 5, dtype=ml_dtypes.bfloat16)})
    base, result = changed("attach", model(sized(text, 7, 5), opset=9, ir=4), update, tmp_path)
    check(base, result, matrix, compute, delta=update[KEY].matrix())


@both_verbs
def test_nodes_need_no_names_where_the_weight_has_one(verb, tmp_path):
    text = 'g (float[N,5] x) => (float[N,7] y) <float[7,5] "m.q.weight"> { y = Gemm <transB = 1> (x, "m.q.weight") }'
    update = adapter({KEY: (7, 5)})
    base, result = changed(verb, model(text), update, tmp_path)
    wanted = inputs(base)["x"] @ (stored(base)[KEY] + update[KEY].matrix()).T
    assert relative_error(run(result)["y"], wanted) <= 2e-6


@both_verbs
def test_names_that_a_graph_has_already_are_not_taken(verb, tmp_path):
    taken = [f"lora/{KEY}/{n}" for n in ("lora_A", "lora_B", "scale", "base", "change", "hidden", "add", "weight")]
    relus = "  ".join(f'["{n}"] "{n}" = Relu("{i}")' for n, i in zip(taken, ["x", *taken], strict=False))
    text = f"""g (float[N,6] x) => (float[N,6] y, float[N,6] "lora/{KEY}/A_2") <float[6,6] w, float[2] "lora/{KEY}/B_2">
      {{ {relus}  ["lora/{KEY}/add_2"] "lora/{KEY}/A_2" = Neg(x)
         ["/m/q/MatMul"] h = MatMul("{taken[-1]}", w)  ["/m/k/MatMul"] y = MatMul(h, w) }}"""
    update = adapter({KEY: (6, 6)})
    base, result = changed(verb, model(text), update, tmp_path)
    kept = stored(base)["w"].astype(np.float64)
    compute = lambda W, v: np.maximum(v["x"], 0) @ W.T @ kept  # noqa: E731
    check(base, result, np.transpose, compute, delta=update[KEY].matrix())
    graph = onnx.load(result).graph
    names = [node.name for node in graph.node]
    values = [t.name for t in graph.initializer] + [name for node in graph.node for name in node.output]
    assert (len(names), len(values)) == (len(set(names)), len(set(values)))


@pytest.mark.parametrize("kind", ["float", "float16", "double"])
def test_values_need_not_be_stored_as_raw_bytes(kind, tmp_path):
    text, matrix, compute = SITES["MatMul of two axes"]
    made = model(sized(text, 7, 5).replace("float", kind))
    old = made.graph.initializer[0]
    typed = onnx.helper.make_tensor("w", old.data_type, old.dims, onnx.numpy_helper.to_array(old).ravel())
    assert not typed.raw_data
    made.graph.initializer[0].CopyFrom(typed)
    update = adapter({KEY: (7, 5)})
    base, result = changed("merge", made, update, tmp_path)
    tolerance = 2e-3 if kind == "float16" else 2e-6
    check(base, result, matrix, compute, delta=update[KEY].matrix(), tolerance=tolerance)


def test_the_branch_is_added_before_what_is_no_bias(tmp_path):
    text = """g (float[N,5] x, float[N,7] z) => (float[N,7] y) <float[5,7] w>
      { ["/m/q/MatMul"] h = MatMul(x, w)  ["skip"] y = Add(h, z) }"""
    _, result = changed("attach", model(text), adapter({KEY: (7, 5)}), tmp_path)
    skip = next(node for node in onnx.load(result).graph.node if node.name == "skip")
    assert (list(skip.input), list(skip.output)) == (["h", "z"], ["y"])


def test_attach_leaves_every_stored_tensor_and_node_as_it_was(tmp_path):
    base, result = changed("attach", model(sized(SITES["bias after"][0], 7, 5)), adapter({KEY: (7, 5)}), tmp_path)
    old, new = onnx.load(base).graph, onnx.load(result).graph
    bytes_of = {t.name: t.SerializeToString() for t in new.initializer}
    assert all(bytes_of[t.name] == t.SerializeToString() for t in old.initializer)
    assert [n.op_type for n in new.node if not n.name.startswith("lora/")] == [n.op_type for n in old.node]


def test_attach_stores_the_factors_as_they_are(tmp_path):
    update = adapter({KEY: lora(7, 5, dtype=ml_dtypes.bfloat16, alpha=1.1)})
    _, result = changed("attach", model(sized(SITES["bias after"][0], 7, 5)), update, tmp_path)
    kept = stored(result)
    for role in ("lora_A", "lora_B"):
        assert kept[f"lora/{KEY}/{role}"].tobytes() == getattr(update[KEY]["lora"], role).tobytes()


def test_an_opened_model_is_the_same_after_a_verb(tmp_path):
    base = open_base(save(model(sized(SITES["bias after"][0], 7, 5)), tmp_path / "base.onnx"))
    first, second = adapter({KEY: (7, 5)}), adapter({KEY: lora(7, 5, seed=9)})
    for name, update in (("first", first), ("second", second), ("again", first)):
        merge(update, base, tmp_path / f"{name}.onnx")
        attach(update, base, tmp_path / f"{name}-attached.onnx")
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()
    assert relative_error(run(tmp_path / "second.onnx")["y"], run(tmp_path / "second-attached.onnx")["y"]) <= 2e-6


def test_an_attached_model_takes_no_second_adapter(tmp_path):
    _, result = changed("attach", model(sized(SITES["bias after"][0], 7, 5)), adapter({KEY: (7, 5)}), tmp_path)
    with pytest.raises(LoraFormatError, match="LF-608  the model has an adapter attached already"):
        attach(adapter({KEY: (7, 5)}), open_base(result), tmp_path / "twice.onnx")


def test_an_untied_copy_is_found_again_as_its_target(tmp_path):
    text = """g (float[N,6] x) => (float[N,6] y) <float[6,6] "m.q.weight">
      { ["/m/q/MatMul"] h = MatMul(x, "m.q.weight")  ["/m/k/MatMul"] y = MatMul(h, "m.q.weight") }"""
    update = adapter({KEY: (6, 6)})
    base, result = changed("merge", model(text), update, tmp_path)
    assert verify(open_base(base), update, open_base(result)).problems == []
    changed_twice = tmp_path / "twice.onnx"
    merge(update, open_base(result), changed_twice)
    (place,) = open_base(changed_twice).resolve(update, Hints()).targets[KEY]
    assert place.weight == f"lora/{KEY}/weight"
