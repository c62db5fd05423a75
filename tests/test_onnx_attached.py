"""Attached models: several adapters, what the record tells, and the ways back; proofs by running."""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
import updates
from graphs import adapter, inputs, lora, model, run, save, session, stored
from onnx import helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from test_onnx_operators import constant_nodes

from loraformat import Adapter, Hints, Lora, LoraFormatError, Placement, Update, digest
from loraformat import load as load_adapter
from loraformat import save as save_adapter
from loraformat.base import Options
from loraformat.plan import Job
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import random_adapter, relative_error
from loraformat.verbs.graph import detach, extract, inlined, prove
from loraformat.verbs.merge import attach, prepare
from loraformat.verbs.verify import verify

KEY = "m.q.weight"
PLACE = Placement((7, 5), (0,), (1,))
TEXT = """g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[7] b>
  { ["/m/q/MatMul"] h = MatMul(x, w)  y = Add(h, b) }"""
both_verbs = pytest.mark.parametrize("verb", ["merge", "attach"])


def put(verb, base, adapters, out, **options):
    plan = prepare(verb, [(f"n{i}", a) for i, a in enumerate(adapters)], base, Options(out, **options))
    base.apply(plan)
    onnx.checker.check_model(out, full_check=True)
    return plan


# Several adapters.

JOBS = [
    ("lora", "lora"), ("lora", "dora"), ("dora", "lora"), ("dora", "dora"), ("lora", "delta"), ("dora", "delta"),
    ("replace", "lora"), ("lora", "replace"), ("rows", "dora"), ("lora", "lora", "rows"), ("loha", "dora of columns"),
]  # fmt: skip


@both_verbs
@pytest.mark.parametrize("kinds", JOBS, ids="+".join)
def test_several_adapters_act_one_after_the_other(kinds, verb, tmp_path):
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    given = [updates.made(kind, PLACE) for kind in kinds]
    given = [  # two of a kind are two adapters
        replace(u, parts=tuple(replace(p, alpha=p.alpha - i) if hasattr(p, "alpha") else p for p in u.parts))
        for i, u in enumerate(given)
    ]
    put(verb, base, [Adapter({KEY: update}) for update in given], tmp_path / "out.onnx")
    weight = base.read("w").T
    for update in given:
        weight = update.apply(weight)
    wanted = inputs(base.path)["x"] @ weight.T.astype(np.float64) + base.read("b")
    for optimise in (True, False):
        assert relative_error(run(tmp_path / "out.onnx", optimise=optimise)["y"], wanted) <= 2e-6
    if verb == "attach":
        attached = open_base(tmp_path / "out.onnx")
        assert [(n, digest(a)) for n, a in attached.extract()] == [
            (f"n{i}", digest(Adapter({KEY: update}))) for i, update in enumerate(given)
        ]
        detach(attached, tmp_path / "detached.onnx")
        assert (tmp_path / "detached.onnx").read_bytes() == base.path.read_bytes()


@both_verbs
def test_adapters_that_name_one_weight_differently_meet_there(verb, tmp_path):
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    first, second = adapter({KEY: (7, 5)}), adapter({"root.m.q.weight": lora(7, 5, seed=9)})
    put(verb, base, [first, second], tmp_path / "out.onnx")
    delta = first[KEY].matrix() + second["root.m.q.weight"].matrix()
    wanted = inputs(base.path)["x"] @ (base.read("w").T + delta).T + base.read("b")
    assert relative_error(run(tmp_path / "out.onnx")["y"], wanted) <= 2e-6


@both_verbs
def test_adapters_that_mean_other_uses_of_one_weight_are_refused(verb, tmp_path):
    base = open_base(
        save(
            model("""g (float[N,6] x) => (float[N,6] y) <float[6,6] w>
      { ["/m/q/MatMul"] h = MatMul(x, w)  ["/m/q_1/MatMul"] y = MatMul(h, w) }"""),
            tmp_path / "base.onnx",
        )
    )
    update = adapter({KEY: (6, 6)})
    everywhere = base.resolve(update, Hints())
    once = replace(everywhere, targets={KEY: everywhere.targets[KEY][:1]})
    jobs = [Job(update, everywhere), Job(update, once)]
    with pytest.raises(LoraFormatError, match="LF-609"):
        base.plan(verb, jobs, Options(tmp_path / "out.onnx"))


