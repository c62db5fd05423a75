"""Stacks of experts inside one operator: com.microsoft's MoE takes a change in front of it, QAttention says why none. And those that are gathered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import lora, model, run, save, session
from installed import needs
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract
from loraformat.verbs.merge import attach, merge, prepare

E, IN, INNER = 3, 10, 14
VERBS = {"merge": merge, "attach": attach}
both_verbs = pytest.mark.parametrize("verb", VERBS)


def weights():
    draw = np.random.default_rng(2)
    shapes = {"experts_up": (E, INNER, IN), "experts_down": (E, IN, INNER)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def graph(held, **attributes):
    """Each row goes to one expert, with all its weight."""
    made = model(f"""g (float[N,{IN}] x, float[N,{E}] p) => (float[N,{IN}] y)
      {{ ["moe"] y = com.microsoft.MoE <k = 1, activation_type = "relu", normalize_routing_weights = 1>
         (x, p, experts_up, , experts_down) }}""")
    made.graph.node[0].attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    made.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in held.items())
    return made


def computed(held, x, p):
    """By the operator's documentation: [experts, out, in], relu between."""
    up, down = (held[name].astype(np.float64) for name in ("experts_up", "experts_down"))
    chosen = p.argmax(1)
    inner = np.maximum(np.einsum("ni,noi->no", x, up[chosen]), 0)
    return np.einsum("ni,noi->no", inner, down[chosen])


def pairs(held, *, bound=False):
    draw, targets, changed = np.random.default_rng(5), {}, dict(held)
    for rank, (key, weight) in enumerate(held.items(), 2):
        _, out, in_ = weight.shape
        a, b = (draw.standard_normal(s).astype(np.float32) for s in ((E, rank, in_), (E, out, rank)))
        changed[key] = weight + (0.3 * b.astype(np.float64) @ a).astype(np.float32)
        place = lf.Placement(weight.shape, (1,), (2,), (0,))
        drawn = sketch(weight, place) if bound else None
        targets[key] = lf.Update((lf.Lora(a, b, 0.3, "factor"),), place if bound else None, sketch=drawn)
    return lf.Adapter(targets), changed


@pytest.mark.parametrize("bound", [False, True], ids=["by names", "by sketches"])
@both_verbs
def test_every_expert_takes_its_own_change(verb, bound, tmp_path):
    needs("MoE")
    held = weights()
    adapter, changed = pairs(held, bound=bound)
    stored = {f"w{i}": v for i, v in enumerate(held.values())} if bound else held
    made = graph(held)
    if bound:
        for tensor, name in zip(made.graph.initializer, stored, strict=True):
            made.graph.node[0].input[list(made.graph.node[0].input).index(tensor.name)] = name
            tensor.name = name
    path, out = save(made, tmp_path / "base.onnx"), tmp_path / "out.onnx"
    draw = np.random.default_rng(0)
    feeds = {
        "x": draw.standard_normal((8, IN)).astype(np.float32),
        "p": draw.standard_normal((8, E)).astype(np.float32),
    }
    assert relative_error(session(path).run(None, feeds)[0], computed(held, **feeds)) <= 2e-6
    VERBS[verb](adapter, open_base(path), out)
    onnx.checker.check_model(out, full_check=True)
    found = session(out).run(None, feeds)[0]
    assert relative_error(found, computed(changed, **feeds)) <= 2e-6
    assert relative_error(found, computed(held, **feeds)) > 0.05
    if verb == "attach":
        assert lf.digest(extract(open_base(out))) == lf.digest(adapter)
        detach(open_base(out), tmp_path / "again.onnx")
        assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", ["MoE", "Gather"])
