"""Finding a target by its values: exactly, in a graph that kept no names, or like its sketch; never a wrong one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import adapter, lora, model, save, stored
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

import loraformat as lf
from loraformat.base import Options
from loraformat.identity import runs_sha256
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.verbs.merge import merge, prepare
from loraformat.verbs.verify import verify

LINEAR = lf.Placement((8, 6), (0,), (1,))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph(text, **weights):
    """A textual graph with these initializers."""
    made = model(text)
    made.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in weights.items())
    return made


def two(w0, w1, names=("n0", "n1")):
    """x·w0 and x·w1, both stored as MatMul reads them."""
    text = f"""g (float[N,6] x) => (float[N,M] y0, float[N,M] y1)
      {{ ["{names[0]}"] y0 = MatMul(x, w0)  ["{names[1]}"] y1 = MatMul(x, w1) }}"""
    return graph(text, w0=w0, w1=w1)


def checkpoint(tmp_path, config='{"model_type": "bert"}', **weights):
    """A Hugging Face checkpoint: its config says that a Linear is [out, in]."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(config)
    return open_base(folder)


def sketched(weight, **kinds):
    """An update bound to a Linear [out, in], with its sketch."""
    place = lf.Placement(weight.shape, (0,), (1,))
    return lf.Update(lora(*weight.shape).parts, place, sketch=sketch(weight, place), **kinds)


def resolve(made, targets, tmp_path, **hints):
    """(target → stored tensors, evidence of the first, problems)."""
    base = open_base(save(made, tmp_path / "base.onnx"))
    found = base.resolve(adapter(targets), lf.Hints(**hints))
    weights = {key: {m.weight for m in places} for key, places in found.targets.items()}
    evidence = next((places[0].evidence for places in found.targets.values()), ())
    return weights, evidence, [*found.unresolved, *found.ambiguous]


def refusal(made, targets, tmp_path, **hints):
    _, _, problems = resolve(made, targets, tmp_path, **hints)
    assert len(problems) == 1, problems
    return problems[0]


# Exactly: the tensor of --base.


def test_a_weight_is_found_by_its_equal_in_the_base(tmp_path):
    k = normal(8, 6)
    made = two(normal(6, 8, seed=1), k.T)
    found, evidence, problems = resolve(
        made, {"enc.k.weight": (8, 6)}, tmp_path, base=checkpoint(tmp_path, **{"enc.k.weight": k})
    )
    assert (found, problems) == ({"enc.k.weight": {"w1"}}, [])
    assert evidence[0] == "fingerprint: equals enc.k.weight of checkpoint"


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_base_is_cast_as_the_exporter_cast_it(dtype, tmp_path):
    k = normal(8, 6)
    made = two(normal(6, 8, seed=1).astype(dtype), k.T.astype(dtype))
    base = checkpoint(tmp_path, **{"enc.k.weight": k})
    assert resolve(made, {"enc.k.weight": (8, 6)}, tmp_path, base=base)[0] == {"enc.k.weight": {"w1"}}


def test_one_value_that_differs_is_another_weight(tmp_path):
    k = normal(8, 6)
    other = k.copy()
    other[3, 3] = np.nextafter(other[3, 3], np.float32(9))
    base = checkpoint(tmp_path, **{"enc.k.weight": k})
    _, evidence, _ = resolve(two(normal(6, 8, seed=1), other.T), {"enc.k.weight": (8, 6)}, tmp_path, base=base)
    assert evidence[0].startswith("sketch: cosine 1.000")  # found all the same, but not called equal


KNOWN = {
    "sketch": lambda drawn: drawn,
    "base": lambda drawn: None,
    "base, and a sketch without a scale": lambda drawn: drawn / np.linalg.norm(drawn),
}


