"""Stack: every row computes with the adapter that it chose; an index that is none is an error, never another adapter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import updates
from graphs import adapter, feeds, lora, model, save, session

import loraformat as lf
from loraformat import Adapter, Lora, LoraFormatError, Placement
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx.attaching import choice, stack

KEY = "m.q.weight"


def put(base, out, adapters, **options):
    plan = prepare("attach", adapters, base, Options(out, mode="stack", **{"rows": ("x",), **options}))
    base.apply(plan)
    onnx.checker.check_model(out, full_check=True)
    return plan


# name → (graph, how the parameter lies, the shape of x); 5 rows
GRAPHS = {
    "MatMul": ("g (float[N,T,5] x) => (float[N,T,7] y) <float[5,7] w, float[7] b> { h = MatMul(x, w)  y = Add(h, b) }",
               Placement((7, 5), (0,), (1,)), (5, 3, 5)),
    "MatMul of two axes": ("g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { y = MatMul(x, w) }",
                           Placement((7, 5), (0,), (1,)), (5, 5)),
    "MatMul of four axes": ("g (float[N,2,T,5] x) => (float[N,2,T,7] y) <float[5,7] w> { y = MatMul(x, w) }",
                            Placement((7, 5), (0,), (1,)), (5, 2, 3, 5)),
    "Gemm": ("""g (float[N,5] x) => (float[N,7] y) <float[7,5] w, float[7] b>
             { y = Gemm <transB = 1, alpha = -1.3, beta = 0.7> (x, w, b) }""", Placement((7, 5), (0,), (1,)), (5, 5)),
    "Gemm of flattened tokens": (
        """g (float[N,3,5] x) => (float[N,3,7] y) <float[5,7] w, float[7] b>
        { flat = Constant <value_ints = [-1, 5]> ()  back = Constant <value_ints = [-1, 3, 7]> ()
          t = Reshape(x, flat)  g = Gemm(t, w, b)  y = Reshape(g, back) }""", Placement((7, 5), (0,), (1,)), (5, 3, 5)),
    "Gather": ("g (int64[N,T] x) => (float[N,T,7] y) <float[9,7] w> { y = Gather(w, x) }",
               Placement((9, 7), (1,), (0,)), (5, 3)),
    "Conv": ("""g (float[N,5,6,8] x) => (float[N,7,P,Q] y) <float[7,5,2,3] w, float[7] b>
             { y = Conv <strides = [2, 1], pads = [1, 0, 0, 2]> (x, w, b) }""", Placement((7, 5, 2, 3), (0,), (1, 2, 3)), (5, 5, 6, 8)),
    "ConvTranspose": ("g (float[N,5,6] x) => (float[N,7,P] y) <float[5,7,2] w> { y = ConvTranspose(x, w) }",
                      Placement((5, 7, 2), (1,), (0, 2)), (5, 5, 6)),
    "two calls of one module": ("g (float[N,6] x) => (float[N,6] y) <float[6,6] w> { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, w) }",
                                Placement((6, 6), (0,), (1,)), (5, 6)),
}  # fmt: skip


def named(made):
    """The graph with names of modules at what reads ``w``."""
    for n, node in enumerate(node for node in made.graph.node if "w" in node.input):
        node.name = f"/m/q{f'_{n}' if n else ''}/{node.op_type}"
    return made


def values(shape, integer):
    draw = np.random.default_rng(3)
    return draw.integers(-9, 9, shape) if integer else draw.standard_normal(shape).astype(np.float32)


def wide(place):
    return updates.Update((updates._pair(place, 4),), place)


every_form = pytest.mark.parametrize(
    ("provider", "select"), [(p, s) for p in ("cpu", "cuda") for s in ("index", "weights")]
)


@pytest.mark.parametrize("name", GRAPHS)
@every_form
def test_every_row_has_what_it_chose(name, provider, select, tmp_path):
    text, place, shape = GRAPHS[name]
    base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
    given = [("two", Adapter({KEY: updates.made("lora", place)})), ("four", Adapter({KEY: wide(place)}))]
    put(base, tmp_path / "out.onnx", given, provider=provider, select=select)
    x = {"x": values(shape, name == "Gather")}
    alone = [session(base.path).run(None, x)[0]]
    for _, one in given:
        merge(one, base, tmp_path / "merged.onnx", force=True)
        alone.append(session(tmp_path / "merged.onnx").run(None, x)[0])
    index = np.array([2, 0, 1, 2, 0])
    mixed = np.array([[0, 1], [0, 0], [0.5, -0.25], [1, 0], [0, 2]], np.float32)
    for optimise in (True, False):
        running = session(tmp_path / "out.onnx", optimise=optimise)
        if select == "index":
            found = running.run(None, {**x, "lora.index": index})[0]
            wanted = np.stack([alone[n][row] for row, n in enumerate(index)])
            assert relative_error(found, wanted) <= 3e-6
            if provider == "cpu" and not optimise:
                bare = session(base.path, optimise=False).run(None, x)[0]
                assert np.array_equal(found[index == 0], bare[index == 0])
        elif name != "two calls of one module":  # which is not linear in the weights
            found = running.run(None, {**x, "lora.weights": mixed})[0]
            wanted = np.stack(
                [
                    alone[0][r] + sum(w * (a[r] - alone[0][r]) for w, a in zip(ws, alone[1:], strict=True))
                    for r, ws in enumerate(mixed)
                ]
            )
            assert relative_error(found, wanted) <= 5e-6
    for called, one in given:
        assert lf.digest(extract(open_base(tmp_path / "out.onnx"), name=called)) == lf.digest(one)
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


@pytest.mark.parametrize("name", ["MatMul", "Gather", "Gemm of flattened tokens"])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("wrong", [3, -1, -2, -3, 2**40])
def test_an_index_out_of_range_is_an_error(name, provider, wrong, tmp_path):
    text, place, shape = GRAPHS[name]
    base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
    given = [(n, Adapter({KEY: updates.made("lora", place)})) for n in ("a", "b")]
    put(base, tmp_path / "out.onnx", given, provider=provider)
    x = {"x": values(shape, name == "Gather"), "lora.index": np.array([1, wrong, 0, 0, 2])}
    for optimise in (True, False):
        with pytest.raises(Exception, match="indices element out of data bounds"):
            session(tmp_path / "out.onnx", optimise=optimise).run(None, x)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("select", ["index", "weights"])
def test_choices_for_another_number_of_rows_are_an_error(select, provider, tmp_path):
    """The twelve tokens of four rows could as well be those of six, three or two."""
    base = open_base(save(named(model(GRAPHS["Gemm of flattened tokens"][0])), tmp_path / "base.onnx"))
    one = adapter({KEY: lora(7, 5)})
    put(base, tmp_path / "out.onnx", [("a", one), ("b", one)], select=select, provider=provider)
    running, x = session(tmp_path / "out.onnx"), np.ones((4, 3, 5), np.float32)
    chosen = [np.zeros(n, np.int64) if select == "index" else np.zeros((n, 2), np.float32) for n in (4, 6, 3, 2)]
    name = f"lora.{select}"
    assert running.run(None, {"x": x, name: chosen[0]})[0].shape == (4, 3, 7)
    for wrong in chosen[1:]:
        with pytest.raises(Exception, match=r"broadcast|reshape|axis"):
            running.run(None, {"x": x, name: wrong})


@pytest.mark.parametrize("name", ["MatMul", "Conv", "Gather"])
def test_where_a_gather_gives_zeros_the_row_is_nan(name, tmp_path):
    """As on CUDA, whose Gather writes zeros beyond the range (gather_impl.cu): here the table holds one row more."""
    text, place, shape = GRAPHS[name]
    base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", Adapter({KEY: updates.made("lora", place)}))], provider="cuda")
    made = onnx.load(tmp_path / "out.onnx")
    table = next(t for t in made.graph.initializer if t.name.endswith("rows/table"))
    rows = onnx.numpy_helper.to_array(table)
    table.CopyFrom(onnx.numpy_helper.from_array(np.pad(rows, [(0, 1), (0, 0)]), table.name))
    x = {"x": values(shape, name == "Gather")}
    running = session(save(made, tmp_path / "zeros.onnx"))
    found = running.run(None, {**x, "lora.index": np.array([1, -7, 0, 0, 1])})[0]
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2, 3, 4]]).all()


@pytest.mark.parametrize("name", ["MatMul", "Conv", "Gather", "Gemm of flattened tokens"])
@every_form
def test_an_infinity_of_one_adapter_stays_in_its_rows(name, provider, select, tmp_path):
    text, place, shape = GRAPHS[name]
    base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
    good, bad = updates.made("lora", place), wide(place)
    bad["lora"].lora_A[...] = 3e38  # finite itself; x·A is not
    bad["lora"].lora_B[...] = 3e38
    put(
        base,
        tmp_path / "out.onnx",
        [("good", Adapter({KEY: good})), ("bad", Adapter({KEY: bad}))],
        provider=provider,
        select=select,
    )
    index = np.array([1, 2, 0, 2, 1])
    fed = {"lora.index": index} if select == "index" else {"lora.weights": np.eye(3, 2, -1, dtype=np.float32)[index]}
    found = session(tmp_path / "out.onnx").run(None, {"x": values(shape, name == "Gather"), **fed})[0]
    finite = np.isfinite(found.reshape(5, -1)).all(1)
    assert finite.tolist() == [True, False, True, False, True]


def test_adapters_of_other_targets_and_names_stand_in_one_graph(tmp_path):
    text = """g (float[N,T,5] x) => (float[N,T,4] y) <float[5,7] w, float[7,4] v>
      { ["/m/q/MatMul"] h = MatMul(x, w)  ["/m/v/MatMul"] y = MatMul(h, v) }"""
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    given = [
        ("q", adapter({KEY: (7, 5)})),
        ("v", adapter({"root.m.v.weight": lora(4, 7, rank=3)})),
        ("both", adapter({KEY: (7, 5), "m.v.weight": (4, 7)})),
    ]
    x = {"x": values((4, 3, 5), False)}
    for provider in ("cpu", "cuda"):
        put(base, tmp_path / "out.onnx", given, provider=provider)
        found = session(tmp_path / "out.onnx").run(None, {**x, "lora.index": np.arange(4)})[0]
        for n, (called, one) in enumerate(given, 1):
            merge(one, base, tmp_path / "merged.onnx", force=True)
            assert relative_error(found[n], session(tmp_path / "merged.onnx").run(None, x)[0][n]) <= 2e-6
            assert lf.digest(extract(open_base(tmp_path / "out.onnx"), name=called)) == lf.digest(one)
        (tmp_path / "out.onnx").unlink()


def test_targets_that_read_one_value_share_one_product_on_cuda(tmp_path):
    text = """g (float[N,T,5] x) => (float[N,T,7] y) <float[5,7] q, float[5,7] k, float[7,5] v>
      { ["/m/q/MatMul"] a = MatMul(x, q)  ["/m/k/MatMul"] b = MatMul(x, k)  ["/m/v/Gemm"] c = MatMul(a, v)
        s = Add(a, b)  d = Add(c, x)  ["/m/o/MatMul"] e = MatMul(d, q)  y = Add(s, e) }"""
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    given = [
        (n, adapter({"m.q.weight": lora(7, 5, rank=r), "m.k.weight": lora(7, 5, rank=2, seed=9)}))
        for n, r in (("a", 1), ("b", 3))
    ]
    put(base, tmp_path / "out.onnx", given, provider="cuda")
    ours = [n for n in onnx.load(tmp_path / "out.onnx").graph.node if n.name.startswith("lora/")]
    products = [n.name.rpartition("/")[2] for n in ours if n.op_type == "MatMul"]
    assert products == ["hidden", "products"]  # u of both, and what reads u: both, since they are small
    x = {"x": values((3, 2, 5), False)}
    found = session(tmp_path / "out.onnx").run(None, {**x, "lora.index": np.array([0, 1, 2])})[0]
    for n, (_, one) in enumerate(given, 1):
        merge(one, base, tmp_path / "merged.onnx", force=True)
        assert relative_error(found[n], session(tmp_path / "merged.onnx").run(None, x)[0][n]) <= 2e-6


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 5e-3), ("double", 1e-5)])
def test_other_dtypes_are_stacked_and_proved(dtype, limit, tmp_path):
    text = GRAPHS["MatMul"][0].replace("float", dtype)
    for provider in ("cpu", "cuda"):
        base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
        given = [("a", adapter({KEY: lora(7, 5, rank=3)})), ("b", adapter({KEY: lora(7, 5, seed=8)}))]
        proof = prove(base, put(base, tmp_path / f"{provider}.onnx", given, provider=provider))
        assert (proof.holds, proof.limit, proof.moved > 0.1) == (True, limit, True)


REFUSED = {
    "rows that are not said": ({"rows": ()}, "LF-705.*which axis"),
    "an input that is not there": ({"rows": ("z",)}, "LF-705"),
    "an axis that is not there": ({"rows": ("x:3",)}, "LF-705"),
    "another axis": ({"rows": ("x:1",)}, "LF-608.*axis 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_must_be_an_axis_that_the_targets_carry(case, tmp_path):
    options, rule = REFUSED[case]
    base = open_base(save(named(model(GRAPHS["MatMul"][0])), tmp_path / "base.onnx"))
    with pytest.raises(LoraFormatError, match=rule):
        put(base, tmp_path / "out.onnx", [("a", adapter({KEY: (7, 5)}))], **options)


LOST = {
    "summed over": "s = ReduceSum <keepdims = 1> (x, axes)  h = MatMul(s, w)",
    "turned round": "s = Transpose <perm = [1, 0, 2]> (x)  h = MatMul(s, w)",
    "joined": "s = Concat <axis = 0> (x, x)  h = MatMul(s, w)",
    "flattened by halves": "p = Constant <value_ints = [-1, 3, 5]> ()  u = Transpose <perm = [1, 0, 2]> (x)  s = Reshape(u, p)  h = MatMul(s, w)",
    "cumulated": "c = Constant <value_int = 0> ()  s = CumSum(x, c)  h = MatMul(s, w)",
    "turned over": "b = Constant <value_ints = [-1]> ()  e = Constant <value_ints = [-99999]> ()  s = Slice(x, b, e, axes, b)  h = MatMul(s, w)",
    "cut": "b = Constant <value_ints = [0]> ()  e = Constant <value_ints = [99999]> ()  s = Slice(x, b, e, b)  h = MatMul(s, w)",
    "moved along": "p = Constant <value_ints = [1, 0, 0, -1, 0, 0]> ()  s = Pad(x, p)  h = MatMul(s, w)",
    "picked": "i = Cast <to = 7> (x)  s = GatherElements <axis = 0> (x, i)  h = MatMul(s, w)",
    "picked by others' places": "i = Cast <to = 7> (z)  s = GatherElements <axis = 1> (x, i)  h = MatMul(s, w)",
    "another input's": "h = MatMul(z, w)",
    "in an unknown operator": "s = com.microsoft.Unheard(x)  h = MatMul(s, w)",
}  # fmt: skip


@pytest.mark.parametrize("how", LOST)
def test_where_the_rows_cannot_be_told_apart_the_target_is_refused(how, tmp_path):
    text = f"""g (float[N,4,5] x, float[N,4,5] z) => (float[P,Q,7] y) <float[5,7] w>
      {{ axes = Constant <value_ints = [0]> ()  {LOST[how]}  y = Identity(h) }}"""
    base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
    with pytest.raises(LoraFormatError, match="LF-608"):
        put(base, tmp_path / "out.onnx", [("a", adapter({KEY: (7, 5)}))])
    assert [path.name for path in tmp_path.iterdir()] == ["base.onnx"]


KEPT = {
    "picked in each row": "e = Sign(x)  i = Cast <to = 7> (e)  s = GatherElements <axis = -1> (x, i)  h = MatMul(s, w)",
    "picked from a table": "e = Sign(x)  i = Cast <to = 7> (e)  n = Shape(x)  o = Slice(sq, zero, b2, zero)  c = Concat <axis = 0> (o, o)  u = Expand(c, n)  s = GatherElements <axis = 2> (u, i)  h = MatMul(s, w)",
    "turned and turned back": "s = Transpose <perm = [1, 0, 2]> (x)  t = Relu(s)  u = Transpose <perm = [1, 0, 2]> (t)  h = MatMul(u, w)",
    "through attention": """t = Transpose <perm = [0, 2, 1]> (x)  s = MatMul(x, t)  p = Softmax <axis = -1> (s)
        o = MatMul(p, x)  h = MatMul(o, w)""",
    "flattened": "p = Constant <value_ints = [-1, 5]> ()  s = Reshape(x, p)  h = MatMul(s, w)",
    "heads split and joined": """p = Constant <value_ints = [0, 4, 5, 1]> ()  s = Reshape(x, p)
        t = Transpose <perm = [0, 2, 1, 3]> (s)  u = Transpose <perm = [0, 2, 1, 3]> (t)
        c = Shape(x)  v = Reshape(u, c)  h = MatMul(v, w)""",
    "all of them sliced": "b = Constant <value_ints = [0]> ()  e = Constant <value_ints = [2147483647]> ()  s = Slice(x, b, e, b)  h = MatMul(s, w)",
    "cut elsewhere, where it is computed": """n = Shape(x)  b = Constant <value_ints = [1]> ()  e = Slice(n, b, b2, zero)
        a = Constant <value_ints = [1]> ()  none = Sub(e, e)  t = Slice(x, none, e, a)  h = MatMul(t, w)""",
    "padded elsewhere": """p = Constant <value_ints = [0, 0, 1, 0, 0, 0]> ()  s = Pad(x, p)  b = Constant <value_ints = [1]> ()
        e = Constant <value_ints = [6]> ()  a = Constant <value_ints = [2]> ()  t = Slice(s, b, e, a)  h = MatMul(t, w)""",
    "in 8 bits": """q, qs, qz = DynamicQuantizeLinear(x)  codes = Constant <value = int8[5,5] {5, 0, 1, 0, 2, 0, 7, 0, 3, 0, 1, 0, 6, 0, 1,
        0, 4, 0, 8, 0, 2, 0, 3, 0, 9}> ()  i = MatMulInteger(q, codes, qz)  f = Cast <to = 1> (i)  t = Mul(f, qs)  h = MatMul(t, w)""",
    "through what ONNX Runtime adds": """f = com.microsoft.QuickGelu(x)  s = com.microsoft.FusedMatMul <transB = 0> (f, sq)
        p = Constant <value_ints = [-1, 5]> ()  r = Reshape(s, p)  c = Shape(x)  u = Reshape(r, c)  h = MatMul(u, w)""",
    "beside another input": "s = Add(z, x)  n = ReduceMean <keepdims = 1> (s, axes)  t = Sub(s, n)  h = MatMul(t, w)",
}  # fmt: skip


@pytest.mark.parametrize("how", KEPT)
def test_rows_are_followed_through_what_keeps_them(how, tmp_path):
    text = f"""g (float[N,4,5] x, float[N,4,5] z) => (float[P,Q,7] y) <float[5,7] w, float[5,5] sq>
      {{ axes = Constant <value_ints = [-1]> ()  zero = Constant <value_ints = [0]> ()
      b2 = Constant <value_ints = [2]> ()  {KEPT[how]}  y = Identity(h) }}"""
    if how == "flattened":
        text = text.replace("float[P,Q,7]", "float[P,7]")
    base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
    given = [("a", adapter({KEY: (7, 5)})), ("b", adapter({KEY: lora(7, 5, rank=3)}))]
    assert prove(base, put(base, tmp_path / "out.onnx", given)).holds
    x = {name: values((3, 4, 5), False) for name in ("x", "z")}
    found = session(tmp_path / "out.onnx").run(None, {**x, "lora.index": np.array([2, 0, 1])})[0].reshape(3, 4, 7)
    for row, number in enumerate([2, 0, 1]):
        merge(
            given[number - 1][1] if number else adapter({KEY: lora(7, 5, alpha=0)}),
            base,
            tmp_path / "m.onnx",
            force=True,
        )
        wanted = session(tmp_path / "m.onnx").run(None, x)[0].reshape(3, 4, 7)
        assert relative_error(found[row], wanted[row]) <= 3e-6


@pytest.mark.parametrize("name", [name for name, (_, place, _) in GRAPHS.items() if place.shape in ((7, 5), (6, 6))])
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_a_magnitude_is_chosen_with_its_pair(name, provider, tmp_path):
    text, place, shape = GRAPHS[name]
    base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
    dora = updates.made("dora", place)
    other = (
        replace(dora["lora"], alpha=-5.0),
        replace(dora["magnitude"], magnitude=dora["magnitude"].magnitude[::-1] * 2),
    )
    kinds = {"dora": dora, "plain": wide(place), "other": replace(dora, parts=other)}
    given = [(kind, Adapter({KEY: update})) for kind, update in kinds.items()]
    put(base, tmp_path / "out.onnx", given, provider=provider)
    x = {"x": values(shape, False)}
    alone = [session(base.path).run(None, x)[0]]
    for _, one in given:
        merge(one, base, tmp_path / "merged.onnx", force=True)
        alone.append(session(tmp_path / "merged.onnx").run(None, x)[0])
    assert min(relative_error(one, other) for one in alone for other in alone if one is not other) > 0.1
    index = np.array([3, 0, 1, 2, 1])
    for optimise in (True, False):
        found = session(tmp_path / "out.onnx", optimise=optimise).run(None, {**x, "lora.index": index})[0]
        assert relative_error(found, np.stack([alone[n][row] for row, n in enumerate(index)])) <= 3e-6
    assert np.array_equal(found[1], session(base.path, optimise=False).run(None, x)[0][1])
    for called, one in given:
        assert lf.digest(extract(open_base(tmp_path / "out.onnx"), name=called)) == lf.digest(one)
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


UNCHOSEN = {
    "a whole difference": ("MatMul", "delta", {}),
    "another weight": ("MatMul", "replace", {}),
    "a magnitude by weights": ("MatMul", "dora", {"select": "weights"}),
    "the magnitude of a kernel": ("Conv", "dora", {}),
}
WHY = {"a magnitude by weights": "is not linear", "the magnitude of a kernel": "of a product only, and Conv is none"}


@pytest.mark.parametrize("case", UNCHOSEN)
def test_what_no_row_could_choose_is_refused(case, tmp_path):
    name, kind, options = UNCHOSEN[case]
    text, place, _ = GRAPHS[name]
    base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
    way_out = "--select index" if "select" in options else "--mode branch|--to-lora R"
    with pytest.raises(LoraFormatError, match=rf"LF-608.*{WHY.get(case, 'no pair')}[\s\S]*({way_out})"):
        put(base, tmp_path / "out.onnx", [("a", Adapter({KEY: updates.made(kind, place)}))], **options)


@pytest.mark.parametrize(("bias", "chosen"), [("1,7", True), ("N,1", False), ("3,7", False)])
def test_a_magnitude_leaves_one_bias_for_all_rows(bias, chosen, tmp_path):
    """A Gemm adds a C of as many rows as x too; where there are as many as adapters, each would be taken for one's."""
    text = (
        f"g (float[3,5] x) => (float[3,7] y) <float[5,7] w, float[{bias.replace('N', '3')}] b> {{ y = Gemm(x, w, b) }}"
    )
    base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
    given = [(n, Adapter({KEY: updates.made("dora", Placement((7, 5), (0,), (1,)))})) for n in "ab"]
    if not chosen:
        with pytest.raises(LoraFormatError, match="LF-608"):
            put(base, tmp_path / "out.onnx", given)
        return
    put(base, tmp_path / "out.onnx", given)
    merge(given[0][1], base, tmp_path / "merged.onnx")
    x = feeds(session(base.path))
    found = session(tmp_path / "out.onnx").run(None, x | {"lora.index": np.array([1, 2, 1])})[0]
    assert relative_error(found, session(tmp_path / "merged.onnx").run(None, x)[0]) <= 3e-6