BIASED = {
    "Add": ('h = MatMul(x, w)  y = Add("m.q.bias", h)', "N,5", "N,7", "5,7", "7"),
    "Add of a bias behind Identity": (
        'i = Identity("m.q.bias")  h = MatMul(x, w)  y = Add(h, i)',
        "N,5",
        "N,7",
        "5,7",
        "7",
    ),
    "Gemm": ('y = Gemm <beta = -1.3> (x, w, "m.q.bias")', "N,5", "N,7", "5,7", "7"),
    "Conv": ('y = Conv(x, w, "m.q.bias")', "N,5,4", "N,7,3", "7,5,2", "7"),
}


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("prefold", [False, True])
@pytest.mark.parametrize("first", ["w", "m.q.bias"])
def test_a_magnitude_leaves_the_bias_alone_that_changes_beside_it(name, prefold, first, tmp_path):
    nodes, x, y, w, b = BIASED[name]
    text = f'g (float[{x}] x) => (float[{y}] y) <float[{w}] w, float[{b}] "m.q.bias"> {{ {nodes} }}'
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    shape = base.read("w").shape
    place = Placement(shape, (0,), (1, 2)) if len(shape) == 3 else Placement(shape, (1,), (0,))
    given = {
        "w": updates.made("dora", place),
        "m.q.bias": updates.made("replace", Placement((7,), (0,), ())),
    }
    given = {key: given[key] for key in sorted(given, key=lambda key: key != first)}
    put("merge", base, [Adapter(given)], tmp_path / "merged.onnx")
    put("attach", base, [Adapter(given)], tmp_path / "attached.onnx", prefold=prefold)
    found = run(tmp_path / "attached.onnx")["y"]
    assert relative_error(found, run(tmp_path / "merged.onnx", optimise=False)["y"]) <= 2e-6
    assert relative_error(found, run(base.path)["y"]) > 0.1
    detach(open_base(tmp_path / "attached.onnx"), tmp_path / "detached.onnx")
    assert (tmp_path / "detached.onnx").read_bytes() == base.path.read_bytes()


# Types.

TYPES = {"float16": 5e-3, "double": 2e-7}


@pytest.mark.parametrize(("kind", "tolerance"), TYPES.items())
@pytest.mark.parametrize("of", ["lora", "dora", "delta", "replace", "rows", "everything"])
def test_a_graph_of_another_type_computes_in_it(kind, tolerance, of, tmp_path):
    base = open_base(save(model(TEXT.replace("float", kind)), tmp_path / "base.onnx"))
    update = updates.made(of, PLACE)
    values = {name: base.read(name).astype(np.float64) for name in ("w", "b")}
    wanted = inputs(base.path)["x"] @ update.apply(values["w"].T).T.astype(np.float64) + values["b"]
    for verb in ("merge", "attach"):
        put(verb, base, [Adapter({KEY: update})], tmp_path / f"{verb}.onnx")
        assert relative_error(run(tmp_path / f"{verb}.onnx")["y"], wanted) <= tolerance
    assert stored(tmp_path / "merge.onnx")["w"].dtype == base.read("w").dtype
    session(tmp_path / "attach.onnx", optimised=tmp_path / "optimised.onnx")
    # ONNX Runtime 1.32 computes float16 in float32 on the CPU, between casts of its own, W's too.
    left = [name for _, name in constant_nodes(onnx.load(tmp_path / "optimised.onnx").graph)]
    assert [name for name in left if not name.startswith("InsertedPrecisionFreeCast_")] == []
    assert digest(open_base(tmp_path / "attach.onnx").extract()[0][1]) == digest(Adapter({KEY: update}))


