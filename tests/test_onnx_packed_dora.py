"""DoRAs of parameters that one weight holds: q, k and v rescaled each in its rows, in every mode, and the others left alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import feeds, lora, model, save, session
from installed import needs
from onnx import numpy_helper
from quantised_graphs import packed as bits_of
from test_onnx_packed import IN, KEYS, OUT, ROWS, ours

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import merge, prepare
from loraformat.verbs.verify import verify
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.changing.record import Record
from loraformat_converters.onnx.effective import Effective
from loraformat_converters.onnx.graph.nodes import Nodes
from loraformat_converters.onnx.runtime import Session

MATRIX = np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32)
BIAS = np.random.default_rng(1).standard_normal(OUT).astype(np.float32)
HEAD = f"g (float[N,T,{IN}] x) => (float[N,T,{OUT}] y)"
NAMELESS = f"g (float[N,{IN}] x) => (float[N,{OUT}] y)"


def codes(bits):
    """(packed codes, steps) in blocks of 32, and the weight that they stand for."""
    step = (np.abs(MATRIX).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)).astype(np.float32)
    held = np.round(MATRIX / step).astype(int)
    filled = np.pad(held + 2 ** (bits - 1), [(0, 0), (0, 32 - IN)]).reshape(OUT, 1, 32)
    return {"w": bits_of(filled, bits), "s": step}, held * step


NBITS = "com.microsoft.MatMulNBits <K = 20, N = 48, bits = {}, block_size = 32> (x, w, s)"
FORMS = {
    "MatMul": (f"{HEAD} {{ y = MatMul(x, w) }}", {"w": MATRIX.T}, 0 * BIAS, MATRIX),
    "MatMul, Add": (f"{HEAD} {{ h = MatMul(x, w)  y = Add(b, h) }}", {"w": MATRIX.T, "b": BIAS}, BIAS, MATRIX),
    "Gemm": (
        f"{NAMELESS} {{ y = Gemm <transB = 1, beta = 0.5> (x, w, b) }}",
        {"w": MATRIX, "b": BIAS}, BIAS / 2, MATRIX,
    ),
    "8 bits": (f"{HEAD} {{ y = {NBITS.format(8)} }}", codes(8)[0], 0 * BIAS, codes(8)[1]),
    "4 bits, Add": (
        f"{HEAD} {{ h = {NBITS.format(4)}  y = Add(h, b) }}", codes(4)[0] | {"b": BIAS}, BIAS, codes(4)[1],
    ),
}  # fmt: skip
"""Form → (graph, its tensors, the bias in the output, the weight [out, in] that it computes with)."""

KINDS = {
    "all": ("q", "k", "v"),
    "q, and pairs of the others": ("q",),
    "v": ("v",),
}
FLOATS = ["MatMul", "MatMul, Add", "Gemm"]


@pytest.fixture(params=FORMS)
def form(request):
    if "bits" in request.param:
        needs("MatMulNBits 8")
    return request.param


def base_of(form, folder):
    text, tensors = FORMS[form][:2]
    made = model(text, opset=21)
    made.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in tensors.items())
    return open_base(save(made, folder / "base.onnx"))


def given(kind, weight, seed=0):
    """Pairs of q, k and v (of v alone where the kind is v), those of a kind with a magnitude a tenth off the norms."""
    targets = dict(ours(weight, ("v",) if kind == "v" else ("q", "k", "v")).items())
    draw = np.random.default_rng(seed + 7)
    for name in KINDS[kind]:
        update = targets[KEYS[name]]
        length = np.linalg.norm(weight[slice(*ROWS[name])], axis=1) * draw.uniform(
            0.9, 1.1, ROWS[name][1] - ROWS[name][0]
        )
        grown = replace(update["lora"], lora_B=update["lora"].lora_B * (1 + seed))
        targets[KEYS[name]] = replace(update, parts=(grown, lf.Magnitude(length.astype(np.float32))))
    return lf.Adapter(targets)


def changed(adapter, weight):
    """W', as PEFT computes DoRA, in float64."""
    new = weight.astype(np.float64)
    for name, rows in ROWS.items():
        if (update := adapter.get(KEYS[name])) is not None:
            pair = update["lora"]
            new[slice(*rows)] += pair.scale * pair.lora_B.astype(np.float64) @ pair.lora_A
            if "magnitude" in update:
                length = np.linalg.norm(new[slice(*rows)], axis=1)
                new[slice(*rows)] *= (update["magnitude"].magnitude / length)[:, None]
    return new