@pytest.mark.parametrize("by", KNOWN)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("factor", "told"), [(8**-0.5, True), (2**-0.5, True), (1.5, True), (1.03, False)])
def test_a_scale_that_was_folded_into_a_weight_is_told(factor, told, named, by, tmp_path):
    """Attention's 1/√d in the weight of q: by the sketch that the adapter brings, by ``--base``, by both."""
    k = normal(8, 6)
    made = two(normal(6, 8, seed=1), np.float32(factor) * k.T, names=("n0", "/enc/k/MatMul" if named else "n1"))
    base = None if by == "sketch" else checkpoint(tmp_path, **{"enc.k.weight": k})
    bound = replace(sketched(k), sketch=KNOWN[by](sketched(k).sketch))
    found, _, problems = resolve(made, {"enc.k.weight": bound}, tmp_path, base=base)
    if told:
        assert [(p.rule, p.where) for p in problems] == [("LF-616", "enc.k.weight")]
        assert f"w1 is {factor:.3g} times enc.k.weight" in problems[0].what
    else:
        assert (found, problems) == ({"enc.k.weight": {"w1"}}, [])


def test_a_sketch_of_the_time_before_scales_recognises_a_weight_whatever_its_scale(tmp_path):
    k = normal(8, 6)
    bound = sketched(k)
    made = two(normal(6, 8, seed=1), np.float32(0.5) * k.T)
    assert refusal(made, {"enc.k.weight": bound}, tmp_path).rule == "LF-616"
    older = replace(bound, sketch=bound.sketch / np.linalg.norm(bound.sketch))
    assert resolve(made, {"enc.k.weight": older}, tmp_path)[0] == {"enc.k.weight": {"w1"}}


