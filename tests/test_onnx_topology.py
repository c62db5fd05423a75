"""Topologies of a branch: beside the operator, inside its product, in its weight; all compute the same, and come out again."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import test_onnx_packed as packed
import updates
from graphs import adapter, feeds, lora, model, run, save, session

import loraformat as lf
from loraformat import Adapter, LoraFormatError, Placement
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx.attaching import attach, joint, widen
from loraformat_converters.onnx.graph.nodes import Nodes

SHARED = """g (float[N,T,5] x) => (float[N,T,4] y) <float[5,7] q, float[5,7] k, float[6,5] v, float[7,6] o, float[6,4] p, float[6] b>
  { ["/m/q/MatMul"] a = MatMul(x, q)  ["/m/k/MatMul"] c = MatMul(x, k)  s = Mul(a, c)  ["/m/o/MatMul"] d = MatMul(s, o)
    h = Add(d, b)  turned = Transpose <perm = [1, 0]> (v)  ["/m/v/MatMul"] e = MatMul(x, turned)  f = Add(h, e)
    ["/m/p/MatMul"] y = MatMul(f, p) }"""
SIZES = {"m.q.weight": (7, 5), "m.k.weight": (7, 5), "m.v.weight": (6, 5), "m.o.weight": (6, 7), "m.p.weight": (4, 6)}
GEMM = """g (float[N,5] x) => (float[N,7] y) <float[7,5] w, float[5,7] v, float[7] b>
  { ["/m/q/Gemm"] h = Gemm <transB = 1, alpha = -1.3, beta = 0.7> (x, w, b)  ["/m/v/MatMul"] g = MatMul(x, v)
    y = Add(h, g) }"""
PAIRS = {
    "siblings": (SHARED, {k: lora(*s, rank=n + 1, seed=n) for n, (k, s) in enumerate(SIZES.items())}),
    "some of them": (SHARED, {"m.k.weight": lora(7, 5, rank=3), "m.p.weight": lora(4, 6)}),
    "Gemm": (GEMM, {"m.q.weight": lora(7, 5, rank=3), "m.v.weight": lora(7, 5, seed=4)}),
}


def put(base, out, adapters, topology, **options):
    plan = prepare("attach", adapters, base, Options(out, topology=topology, **options))
    base.apply(plan)
    onnx.checker.check_model(out, full_check=True)
    return plan


def products(path):
    """The MatMuls that ONNX Runtime runs, and what else of ours is left."""
    session(path, optimised=path.with_suffix(".optimised"))
    nodes = onnx.load(path.with_suffix(".optimised")).graph.node
    return [n.op_type for n in nodes if "MatMul" in n.op_type or n.op_type in ("Gemm", "Concat")]


@pytest.mark.parametrize("topology", ["concat", "folded"])
@pytest.mark.parametrize("case", PAIRS)
def test_a_topology_computes_what_a_branch_computes(case, topology, tmp_path):
    text, targets = PAIRS[case]
    base, given = open_base(save(model(text), tmp_path / "base.onnx")), Adapter(targets)
    put(base, tmp_path / "branch.onnx", [("a", given)], "separate")
    plan = put(base, tmp_path / "out.onnx", [("a", given)], topology)
    merge(given, base, tmp_path / "merged.onnx")
    for optimise in (True, False):
        found, branch, merged = (
            run(tmp_path / f"{name}.onnx", optimise=optimise)["y"] for name in ("out", "branch", "merged")
        )
        assert relative_error(found, branch) <= 1e-6
        assert relative_error(found, merged) <= 2e-6
        assert relative_error(found, run(base.path)["y"]) > 0.01
    assert prove(base, plan).holds
    assert lf.digest(extract(open_base(tmp_path / "out.onnx"))) == lf.digest(given)
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


def test_what_reads_one_value_has_one_product_more(tmp_path):
    base, given = open_base(save(model(SHARED), tmp_path / "base.onnx")), Adapter(PAIRS["siblings"][1])
    put(base, tmp_path / "concat.onnx", [("a", given)], "concat")
    put(base, tmp_path / "folded.onnx", [("a", given)], "folded")
    bare = products(base.path)
    assert len(products(tmp_path / "folded.onnx")) == len(bare) == 5
    found = products(tmp_path / "concat.onnx")
    # x is read by three, s and f by one each: three products and three Concats more, and W is in no Concat; two of the
    # three are one, the third's weight is not stored as it is read.
    assert (found.count("Concat"), len(found)) == (3, 10)


@pytest.mark.parametrize("opset", [7, 11, 18])
@pytest.mark.parametrize(("dtype", "limit"), [("float", 1e-6), ("float16", 5e-3)])
def test_small_products_of_one_x_are_one_product(opset, dtype, limit, monkeypatch, tmp_path):
    """One is an output of the graph, two are read in branches of an If."""
    text = """g (float[N,T,5] x, bool c) => (float[N,T,6] y, float[N,T,8] q) <float[5,8] wq, float[5,6] wk, float[5,6] wv>
      { ["/m/q/MatMul"] q = MatMul(x, wq)  ["/m/k/MatMul"] k = MatMul(x, wk)  ["/m/v/MatMul"] v = MatMul(x, wv)
        y = If (c) <then_branch = one () => (float[N,T,6] a) { a = Mul(k, v) },
                    else_branch = other () => (float[N,T,6] b) { b = Sub(k, v) }> }"""
    base = open_base(save(model(text.replace("float", dtype), opset=opset), tmp_path / "base.onnx"))
    sizes = {"q": 8, "k": 6, "v": 6}
    given = Adapter({f"m.{name}.weight": lora(n, 5, rank=6, seed=ord(name)) for name, n in sizes.items()})
    merge(given, base, tmp_path / "merged.onnx")
    for small, cut in ((29, []), (30, [2]), (40, [3])):
        monkeypatch.setattr(joint, "_SMALL", small)
        out = tmp_path / f"{small}.onnx"
        plan = put(base, out, [("a", given)], "concat")
        assert [len(node.output) for node in onnx.load(out).graph.node if node.op_type == "Split"] == cut
        for optimise, condition in ((True, True), (False, False)):
            x = feeds(session(base.path)) | {"c": np.array(condition)}
            found, truth = (session(path, optimise=optimise).run(None, x) for path in (out, tmp_path / "merged.onnx"))
            assert all(relative_error(*pair) <= limit for pair in zip(found, truth, strict=True))
        assert prove(base, plan).holds
        assert lf.digest(extract(open_base(out))) == lf.digest(given)
        detach(open_base(out), tmp_path / f"{small}.again.onnx")
        assert (tmp_path / f"{small}.again.onnx").read_bytes() == base.path.read_bytes()


@pytest.mark.parametrize("opset", [7, 11, 18])
def test_where_zeros_would_cost_more_than_kernels_each_weight_has_its_own_concat(opset, monkeypatch, tmp_path):
    base, given = open_base(save(model(SHARED, opset=opset), tmp_path / "base.onnx")), Adapter(PAIRS["siblings"][1])
    put(base, tmp_path / "together.onnx", [("a", given)], "concat")
    monkeypatch.setattr(widen, "_KERNEL", 0)
    plan = put(base, tmp_path / "apart.onnx", [("a", given)], "concat")
    split = next(node for node in onnx.load(tmp_path / "apart.onnx").graph.node if node.op_type == "Split")
    assert len(split.output) == 3
    assert products(tmp_path / "apart.onnx").count("Concat") == 5
    for optimise in (True, False):
        found, together = (run(tmp_path / f"{name}.onnx", optimise=optimise)["y"] for name in ("apart", "together"))
        assert relative_error(found, together) <= 1e-6
    assert prove(base, plan).holds
    assert lf.digest(extract(open_base(tmp_path / "apart.onnx"))) == lf.digest(given)
    detach(open_base(tmp_path / "apart.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


def test_a_model_whose_products_are_joined_is_asked_about_as_it_was(tmp_path):
    """Its own operators multiply nothing with nothing, [0, 1] · [1, 1]: that is no weight of anything."""
    base, given = open_base(save(model(SHARED), tmp_path / "base.onnx")), Adapter(PAIRS["siblings"][1])
    put(base, tmp_path / "out.onnx", [("a", given)], "concat", live_scale=True)
    out = open_base(tmp_path / "out.onnx")
    assert out.linears(lf.Hints()) == base.linears(lf.Hints())
    assert out.describe()["weights"] == base.describe()["weights"]
    (place,) = out.resolve(given, lf.Hints()).require().targets["m.q.weight"]
    assert place.handle.root_name == "q"
    for pair in ((base, out), (out, base)):
        with pytest.raises(LoraFormatError, match=r"LF-608  .*out.onnx has an adapter attached"):
            lf.extract(*pair, rank=2)


def test_zeros_are_weighed_by_the_rows_that_they_fill(tmp_path):
    """q, k and v of a model as large as a real one: at rank 16 they share u, at rank 256 they do not."""
    text = """g (float16[N,64] x) => (float16[N,4096] y) <float16[64,4096] q, float16[64,4096] k, float16[64,4096] v>
      { ["/m/q/MatMul"] a = MatMul(x, q)  ["/m/k/MatMul"] b = MatMul(x, k)  ["/m/v/MatMul"] c = MatMul(x, v)
        d = Mul(a, b)  y = Add(d, c) }"""
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    for rank, cut in ((16, False), (384, True)):
        given = Adapter({f"m.{n}.weight": lora(4096, 64, rank=rank, seed=i) for i, n in enumerate("qkv")})
        put(base, tmp_path / f"{rank}.onnx", [("a", given)], "concat")
        nodes = onnx.load(tmp_path / f"{rank}.onnx").graph.node
        assert any(node.op_type == "Split" and "hidden" in node.input[0] for node in nodes) == cut


def test_several_adapters_and_live_strengths_stand_in_one_product(tmp_path):
    base = open_base(save(model(SHARED), tmp_path / "base.onnx"))
    given = {"a": Adapter(PAIRS["siblings"][1]), "b": Adapter(PAIRS["some of them"][1])}
    put(base, tmp_path / "out.onnx", list(given.items()), "concat", live_scale=True)
    running = session(tmp_path / "out.onnx")
    x = feeds(session(base.path))
    for a, b in ((1.0, 1.0), (0.5, -2.0), (0.0, 1.0), (0.0, 0.0)):
        found = running.run(
            None, {**x, "lora.scale.a": np.array(a, np.float32), "lora.scale.b": np.array(b, np.float32)}
        )[0]
        merge([(given["a"], a), (given["b"], b)], base, tmp_path / "merged.onnx", force=True)
        assert relative_error(found, session(tmp_path / "merged.onnx").run(None, x)[0]) <= 2e-6
    for name, one in given.items():
        assert lf.digest(extract(open_base(tmp_path / "out.onnx"), name=name)) == lf.digest(one)
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 5e-3), ("double", 1e-6)])
def test_other_dtypes(dtype, limit, tmp_path):
    base = open_base(save(model(SHARED.replace("float", dtype)), tmp_path / "base.onnx"))
    kind = np.float64 if dtype == "double" else np.float32
    given = Adapter({key: lora(*size, dtype=kind, seed=7) for key, size in SIZES.items()})
    merge(given, base, tmp_path / "merged.onnx")
    wanted = run(tmp_path / "merged.onnx")["y"].astype(np.float64)
    for topology in ("concat", "folded"):
        put(base, tmp_path / f"{topology}.onnx", [("a", given)], topology)
        assert relative_error(run(tmp_path / f"{topology}.onnx")["y"].astype(np.float64), wanted) <= limit


OTHERS = {
    "a convolution": ("""g (float[N,5,6] x) => (float[N,7,P] y) <float[7,5,2] w> { ["/m/q/Conv"] y = Conv(x, w) }""",
                      Placement((7, 5, 2), (0,), (1, 2)), "lora"),
    "a table": ("""g (int64[N] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/Gather"] y = Gather(w, x) }""",
                Placement((5, 7), (1,), (0,)), "lora"),
    "a DoRA": ("""g (float[N,5] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }""",
               Placement((7, 5), (0,), (1,)), "dora"),
    "x on the right": ("""g (float[5,N] x) => (float[7,N] y) <float[7,5] w> { ["/m/q/MatMul"] y = MatMul(w, x) }""",
                       Placement((7, 5), (0,), (1,)), "lora"),
    "two calls": ("""g (float[N,6] x) => (float[N,6] y) <float[6,6] w>
                  { ["/m/q/MatMul"] h = MatMul(x, w)  r = Relu(h)  ["/m/q_1/MatMul"] y = MatMul(r, w) }""",
                  Placement((6, 6), (0,), (1,)), "lora"),
    "x turned": ("""g (float[5,N] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/Gemm"] y = Gemm <transA = 1> (x, w) }""",
                 Placement((7, 5), (0,), (1,)), "lora"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_has_no_other_topology_keeps_its_branch_and_is_told(case, tmp_path):
    text, place, kind = OTHERS[case]
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    given = Adapter({"m.q.weight": updates.made(kind, place)})
    for topology in ("concat", "folded"):
        plan = put(base, tmp_path / f"{topology}.onnx", [("a", given)], topology)
        assert prove(base, plan).holds
        told = [note for note in plan.notes if "branch of their own" in note]
        assert bool(told) == (topology == "concat")
        assert lf.digest(extract(open_base(tmp_path / f"{topology}.onnx"))) == lf.digest(given)
        detach(open_base(tmp_path / f"{topology}.onnx"), tmp_path / f"{topology}.again.onnx")
        assert (tmp_path / f"{topology}.again.onnx").read_bytes() == base.path.read_bytes()


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "MatMulNBits"])
@pytest.mark.parametrize("topology", ["concat", "folded"])
def test_rows_of_a_packed_product_and_a_quantised_one(form, topology, tmp_path):
    w = packed.weight()
    base, given = open_base(save(packed.product(form, w), tmp_path / "base.onnx")), packed.ours(w)
    plan = put(base, tmp_path / "out.onnx", [("a", given)], topology)
    put(base, tmp_path / "branch.onnx", [("a", given)], "separate")
    found, branch = (run(tmp_path / f"{name}.onnx")["y"] for name in ("out", "branch"))
    assert relative_error(found, branch) <= 1e-6
    assert relative_error(found, run(base.path)["y"]) > 1e-3
    assert any("branch of their own" in note for note in plan.notes) == (form == "MatMulNBits")
    assert lf.digest(extract(open_base(tmp_path / "out.onnx"))) == lf.digest(given)
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