def truth(form, adapter, x):
    _, _, bias, weight = FORMS[form]
    return x.astype(np.float64) @ changed(adapter, weight).T + bias


def put(base, adapters, out, **options):
    plan = prepare("attach", adapters, base, Options(out, **options))
    base.apply(plan)
    onnx.checker.check_model(out, full_check=True)
    return plan


def comes_out(base, out, adapters):
    """What was attached is extracted bit for bit, and the base is left."""
    for name, adapter in adapters:
        assert lf.digest(extract(open_base(out), name=name)) == lf.digest(adapter)
    is_left(base, out)


def is_left(base, out):
    again = out.with_name(f"again.{out.name}")
    detach(open_base(out), again)
    assert again.read_bytes() == base.path.read_bytes()


def outside(adapter):
    """The rows of the output that no target has."""
    free = np.ones(OUT, bool)
    for name, rows in ROWS.items():
        free[slice(*rows)] &= KEYS[name] not in adapter
    return free


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FLOATS)
def test_a_merge_rescales_the_rows_of_its_target(name, kind, tmp_path):
    base, weight = base_of(name, tmp_path), FORMS[name][3]
    adapter, x = given(kind, weight), feeds(session(base.path))["x"]
    plan = prepare("merge", [("a", adapter)], base, Options(tmp_path / "out.onnx"))
    base.apply(plan)
    assert prove(base, plan).holds
    found = open_base(tmp_path / "out.onnx").read("w")
    found = found if name == "Gemm" else found.T
    assert relative_error(found, changed(adapter, weight)) <= 1e-6
    assert np.array_equal(found[outside(adapter)], weight[outside(adapter)])
    assert not verify(base, adapter, open_base(tmp_path / "out.onnx")).problems
    assert relative_error(session(tmp_path / "out.onnx").run(None, {"x": x})[0], truth(name, adapter, x)) <= 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"topology": "concat"}, {"topology": "folded"}, {"prefold": True}])
def test_a_branch_rescales_the_rows_of_its_target(form, kind, options, tmp_path):
    base, out = base_of(form, tmp_path), tmp_path / "out.onnx"
    adapter, x = given(kind, FORMS[form][3]), feeds(session(base.path))["x"]
    plan = put(base, [("a", adapter)], out, **options)
    assert prove(base, plan).holds
    for optimise in (False, True):
        before, after = (session(p, optimise=optimise).run(None, {"x": x})[0] for p in (base.path, out))
        assert relative_error(after, truth(form, adapter, x)) <= 2e-6
        assert relative_error(before, truth(form, adapter, x)) > 1e-2
        if not optimise:
            assert np.array_equal(after[..., outside(adapter)], before[..., outside(adapter)])
    comes_out(base, out, [] if options == {"prefold": True} else [("a", adapter)])


def test_one_product_more_and_one_vector_serve_all_three(tmp_path):
    base, out = base_of("MatMul, Add", tmp_path), tmp_path / "out.onnx"
    for adapter, wanted in ((ours(MATRIX), 0), (given("all", MATRIX), 1)):
        put(base, [("a", adapter)], out)
        session(out, optimised=tmp_path / "run.onnx")
        ops = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
        assert (ops.count("MatMul"), ops.count("Mul"), len(ops)) == (3, wanted, 5 + 2 * wanted)
        out.unlink()


def test_two_doras_of_one_slice_follow_each_other(tmp_path):
    """The second divides by the norm of what the first has left; a merge of both is the truth."""
    base = base_of("MatMul, Add", tmp_path)
    adapters = [("a", given("all", MATRIX)), ("b", given("q, and pairs of the others", MATRIX, seed=1))]
    x = feeds(session(base.path))["x"]
    wanted = x.astype(np.float64) @ changed(adapters[1][1], changed(adapters[0][1], MATRIX)).T + BIAS
    for verb, options in (("merge", {}), ("attach", {}), ("attach", {"topology": "folded"})):
        out = tmp_path / f"{verb}{len(options)}.onnx"
        base.apply(prepare(verb, adapters, base, Options(out, **options)))
        assert relative_error(session(out).run(None, {"x": x})[0], wanted) <= 2e-6
        if verb == "attach":
            comes_out(base, out, adapters)