@pytest.mark.parametrize("factor", [1, 0.5])
def test_the_scale_of_a_small_weight_that_only_its_name_tells_is_compared(factor, tmp_path):
    """Its sketch is no proof of which weight it is, and tells its scale all the same."""
    w = normal(3, 3)
    made = two(np.float32(factor) * w.T, normal(3, 3, seed=2), names=("/enc/q/MatMul", "n1"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    given = adapter({"enc.q.weight": sketched(w)})
    assert base.resolve(given, lf.Hints()).require().rungs == "node_name"
    if factor == 1:
        assert merge(given, base, tmp_path / "out.onnx")
        return
    with pytest.raises(lf.LoraFormatError, match=r"LF-616  w0 is 0\.5 times enc\.q\.weight"):
        merge(given, base, tmp_path / "out.onnx")


def test_the_base_that_is_given_must_be_the_one_that_the_adapter_was_bound_to(tmp_path):
    """The graph equals ``--base``, and the adapter is of another one."""
    k = normal(8, 6)
    given = adapter({"enc.k.weight": sketched(normal(8, 6, seed=5))})
    base = open_base(save(two(normal(6, 8, seed=1), k.T), tmp_path / "base.onnx"))
    hints = lf.Hints(base=checkpoint(tmp_path, **{"enc.k.weight": k}))
    with pytest.raises(lf.LoraFormatError, match="LF-607  w1 is not like the tensor"):
        merge(given, base, tmp_path / "out.onnx", hints)


SQUARE = {"gemm": '["n"] y = Gemm <transB = 1> (x, w)', "matmul": '["n"] y = MatMul(x, w)'}


@pytest.mark.parametrize("by", ["base", "sketch"])
@pytest.mark.parametrize(("op", "turned"), [("gemm", False), ("matmul", True)])
def test_a_square_weight_is_found_as_the_operator_reads_it(op, turned, by, tmp_path):
    w = normal(6, 6)
    right = w.T if turned else w
    text = f"g (float[N,6] x) => (float[N,6] y) {{ {SQUARE[op]} }}"
    base = checkpoint(tmp_path, **{"q.weight": w}) if by == "base" else None
    targets = {"q.weight": (6, 6) if base else sketched(w)}
    assert resolve(graph(text, w=right), targets, tmp_path, base=base)[0] == {"q.weight": {"w"}}
    assert refusal(graph(text, w=right.T), targets, tmp_path, base=base).rule == "LF-602"


def test_where_nothing_tells_how_the_base_stores_a_square_weight_both_readings_are_tried(tmp_path):
    w = normal(6, 6)
    base = checkpoint(tmp_path, config=None, **{"q.weight": w})
    for i, right in enumerate((w, w.T)):
        made = graph("g (float[N,6] x) => (float[N,6] y) { y = MatMul(x, w) }", w=right)
        assert resolve(made, {"q.weight": (6, 6)}, tmp_path, base=base)[0] == {"q.weight": {"w"}}, i
    merge(adapter({"q.weight": (6, 6)}), open_base(tmp_path / "base.onnx"), tmp_path / "out.onnx", lf.Hints(base=base))
    expected = w.T + lora(6, 6).matrix().T  # the operator's own orientation, whatever the base's is
    np.testing.assert_allclose(stored(tmp_path / "out.onnx")["w"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["base", "sketch"])
def test_twins_of_equal_values_are_told_apart_by_names_only(by, tmp_path):
    w = normal(8, 6)
    base = checkpoint(tmp_path, **{"enc.q.weight": w}) if by == "base" else None
    targets = {"enc.q.weight": (8, 6) if base else sketched(w)}
    problem = refusal(two(w.T, w.T), targets, tmp_path, base=base)
    assert problem.rule == "LF-603"
    assert "w0, w1" in problem.what
    named = two(w.T, w.T, names=("/enc/k/MatMul", "/enc/q/MatMul"))
    found, evidence, problems = resolve(named, targets, tmp_path, base=base)
    assert (found, problems) == ({"enc.q.weight": {"w1"}}, [])
    assert [e.partition(":")[0] for e in evidence] == ["node_name", "fingerprint" if base else "sketch", "operator"]


def test_one_of_two_weights_of_a_module_is_chosen_by_its_values(tmp_path):
    w = normal(8, 6)
    made = two(normal(6, 8, seed=1), w.T, names=("/enc/q/MatMul", "/enc/q/MatMul_1"))
    assert refusal(made, {"enc.q.weight": (8, 6)}, tmp_path).rule == "LF-603"
    assert resolve(made, {"enc.q.weight": sketched(w)}, tmp_path)[0] == {"enc.q.weight": {"w1"}}


@pytest.mark.parametrize("by", ["base", "sketch"])
def test_a_name_and_the_values_that_disagree_are_both_printed(by, tmp_path):
    w = normal(8, 6)
    base = checkpoint(tmp_path, **{"enc.q.weight": w}) if by == "base" else None
    made = two(normal(6, 8, seed=1), w.T, names=("/enc/q/MatMul", "/enc/k/MatMul"))
    problem = refusal(made, {"enc.q.weight": (8, 6) if base else sketched(w)}, tmp_path, base=base)
    assert problem.rule == "LF-603"
    assert "node_name: enc.q → /enc/q/MatMul (w0)" in problem.what
    assert "→ /enc/k/MatMul (w1)" in problem.what


@pytest.mark.parametrize("by", ["base", "sketch"])
def test_a_tensor_that_two_nameless_nodes_use_is_nobodys(by, tmp_path):
    w = normal(6, 6)
    base = checkpoint(tmp_path, **{"q.weight": w}) if by == "base" else None
    made = graph("g (float[N,6] x) => (float[N,6] y) { h = MatMul(x, w)  y = MatMul(h, w) }", w=w.T)
    assert refusal(made, {"q.weight": (6, 6) if base else sketched(w)}, tmp_path, base=base).rule == "LF-609"


def test_two_targets_of_equal_values_for_one_tensor_are_an_error(tmp_path):
    w = normal(8, 6)
    made = graph("g (float[N,6] x) => (float[N,8] y) { y = MatMul(x, w) }", w=w.T)
    problem = refusal(made, {"a.weight": sketched(w), "b.weight": sketched(w)}, tmp_path)
    assert problem.rule == "LF-603"
    assert "a.weight means the node" in problem.what


def test_a_tied_head_is_the_multiplication_and_the_embedding_the_look_up(tmp_path):
    w = normal(9, 6)
    made = graph("""g (int64[N] i) => (float[N,9] y)
      { ["e"] h = Gather(w, i)  t = Transpose(w)  ["h"] y = MatMul(h, t) }""", w=w)  # fmt: skip
    base = open_base(save(made, tmp_path / "base.onnx"))
    places = base.resolve(adapter({"head.weight": sketched(w)}), lf.Hints()).require().targets["head.weight"]
    assert [place.node for place in places] == ["h"]


def test_a_sketch_beside_an_unplaced_target_says_nothing(tmp_path):
    w = normal(8, 6)
    unplaced = lf.Update(lora(8, 6).parts, sketch=sketched(w).sketch)
    assert refusal(two(normal(6, 8, seed=1), w.T), {"enc.q.weight": unplaced}, tmp_path).rule == "LF-602"


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 3), (5, 6)])
def test_a_small_weight_is_not_recognised_by_a_sketch_that_many_have(shape, tmp_path):
    w = normal(*shape)
    made = graph("g (float[N,M] x) => (float[N,K] y) { y = MatMul(x, w) }", w=w.T)
    assert refusal(made, {"enc.q.weight": sketched(w)}, tmp_path).rule == "LF-602"
    base = checkpoint(tmp_path, **{"enc.q.weight": w})
    assert resolve(made, {"enc.q.weight": shape}, tmp_path, base=base)[0] == {"enc.q.weight": {"w"}}


