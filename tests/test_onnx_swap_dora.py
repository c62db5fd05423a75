"""A DoRA in the slots of a swap: its pair is fed and its gain m/‖V‖ − 1; the base is what it was when nothing is."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import updates
from graphs import adapter, feeds, lora, model, save, session
from test_onnx_swap import GRAPHS, KEY, MATMUL, put, quantised, run

import loraformat as lf
from loraformat import Adapter, LoraFormatError, Placement
from loraformat.base import Options
from loraformat.registry import load, open_base
from loraformat.strength import strengthen
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, prove
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.attaching import magnitude
from loraformat_converters.onnx.attaching.ends import Ends
from loraformat_converters.onnx.attaching.slots import Slots
from loraformat_converters.onnx.running.captured import Captured
from loraformat_converters.onnx.runtime import Session

LINEAR = Placement((7, 5), (0,), (1,))
GAIN = f"lora/{KEY}/gain"
RESCALED = [name for name in GRAPHS if name not in ("MatMul, weight on the left", "MatMul of experts")]


def dora(place=LINEAR):
    return Adapter({KEY: updates.made("dora", place)})


def plain(place=LINEAR):
    return Adapter({KEY: updates.made("lora", place)})


@pytest.mark.parametrize("name", RESCALED)
@pytest.mark.parametrize("pad", [None, 4])
def test_a_dora_a_pair_and_the_base_by_turns(name, pad, tmp_path):
    text, place = GRAPHS[name]
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    given = [("dora", dora(place)), ("plain", plain(place))]
    put(base, tmp_path / "out.onnx", given, pad_rank=pad)
    for optimise in (True, False):
        running, off = session(tmp_path / "out.onnx", optimise=optimise), run(session(base.path, optimise=optimise))
        for called, one in given:
            merge(one, base, tmp_path / "merged.onnx", force=True)
            wanted = run(session(tmp_path / "merged.onnx", optimise=optimise))
            assert relative_error(run(running, tmp_path / f"out.{called}.onnx_adapter"), wanted) <= 3e-6
            assert relative_error(wanted, off) > 0.01
            found = run(running)
            assert np.array_equal(found, off) if not optimise else relative_error(found, off) <= 1e-6
    detach(open_base(tmp_path / "out.onnx"), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == base.path.read_bytes()


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_infinite_in_the_base_stays_so_when_nothing_is_fed(bias, tmp_path):
    """0 · ∞ is no number: the gain multiplies as 1 + 0."""
    made = model(MATMUL if bias else MATMUL.replace("h = MatMul(x, w)  y = Add(h, b)", "y = MatMul(x, w)"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("dora", dora())])
    x = {"x": np.full((1, 1, 5), 3e38, np.float32)}
    found = [session(path, optimise=False).run(None, x)[0] for path in (base.path, tmp_path / "out.onnx")]
    assert np.isinf(found[0]).any()
    assert found[0].tobytes() == found[1].tobytes()


def test_required_slots_are_fed_all_and_switched_off_by_zeros(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    given = [("dora", dora()), ("plain", plain())]
    put(base, tmp_path / "out.onnx", given, slots="required", pad_rank=3)
    running = session(tmp_path / "out.onnx", optimise=False)
    slots = {value.name for value in running.get_inputs()} - {"x"}
    x = {"x": feeds(session(base.path))["x"]}
    for called, one in given:
        tensors = tort.read(tmp_path / f"out.{called}.onnx_adapter").tensors
        assert (tensors.keys(), GAIN in slots, tensors[GAIN].any()) == (slots, True, called == "dora")
        merge(one, base, tmp_path / "merged.onnx", force=True)
        wanted = session(tmp_path / "merged.onnx").run(None, x)[0]
        assert relative_error(running.run(None, {**x, **tensors})[0], wanted) <= 3e-6
    none = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    assert np.array_equal(running.run(None, {**x, **none})[0], session(base.path, optimise=False).run(None, x)[0])


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_a_gain_is_fed_in_the_dtype_of_the_weight(dtype, tmp_path):
    base = open_base(save(model(MATMUL.replace("float", dtype)), tmp_path / "base.onnx"))
    plan = put(base, tmp_path / "out.onnx", [("dora", dora())])
    assert tort.read(tmp_path / "out.dora.onnx_adapter").tensors[GAIN].dtype.name == dtype.replace("double", "float64")
    assert prove(base, plan).holds


@pytest.mark.parametrize("bits", [8, 4])
def test_a_dora_beside_a_quantised_weight_is_fed_what_its_branch_would_be(bits, tmp_path):
    base, given = quantised(bits, tmp_path), [("a", dora(Placement((32, 64), (0,), (1,))))]
    for mode in ("swap", "branch"):
        base.apply(prepare("attach", given, base, Options(tmp_path / f"{mode}.onnx", mode)))
    swapped, beside = (session(tmp_path / f"{mode}.onnx", optimise=False) for mode in ("swap", "branch"))
    wanted = run(beside)
    assert relative_error(run(swapped, tmp_path / "swap.a.onnx_adapter"), wanted) <= 1e-6
    off = run(session(base.path, optimise=False))
    assert np.array_equal(run(swapped), off)
    assert relative_error(wanted, off) > 0.1


# What is written later, and what is read.


def test_an_adapter_written_for_the_model_later_is_the_one_that_attach_writes(tmp_path, run):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    lf.save(dora(), tmp_path / "a.safetensors")
    put(base, tmp_path / "out.onnx", [("a", dora())])
    told = run("convert", "a.safetensors", "a.onnx_adapter", "--for", "out.onnx", "--fold-scale")
    assert (told.code, told.err.count("LF-")) == (0, 0)
    one, other = (tort.read(tmp_path / name).tensors for name in ("a.onnx_adapter", "out.a.onnx_adapter"))
    assert all(relative_error(one[name], other[name]) <= 1e-6 for name in other)
    told = run("convert", "a.safetensors", "b.onnx_adapter", "--fold-scale")
    assert (told.code, "LF-508" in told.err, "--for MODEL.onnx" in told.err) == (1, True, True)
    told = run("convert", "a.onnx_adapter", "c.safetensors")
    assert (told.code, "LF-506" in told.err, "--for MODEL.onnx, for which it was written" in told.err) == (
        1,
        True,
        True,
    )
    assert run("convert", "a.onnx_adapter", "c.safetensors", "--for", "out.onnx").code == 0
    same_merge(load(tmp_path / "c.safetensors"), dora(), base, tmp_path)


def same_merge(one, other, base, folder, limit=3e-6):
    """Both are DoRAs, and change the base alike."""
    merge(one, base, folder / "one.onnx", force=True)
    merge(other, base, folder / "other.onnx", force=True)
    found, wanted, off = (run(session(path)) for path in (folder / "one.onnx", folder / "other.onnx", base.path))
    assert one[KEY].kind == other[KEY].kind == "dora"
    assert relative_error(found, wanted) <= limit < 0.01 < relative_error(wanted, off)


@pytest.mark.parametrize("name", RESCALED)
@pytest.mark.parametrize("pad", [None, 4])
def test_a_dora_is_read_back_by_the_weights_of_its_model(name, pad, tmp_path):
    text, place = GRAPHS[name]
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("dora", dora(place))], pad_rank=pad)
    lf.convert(tmp_path / "out.dora.onnx_adapter", tmp_path / "back.safetensors", model=tmp_path / "out.onnx")
    same_merge(load(tmp_path / "back.safetensors"), dora(place), base, tmp_path)


def test_a_dora_for_another_model_is_not_read_by_the_weights_of_this_one(tmp_path):
    for n in (1, 2):
        base = open_base(save(model(MATMUL, seed=n), tmp_path / f"base{n}.onnx"))
        put(base, tmp_path / f"out{n}.onnx", [("dora", dora())])
    with pytest.raises(LoraFormatError, match=r"LF-607.*another model"):
        lf.convert(tmp_path / "out1.dora.onnx_adapter", tmp_path / "back.safetensors", model=tmp_path / "out2.onnx")


def test_where_the_ratio_is_0_nothing_is_left_of_b(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    none = updates.made("dora", LINEAR)
    length = np.ones(7, np.float32)
    length[3] = 0
    given = Adapter({KEY: lf.Update((none["lora"], lf.Magnitude(length)), none.placement)})
    put(base, tmp_path / "out.onnx", [("dora", given)])
    with pytest.raises(LoraFormatError, match=r"LF-506.*is 0 in places"):
        lf.convert(tmp_path / "out.dora.onnx_adapter", tmp_path / "back.safetensors", model=tmp_path / "out.onnx")


def test_a_pair_in_a_file_for_slots_with_gains_is_read(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", dora()), ("b", plain())], slots="required")
    found = load(tmp_path / "out.b.onnx_adapter")
    assert relative_error(found[KEY].matrix(), plain()[KEY].matrix()) <= 1e-6


REFUSED = {
    "names of Olive's": ({"slot_names": "olive"}, dora(), MATMUL, r"LF-705.*olive has no name.*\n.*--slot-names native"),
    "names of GenAI's": ({"slot_names": "genai"}, dora(), MATMUL, r"LF-705.*genai has no name"),
    "a weight on the left": ({}, dora(), GRAPHS["MatMul, weight on the left"][0], "LF-508"),
    "a magnitude of other axes": ({}, Adapter({KEY: updates.made("dora of columns", LINEAR)}), MATMUL, "LF-508"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_gain_is_refused_before_anything_is_written(case, tmp_path):
    options, given, text, rule = REFUSED[case]
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    with pytest.raises(LoraFormatError, match=rule):
        put(base, tmp_path / "out.onnx", [("a", given)], **options)
    assert [path.name for path in tmp_path.iterdir()] == ["base.onnx"]


def test_slots_that_no_dora_asked_for_take_none(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", plain())])
    assert GAIN not in [value.name for value in session(tmp_path / "out.onnx").get_overridable_initializers()]
    with pytest.raises(LoraFormatError, match=r"LF-508.*no input for a magnitude.*\n.*attach again with this adapter"):
        Session(tmp_path / "out.onnx").load("dora", dora())


MISFITS = {
    "another in": dora(Placement((7, 6), (0,), (1,))),
    "another out": dora(Placement((8, 5), (0,), (1,))),
    "a magnitude of another out": Adapter(
        {KEY: lf.Update((*plain()[KEY].parts, lf.Magnitude(np.ones(6, np.float32))))}
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_dora_of_other_sizes_is_refused(case, tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", dora())])
    with pytest.raises(LoraFormatError, match="LF-606"):
        Session(tmp_path / "out.onnx").load("a", MISFITS[case])


def test_a_weight_that_is_not_there_any_more_is_a_fault(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", dora())])
    made = onnx.load(tmp_path / "out.onnx")
    for node in made.graph.node:
        node.input[:] = ["v" if name == "w" else name for name in node.input]
    next(tensor for tensor in made.graph.initializer if tensor.name == "w").name = "v"
    running = Session(save(made, tmp_path / "x.onnx"))
    running.load("plain", plain())
    with pytest.raises(LoraFormatError, match=r"LF-608.*0 operators of the model read w"):
        running.load("dora", dora())


ROWS = [["n", [7], "w", [1], rows] for rows in (3, None, [], [0], [0, "x"], [0, 7, 9])]


@pytest.mark.parametrize("gain", [3, [], ["n", [7], "w"], ["n", "x", "w", [1]], *ROWS])
def test_a_gain_that_cannot_be_read_is_a_fault(gain, tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    put(base, tmp_path / "out.onnx", [("a", dora())])
    made = onnx.load(tmp_path / "out.onnx")
    prop = next(prop for prop in made.metadata_props if prop.key == "loraformat.base")
    record = json.loads(prop.value)
    record["slots"]["slots"][KEY]["gain"] = gain
    prop.value = json.dumps(record)
    with pytest.raises(LoraFormatError, match="LF-613"):
        Session(save(made, tmp_path / "x.onnx"))


# The runtime.


def opened(folder, **options):
    """Its names: a DoRA from its file and in memory, a pair likewise; and what each gives."""
    captured = options.pop("captured", False)
    base = open_base(save(model(MATMUL), folder / "base.onnx"))
    put(base, folder / "out.onnx", [("dora", dora()), ("plain", plain())], **options)
    running, x = Session(folder / "out.onnx", captured=captured), feeds(session(base.path))
    truth = {None: session(base.path).run(None, x)[0]}
    for called, one in (("dora", dora()), ("plain", plain())):
        merge(one, base, folder / "merged.onnx", force=True)
        truth[called] = truth[f"{called} of memory"] = session(folder / "merged.onnx").run(None, x)[0]
        running.load(called, folder / f"out.{called}.onnx_adapter")
        running.load(f"{called} of memory", one)
    return running, x, truth


@pytest.mark.parametrize("options", [{}, {"slots": "required"}, {"pad_rank": 3, "captured": True}])
def test_the_runtime_changes_between_doras_and_pairs(options, tmp_path):
    running, x, truth = opened(tmp_path, **options)
    for choice in ("dora", "plain", None, "dora of memory", None, "plain of memory", "dora"):
        assert relative_error(running.use(choice).run(x)["y"], truth[choice]) <= 3e-6
    with pytest.raises(LoraFormatError, match=r"LF-607|LF-606|LF-602"):
        running.load("other", adapter({"m.k.weight": lora(7, 5)}))


def test_a_dora_is_used_alone_and_as_it_is(tmp_path):
    running, x, truth = opened(tmp_path)
    half = running.use({"plain": 0.5}).run(x)["y"]
    assert relative_error(half, (truth["plain"] + truth[None]) / 2) <= 3e-6
    for choice in ({"dora": 0.5}, {"dora": 1.0, "plain": 0.5}, {"dora": 1.0, "dora of memory": 1.0}):
        with pytest.raises(LoraFormatError, match=r"LF-508.*no part in a blend.*\n.*Effective"):
            running.use(choice)
    assert relative_error(running.use({"dora": 1.0, "plain": 0.0}).run(x)["y"], truth["dora"]) <= 3e-6


# No test that cannot fail.


def the_bias_is_rescaled_too(patch):
    whole = Ends.add
    patch.setattr(
        Ends,
        "add",
        lambda self, site, run, change, kept=None: whole(
            self, site, run, change, kept and (lambda run, base, bias: kept(run, base, ""))
        ),
    )


def the_norm_is_of_the_base_alone(patch):
    whole = Slots.fed
    patch.setattr(Slots, "fed", lambda self, given, norms: whole(self, given, _of_nothing(norms)))


def _of_nothing(norms):
    return lambda gain, update: norms(gain, strengthen(Adapter({KEY: update}), 0.0)[KEY])


def b_is_not_rescaled(patch):
    patch.setattr("loraformat_converters.onnx.attaching.slots._rescaled", lambda update, ratio: bare(update))


def the_ratio_is_fed_for_the_gain(patch):
    whole = Slots.fed

    def off_by_one(self, given, norms):
        fed = whole(self, given, norms)
        return type(fed)(fed.pairs, {key: gain + 1 for key, gain in fed.gains.items()})

    patch.setattr(Slots, "fed", off_by_one)


def no_gain_is_fed(patch):
    whole = Slots.fed
    patch.setattr(Slots, "fed", lambda self, given, norms: type(fed := whole(self, given, norms))(fed.pairs))


def the_base_is_not_rescaled(patch):
    patch.setattr(magnitude, "kept", lambda form, site, gain, run, base, bias: base)


def bare(update):
    return lf.Update(update.parts[:1], update.placement)


MUTANTS = [
    the_bias_is_rescaled_too, the_norm_is_of_the_base_alone, b_is_not_rescaled, the_ratio_is_fed_for_the_gain,
    no_gain_is_fed, the_base_is_not_rescaled,
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("graph", ["Gemm", "Conv"])
def test_a_proof_is_red_on_a_mutant(mutant, graph, monkeypatch, tmp_path):
    text, place = GRAPHS[graph]
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    assert prove(base, put(base, tmp_path / "good.onnx", [("a", dora(place))])).holds
    mutant(monkeypatch)
    assert not prove(base, put(base, tmp_path / "bad.onnx", [("a", dora(place))])).holds


def the_gain_of_the_last_dora_stays(patch):
    """What a buffer would do that is not cleared for a pair, which feeds no gain."""
    whole = Captured.hold
    kept = {}

    def hold(self, tensors):
        kept.update({name: tensor for name, tensor in tensors.items() if name == GAIN})
        return whole(self, {**kept, **tensors})

    patch.setattr(Captured, "hold", hold)


def test_a_gain_that_stays_is_red(monkeypatch, tmp_path):
    the_gain_of_the_last_dora_stays(monkeypatch)
    with pytest.raises(AssertionError):
        test_the_runtime_changes_between_doras_and_pairs({"pad_rank": 3, "captured": True}, tmp_path)
