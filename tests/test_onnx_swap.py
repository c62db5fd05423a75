"""Swap: what is fed acts, what is not fed leaves the base as it was, and an adapter of another model is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import updates
from graphs import adapter, feeds, lora, model, save, session
from onnxruntime.quantization import quantize_dynamic

import loraformat as lf
from loraformat import Adapter, LoraFormatError, Placement
from loraformat.base import Options
from loraformat.registry import layout, open_base
from loraformat.testing import relative_error
from loraformat.verbs.convert import convert
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.attaching import swap
from loraformat_converters.onnx.attaching.slots import Slots
from loraformat_converters.onnx.changing.record import Record
from loraformat_converters.onnx.runtime import Session

KEY = "m.q.weight"
MATMUL = """g (float[N,T,5] x) => (float[N,T,7] y) <float[5,7] w, float[7] b>
  { ["/m/q/MatMul"] h = MatMul(x, w)  y = Add(h, b) }"""


def put(base, out, adapters, **options):
    plan = prepare("attach", adapters, base, Options(out, mode="swap", **options))
    base.apply(plan)
    onnx.checker.check_model(out, full_check=True)
    return plan


def run(running, path=None, seed=3):
    """The first output, with the adapter at ``path`` active."""
    options, held = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if path is not None:
        held.Load(str(path))
        options.add_active_adapter(held)
    return running.run(None, feeds(running, seed), options)[0]


# name → (graph, how the parameter lies for the adapter)
GRAPHS = {
    "MatMul": (MATMUL, Placement((7, 5), (0,), (1,))),
    "MatMul, weight on the left": (
        """g (float[5,N] x) => (float[7,N] y) <float[7,5] w> { ["/m/q/MatMul"] y = MatMul(w, x) }""",
        Placement((7, 5), (0,), (1,)),
    ),
    "MatMul of experts": (
        """g (float[2,N,5] x) => (float[2,N,7] y) <float[2,5,7] w> { ["/m/q/MatMul"] y = MatMul(x, w) }""",
        Placement((2, 5, 7), (2,), (1,), (0,)),
    ),
    "Gemm": (
        """g (float[N,5] x) => (float[N,7] y) <float[7,5] w, float[7] b>
        { ["/m/q/Gemm"] y = Gemm <transB = 1, alpha = -1.3, beta = 0.7> (x, w, b) }""",
        Placement((7, 5), (0,), (1,)),
    ),
    "Gemm, x turned": (
        """g (float[5,N] x) => (float[N,7] y) <float[5,7] w> { ["/m/q/Gemm"] y = Gemm <transA = 1> (x, w) }""",
        Placement((7, 5), (0,), (1,)),
    ),
    "Gather": (
        """g (int64[N,T] x) => (float[N,T,7] y) <float[9,7] w> { ["/m/q/Gather"] y = Gather(w, x) }""",
        Placement((9, 7), (1,), (0,)),
    ),
    "Conv": (
        """g (float[N,5,6,8] x) => (float[N,7,P,Q] y) <float[7,5,2,3] w, float[7] b>
        { ["/m/q/Conv"] y = Conv <strides = [2, 1], pads = [1, 0, 0, 2]> (x, w, b) }""",
        Placement((7, 5, 2, 3), (0,), (1, 2, 3)),
    ),
    "Conv of one axis": (
        """g (float[N,5,6] x) => (float[N,7,P] y) <float[7,5,2] w> { ["/m/q/Conv"] y = Conv(x, w) }""",
        Placement((7, 5, 2), (0,), (1, 2)),
    ),
    "ConvTranspose": (
        """g (float[N,5,6,8] x) => (float[N,7,P,Q] y) <float[5,7,2,3] w>
        { ["/m/q/ConvTranspose"] y = ConvTranspose <strides = [2, 1]> (x, w) }""",
        Placement((5, 7, 2, 3), (1,), (0, 2, 3)),
    ),
    "two calls of one module": (
        """g (float[N,6] x) => (float[N,6] y) <float[6,6] w>
        { ["/m/q/MatMul"] h = MatMul(x, w)  r = Relu(h)  ["/m/q_1/MatMul"] y = MatMul(r, w) }""",
        Placement((6, 6), (0,), (1,)),
    ),
}  # fmt: skip
every_graph = pytest.mark.parametrize("name", GRAPHS)


@every_graph
@pytest.mark.parametrize("pad", [None, 4])
def test_what_is_fed_acts_and_nothing_else(name, pad, tmp_path):
    text, place = GRAPHS[name]
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    given = [("two", Adapter({KEY: updates.made("lora", place)})), ("four", Adapter({KEY: wide(place)}))]
    padded = {} if pad is None else {"pad_rank": pad}
    put(base, tmp_path / "out.onnx", given, **padded)
    for optimise in (True, False):
        running = session(tmp_path / "out.onnx", optimise=optimise)
        plain = session(base.path, optimise=optimise)
        assert np.array_equal(run(running), run(plain)) or relative_error(run(running), run(plain)) <= 1e-6 * optimise
        for called, one in given:
            merge(one, base, tmp_path / "merged.onnx", force=True)
            wanted = run(session(tmp_path / "merged.onnx", optimise=optimise))
            found = run(running, tmp_path / f"out.{called}.onnx_adapter")
            assert relative_error(found, wanted) <= 3e-6
            assert relative_error(found, run(plain)) > 0.01
        assert relative_error(run(running), run(plain)) <= 1e-6  # and is gone again
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


def wide(place):
    """An update of rank 4."""
    return updates.Update((updates._pair(place, 4),), place)


@pytest.mark.parametrize("style", ["native", "olive", "genai"])
@pytest.mark.parametrize("dtype", ["float", "float16", "double"])
def test_slots_go_by_the_names_of_their_style_and_in_the_dtype_of_the_weight(style, dtype, tmp_path):
    text = MATMUL.replace("/m/q/", "/h/self_attn/q/").replace("float", dtype)
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    given = adapter({"h.self_attn.q.weight": (7, 5)})
    put(base, tmp_path / "out.onnx", [("a", given)], slot_names=style)
    names = {
        "native": "lora/h.self_attn.q.weight/A",
        "olive": "h.self_attn.q.lora_A.weight",
        "genai": "h.attn.q.lora_A.MatMul.weight",
    }
    running = session(tmp_path / "out.onnx")
    assert names[style] in [value.name for value in running.get_overridable_initializers()]
    merge(given, base, tmp_path / "merged.onnx")
    wanted = run(session(tmp_path / "merged.onnx"))
    found = run(running, tmp_path / "out.a.onnx_adapter")
    assert relative_error(found, wanted) <= (2e-3 if dtype == "float16" else 2e-6)
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


def test_required_slots_are_inputs_and_every_file_fills_all_of_them(tmp_path):
    text = """g (float[N,5] x) => (float[N,4] y) <float[5,7] w, float[7,4] v>
      { ["/m/q/MatMul"] h = MatMul(x, w)  ["/m/v/MatMul"] y = MatMul(h, v) }"""
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    one, both = adapter({KEY: (7, 5)}), adapter({KEY: lora(7, 5, rank=3), "m.v.weight": (4, 7)})
    put(base, tmp_path / "out.onnx", [("one", one), ("both", both)], slots="required")
    running = session(tmp_path / "out.onnx")
    slots = {value.name for value in running.get_inputs()} - {"x"}
    assert not running.get_overridable_initializers()
    for called, given in (("one", one), ("both", both)):
        tensors = tort.read(tmp_path / f"out.{called}.onnx_adapter").tensors
        assert tensors.keys() == slots
        merge(given, base, tmp_path / "merged.onnx", force=True)
        wanted = session(tmp_path / "merged.onnx")
        x = feeds(wanted)
        assert relative_error(running.run(None, {**x, **tensors})[0], wanted.run(None, x)[0]) <= 2e-6


def test_patterns_make_slots_that_no_adapter_has_asked_for_yet(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [], targets=("q",))
    lf.save(adapter({KEY: lora(7, 5, alpha=2)}), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a.onnx_adapter", model=tmp_path / "out.onnx")
    merge(lf.load(tmp_path / "a.safetensors"), base, tmp_path / "merged.onnx")
    found = run(session(tmp_path / "out.onnx"), tmp_path / "a.onnx_adapter")
    assert relative_error(found, run(session(tmp_path / "merged.onnx"))) <= 2e-6
    with pytest.raises(LoraFormatError, match="LF-705"):
        put(base, tmp_path / "x.onnx", [], targets=("nothing",))


def test_an_adapter_written_for_the_model_later_is_the_one_that_attach_writes(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    given = adapter({KEY: lora(7, 5, alpha=2)})
    put(base, tmp_path / "out.onnx", [("a", given)])
    lf.save(given, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a.onnx_adapter", model=tmp_path / "out.onnx")
    assert (tmp_path / "a.onnx_adapter").read_bytes() == (tmp_path / "out.a.onnx_adapter").read_bytes()
    assert tort.read(tmp_path / "a.onnx_adapter").model_version == open_base(tmp_path / "out.onnx").slots.version


MISFITS = {
    "a target without a slot": (adapter({"m.k.weight": lora(7, 5, alpha=2)}), "LF-602"),
    "other sizes": (adapter({KEY: lora(7, 6, alpha=2)}), "LF-606"),
    "a scale": (adapter({KEY: lora(7, 5)}), "LF-508.*\n.*--fold-scale"),
    "no pair": (Adapter({KEY: updates.made("dora", Placement((7, 5), (0,), (1,)))}), "LF-508"),
    "a rank over the slots'": (adapter({KEY: lora(7, 5, rank=4, alpha=4)}), "LF-606.*rank 4"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_adapter_that_does_not_fit_the_slots_is_refused(case, tmp_path):
    given, rule = MISFITS[case]
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [], targets=("q",), pad_rank=3)
    lf.save(given, tmp_path / "a.safetensors")
    with pytest.raises(LoraFormatError, match=rule):
        convert(tmp_path / "a.safetensors", tmp_path / "a.onnx_adapter", model=tmp_path / "out.onnx")
    assert not (tmp_path / "a.onnx_adapter").exists()


def test_slots_of_half_precision_take_rounding_only_when_asked(tmp_path, run):
    save(model(MATMUL.replace("float", "float16")), tmp_path / "m.onnx")
    lf.save(adapter({KEY: lora(7, 5, alpha=2)}), tmp_path / "a.safetensors")
    assert run("attach", "--to", "m.onnx", "-o", "out.onnx", "--mode", "swap", "-t", "q").code == 0
    done = run("convert", "a.safetensors", "a.onnx_adapter", "--for", "out.onnx")
    assert (done.code, "--dtype float16" in done.err) == (1, True)
    assert run("convert", "a.safetensors", "a.onnx_adapter", "--for", "out.onnx", "--dtype", "float16").code == 0
    done = run("convert", "a.safetensors", "b.onnx_adapter", "--for", "m.onnx")
    assert (done.code, "no inputs for an adapter" in done.err) == (2, True)


def test_values_beyond_half_precision_are_refused(tmp_path):
    base = open_base(save(model(MATMUL.replace("float", "float16")), tmp_path / "base.onnx"))
    given = Adapter(
        {
            KEY: updates.Update(
                (updates.Lora(np.full((2, 5), 1e5, np.float32), np.ones((7, 2), np.float32), 1.0, "factor"),)
            )
        }
    )
    with pytest.raises(LoraFormatError, match="LF-612"):
        put(base, tmp_path / "out.onnx", [("a", given)])
    assert [path.name for path in tmp_path.iterdir()] == ["base.onnx"]


REFUSED = {
    "a magnitude of other axes": ("dora of columns", {}, "LF-508"),
    "a LoHa": ("loha", {}, "LF-508.*\n.*--to-lora"),
    "a dense change": ("delta", {}, "LF-508"),
    "a rank over all slots'": ("lora", {"pad_rank": 1}, "LF-606"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fed_is_refused_before_anything_is_written(case, tmp_path):
    kind, options, rule = REFUSED[case]
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    given = Adapter({KEY: updates.made(kind, Placement((7, 5), (0,), (1,)))})
    with pytest.raises(LoraFormatError, match=rule):
        put(base, tmp_path / "out.onnx", [("a", given)], **options)
    assert [path.name for path in tmp_path.iterdir()] == ["base.onnx"]


def test_a_model_whose_initializers_are_all_inputs_has_required_slots_only(tmp_path):
    made = model(MATMUL, ir=3, opset=11)
    for tensor in made.graph.initializer:
        made.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    base = open_base(save(made, tmp_path / "base.onnx"))
    given = adapter({KEY: (7, 5)})
    with pytest.raises(LoraFormatError, match=r"LF-608.*IR version 4(.|\n)*--slots required"):
        put(base, tmp_path / "out.onnx", [("a", given)])
    with pytest.raises(LoraFormatError, match=r"LF-608.*IR version 4"):
        prepare("attach", [("a", given)], base, Options(tmp_path / "out.onnx", live_scale=True))
    put(base, tmp_path / "out.onnx", [("a", given)], slots="required")
    merge(given, base, tmp_path / "merged.onnx")
    tensors = tort.read(tmp_path / "out.a.onnx_adapter").tensors
    x = {"x": np.ones((2, 3, 5), np.float32)}
    found = session(tmp_path / "out.onnx").run(None, {**x, **tensors})[0]
    assert relative_error(found, session(tmp_path / "merged.onnx").run(None, x)[0]) <= 2e-6
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


@pytest.mark.parametrize("name", ["a/b", "../a", ".a", ""])
def test_a_name_is_a_file_beside_the_model(name, tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    if name:
        with pytest.raises(LoraFormatError, match="LF-705"):
            put(base, tmp_path / "out.onnx", [(name, adapter({KEY: (7, 5)}))])


def test_an_adapters_file_is_not_overwritten_unasked(tmp_path, run):
    save(model(MATMUL), tmp_path / "m.onnx")
    lf.save(adapter({KEY: (7, 5)}), tmp_path / "a.safetensors")
    (tmp_path / "out.a.onnx_adapter").write_text("mine")
    done = run("attach", "a=a.safetensors", "--to", "m.onnx", "-o", "out.onnx", "--mode", "swap")
    assert (done.code, "LF-702" in done.err) == (1, True)
    assert ((tmp_path / "out.a.onnx_adapter").read_text(), (tmp_path / "out.onnx").exists()) == ("mine", False)
    done = run(
        "attach",
        "a=a.safetensors",
        "--to",
        "m.onnx",
        "-o",
        "out.onnx",
        "--mode",
        "swap",
        "--force",
        "--verify",
        "--json",
    )
    assert (done.code, done.json["proof"]["error"] <= 1e-5, done.json["proof"]["moved"] > 0.1) == (0, True, True)


def test_the_adapter_of_a_swap_is_extracted_from_its_file(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", adapter({KEY: (7, 5)}))])
    with pytest.raises(LoraFormatError, match=r"LF-613.*does not hold it"):
        extract(open_base(tmp_path / "out.onnx"))


def test_a_swap_that_was_changed_since_is_not_detached(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", adapter({KEY: (7, 5)}))])
    made = onnx.load(tmp_path / "out.onnx")
    next(t for t in made.graph.initializer if t.name == "b").raw_data = bytes(28)
    with pytest.raises(LoraFormatError, match="LF-613"):
        detach(open_base(save(made, tmp_path / "x.onnx")), tmp_path / "d.onnx")


@pytest.mark.parametrize(
    "value", [{}, {"slots": 3}, {"slots": {"k": {}}, "required": False}, {"slots": {"k": {"a": 1}}}, 7]
)
def test_slots_that_cannot_be_read_are_a_fault(value, tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", adapter({KEY: (7, 5)}))])
    made = onnx.load(tmp_path / "out.onnx")
    prop = next(p for p in made.metadata_props if p.key == "loraformat.base")
    prop.value = json.dumps({**json.loads(prop.value), "slots": value})
    with pytest.raises(LoraFormatError, match="LF-613"):
        _ = open_base(save(made, tmp_path / "x.onnx")).slots


@pytest.mark.parametrize(
    "damage", [{"a_shape": [-5, None]}, {"a_shape": [2**40, None]}, {"rank": 2**40}, {"rank": -3}, {"rank": 0}]
)
def test_sizes_that_no_slot_has_are_a_fault(damage, tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", adapter({KEY: (7, 5)}))], slots="required")
    made = onnx.load(tmp_path / "out.onnx")
    prop = next(p for p in made.metadata_props if p.key == "loraformat.base")
    record = json.loads(prop.value)
    record["slots"]["slots"][KEY] |= damage
    prop.value = json.dumps(record)
    with pytest.raises(LoraFormatError, match="LF-613"):
        Session(save(made, tmp_path / "x.onnx")).use(None)


def test_a_folder_of_models_has_an_adapter_for_each_and_gives_all_back(tmp_path):
    (tmp_path / "base").mkdir()
    for part, out in (("encoder", 7), ("decoder", 4)):
        text = f"""g (float[N,T,5] x) => (float[N,T,{out}] y) <float[5,{out}] w>
          {{ ["/{part}/q/MatMul"] y = MatMul(x, w) }}"""
        save(model(text), tmp_path / "base" / f"{part}_model.onnx")
    base = open_base(tmp_path / "base")
    given = adapter({"encoder.q.weight": (7, 5), "decoder.q.weight": (4, 5)})
    plan = prepare("attach", [("a", given)], base, Options(tmp_path / "out", mode="swap"))
    base.apply(plan)
    files = ["decoder_model.a.onnx_adapter", "decoder_model.onnx", "encoder_model.a.onnx_adapter", "encoder_model.onnx"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert prove(base, plan).holds
    detach(open_base(tmp_path / "out"), tmp_path / "again")
    before, after = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("base", "again"))
    assert after == before


# Beside quantised weights.


def quantised(bits, folder):
    """A product and a bias whose weight is in codes."""
    made = model("""g (float[N,T,64] x) => (float[N,T,32] y) <float[64,32] w, float[32] b>
      { ["/m/q/MatMul"] h = MatMul(x, w)  y = Add(h, b) }""")
    if bits == 8:
        quantize_dynamic(save(made, folder / "float.onnx"), folder / "base.onnx")
        return open_base(folder / "base.onnx")
    tool = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer", reason="onnxruntime 1.20 has none")
    quantiser = tool.MatMulNBitsQuantizer(made, block_size=32, is_symmetric=True)
    quantiser.process()
    return open_base(save(quantiser.model.model, folder / "base.onnx"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["swap", "stack"])
def test_a_pair_is_fed_or_chosen_beside_a_quantised_weight(bits, mode, tmp_path):
    base = quantised(bits, tmp_path)
    given = [("a", adapter({KEY: (32, 64)})), ("b", adapter({KEY: lora(32, 64, rank=3, seed=9)}))]
    options = Options(tmp_path / "out.onnx", mode, rows=("x",) if mode == "stack" else ())
    plan = prepare("attach", given, base, options)
    base.apply(plan)
    proof = prove(base, plan)
    assert (proof.error <= 2e-6, proof.moved > 0.1) == (True, True)
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


def test_no_convolution_runs_without_channels(tmp_path):
    """ONNX Runtime before 1.32 writes nothing then, and what memory held before is read as the result."""
    base = open_base(save(model(GRAPHS["Conv"][0]), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", Adapter({KEY: updates.made("lora", GRAPHS["Conv"][1])}))])
    slot = Record.of_file(tmp_path / "out.onnx").slots.slots[KEY]
    off, kernel, out = slot.off(), slot.a_shape[1:], slot.b_shape[0]
    assert [value.shape for value in off.values()] == [(1, *kernel), (out, 1, 1, 1)]
    fed = slot.feeds(np.zeros((0, *kernel), np.float32), np.zeros((out, 0, 1, 1), np.float32))
    assert [value.shape for value in fed.values()] == [value.shape for value in off.values()]


# The live strength of a branch.


def test_the_strength_of_a_branch_is_an_input(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    given = [("a", adapter({KEY: (7, 5)})), ("b", adapter({KEY: lora(7, 5, seed=9)}))]
    base.apply(prepare("attach", given, base, Options(tmp_path / "out.onnx", live_scale=True)))
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    running = session(tmp_path / "out.onnx")
    x = feeds(running)
    for strengths in ({}, {"a": 0.5}, {"a": 0.0, "b": -2.0}):
        fed = {f"lora.scale.{name}": np.float32(s) for name, s in strengths.items()}
        merge([(one, strengths.get(name, 1.0)) for name, one in given], base, tmp_path / "m.onnx", force=True)
        wanted = session(tmp_path / "m.onnx").run(None, x)[0]
        assert relative_error(running.run(None, {**x, **{k: np.asarray(v) for k, v in fed.items()}})[0], wanted) <= 3e-6
    assert lf.digest(extract(open_base(tmp_path / "out.onnx"), name="b")) == lf.digest(given[1][1])
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


@pytest.mark.parametrize("kind", ["dora", "delta"])
def test_what_has_no_strength_has_no_live_one(kind, tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    given = Adapter({KEY: updates.made(kind, Placement((7, 5), (0,), (1,)))})
    with pytest.raises(LoraFormatError, match="LF-608"):
        prepare("attach", [("a", given)], base, Options(tmp_path / "out.onnx", live_scale=True))


# No test that cannot fail.


def sides_exchanged(patch):
    whole = Slots.feeds

    def exchanged(self, given):
        found = whole(self, given)
        return {name[:-1] + "BA"["AB".index(name[-1])]: tensor.T for name, tensor in found.items()}

    patch.setattr(Slots, "feeds", exchanged)


def scale_lost(patch):
    patch.setattr("loraformat_converters.onnx.attaching.slots.folded", lambda update, by: update)


def factor_lost(patch):
    whole = swap.fitted

    def fitted(make, spot, slots):
        sites = tuple(replace(site, factor=1.0) for site in spot.sites)
        return whole(make, replace(spot, sites=sites), slots)

    patch.setattr(swap, "fitted", fitted)


@pytest.mark.parametrize(
    ("mutant", "graph"), [(sides_exchanged, "MatMul"), (scale_lost, "Conv"), (factor_lost, "Gemm")]
)
def test_a_proof_is_red_on_a_mutant(mutant, graph, monkeypatch, tmp_path):
    text, place = GRAPHS[graph]
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    given = [("a", Adapter({KEY: updates.made("lora", place)}))]
    plan = put(base, tmp_path / "good.onnx", given)
    assert prove(base, plan).holds
    mutant(monkeypatch)
    try:
        holds = prove(base, put(base, tmp_path / "bad.onnx", given)).holds
    except LoraFormatError:
        holds = False
    assert not holds


def test_the_layout_is_known_by_its_ending():
    assert layout("onnx_adapter").endings == (".onnx_adapter",)