# Zero weights, and vectors, which have no sketch.


def test_a_zero_weight_is_recognised_by_nothing(tmp_path):
    zero = np.zeros((8, 6), np.float32)
    made = two(zero.T, normal(6, 8))
    assert refusal(made, {"enc.q.weight": sketched(zero)}, tmp_path).rule == "LF-602"
    named = two(zero.T, normal(6, 8), names=("/enc/q/MatMul", "n1"))
    assert resolve(named, {"enc.q.weight": sketched(zero)}, tmp_path)[0] == {"enc.q.weight": {"w0"}}
    base = checkpoint(tmp_path, **{"enc.q.weight": zero})
    assert resolve(made, {"enc.q.weight": (8, 6)}, tmp_path, base=base)[0] == {"enc.q.weight": {"w0"}}
    assert refusal(two(zero.T, zero.T), {"enc.q.weight": (8, 6)}, tmp_path, base=base).rule == "LF-603"


NORMS = """g (float[N,6] x) => (float[N,6] y)
  { ["/a/norm/LayerNormalization"] h = LayerNormalization(x, s0, b0)
    ["/b/norm/LayerNormalization"] y = LayerNormalization(h, s1, b1) }"""


def vector(n=6):
    return lf.Update((lf.Delta(normal(n), 1.0, "factor"),), lf.Placement((n,), (0,), ()))


def test_equal_norms_are_told_apart_by_names_only(tmp_path):
    ones, zeros = np.ones(6, np.float32), np.zeros(6, np.float32)
    made = graph(NORMS, s0=ones, s1=ones, b0=zeros, b1=zeros)
    base = checkpoint(tmp_path, **{"b.norm.weight": ones, "b.norm.bias": zeros})
    targets = {"b.norm.weight": vector(), "b.norm.bias": vector()}
    for hints in ({}, {"base": base}):
        found, _, problems = resolve(made, targets, tmp_path, **hints)
        assert (found, problems) == ({"b.norm.weight": {"s1"}, "b.norm.bias": {"b1"}}, [])
    for node in made.graph.node:
        node.name = ""
    _, _, problems = resolve(made, targets, tmp_path, base=base)
    assert {p.rule for p in problems} == {"LF-603"}


def test_a_bias_without_a_name_is_found_by_its_equal_in_the_base(tmp_path):
    w, bias = normal(8, 6), normal(8, seed=2)
    made = graph("g (float[N,6] x) => (float[N,8] y) { h = MatMul(x, w)  y = Add(h, b) }", w=w.T, b=bias)
    base = checkpoint(tmp_path, **{"q.weight": w, "q.bias": bias})
    targets = {"q.weight": (8, 6), "q.bias": vector(8)}
    assert resolve(made, targets, tmp_path, base=base)[0] == {"q.weight": {"w"}, "q.bias": {"b"}}