def test_an_x_that_is_one_row_has_none_to_choose(tmp_path):
    base = open_base(
        save(named(model("g (float[5] x) => (float[7] y) <float[5,7] w> { y = MatMul(x, w) }")), tmp_path / "base.onnx")
    )
    with pytest.raises(LoraFormatError, match=r"LF-608 .*multiplies along the axis of the rows"):
        put(base, tmp_path / "out.onnx", [("a", adapter({KEY: (7, 5)}))])


def test_options_of_another_mode_are_mistakes(tmp_path, run):
    save(named(model(GRAPHS["MatMul"][0])), tmp_path / "m.onnx")
    lf.save(adapter({KEY: (7, 5)}), tmp_path / "a.safetensors")
    words = ("attach", "a.safetensors", "--to", "m.onnx", "-o", "out.onnx")
    for more in (
        ("--rows", "x"),
        ("--mode", "stack", "--pad-rank", "3"),
        ("--mode", "swap", "--live-scale"),
        ("--mode", "swap", "--provider", "cuda"),
        ("--mode", "stack", "--rows", "x", "--topology", "folded"),
    ):
        assert run(*words, *more).code == 2, more
    assert run(*words, "--mode", "stack").code == 2
    done = run(*words, "--mode", "stack", "--rows", "x", "--verify", "--json")
    assert (done.code, done.json["proof"]["error"] <= 1e-5) == (0, True)