@pytest.mark.parametrize("options", [{}, {"slots": "required"}, {"pad_rank": 8}])
def test_slots_are_fed_doras_of_slices_and_are_off_without(form, options, tmp_path):
    base, out, weight = base_of(form, tmp_path), tmp_path / "out.onnx", FORMS[form][3]
    adapters = [
        ("all", given("all", weight)), ("mixed", given("q, and pairs of the others", weight, seed=1)),
        ("one", given("v", weight)), ("plain", ours(weight)),
    ]  # fmt: skip
    plan = put(base, adapters, out, mode="swap", **options)
    assert prove(base, plan).holds
    assert any("9 inputs for 3 targets" in note for note in plan.notes)
    x = feeds(session(base.path))["x"]
    running = Session(out, captured="pad_rank" in options)
    for name, adapter in adapters:
        running.load(name, out.with_name(f"out.{name}.onnx_adapter"))
        running.load(f"{name}, itself", adapter)
    for name, adapter in adapters:
        for choice in (name, f"{name}, itself"):
            assert relative_error(running.use(choice).run({"x": x})["y"], truth(form, adapter, x)) <= 2e-6
    off = Record.of_file(out).slots.off() if options.get("slots") else {}
    before, found = (
        session(p, optimise=False).run(None, {"x": x, **more})[0] for p, more in ((base.path, {}), (out, off))
    )
    assert np.array_equal(found, before)
    is_left(base, out)


def test_doras_of_slices_are_read_back_by_the_weights_of_their_model(form, tmp_path):
    base, out, weight = base_of(form, tmp_path), tmp_path / "out.onnx", FORMS[form][3]
    adapter = given("q, and pairs of the others", weight, seed=1)
    put(base, [("mixed", adapter)], out, mode="swap")
    lf.convert(out.with_name("out.mixed.onnx_adapter"), tmp_path / "back.safetensors", model=out)
    found = lf.load(tmp_path / "back.safetensors")
    assert {key: update.kind for key, update in found.items()} == {key: u.kind for key, u in adapter.items()}
    assert relative_error(changed(found, weight), changed(adapter, weight)) <= 2e-6


def test_only_the_slots_of_doras_have_a_gain(tmp_path):
    base, out = base_of("MatMul, Add", tmp_path), tmp_path / "out.onnx"
    put(base, [("a", given("q, and pairs of the others", MATRIX))], out, mode="swap")
    gains = {key: slot.gain for key, slot in Record.of_file(out).slots.slots.items()}
    assert {key: gain and (gain.shape, gain.rows) for key, gain in gains.items()} == {
        KEYS["q"]: ((24,), (0, 24)), KEYS["k"]: None, KEYS["v"]: None,
    }  # fmt: skip
    with pytest.raises(lf.LoraFormatError, match=r"LF-508.*no input for a magnitude"):
        Session(out).load("v", given("v", MATRIX))


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_rows_choose_among_doras_of_slices(form, provider, tmp_path):
    base, out, weight = base_of(form, tmp_path), tmp_path / "out.onnx", FORMS[form][3]
    adapters = [
        ("all", given("all", weight)), ("mixed", given("q, and pairs of the others", weight, seed=1)),
        ("plain", ours(weight, ("v", "k"))), ("one", given("v", weight)),
    ]  # fmt: skip
    plan = put(base, adapters, out, mode="stack", rows=("x",), provider=provider)
    assert prove(base, plan).holds
    x = np.random.default_rng(5).standard_normal((5, *feeds(session(base.path))["x"].shape[1:])).astype(np.float32)
    index = np.array([3, 0, 1, 4, 2])
    found, before = (
        session(p, optimise=False).run(None, {"x": x, **more})[0]
        for p, more in ((out, {"lora.index": index}), (base.path, {}))
    )
    for row, n in enumerate(index):
        wanted = truth(form, adapters[n - 1][1] if n else lf.Adapter({}), x[row])
        assert relative_error(found[row], wanted) <= 3e-6
    assert np.array_equal(found[1], before[1])
    assert np.array_equal(found[3][..., :36], before[3][..., :36])
    comes_out(base, out, adapters)