def test_a_float64_weight_keeps_what_float32_would_round_away(tmp_path):
    base = open_base(save(model(TEXT.replace("float", "double")), tmp_path / "base.onnx"))
    tiny = lora(7, 5, alpha=1e-9)
    put("merge", base, [Adapter({KEY: tiny})], tmp_path / "out.onnx")
    change = stored(tmp_path / "out.onnx")["w"] - base.read("w")
    assert relative_error(change, tiny.matrix().T) <= 1e-5


@pytest.mark.parametrize("of", ["lora", "dora", "everything"])
@pytest.mark.parametrize("verb", ["merge", "attach"])
def test_a_bfloat16_graph_is_proved_on_a_float32_copy(of, verb, tmp_path):
    made = model(TEXT.replace("float", "bfloat16"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    plan = put(verb, base, [Adapter({KEY: updates.made(of, PLACE)})], tmp_path / "out.onnx")
    proof = prove(base, plan)
    assert (proof.holds, proof.limit, proof.moved > 0.1) == (True, 2e-2, True)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16])
@pytest.mark.parametrize("opset", [9, 18])
def test_factors_come_back_in_their_own_type(dtype, opset, tmp_path):
    base = open_base(save(model(TEXT, opset=opset, ir=4 if opset < 13 else 10), tmp_path / "base.onnx"))
    given = adapter({KEY: lora(7, 5, dtype=dtype)})
    attach(given, base, tmp_path / "out.onnx")
    assert digest(extract(open_base(tmp_path / "out.onnx"))) == digest(given)
    wanted = inputs(base.path)["x"] @ (base.read("w").T + given[KEY].matrix()).T + base.read("b")
    assert relative_error(run(tmp_path / "out.onnx")["y"], wanted) <= 2e-6


@pytest.mark.parametrize(("sigma", "moves"), [(1.0, False), (1e-6, True), (3e4, True)])
def test_factors_beyond_the_normal_numbers_of_float16_are_balanced(sigma, moves, tmp_path):
    base = open_base(save(model(TEXT.replace("float", "float16")), tmp_path / "base.onnx"))
    part = lora(7, 5, rank=3)["lora"]
    size = np.float32(sigma * 10)
    given = Adapter({KEY: Update((Lora(part.lora_A / size, part.lora_B * size, 1e3 / 1e3, "factor"),))})
    if sigma == 1.0:
        given = Adapter({KEY: Update((part,))})
    plan = put("attach", base, [given], tmp_path / "out.onnx")
    assert any("balanced by powers of two" in note for note in plan.notes) == moves
    assert any("rounding changes the factors by up to" in note for note in plan.notes)
    assert digest(extract(open_base(tmp_path / "out.onnx"))) == digest(given)
    values = {name: base.read(name).astype(np.float64) for name in ("w", "b")}
    wanted = inputs(base.path)["x"] @ (values["w"].T + given[KEY].matrix()).T + values["b"]
    assert relative_error(run(tmp_path / "out.onnx", optimise=False)["y"], wanted) <= 2e-3


# The record.


def test_everything_of_an_adapter_comes_back(tmp_path):
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    seen = sketch(base.read("w"), Placement((5, 7), (1,), (0,)))
    update = replace(updates.made("dora", PLACE), assumed=("name",), sketch=seen)
    about = {"title": "Ünïcode", "training": {"seed": 3}}
    given = Adapter({KEY: update}, base_model={"name": "b"}, about=about, extensions={"peft": '{"r": 2}'})
    attach(given, base, tmp_path / "out.onnx")
    save_adapter(given, tmp_path / "a.safetensors")
    save_adapter(extract(open_base(tmp_path / "out.onnx")), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_names_that_begin_like_ours_are_not_taken_out(tmp_path):
    text = f"""g (float[N,5] x) => (float[N,7] y) <float[5,7] w, float[7] "lora/{KEY}/mine">
      {{ ["/m/q/MatMul"] h = MatMul(x, w)  ["lora/{KEY}/add"] y = Add(h, "lora/{KEY}/mine") }}"""
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    attach(adapter({KEY: (7, 5)}), base, tmp_path / "out.onnx")
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "detached.onnx")
    assert (tmp_path / "detached.onnx").read_bytes() == base.path.read_bytes()