# No test that cannot fail.


def index_off_by_one(patch):
    whole = choice.Choice._columns
    patch.setattr(choice.Choice, "_columns", lambda self, owners, shape: whole(self, [n - 1 for n in owners], shape))


def mask_lost(patch):
    patch.setattr(choice.Choice, "keep", lambda self, run, site, hidden, axes, owners: hidden)


def scale_lost(patch):
    patch.setattr(Lora, "scale", property(lambda self: 1.0))


def owners_exchanged(patch):
    whole = choice.Choice._columns
    patch.setattr(choice.Choice, "_columns", lambda self, owners, shape: whole(self, owners[::-1], shape))


def slots_begin_with_an_adapter(patch):
    patch.setattr(
        stack.Stack,
        "_zeros",
        lambda self, make, shape, kind: make.node(
            "ConstantOfShape",
            [make.store("z", np.array(shape))],
            "o",
            value=onnx.numpy_helper.from_array(np.ones(1, np.float32)),
        ),
    )


def magnitudes_of_the_base(patch):
    patch.setattr(stack, "table", lambda make, site, ratios, count: None)


def magnitudes_one_slot_on(patch):
    whole = stack.table
    patch.setattr(
        stack,
        "table",
        lambda make, site, ratios, count: whole(make, site, {n - 1: g for n, g in ratios.items()}, count),
    )