@pytest.mark.parametrize("mode", ["branch", "swap", "stack"])
def test_doras_of_slices_in_16_bits(mode, tmp_path):
    """As near to the merged weights as 16 bits are, and off they are the base."""
    text = f"g (float16[N,T,{IN}] x) => (float16[N,T,{OUT}] y) {{ h = MatMul(x, w)  y = Add(h, b) }}"
    made, out, rows = model(text, opset=21), tmp_path / "out.onnx", ("x",) if mode == "stack" else ()
    tensors = {"w": MATRIX.T.astype(np.float16), "b": BIAS.astype(np.float16)}
    made.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in tensors.items())
    base, weight = open_base(save(made, tmp_path / "base.onnx")), tensors["w"].T.astype(np.float32)
    adapter, x = given("q, and pairs of the others", weight), feeds(session(base.path))
    plan = put(base, [("a", adapter)], out, mode=mode, rows=rows)
    assert prove(base, plan).holds
    more = tort.read(out.with_name("out.a.onnx_adapter")).tensors if mode == "swap" else {}
    more |= {"lora.index": np.ones(len(x["x"]), np.int64)} if mode == "stack" else {}
    wanted = x["x"].astype(np.float64) @ changed(adapter, weight).T + tensors["b"]
    assert relative_error(session(out).run(None, x | more)[0], wanted) <= 1e-3
    bare = session(base.path, optimise=False).run(None, x)[0]
    assert relative_error(bare, wanted) > 1e-2
    if mode != "branch":
        off = {"lora.index": np.zeros(len(x["x"]), np.int64)} if mode == "stack" else {}
        assert np.array_equal(session(out, optimise=False).run(None, x | off)[0], bare)
    is_left(base, out)


def test_a_mixture_of_doras_is_refused(tmp_path):
    base = base_of("MatMul", tmp_path)
    options = Options(tmp_path / "out.onnx", mode="stack", rows=("x",), select="weights")
    with pytest.raises(lf.LoraFormatError, match=r"LF-608.*a row can choose it, and not mix it"):
        prepare("attach", [("a", given("v", MATRIX))], base, options)


@pytest.mark.parametrize("name", FLOATS)
def test_the_runtime_holds_doras_of_slices_in_the_weight(name, tmp_path):
    base = base_of(name, tmp_path)
    adapters = {kind: given(kind, MATRIX) for kind in KINDS}
    x = feeds(session(base.path))["x"]
    running = Effective(base.path, adapters)
    for kind, adapter in adapters.items():
        running.use(kind)
        assert relative_error(running.run({"x": x})["y"], truth(name, adapter, x)) <= 2e-6
    running.use(None)
    assert np.array_equal(running.run({"x": x})["y"], session(base.path).run(None, {"x": x})[0])


def test_codes_take_a_merge_of_a_slice_on_request(tmp_path):
    needs("MatMulNBits 8")
    base, weight = base_of("8 bits", tmp_path), FORMS["8 bits"][3]
    adapter, x = given("v", weight), feeds(session(base.path))["x"]
    merge(adapter, base, tmp_path / "out.onnx", requantize=True)
    after, before = (session(p).run(None, {"x": x})[0] for p in (tmp_path / "out.onnx", base.path))
    assert np.array_equal(after[..., :36], before[..., :36])
    wanted = truth("8 bits", adapter, x)
    assert relative_error(after, wanted) < relative_error(before, wanted) / 2


def attended(tmp_path):
    """(DoRAs of q and v in one com.microsoft.Attention, the base, what it computes with them in its weight)."""
    w = np.random.default_rng(1).standard_normal((72, 24)).astype(np.float32)
    made = model("""g (float[N,T,24] x) => (float[N,T,24] y) <float[72] b>
      { y = com.microsoft.Attention <num_heads = 4> (x, w, b) }""")
    made.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(w.T), "w"))
    place, targets = lf.Placement((24, 24), (0,), (1,)), {}
    new = w.astype(np.float64)
    for n, name in ((0, "q"), (2, "v")):
        rows, pair = slice(24 * n, 24 * n + 24), lora(24, 24, alpha=0.1, seed=n)["lora"]
        length = np.linalg.norm(w[rows], axis=1) * np.linspace(0.7, 1.3, 24)
        parts = (pair, lf.Magnitude(length.astype(np.float32)))
        targets[f"m.{name}.weight"] = lf.Update(parts, place, sketch=sketch(w[rows], place))
        new[rows] += pair.scale * pair.lora_B.astype(np.float64) @ pair.lora_A
        new[rows] *= (length / np.linalg.norm(new[rows], axis=1))[:, None]
    base, adapter = open_base(save(made, tmp_path / "base.onnx")), lf.Adapter(targets)
    made.graph.initializer[-1].CopyFrom(numpy_helper.from_array(new.T.astype(np.float32), "w"))
    x = feeds(session(base.path))
    wanted = session(save(made, tmp_path / "wanted.onnx")).run(None, x)[0]
    assert relative_error(session(base.path).run(None, x)[0], wanted) > 0.05
    return adapter, base, wanted