@pytest.mark.parametrize("ir", [3, 10])
def test_an_old_model_is_given_back_without_our_inputs(ir, tmp_path):
    made = model(TEXT, ir=ir, opset=8)
    for tensor in made.graph.initializer:
        made.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    base = open_base(save(made, tmp_path / "base.onnx"))
    attach(adapter({KEY: (7, 5)}), base, tmp_path / "out.onnx")
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "detached.onnx")
    assert (tmp_path / "detached.onnx").read_bytes() == base.path.read_bytes()


def a_weight(made):
    tensor = next(t for t in made.graph.initializer if t.name == "w")
    tensor.raw_data = bytes(4) + tensor.raw_data[4:]


def a_factor(made):
    tensor = next(t for t in made.graph.initializer if t.name.endswith("lora_A"))
    tensor.raw_data = bytes(4) + tensor.raw_data[4:]


def a_factor_gone(made):
    kept = [t for t in made.graph.initializer if not t.name.endswith("lora_A")]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)


def a_node(made):
    made.graph.node.append(helper.make_node("Neg", ["y"], ["z"], "more"))


def the_record(value):
    def change(made):
        next(p for p in made.metadata_props if p.key == "loraformat.attached").value = value

    return change


def half_a_record(made):
    kept = [p for p in made.metadata_props if p.key != "loraformat.base"]
    del made.metadata_props[:]
    made.metadata_props.extend(kept)


CHANGED = {"detach": [a_weight, a_node], "extract": [a_factor, a_factor_gone]}


@pytest.mark.parametrize(("way", "change"), [(way, change) for way in CHANGED for change in CHANGED[way]])
def test_a_model_that_was_changed_since_is_refused(way, change, tmp_path):
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    attach(adapter({KEY: (7, 5)}), base, tmp_path / "out.onnx")
    made = onnx.load(tmp_path / "out.onnx")
    change(made)
    opened = open_base(save(made, tmp_path / "changed.onnx"))
    with pytest.raises(LoraFormatError, match="LF-613"):
        detach(opened, tmp_path / "detached.onnx") if way == "detach" else extract(opened)
    assert not (tmp_path / "detached.onnx").exists()


HOSTILE = ["", "[", "{}", "[{}]", '[{"version": 2}]', "[3]", "null", '[{"version":1,"name":3,"mode":"","digest":""}]']


@pytest.mark.parametrize("change", [*map(the_record, HOSTILE), half_a_record])
def test_a_record_that_cannot_be_read_is_a_fault(change, tmp_path):
    given = adapter({KEY: (7, 5)})
    attach(given, open_base(save(model(TEXT), tmp_path / "base.onnx")), tmp_path / "out.onnx")
    made = onnx.load(tmp_path / "out.onnx")
    change(made)
    opened = open_base(save(made, tmp_path / "changed.onnx"))
    for act in (
        extract,
        lambda base: detach(base, tmp_path / "x.onnx"),
        lambda base: attach(given, base, tmp_path / "x"),
    ):
        with pytest.raises(LoraFormatError, match="LF-613"):
            act(opened)


@pytest.mark.parametrize("act", [extract, lambda base: detach(base, base.path.with_name("out.onnx"))])
def test_of_a_model_without_a_record_nothing_can_be_taken(act, tmp_path):
    with pytest.raises(LoraFormatError, match="LF-613"):
        act(open_base(save(model(TEXT), tmp_path / "base.onnx")))