def the_bias_is_rescaled_too(patch):
    patch.setattr(stack.magnitude, "rest", lambda make, form, site, bias, rest: make.node("Sub", [rest, rest], "none"))


@pytest.mark.parametrize("mutant", [magnitudes_of_the_base, magnitudes_one_slot_on, the_bias_is_rescaled_too])
def test_magnitudes_are_red_on_a_mutant(mutant, monkeypatch, tmp_path):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        test_a_magnitude_is_chosen_with_its_pair("Gemm", "cpu", tmp_path)


MUTANTS = [
    (index_off_by_one, "Conv"),
    (mask_lost, "Gather"),
    (scale_lost, "MatMul"),
    (owners_exchanged, "Conv"),
    (slots_begin_with_an_adapter, "MatMul"),
]


@pytest.mark.parametrize(("mutant", "graph"), MUTANTS)
def test_a_proof_is_red_on_a_mutant(mutant, graph, monkeypatch, tmp_path):
    text, place, _ = GRAPHS[graph]
    base = open_base(save(named(model(text)), tmp_path / "base.onnx"))
    given = [("two", Adapter({KEY: updates.made("lora", place)})), ("four", Adapter({KEY: wide(place)}))]
    assert prove(base, put(base, tmp_path / "good.onnx", given)).holds
    with monkeypatch.context() as patch:
        mutant(patch)
        plan = put(base, tmp_path / "bad.onnx", given)
    assert not prove(base, plan).holds