@pytest.mark.parametrize("verb", ["merge", "attach"])
def test_the_weight_of_an_attention_is_rescaled_inside_or_in_front_of_it(verb, tmp_path):
    """com.microsoft.Attention multiplies by its weight itself: its q, k and v change in the weight, its bias does not."""
    (adapter, base, wanted), out = attended(tmp_path), tmp_path / "out.onnx"
    plan = prepare(verb, [("a", adapter)], base, Options(out))
    base.apply(plan)
    assert prove(base, plan).holds
    assert relative_error(session(out).run(None, feeds(session(base.path)))[0], wanted) <= 2e-6
    if verb == "attach":
        comes_out(base, out, [("a", adapter)])
    else:
        assert np.array_equal(*(one.read("w")[:, 24:48] for one in (open_base(out), base)))


@pytest.mark.parametrize("mode", ["swap", "stack"])
def test_the_product_of_an_attention_is_rescaled_where_it_is_taken_apart(mode, tmp_path):
    """Its bias is added behind it, and keeps what it is; k has no magnitude."""
    adapter, base, wanted = attended(tmp_path)
    out, x = tmp_path / "out.onnx", feeds(session(base.path))
    plan = prepare("attach", [("a", adapter)], base, Options(out, mode, rows=("x",)))
    base.apply(plan)
    assert prove(base, plan).holds
    running, before = Session(out), session(base.path).run(None, x)[0]
    if mode == "swap":
        running.load("a", adapter)
    chosen, none = ("a", None) if mode == "swap" else (["a"] * 3, [None] * 3)
    assert relative_error(running.use(chosen).run(x)["y"], wanted) <= 1e-5
    assert relative_error(running.use(none).run(x)["y"], before) <= 1e-6
    detach(open_base(out), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


ABSOLUTE = {
    "replace": lambda part: (lf.Replace(MATRIX[36:48]),),
    "lora+rows": lambda part: (part, lf.Rows(MATRIX[36:37], np.array([0]))),
}


@pytest.mark.parametrize("kind", ABSOLUTE)
@pytest.mark.parametrize("verb", ["merge", "attach"])
def test_what_is_absolute_is_refused_of_a_slice(verb, kind, tmp_path):
    base, update = base_of("MatMul", tmp_path), ours(MATRIX, ("v",))[KEYS["v"]]
    adapter = lf.Adapter({KEYS["v"]: replace(update, parts=ABSOLUTE[kind](update["lora"]))})
    with pytest.raises(lf.LoraFormatError, match=r"LF-608.*holds several parameters"):
        prepare(verb, [("a", adapter)], base, Options(tmp_path / "out.onnx"))


# No test that cannot fail.


def the_norm_is_of_other_rows(patch):
    whole = magnitude._of_matrix
    patch.setattr(magnitude, "_of_matrix", lambda update, matrix: whole(update, matrix)[::-1])


def all_rows_are_rescaled(patch):
    whole = Nodes.runs
    patch.setattr(
        Nodes,
        "runs",
        lambda self, parts, shape, rest, *more, **axis: whole(self, parts, shape, rest + 0.1, *more, **axis),
    )


def partners_are_exchanged(patch):
    whole = Nodes.node

    def node(self, op, inputs, role, **attributes):
        turned = inputs[::-1] if role in ("magnitude/rows", "gain/rows") else inputs
        return whole(self, op, turned, role, **attributes)

    patch.setattr(Nodes, "node", node)


MUTANTS = [the_norm_is_of_other_rows, all_rows_are_rescaled, partners_are_exchanged]


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("mode", ["branch", "swap", "stack"])
def test_a_proof_is_red_on_a_mutant(mutant, mode, monkeypatch, tmp_path):
    base = base_of("MatMul, Add", tmp_path)
    adapters = [("a", given("q, and pairs of the others", MATRIX))]
    options = {"mode": mode, "rows": ("x",) if mode == "stack" else ()}
    assert prove(base, put(base, adapters, tmp_path / "good.onnx", **options)).holds
    mutant(monkeypatch)
    assert not prove(base, put(base, adapters, tmp_path / "bad.onnx", **options)).holds