def test_for_cuda_it_is_the_product_and_for_the_cpu_it_is_beside(tmp_path):
    base, given = open_base(save(model(SHARED), tmp_path / "base.onnx")), Adapter(PAIRS["siblings"][1])
    for topology, provider in (("separate", "cpu"), ("concat", "cuda")):
        put(base, tmp_path / "auto.onnx", [("a", given)], "auto", provider=provider)
        put(base, tmp_path / "stated.onnx", [("a", given)], topology)
        assert (tmp_path / "auto.onnx").read_bytes() == (tmp_path / "stated.onnx").read_bytes()
        for name in ("auto", "stated"):
            (tmp_path / f"{name}.onnx").unlink()


REFUSED = [
    {"topology": "concat", "prefold": True},
    {"topology": "folded", "prefold": True},
    {"topology": "folded", "live_scale": True},
]


@pytest.mark.parametrize("options", REFUSED)
def test_topologies_that_contradict_another_option_are_refused(options, tmp_path):
    base = open_base(save(model(SHARED), tmp_path / "base.onnx"))
    with pytest.raises(LoraFormatError, match="LF-705"):
        put(base, tmp_path / "out.onnx", [("a", adapter({"m.q.weight": (7, 5)}))], **options)
    assert [path.name for path in tmp_path.iterdir()] == ["base.onnx"]


