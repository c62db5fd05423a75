"""Weights that hold several parameters: q, k and v in one product, found and changed in their own rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import feeds, inputs, lora, model, run, save, session
from installed import needs
from onnx import numpy_helper
from quantised_graphs import packed as packed_bits

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch, sketches
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import attach, merge, prepare
from loraformat.verbs.verify import verify
from loraformat_converters.onnx.attaching import fitting, stack
from loraformat_converters.onnx.runtime import Session

IN = 20
ROWS = {"q": (0, 24), "k": (24, 36), "v": (36, 48)}
OUT = 48
KEYS = {name: f"m.{name}_proj.weight" for name in ROWS}
VERBS = {"attach": attach, "merge": merge}


def weight(seed=0):
    """[out, in]: q above k above v."""
    return np.random.default_rng(seed).standard_normal((OUT, IN)).astype(np.float32)


def product(form, w, opset=18):
    """x·Wᵀ without a name."""
    head = f"g (float[N,T,{IN}] x) => (float[N,T,{OUT}] y)"
    if form == "MatMulNBits":
        needs("MatMulNBits 8")
        step = (np.abs(w.reshape(OUT, 1, IN)).max(-1) / 100).astype(np.float32)
        codes = np.round(w / step).astype(int) + 128
        filled = np.pad(codes, [(0, 0), (0, 12)]).reshape(OUT, 1, 32)
        made = model(f"""{head} {{ y = com.microsoft.MatMulNBits
          <K = {IN}, N = {OUT}, bits = 8, block_size = 32> (x, w, s) }}""", opset=21)  # fmt: skip
        held = {"w": packed_bits(filled, 8), "s": step}
    else:
        flat = f"g (float[N,{IN}] x) => (float[N,{OUT}] y)"
        body = {"MatMul": f"{head} {{ y = MatMul(x, w) }}", "Gemm": f"{flat} {{ y = Gemm <transB = 1> (x, w) }}"}[form]
        made, held = model(body, opset=opset), {"w": w if form == "Gemm" else w.T}
    made.graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in held.items())
    return made


def ours(w, names=("q", "k", "v"), **kinds):
    """Pairs, bound to the rows of ``w``."""
    targets = {}
    for seed, name in enumerate(names):
        start, stop = ROWS[name]
        place = lf.Placement((stop - start, IN), (0,), (1,))
        pair = lora(stop - start, IN, rank=2 + seed, seed=seed + 3)
        small = replace(pair["lora"], alpha=0.02, scale_rule="factor")  # a merge is found again by the same sketches
        targets[KEYS[name]] = lf.Update((small,), place, sketch=sketch(w[start:stop], place), **kinds)
    return lf.Adapter(targets)


def spread(adapter):
    """ΔW of the whole weight, by hand."""
    whole = np.zeros((OUT, IN))
    for name, (start, stop) in ROWS.items():
        if KEYS[name] in adapter:
            part = adapter[KEYS[name]]["lora"]
            whole[start:stop] = 0.02 * part.lora_B.astype(np.float64) @ part.lora_A
    return whole


def check(verb, form, tmp_path, names=("q", "k", "v")):
    """What the changed model computes; the base again and the adapter, where it was attached."""
    w = weight()
    path, adapter, out = save(product(form, w), tmp_path / "base.onnx"), ours(w, names), tmp_path / "out.onnx"
    VERBS[verb](adapter, open_base(path), out)
    onnx.checker.check_model(out, full_check=True)
    before, x = run(path, optimise=False)["y"], inputs(path)["x"]
    for optimise in (False, True):
        after = run(out, optimise=optimise)["y"]
        assert relative_error(after, before + x @ spread(adapter).T) <= 2e-6
        assert relative_error(after, before) > 1e-2
    assert not verify(open_base(path), adapter, open_base(out)).problems
    if verb == "attach":
        assert lf.digest(extract(open_base(out))) == lf.digest(adapter)
        detach(open_base(out), tmp_path / "again.onnx")
        assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("names", [("q", "k", "v"), ("v", "q"), ("k",)])
@pytest.mark.parametrize("form", ["MatMul", "Gemm"])
@pytest.mark.parametrize("verb", VERBS)
def test_targets_of_one_product_are_changed_each_in_its_rows(verb, form, names, tmp_path):
    check(verb, form, tmp_path, names)


def test_targets_of_one_quantised_product_are_changed_each_in_its_rows(tmp_path):
    check("attach", "MatMulNBits", tmp_path)


@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_the_weight_of_an_attention_is_changed_in_front_of_it(kind, tmp_path):
    """com.microsoft.Attention multiplies by its weight itself: no branch can run beside that."""
    w = np.random.default_rng(1).standard_normal((72, 24)).astype(np.float32)
    made = model("""g (float[N,T,24] x) => (float[N,T,24] y) <float[72] b>
      { y = com.microsoft.Attention <num_heads = 4> (x, w, b) }""")
    made.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(w.T), "w"))
    path, place = save(made, tmp_path / "base.onnx"), lf.Placement((24, 24), (0,), (1,))
    update, changed = lora(24, 24, seed=5), w.copy()
    if kind == "delta":
        update = lf.Update((lf.Delta(update.matrix()),))
    changed[24:48] += update.matrix()
    adapter = lf.Adapter({"m.k_proj.weight": replace(update, placement=place, sketch=sketch(w[24:48], place))})
    attach(adapter, open_base(path), tmp_path / "out.onnx")
    made.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed.T), "w"))
    wanted = run(save(made, tmp_path / "wanted.onnx"))["y"]
    assert relative_error(run(tmp_path / "out.onnx")["y"], wanted) <= 2e-6
    assert relative_error(run(path)["y"], wanted) > 0.05
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def resolve(made, adapter, tmp_path):
    return open_base(save(made, tmp_path / "base.onnx")).resolve(adapter, lf.Hints())


def test_the_evidence_tells_the_rows(tmp_path):
    w = weight()
    found = resolve(product("MatMul", w), ours(w), tmp_path).require().targets
    assert {key: places[0].rows for key, places in found.items()} == {KEYS[n]: rows for n, rows in ROWS.items()}
    assert found[KEYS["k"]][0].evidence[0].startswith("sketch: rows 24 to 36 of (48, 20), cosine 1.000")
    assert found[KEYS["k"]][0].as_json()["slice"] == [24, 36]


def test_rows_of_another_weight_are_not_taken_for_ours(tmp_path):
    assert not resolve(product("MatMul", weight(seed=1)), ours(weight()), tmp_path).targets


def test_equal_rows_are_told_apart_by_nothing(tmp_path):
    w = weight()
    w[36:48] = w[24:36]
    found = resolve(product("MatMul", w), ours(w, ["k"]), tmp_path)
    assert [(p.rule, "2 runs of rows of w" in p.what) for p in found.ambiguous] == [("LF-603", True)]


def test_two_targets_of_the_same_rows_are_an_error(tmp_path):
    w = weight()
    (update,) = ours(w, ["k"]).values()
    found = resolve(product("MatMul", w), lf.Adapter({"a.weight": update, "b.weight": update}), tmp_path)
    assert [p.rule for p in found.ambiguous] == ["LF-603"]


@pytest.mark.parametrize(
    "options", [{}, {"prefold": True}, {"topology": "concat"}, {"topology": "folded"}, {"mode": "swap"}]
)
@pytest.mark.parametrize("opset", [7, 10])
def test_an_opset_whose_pad_takes_its_sizes_as_attributes(opset, options, tmp_path):
    w = weight()
    base, x = (
        open_base(save(product("MatMul", w, opset=opset), tmp_path / "base.onnx")),
        feeds(session(tmp_path / "base.onnx")),
    )
    merge(ours(w), base, tmp_path / "merged.onnx")
    base.apply(prepare("attach", [("a", ours(w))], base, Options(tmp_path / "out.onnx", **options)))
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    running = Session(tmp_path / "out.onnx")
    if options.get("mode") == "swap":
        running.load("a", ours(w))
        running = running.use("a")
    assert relative_error(running.run(x)["y"], session(tmp_path / "merged.onnx").run(None, x)[0]) <= 2e-6
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


def test_a_scale_that_was_folded_into_some_of_the_rows_is_told(tmp_path):
    w = weight()
    held = w.copy()
    held[: ROWS["q"][1]] *= 64**-0.5
    found = resolve(product("MatMul", held), ours(w), tmp_path)
    assert [(p.rule, p.where) for p in found.unresolved] == [("LF-616", KEYS["q"])]
    assert set(found.targets) == {KEYS["k"], KEYS["v"]}


def test_the_sketch_of_a_run_is_that_of_the_rows_by_themselves():
    w = weight()
    drawn = sketches(w, 12, 4)
    assert list(drawn) == list(range(0, 37, 4))
    for start, found in drawn.items():
        alone = sketch(w[start : start + 12], lf.Placement((12, IN), (0,), (1,)))
        np.testing.assert_allclose(found, alone, atol=1e-6)


def rows_choose(form, provider, select, tmp_path):
    """A stack beside a weight that holds q, k and v: of two adapters one has all three, the other two of them."""
    w = weight()
    path, out = save(product(form, w), tmp_path / "base.onnx"), tmp_path / "out.onnx"
    given = {"whole": ours(w), "part": ours(w, ("v", "q"))}
    base, x = open_base(path), inputs(path)["x"].astype(np.float32)
    plan = prepare(
        "attach", list(given.items()), base, Options(out, "stack", rows=("x",), provider=provider, select=select)
    )
    base.apply(plan)
    assert prove(base, plan).holds
    index = np.arange(x.shape[0]) % 3
    fed = {"lora.index": index} if select == "index" else {"lora.weights": np.eye(3, 2, -1, dtype=np.float32)[index]}
    before, found = session(path).run(None, {"x": x})[0], session(out).run(None, {"x": x, **fed})[0]
    for n, adapter in enumerate(given.values(), 1):
        wanted = before[index == n] + x[index == n].astype(np.float64) @ spread(adapter).T
        assert relative_error(found[index == n], wanted) <= 2e-6
        assert relative_error(found[index == n], before[index == n]) > 1e-3
    assert relative_error(found[index == 0], before[index == 0]) <= 1e-6
    for name, adapter in given.items():
        assert lf.digest(extract(open_base(out), name=name)) == lf.digest(adapter)
    detach(open_base(out), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "MatMulNBits"])
@pytest.mark.parametrize(("provider", "select"), [("cpu", "index"), ("cuda", "index"), ("cpu", "weights")])
def test_rows_choose_among_adapters_of_a_packed_weight(form, provider, select, tmp_path):
    rows_choose(form, provider, select, tmp_path)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_choice_is_red_where_a_part_is_lost(lost, monkeypatch, tmp_path):
    whole = stack.joined
    monkeypatch.setattr(stack, "joined", lambda make, pairs: whole(make, [p for n, p in enumerate(pairs) if n != lost]))
    with pytest.raises(AssertionError):
        rows_choose("MatMul", "cpu", "index", tmp_path)


def swapped(form, tmp_path, **options):
    """Slots of q, k and v beside the one weight that holds them, fed by files, by name and in a blend."""
    w = weight()
    path, out = save(product(form, w), tmp_path / "base.onnx"), tmp_path / "out.onnx"
    given = {"whole": ours(w), "part": ours(w, ("v", "q"))}
    base, x = open_base(path), inputs(path)["x"].astype(np.float32)
    plan = prepare("attach", list(given.items()), base, Options(out, "swap", **options))
    base.apply(plan)
    onnx.checker.check_model(out, full_check=True)
    assert prove(base, plan).holds
    assert any("6 inputs for 3 targets" in note for note in plan.notes)
    before, running = session(path).run(None, {"x": x})[0], Session(out)
    for name, adapter in given.items():
        running.load(name, out.with_name(f"out.{name}.onnx_adapter"))
        running.load(f"{name}, itself", adapter)
    for choice in ("whole", {"part, itself": 1.0}, {"whole": 0.7, "part, itself": -0.3}):
        strengths = {choice: 1.0} if isinstance(choice, str) else choice
        delta = sum(s * spread(given[name.partition(",")[0]]) for name, s in strengths.items())
        found = running.use(choice).run({"x": x})["y"]
        assert relative_error(found, before + x.astype(np.float64) @ delta.T) <= 2e-6
        assert relative_error(found, before) > 1e-3
    assert np.array_equal(running.run({"x": x})["y"], before)
    detach(open_base(out), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "MatMulNBits"])
@pytest.mark.parametrize("options", [{}, {"slots": "required"}, {"pad_rank": 8}])
def test_adapters_of_a_packed_weight_are_swapped(form, options, tmp_path):
    swapped(form, tmp_path, **options)


def rows_of_the_first(patch):
    whole = fitting.padded
    patch.setattr(fitting, "padded", lambda make, b, ends, role: whole(make, b, [0, 0, 0, sum(ends)], role))


def partners_exchanged(patch):
    whole = fitting.Nodes.node

    def node(self, op, inputs, role, **attributes):
        return whole(self, op, inputs[::-1] if role == "B/all" else inputs, role, **attributes)

    patch.setattr(fitting.Nodes, "node", node)


@pytest.mark.parametrize("mutant", [rows_of_the_first, partners_exchanged])
def test_a_swap_is_red_on_a_mutant(mutant, monkeypatch, tmp_path):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        swapped("MatMul", tmp_path, pad_rank=8)