def test_a_strength_that_would_do_nothing_is_refused(form, tmp_path):
    """The change is in the weight, and what multiplies branches does not come by."""
    held = weights()
    made = graph(held) if form == "MoE" else gathered(*CHOSEN["Gather, on the left"])[0]
    key = "experts_up" if form == "MoE" else "stack"
    ours = lf.Adapter({key: pairs(held)[0]["experts_up"]})
    with pytest.raises(lf.LoraFormatError, match=rf"LF-608  a lora update has no strength [^@]*in the weight  @ {key}"):
        attach(ours, open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx", live_scale=True)


def test_rows_of_gate_and_up_in_turns_are_told_by_values_only(tmp_path):
    held = weights()
    base = open_base(save(graph(held, swiglu_fusion=1), tmp_path / "base.onnx"))
    found = base.resolve(pairs(held)[0], lf.Hints())
    assert [(p.rule, p.where) for p in found.unresolved] == [("LF-604", "experts_up")]
    assert set(base.resolve(pairs(held, bound=True)[0], lf.Hints()).require().targets) == set(held)


def in_turns(stack):
    """[gate | up] as onnxruntime-genai's builder (0.18) lays it for ``swiglu_fusion`` = 1: a row of each, in turns."""
    gate, up = np.split(stack, 2, 1)
    return np.stack([gate, up], 2).reshape(stack.shape)


def gated(up, down, x, p):
    """SwiGLU of [gate | up], by the operator's documentation."""
    chosen = p.argmax(1)
    gate, linear = np.split(np.einsum("ni,noi->no", x.astype(np.float64), up[chosen]), 2, 1)
    return np.einsum("ni,noi->no", gate / (1 + np.exp(-gate)) * linear, down[chosen])


@pytest.mark.parametrize("way", ["sketch", "base"])
@pytest.mark.parametrize("turned", [False, True], ids=["gate and up in turns too", "gate, then up"])
@both_verbs
def test_values_tell_in_which_order_a_module_has_gate_and_up(verb, turned, way, tmp_path):
    needs("MoE")
    draw = np.random.default_rng(7)
    module = draw.standard_normal((E, INNER, IN)).astype(np.float32)  # [gate | up], or in turns
    down = draw.standard_normal((E, IN, INNER // 2)).astype(np.float32)
    laid = in_turns if turned else lambda stack: stack
    held = {"experts_up": laid(module), "experts_down": down}
    made = graph(held, swiglu_fusion=1)
    next(a for a in made.graph.node[0].attribute if a.name == "activation_type").s = b"swiglu"
    made.graph.node[0].input[2] = made.graph.initializer[0].name = "w"
    path, out = save(made, tmp_path / "base.onnx"), tmp_path / "out.onnx"
    a, b = (draw.standard_normal(s).astype(np.float32) for s in ((E, 2, IN), (E, INNER, 2)))
    place = lf.Placement(module.shape, (1,), (2,), (0,))
    update = lf.Update(
        (lf.Lora(a, b, 0.3, "factor"),), place, sketch=sketch(module, place) if way == "sketch" else None
    )
    hints = lf.Hints()
    if way == "base":
        save_file({"m.experts.gate_up_proj": module}, tmp_path / "base.safetensors")
        hints = lf.Hints(base=open_base(tmp_path / "base.safetensors"))
    VERBS[verb](lf.Adapter({"m.experts.gate_up_proj": update}), open_base(path), out, hints)
    fed = {"x": draw.standard_normal((8, IN)).astype(np.float32), "p": draw.standard_normal((8, E)).astype(np.float32)}
    for file, stack in ((path, module), (out, module + 0.3 * b @ a)):
        # what gate and up are is the operator's to say: of rows in turns, those at the even places are the gate's
        whole = stack if turned else np.concatenate([stack[:, ::2], stack[:, 1::2]], 1)
        assert relative_error(session(file).run(None, fed)[0], gated(whole, down, **fed)) <= 2e-6
    if verb == "attach":
        detach(open_base(out), tmp_path / "again.onnx")
        assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


CHOSEN = {
    "GatherND, on the left": (
        "stack",
        "a = Constant <value_ints = [-1]> () j = Unsqueeze(i, a) g = GatherND(stack, j) u = Unsqueeze(x, a) y = MatMul(g, u)",
    ),
    "Gather, on the left": ("stack", "a = Constant <value_ints = [-1]> () g = Gather(stack, i) u = Unsqueeze(x, a) y = MatMul(g, u)"),
    "Gather, on the right": ("turned", "a = Constant <value_ints = [1]> () g = Gather(turned, i) u = Unsqueeze(x, a) v = MatMul(u, g) y = Transpose <perm = [0, 2, 1]> (v)"),
}  # fmt: skip


def gathered(name, body):
    """Row by row the product with the expert that is named: [experts, 14, 10] on the left, [experts, 10, 14] on the right."""
    stack = weights()["experts_up"]
    made = model(f"g (float[N,{IN}] x, int64[N] i) => (float[N,{INNER},1] y) {{ {body} }}", opset=13)
    made.graph.initializer.append(
        numpy_helper.from_array(stack if name == "stack" else stack.swapaxes(1, 2).copy(), name)
    )
    return made, stack


@pytest.mark.parametrize("form", CHOSEN)
@both_verbs
def test_experts_that_a_graph_gathers_itself_are_changed_in_their_stack(verb, form, tmp_path):
    name, body = CHOSEN[form]
    made, stack = gathered(name, body)
    path, out, draw = save(made, tmp_path / "base.onnx"), tmp_path / "out.onnx", np.random.default_rng(3)
    a, b = (draw.standard_normal(s).astype(np.float32) for s in ((E, 2, IN), (E, INNER, 2)))
    ours = lf.Adapter({name: lf.Update((lf.Lora(a, b, 0.5, "factor"),))})
    VERBS[verb](ours, open_base(path), out)
    fed = {"x": draw.standard_normal((7, IN)).astype(np.float32), "i": draw.integers(0, E, 7)}
    for file, held in ((path, stack), (out, stack + 0.5 * b @ a)):
        wanted = np.einsum("noi,ni->no", held[fed["i"]], fed["x"])[..., None]
        assert relative_error(session(file).run(None, fed)[0], wanted) <= 1e-6
    if verb == "attach":
        assert lf.digest(extract(open_base(out))) == lf.digest(ours)
        detach(open_base(out), tmp_path / "again.onnx")
        assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


OTHERWISE = {
    "rows of experts": "j = Constant <value = int64[2,2] {0, 1, 2, 3}> () g = GatherND(stack, j) u = Transpose(x) y = MatMul(g, u)",
    "two readers": "g = Gather(stack, i) r = Relu(g) a = Constant <value_ints = [-1]> () u = Unsqueeze(x, a) y = MatMul(g, u)",
    "no product": "g = Gather(stack, i) y = Relu(g)",
    "columns": "g = Gather <axis = 2> (stack, i) y = MatMul(g, x)",
}


@pytest.mark.parametrize("form", OTHERWISE)
def test_a_stack_that_is_used_otherwise_has_no_meaning(form, tmp_path):
    made, _ = gathered("stack", OTHERWISE[form])
    ours = lf.Adapter({"stack": lf.Update((lf.Lora(np.ones((E, 2, IN)), np.ones((E, INNER, 2)), 1.0, "factor"),))})
    with pytest.raises(lf.LoraFormatError, match="LF-608"):
        merge(
            ours,
            open_base(save(made, tmp_path / "base.onnx")),
            tmp_path / "out.onnx",
            lf.Hints(names={"stack": "stack"}),
        )


def attention(tmp_path):
    """(a quantised Attention, its weight [out, in])."""
    draw = np.random.default_rng(3)
    codes, step = draw.integers(-90, 90, (24, 72)).astype(np.int8), (0.01 + 0.01 * draw.random(72)).astype(np.float32)
    made = model("""g (float[N,T,24] x) => (float[N,T,24] y) <float[72] b>
      { a, xs, xz = DynamicQuantizeLinear(x)
        ["attention"] y = com.microsoft.QAttention <num_heads = 4> (a, q, b, xs, s, , xz, z) }""")
    held = {"q": codes, "s": step, "z": np.zeros(72, np.int8)}
    made.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in held.items())
    return save(made, tmp_path / "base.onnx"), (codes * step.astype(np.float64)).T


def test_a_quantised_attention_says_why_nothing_runs_beside_it_and_takes_a_merge(tmp_path):
    path, weight = attention(tmp_path)
    place = lf.Placement((24, 24), (0,), (1,))
    update = lora(24, 24, rank=3, seed=4)
    size = 0.03 / float(np.std(update["lora"].lora_B @ update["lora"].lora_A))
    key = lf.Update(
        (replace(update["lora"], alpha=size, scale_rule="factor"),), place, sketch=sketch(weight[24:48], place)
    )
    base, ours, out = open_base(path), lf.Adapter({"m.k_proj.weight": key}), tmp_path / "out.onnx"
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*QAttention goes on with its product itself"):
        prepare("attach", [("default", ours)], base, Options(out))
    with pytest.raises(
        lf.LoraFormatError, match=r"LF-608 .*goes on with its product itself[^@]*@ m\.k_proj\.weight\n +--requantize"
    ):
        merge(ours, base, out)
    merge(ours, base, out, requantize=True)
    codes, step = (numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer if t.name in "qs")
    found, wanted = (codes * step.astype(np.float64)).T, weight.copy()
    wanted[24:48] += key.matrix()
    np.testing.assert_array_equal(found[:24], weight[:24])
    assert (np.abs(found - wanted) <= 0.5005 * step[:, None]).mean() > 0.99
    assert relative_error(run(out)["y"], run(path)["y"]) > 0.01