@both_verbs
def test_an_attached_model_takes_no_other_adapter(verb, tmp_path):
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    put("attach", base, [Adapter({KEY: updates.made("dora", PLACE)})], tmp_path / "attached.onnx")
    with pytest.raises(LoraFormatError, match="LF-608  the model has an adapter attached already"):
        put(verb, open_base(tmp_path / "attached.onnx"), [adapter({KEY: (7, 5)})], tmp_path / "out.onnx")


@pytest.mark.parametrize("topology", ["separate", "concat"])
def test_a_model_in_which_an_output_has_another_producer_is_not_what_it_was(topology, tmp_path):
    """ONNX Runtime's converter to float16 puts a Cast in front of each output, which has then two producers on the way back."""
    text = """g (float[N,5] x) => (float[N,7] y, float[N,7] z) <float[5,7] q, float[5,7] k>
      { ["/m/q/MatMul"] y = MatMul(x, q)  ["/m/k/MatMul"] z = MatMul(x, k) }"""
    base, given = open_base(save(model(text), tmp_path / "base.onnx")), adapter({KEY: (7, 5), "m.k.weight": (7, 5)})
    put("attach", base, [given], tmp_path / "out.onnx", topology=topology)
    half = convert_float_to_float16(onnx.load(tmp_path / "out.onnx"), keep_io_types=True)
    opened = open_base(save(half, tmp_path / "half.onnx"))
    assert relative_error(run(opened.path)["y"], run(tmp_path / "out.onnx")["y"]) <= 5e-3
    with pytest.raises(LoraFormatError, match=r"LF-613 .*is not what it was"):
        detach(opened, tmp_path / "again.onnx")
    assert opened.describe()["attached"]


def test_an_attached_model_is_verified_by_what_it_holds(tmp_path):
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    given, other = Adapter({KEY: updates.made("dora", PLACE)}), adapter({KEY: (7, 5)})
    attach(given, base, tmp_path / "out.onnx")
    verdict = verify(base, given, open_base(tmp_path / "out.onnx"))
    assert (verdict.problems, dict(verdict.touched), verdict.untouched) == ([], {KEY: 0.0}, 2)
    assert [p.rule for p in verify(base, other, open_base(tmp_path / "out.onnx")).problems] == ["LF-611"]
    stranger = open_base(save(model(TEXT, seed=8), tmp_path / "stranger.onnx"))
    assert len(verify(stranger, given, open_base(tmp_path / "out.onnx")).problems) == 3


# Functions.


def with_function(tmp_path):
    """A Linear that is a local function, with a weight of its own; and the same model without functions."""
    weight = numpy_helper.from_array(np.random.default_rng(5).standard_normal((5, 7)).astype(np.float32), "w")
    body = [
        helper.make_node("Constant", [], [KEY], value=weight),
        helper.make_node("MatMul", ["x", KEY], ["y"]),
    ]
    made = model("g (float[N,5] x) => (float[N,7] y) { y = own.Linear(x) }")
    made.functions.append(helper.make_function("own", "Linear", ["x"], ["y"], body, [helper.make_opsetid("", 18)]))
    made.opset_import.append(helper.make_opsetid("own", 1))
    return save(made, tmp_path / "base.onnx"), numpy_helper.to_array(weight)


@both_verbs
def test_a_function_is_rewritten_once_it_is_inlined(verb, tmp_path):
    path, weight = with_function(tmp_path)
    base = inlined(open_base(path))
    (name,) = [site.root_name for site in base.index.sites]
    update = adapter({name: (7, 5)})
    put(verb, base, [update], tmp_path / "out.onnx")
    wanted = inputs(path)["x"] @ (weight + update[name].matrix().T)
    assert relative_error(run(tmp_path / "out.onnx")["y"], wanted) <= 2e-6


# Proofs.

MODEL = """g (int64[batch,seq] ids, int64[batch,seq] mask, int64[batch,seq] kinds) => (float[batch,seq,6] y)
  <float[9,5] "e.weight", float[2,5] types, float[5,6] w, float[6] b>
  { f = Cast <to = 1> (mask)  i = Identity(ids)  ["/e/Gather"] t = Gather("e.weight", i)  k = Gather(types, kinds)
    s = Add(t, k)  ["/m/q/MatMul"] h = MatMul(s, w)  a = Add(h, b)
    axes = Constant <value_ints = [2]> ()  u = Unsqueeze(f, axes)  y = Mul(a, u) }"""