# No test that cannot fail.


def columns_not_shifted(patch):
    whole = widen.padded
    patch.setattr(widen, "padded", lambda make, value, ends, role: whole(make, value, [0, 0, 0, sum(ends)], role))


def scale_lost(patch):
    patch.setattr(lf.Lora, "scale", property(lambda self: 1.0))


def every_weight_has_the_rows_of_the_first(patch):
    whole = widen._below
    patch.setattr(widen, "_below", lambda make, uses, apart: whole(make, uses, apart)[:1] * len(uses))


def every_weight_has_the_part_of_the_first(patch):
    patch.setattr(widen, "_KERNEL", 0)
    whole = Nodes.split
    patch.setattr(Nodes, "split", lambda self, value, sizes, role: whole(self, value, sizes, role)[:1] * len(sizes))


def every_product_is_of_the_first_weight(patch):
    whole = widen.join
    patch.setattr(widen, "join", lambda run, x, uses: whole(run, x, [(site, uses[0][1]) for site, _ in uses]))


def strengths_of_the_first(patch):
    patch.setattr(attach, "owners", lambda pairs: [0 for pair in pairs for _ in range(pair.r)])


SQUARE = """g (float[N,6] x) => (float[N,6] y) <float[6,6] q, float[6,6] k>
  { ["/m/q/MatMul"] a = MatMul(x, q)  ["/m/k/MatMul"] b = MatMul(x, k)  y = Mul(a, b) }"""


@pytest.mark.parametrize(
    "mutant",
    [
        columns_not_shifted,
        scale_lost,
        every_weight_has_the_rows_of_the_first,
        every_weight_has_the_part_of_the_first,
        every_product_is_of_the_first_weight,
    ],
)
def test_a_proof_is_red_on_a_mutant(mutant, monkeypatch, tmp_path):
    """All square, the rank too: nothing is caught by a shape."""
    base = open_base(save(model(SQUARE), tmp_path / "base.onnx"))
    given = Adapter({f"m.{n}.weight": lora(6, 6, rank=6, seed=i) for i, n in enumerate("qk")})
    assert prove(base, put(base, tmp_path / "good.onnx", [("a", given)], "concat")).holds
    with monkeypatch.context() as patch:
        mutant(patch)
        plan = put(base, tmp_path / "bad.onnx", [("a", given)], "concat")
    assert not prove(base, plan).holds


def test_live_strengths_are_red_on_a_mutant(monkeypatch, tmp_path):
    strengths_of_the_first(monkeypatch)
    with pytest.raises(AssertionError):
        test_several_adapters_and_live_strengths_stand_in_one_product(tmp_path)