# A name that means another weight than the adapter was bound to.


def test_a_weight_that_is_not_like_the_sketch_is_not_changed_by_its_name(tmp_path):
    made = two(normal(6, 8, seed=1), normal(6, 8, seed=2), names=("/enc/q/MatMul", "n1"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    ours = [("default", adapter({"enc.q.weight": sketched(normal(8, 6))}))]
    with pytest.raises(lf.LoraFormatError, match="LF-607  w0 is not like the tensor") as caught:
        prepare("merge", ours, base, Options(tmp_path / "out.onnx"))
    assert len(caught.value.problems) == 1
    assert prepare("merge", ours, base, Options(tmp_path / "out.onnx"), any_base=True).steps


@pytest.mark.parametrize("cast", [np.float32, np.float16])
@pytest.mark.parametrize("node", ["/enc/q/MatMul", ""])
def test_a_digest_is_not_compared_with_a_turned_weight_whatever_its_node_is_called(node, cast, tmp_path):
    w = normal(6, 6)
    letter = {np.float16: "float16", np.float32: "float"}[cast]
    made = graph(f"g ({letter}[N,6] x) => ({letter}[N,6] y) {{ y = MatMul(x, w) }}", w=w.T.astype(cast))
    made.graph.node[0].name = node
    bound = adapter({"enc.q.weight": replace(sketched(w), base_sha256=runs_sha256([w]))})
    merge(bound, open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx")


def test_a_close_relative_of_the_base_is_taken(tmp_path):
    w = normal(8, 6)
    made = two(w.T + 0.05 * normal(6, 8, seed=1), normal(6, 8, seed=2), names=("/enc/q/MatMul", "n1"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    merge(adapter({"enc.q.weight": sketched(w)}), base, tmp_path / "out.onnx")


def test_a_checkpoint_is_held_against_the_sketch_too(tmp_path):
    other = open_base(checkpoint(tmp_path, **{"enc.q.weight": normal(8, 6, seed=1)}).path)
    with pytest.raises(lf.LoraFormatError, match="LF-607"):
        merge(adapter({"enc.q.weight": sketched(normal(8, 6))}), other, tmp_path / "out.safetensors")


# Quantised weights: found, though not changed.


def int8(w, axis):
    scale = np.abs(w).max(1 - axis, keepdims=True) / 127
    return np.round(w / scale).astype(np.int8), scale.astype(np.float32)


def quantised(kind, w):
    """A graph that multiplies by w [in, out] kept in fewer bits."""
    q, scale = int8(w, axis=1)
    head = "g (float[N,24] x) => (float[N,32] y)"
    match kind:
        case "DequantizeLinear":
            nodes = 'f = DequantizeLinear <axis = 1> (q, s, z) ["n"] y = MatMul(x, f)'
            return graph(f"{head} {{ {nodes} }}", q=q, s=scale[0], z=np.zeros(32, np.int8))
        case "Cast, Mul":
            return graph(f'{head} {{ f = Cast <to = 1> (q) v = Mul(f, s) ["n"] y = MatMul(x, v) }}', q=q, s=scale)
        case "Cast, Sub, Mul":
            unsigned = (q.astype(np.int16) + 128).astype(np.uint8)
            nodes = 'f = Cast <to = 1> (q) c = Sub(f, z) v = Mul(c, s) ["n"] y = MatMul(x, v)'
            return graph(f"{head} {{ {nodes} }}", q=unsigned, s=scale, z=np.array(128, np.float32))
        case "Mul, Transpose":
            nodes = 'f = Cast <to = 1> (q) v = Mul(s, f) t = Transpose(v) ["n"] y = MatMul(x, t)'
            return graph(f"{head} {{ {nodes} }}", q=q.T, s=scale.T)
        case "int4 blocks":
            made = model(
                f'{head} {{ f = DequantizeLinear <axis = 0, block_size = 8> (q, s) ["n"] y = MatMul(x, f) }}', opset=21
            )
            blocks = w.reshape(3, 8, 32)
            step = np.abs(blocks).max(1, keepdims=True) / 7
            codes = np.round(blocks / step).reshape(24, 32).astype(np.int8)
            made.graph.initializer.append(helper.make_tensor("q", onnx.TensorProto.INT4, codes.shape, codes.ravel()))
            made.graph.initializer.append(numpy_helper.from_array(step[:, 0].astype(np.float32), "s"))
            return made
    raise AssertionError(kind)


QUANTISED = ("DequantizeLinear", "Cast, Mul", "Cast, Sub, Mul", "Mul, Transpose", "int4 blocks")


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_weight_is_found_by_its_sketch_and_not_changed(kind, tmp_path):
    w = normal(32, 24)
    made = quantised(kind, w.T)
    base = open_base(save(made, tmp_path / "base.onnx"))
    onnx.checker.check_model(made)
    ours = adapter({"enc.q.weight": sketched(w)})
    (place,) = base.resolve(ours, lf.Hints()).require().targets["enc.q.weight"]
    assert (place.node, place.evidence[0].partition(":")[0]) == ("n", "sketch")
    assert 0.98 < place.confidence < 1.0
    assert not base.resolve(adapter({"enc.q.weight": sketched(normal(32, 24, seed=1))}), lf.Hints()).targets
    with pytest.raises(lf.LoraFormatError, match="LF-608"):
        merge(ours, base, tmp_path / "out.onnx")


def test_a_quantised_weight_is_found_by_the_base_alone(tmp_path):
    w = normal(32, 24)
    base = checkpoint(tmp_path, **{"enc.q.weight": w})
    _, evidence, _ = resolve(quantised("Cast, Mul", w.T), {"enc.q.weight": (32, 24)}, tmp_path, base=base)
    assert evidence[0].startswith("sketch: ")


def test_a_small_tensor_that_a_product_would_blow_up_is_not_computed(tmp_path):
    text = "g (float[N,6] x) => (float[N,M] y) { f = Cast <to = 1> (q) v = Mul(f, s) y = MatMul(x, v) }"
    made = graph(text, q=np.ones((6, 1), np.int8), s=normal(1, 500))
    assert refusal(made, {"q.weight": sketched(normal(1, 6))}, tmp_path).rule == "LF-602"


@pytest.mark.parametrize("node", ["DequantizeLinear <axis = 7> (q, s)", "Cast <to = 99> (q)", "DequantizeLinear(q)"])
def test_a_broken_dequantisation_is_not_found_and_not_a_crash(node, tmp_path):
    made = graph(
        f"g (float[N,6] x) => (float[N,8] y) {{ f = {node} y = MatMul(x, f) }}", q=np.ones((6, 8), np.int8), s=normal(8)
    )
    assert refusal(made, {"q.weight": sketched(normal(8, 6))}, tmp_path).rule == "LF-602"


# A checkpoint takes the base's word for how a square weight lies.


def test_a_checkpoint_that_does_not_say_how_a_square_weight_lies_is_read_as_the_base_is(tmp_path):
    w = normal(6, 6)
    save_file({"q.weight": w}, tmp_path / "bare.safetensors")
    bare, base = open_base(tmp_path / "bare.safetensors"), checkpoint(tmp_path, **{"q.weight": w})
    ours = adapter({"q.weight": (6, 6)})
    assert [p.rule for p in bare.resolve(ours, lf.Hints()).unresolved] == ["LF-604"]
    (place,) = bare.resolve(ours, lf.Hints(base=base)).require().targets["q.weight"]
    assert (place.placement.spec, place.evidence[1]) == ("out,in", "base: as in checkpoint")
    turned = bare.resolve(ours, lf.Hints(base=base, axes={"q": "in,out"}))
    assert [p.rule for p in turned.unresolved] == ["LF-605"]


# On the command line.


def test_the_base_is_given_on_the_command_line(run, tmp_path):
    w = normal(8, 6)
    source = checkpoint(tmp_path, **{"enc.q.weight": w}).path
    save(two(normal(6, 8, seed=1), w.T), tmp_path / "base.onnx")
    lf.save(adapter({"enc.q.weight": (8, 6)}), tmp_path / "a.safetensors")
    assert run("resolve", "a.safetensors", "--in", "base.onnx").code == 1
    assert "1/1 targets by fingerprint" in run("resolve", "a.safetensors", "--in", "base.onnx", "--base", source).err
    assert run("attach", "a.safetensors", "--to", "base.onnx", "-o", "out.onnx").code == 1
    assert run("attach", "a.safetensors", "--to", "base.onnx", "-o", "out.onnx", "--base", source).code == 0
    told = run("merge", "a.safetensors", "--into", "base.onnx", "-o", "m.onnx", "--base", source)
    assert "1/1 targets by fingerprint" in told.err
    assert run("bind", "a.safetensors", "--base", source, "-o", "bound.safetensors").code == 0
    assert "by sketch" in run("merge", "bound.safetensors", "--into", "base.onnx", "-o", "s.onnx").err
    np.testing.assert_array_equal(stored(tmp_path / "s.onnx")["w1"], stored(tmp_path / "m.onnx")["w1"])


# What a merge leaves is found again.


def test_a_weight_that_went_by_its_values_is_verified_after_they_changed(tmp_path):
    """ΔW is three times W: nothing of the merged graph is like the base's weight, and no name says which it is."""
    k, other = normal(8, 6), normal(8, 6, seed=1)
    base = checkpoint(tmp_path, **{"enc.k.weight": k})
    graphs = open_base(save(two(other.T, k.T), tmp_path / "base.onnx"))
    given = adapter({"enc.k.weight": lora(8, 6, alpha=9.0)})
    merge(given, graphs, tmp_path / "merged.onnx", hints=lf.Hints(base=base))
    hints = lf.Hints(base=base)
    assert verify(graphs, given, open_base(tmp_path / "merged.onnx"), hints).problems == []
    wrong = onnx.load(tmp_path / "merged.onnx")
    next(t for t in wrong.graph.initializer if t.name == "w1").CopyFrom(numpy_helper.from_array(k.T.copy(), "w1"))
    told = verify(graphs, given, open_base(save(wrong, tmp_path / "wrong.onnx")), hints).problems
    assert [p.rule for p in told] == ["LF-611"]
    assert "not applied" in told[0].what


def test_the_copy_that_a_merge_made_is_found_under_a_prefix_and_beside_its_twin(tmp_path):
    """Zero biases of one size are one tensor, named after one of its modules; the base has all of them."""
    zeros = np.zeros(8, np.float32)
    text = """g (float[N,6] x) => (float[N,8] y) {
      ["/m/p/MatMul"] a = MatMul(x, w0)  ["/m/p/Add"] b = Add(a, zero)
      ["/m/q/MatMul"] c = MatMul(x, w1)  ["/m/q/Add"] d = Add(c, zero)  y = Mul(b, d) }"""
    made = graph(text, w0=normal(6, 8), w1=normal(6, 8, seed=1), **{"m.p.bias": zeros})
    for adding in (made.graph.node[1], made.graph.node[3]):
        adding.input[1] = "m.p.bias"
    graphs = open_base(save(made, tmp_path / "base.onnx"))
    biases = {f"{name}.bias": lf.Update((lf.Replace(normal(8, seed=i + 2)),)) for i, name in enumerate("pq")}
    given = adapter({"p.weight": (8, 6), **biases})
    base = checkpoint(tmp_path, **{"p.bias": zeros, "q.bias": zeros, "p.weight": normal(6, 8).T.copy()})
    for hints in (lf.Hints(), lf.Hints(base=base)):
        merge(given, graphs, tmp_path / "merged.onnx", hints=hints, force=True)
        assert verify(graphs, given, open_base(tmp_path / "merged.onnx"), hints).problems == []
    found = stored(tmp_path / "merged.onnx")
    assert np.array_equal(found["lora/q.bias/weight"], biases["q.bias"]["replace"].replace)


@pytest.mark.parametrize(
    ("config", "module", "laid"),
    [
        ('{"model_type": "bert"}', "h.0.c_fc", "out,in"),
        ('{"model_type": "gpt2"}', "h.0.c_fc", "in,out"),
        ("", "h.0.c_fc", None),
    ],
    ids=["a Linear", "a Conv1D", "a checkpoint that does not say"],
)
def test_a_square_tensor_that_replaces_another_lies_as_the_base_says(config, module, laid, tmp_path):
    weight, new = normal(6, 6), normal(6, 6, seed=1)
    stored_so = weight.T.copy() if laid == "in,out" else weight
    base = checkpoint(tmp_path, config, **{f"{module}.weight": stored_so})
    made = two(normal(6, 6, seed=2), weight.T, names=("n0", f"/{module.replace('.c_fc', '/c_fc')}/MatMul"))
    given = {f"{module}.weight": lf.Update((lf.Replace(new.T.copy() if laid == "in,out" else new),))}
    if laid is None:
        assert refusal(made, given, tmp_path, base=base).rule == "LF-604"
        return
    graphs = open_base(save(made, tmp_path / "base.onnx"))
    merge(adapter(given), graphs, tmp_path / "merged.onnx", hints=lf.Hints(base=base))
    assert np.array_equal(stored(tmp_path / "merged.onnx")["w1"], new.T)


def test_that_a_head_takes_the_tokens_of_its_table_is_said(tmp_path):
    table = normal(9, 5)
    made = graph(
        """g (int64[N] ids) => (float[N,9] y) { t = Gather(table, ids)  ["/head/MatMul"] y = MatMul(t, head) }""",
        head=table.T,
        table=table,
    )
    made.graph.initializer[1].name = made.graph.node[0].input[0] = "e.weight"
    tokens = lf.Rows(normal(2, 5, seed=1), np.array([2, 7]))
    given = lf.Adapter({"e.weight": lf.Update((tokens,))})
    made.graph.node[0].name = "/e/Gather"
    base = open_base(save(made, tmp_path / "base.onnx"))
    plan = prepare("merge", [("a", given)], base, Options(tmp_path / "out.onnx"))
    assert "e.weight: /head/MatMul has the same values and changes too, as in transformers' models" in plan.notes


@pytest.mark.parametrize(("cast", "like"), [(np.float16, True), (np.float32, True), (np.float16, False)])
def test_a_graph_that_was_cast_is_the_one_that_the_adapter_was_bound_to(cast, like, tmp_path):
    """A kernel lies in a graph as in the checkpoint, so that its bytes are compared first; cast they are others."""
    kernel = normal(9, 4, 3)
    place = lf.Placement(kernel.shape, (0,), (1, 2))
    update = lf.Update(lora(9, 12).parts, place, sketch=sketch(kernel, place))
    bound = lf.Adapter({"c.weight": replace(update, base_sha256=runs_sha256([kernel]))})
    letter = {np.float16: "float16", np.float32: "float"}[cast]
    made = model(f'g ({letter}[N,4,8] x) => ({letter}[N,9,6] y) {{ ["/c/Conv"] y = Conv(x, w) }}')
    stored_so = (kernel if like else normal(9, 4, 3, seed=1)).astype(cast)
    made.graph.initializer.append(numpy_helper.from_array(stored_so, "c.weight"))
    made.graph.node[0].input[1] = "c.weight"
    base = open_base(save(made, tmp_path / "base.onnx"))
    if like:
        merge(bound, base, tmp_path / "merged.onnx")
        return
    with pytest.raises(lf.LoraFormatError, match="LF-607"):
        merge(bound, base, tmp_path / "merged.onnx")