BOTH = {"e.weight": Update(lora(5, 9).parts, Placement((9, 5), (1,), (0,)), op="embedding"), KEY: lora(6, 5)}


@both_verbs
def test_a_proof_runs_the_model_on_inputs_that_it_makes(verb, tmp_path):
    base = open_base(save(model(MODEL), tmp_path / "base.onnx"))
    plan = put(verb, base, [Adapter(BOTH)], tmp_path / "out.onnx")
    proof = prove(base, plan)
    assert proof.holds
    assert (0 < proof.error <= 2e-6, proof.limit, proof.output, proof.moved > 0.1) == (True, 1e-5, "y", True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.onnx", "out.onnx"]


@both_verbs
def test_a_proof_fails_where_the_written_model_is_another(verb, tmp_path):
    base = open_base(save(model(MODEL), tmp_path / "base.onnx"))
    plan = put(verb, base, [Adapter(BOTH)], tmp_path / "out.onnx")
    made = onnx.load(tmp_path / "out.onnx")
    name = "w" if verb == "merge" else f"lora/{KEY}/scale"
    tensor = next(t for t in made.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(numpy_helper.to_array(tensor) * 1.01, np.float32), name))
    save(made, tmp_path / "out.onnx")
    assert not prove(base, plan).holds


def test_a_proof_takes_inputs_where_it_can_make_none(tmp_path):
    text = """g (float[N,5] x, float[2] z, int64[1] n) => (float[N,7] y) <float[5,7] w>
      { ["/m/q/MatMul"] h = MatMul(x, w)  t = Gather(z, n)  y = Add(h, t) }"""
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    plan = put("attach", base, [adapter({KEY: (7, 5)})], tmp_path / "out.onnx")
    values = {"x": np.ones((4, 5), np.float32), "z": np.ones(2, np.float32), "n": np.array([7])}
    np.savez(tmp_path / "bad.npz", **values)
    np.savez(tmp_path / "few.npz", x=values["x"])
    np.savez(tmp_path / "good.npz", **values | {"n": np.array([1])})
    (tmp_path / "none.npz").write_bytes(b"no")
    assert prove(base, plan, tmp_path / "good.npz").holds
    for name in ("bad", "few", "none"):
        with pytest.raises(LoraFormatError, match="LF-705"):
            prove(base, plan, tmp_path / f"{name}.npz")


# The commands.


@pytest.fixture
def files(tmp_path):
    save(model(MODEL), tmp_path / "m.onnx")
    save_adapter(Adapter(BOTH), tmp_path / "a.safetensors")
    save_adapter(adapter({KEY: lora(6, 5, seed=4)}), tmp_path / "b.safetensors")
    return tmp_path


@pytest.mark.parametrize("verb", ["attach --to", "merge --into"])
def test_what_cannot_be_proved_is_told_before_anything_is_written(verb, run, files):
    made = onnx.load(files / "m.onnx")
    made.graph.input[0].type.tensor_type.ClearField("shape")
    save(made, files / "m.onnx")
    verb, flag = verb.split()
    done = run(verb, "a.safetensors", flag, "m.onnx", "-o", "out.onnx", "--verify")
    assert (done.code, "LF-705" in done.err, (files / "out.onnx").exists()) == (2, True, False)


def test_what_was_folded_beforehand_is_proved_by_running_it(run, files):
    done = run("attach", "a.safetensors", "--to", "m.onnx", "-o", "out.onnx", "--prefold", "--verify")
    assert (done.code, "≤ 1e-05 at y" in done.err) == (0, True)


def test_of_a_model_that_draws_at_random_only_the_weights_are_proved(run, files):
    text = MODEL.replace("s = Add(t, k)", "noise = RandomNormalLike(t)  drawn = Add(t, noise)  s = Add(drawn, k)")
    save(model(text), files / "m.onnx")
    done = run("attach", "a.safetensors", "--to", "m.onnx", "-o", "out.onnx", "--verify")
    assert (done.code, "draws at random" in done.err) == (1, True)
    assert run("verify", "--base", "m.onnx", "--adapter", "a.safetensors", "--merged", "out.onnx").code == 0


def test_the_way_there_and_back(run, files):
    done = run("attach", "a.safetensors", "--to", "m.onnx", "-o", "out.onnx", "--verify")
    assert (done.code, "max rel err" in done.err, "≤ 1e-05 at y" in done.err) == (0, True, True)
    assert run("verify", "--base", "m.onnx", "--adapter", "a.safetensors", "--merged", "out.onnx").code == 0
    assert run("verify", "--base", "m.onnx", "--adapter", "b.safetensors", "--merged", "out.onnx").code == 1
    assert run("detach", "out.onnx", "-o", "again.onnx").code == 0
    assert (files / "again.onnx").read_bytes() == (files / "m.onnx").read_bytes()
    done = run("extract", "out.onnx", "-o", "again.safetensors", "--json")
    assert done.json["digest"] == digest(load_adapter(files / "a.safetensors"))
    assert (files / "again.safetensors").read_bytes() == (files / "a.safetensors").read_bytes()
    assert run("detach", "out.onnx", "-o", "out.onnx", "--force").code == 1
    assert run("detach", "m.onnx", "-o", "x.onnx").code == 1
    assert run("detach", "a.safetensors", "-o", "x.onnx").code == 1


def test_one_of_several_is_extracted_by_its_name(run, files):
    done = run("attach", "one=a.safetensors", "two=b.safetensors:2", "--to", "m.onnx", "-o", "out.onnx", "--verify")
    assert done.code == 0
    assert run("extract", "out.onnx", "-o", "x.safetensors").code == 2
    assert run("extract", "out.onnx", "-o", "x.safetensors", "--name", "three").code == 2
    assert run("extract", "out.onnx", "-o", "x.safetensors", "--name", "two").code == 0
    assert load_adapter(files / "x.safetensors")[KEY].scale == 2 * load_adapter(files / "b.safetensors")[KEY].scale


def test_merge_proves_and_takes_inputs(run, files):
    np.savez(files / "x.npz", **{n: np.ones((2, 3), np.int64) for n in ("ids", "mask", "kinds")})
    words = ("merge", "a.safetensors", "--into", "m.onnx", "-o", "out.onnx", "--verify", "--inputs", "x.npz", "--json")
    done = run(*words)
    assert (done.code, done.json["proof"]["error"] <= 1e-5) == (0, True)


def test_prefold_and_inline_are_options(run, files):
    assert run("attach", "a.safetensors", "--to", "m.onnx", "-o", "out.onnx", "--prefold", "--inline").code == 0
    assert run("extract", "out.onnx", "-o", "x.safetensors").code == 1
    assert json.loads(run("detach", "out.onnx", "-o", "again.onnx", "--json").out)["verb"] == "detach"
    assert (files / "again.onnx").read_bytes() == (files / "m.onnx").read_bytes()


def test_random_adapters_of_every_kind_have_names_in_the_record(tmp_path):
    base = open_base(save(model(TEXT), tmp_path / "base.onnx"))
    given = random_adapter(kinds=("dora",))
    key = next(iter(given))
    update = replace(updates.made("everything", PLACE))
    attach(Adapter({key: update}), base, tmp_path / "out.onnx", Hints({key: "/m/q/MatMul"}))
    running = session(tmp_path / "out.onnx")
    props = running.get_modelmeta().custom_metadata_map
    (entry,) = json.loads(props["loraformat.attached"])
    assert (entry["name"], entry["mode"], list(entry["targets"])) == ("default", "branch", [key])
