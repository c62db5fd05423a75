"""A merge into codes: each is the one that is nearest to W + ΔW, in the steps in which W is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import feeds, lora, model, outputs, save, session
from installed import needs
from quantised_graphs import FORMS, IN, KEY, OUT, PER_OUT, scales

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.graph import prove
from loraformat.verbs.merge import attach, merge, prepare
from loraformat.verbs.verify import verify

ROWS = np.repeat(PER_OUT[:, None].astype(np.float64), IN, 1)
ONE = lambda step: np.full((OUT, IN), np.float64(np.float32(step)))  # noqa: E731


def blocks(bits):
    """MatMulNBits of ``quantised_graphs``: a step for each out and run of 16."""
    return np.repeat(scales(OUT, 3).astype(np.float64), 16, 1)[:, :IN]


STEPS = {
    "Cast, Mul": ROWS,
    "Cast, Sub, Mul, Transpose": ROWS,
    "DequantizeLinear": ROWS,
    "DequantizeLinear, zero points": ROWS,
    "DequantizeLinear, Gemm": ONE(0.013),
    "DequantizeLinear, int4 blocks": np.repeat(scales(5, OUT), 8, 0).T.astype(np.float64),
    "QDQ": ROWS,
    "MatMulInteger": ROWS,
    "MatMulInteger, uint8": ONE(0.017),
    "DynamicQuantizeMatMul": ROWS,
    "MatMulIntegerToFloat": ROWS,
    "QLinearMatMul": ONE(0.012),
    "QGemm": ROWS,
    "MatMulNBits 4": blocks(4),
    "MatMulNBits 4, zero points": blocks(4),
    "MatMulNBits 4, float zero points": blocks(4),
    "MatMulNBits 8": blocks(8),
    "MatMulNBits 8, zero points": blocks(8),
    "MatMulNBits 2": blocks(2),
    "Gather, DequantizeLinear": ONE(0.017),
    "Cast, Mul, Gather": scales(IN, 1).T.astype(np.float64) * np.ones((OUT, 1)),
    "GatherBlockQuantized 4": np.repeat(scales(IN, 3).astype(np.float64), 16, 1).T,
    "GatherBlockQuantized 8": np.repeat(scales(IN, 3).astype(np.float64), 16, 1).T,
    "Conv": np.tile(ROWS, 3),
    "ConvInteger": np.full((OUT, 3 * IN), np.float64(np.float32(0.01))),
}
"""Form → how wide the steps of W [out, in] are."""

UNKNOWN = {"QuantizeLinear, DequantizeLinear": "QuantizeLinear lies between"}


def update_of(form, steps=0.0):
    """A pair that moves W by some of its steps: by fewer where there are few."""
    steps = steps or next((few for bits, few in ((" 2", 0.6), (" 4", 1.5), ("int4", 1.5)) if bits in form), 2.0)
    _, weight = FORMS[form]()
    made = lora(*weight.shape, rank=3, seed=8)
    size = steps * float(STEPS[form].mean() if form in STEPS else 0.01)
    part = replace(
        made["lora"], alpha=size / float(np.std(made["lora"].lora_B @ made["lora"].lora_A)), scale_rule="factor"
    )
    return lf.Adapter({KEY: replace(made, parts=(part,), op="embedding" if "Gather" in form else None)})


def weight_of(path):
    base = open_base(path)
    site = next(site for site in base.index.sites if not site.vector)
    value, place = base.values.read(site)
    return place.to_matrix(value).astype(np.float64)


def check(form, tmp_path):
    made, weight = FORMS[form]()
    path, out, ours = save(made, tmp_path / "base.onnx"), tmp_path / "out.onnx", update_of(form)
    outcome = merge(ours, open_base(path), out, requantize=True)
    onnx.checker.check_model(out, full_check=True)
    wanted, found, step = weight + ours[KEY].matrix(), weight_of(out), STEPS[form]
    low, high = (np.minimum(found.min(), weight.min()), np.maximum(found.max(), weight.max()))
    inside = np.abs(found - wanted) <= 0.5005 * step
    # What lies outside the codes is as near to W + ΔW as they reach: the step beyond is no code of the type.
    assert inside.mean() > 0.8
    assert (np.abs(found - wanted)[~inside] <= np.abs(weight - wanted)[~inside] + 0.5 * step[~inside]).all()
    assert (low, high) != (0, 0)
    norms = outcome.norms[KEY]
    assert norms.lost**0.5 == pytest.approx(np.linalg.norm(found - wanted), rel=1e-4)
    assert norms.delta**0.5 == pytest.approx(np.linalg.norm(ours[KEY].matrix()), rel=1e-4)
    kept = {t.name: t.raw_data for t in onnx.load(path).graph.initializer}
    changed = [t.name for t in onnx.load(out).graph.initializer if kept[t.name] != t.raw_data]
    assert len(changed) == 1
    return path, out, ours


@pytest.mark.parametrize("form", STEPS)
def test_the_codes_are_the_nearest_and_nothing_else_changes(form, tmp_path):
    check(form, tmp_path)


@pytest.mark.parametrize("form", STEPS)
def test_the_written_model_is_verified_and_proved(form, tmp_path):
    needs(form)
    made, _ = FORMS[form]()
    path, out, ours = save(made, tmp_path / "base.onnx"), tmp_path / "out.onnx", update_of(form)
    base = open_base(path)
    plan = prepare("merge", [("default", ours)], base, Options(out, requantize=True))
    assert 0.0 < plan.estimate()[KEY] < 0.9
    base.apply(plan)
    verdict = verify(base, ours, open_base(out))
    assert not verdict.problems
    assert list(verdict.touched) == [KEY]
    proof = prove(base, plan)
    assert proof.holds
    assert proof.moved > 1e-3


def test_a_code_that_was_changed_afterwards_is_found(tmp_path):
    path, out, ours = check("MatMulNBits 4", tmp_path)
    made = onnx.load(out)
    tensor = next(t for t in made.graph.initializer if t.name == "q")
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    verdict = verify(open_base(path), ours, open_base(save(made, out)))
    assert [problem.rule for problem in verdict.problems] == ["LF-611"]


@pytest.mark.parametrize("form", ["MatMulNBits 4", "DequantizeLinear"])
def test_a_change_that_would_be_rounded_away_is_refused_before_a_byte_is_written(form, tmp_path):
    made, _ = FORMS[form]()
    base, ours = open_base(save(made, tmp_path / "base.onnx")), update_of(form, steps=0.05)
    with pytest.raises(lf.LoraFormatError, match=r"LF-615 .* of ΔW survives in .*, the least allowed is 10 %"):
        merge(ours, base, tmp_path / "out.onnx", requantize=True)
    assert not (tmp_path / "out.onnx").exists()
    merge(ours, base, tmp_path / "out.onnx", requantize=True, survival=0.0)


def test_without_being_asked_it_is_refused_and_the_way_is_named(tmp_path):
    made, _ = FORMS["MatMulNBits 4"]()
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*quantised[^@]*@ m\.q\.weight\n +attach it.*--requantize"):
        merge(update_of("MatMulNBits 4"), open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx")


@pytest.mark.parametrize("form", UNKNOWN)
def test_steps_that_are_not_known_are_refused(form, tmp_path):
    made, _ = FORMS[form]()
    with pytest.raises(lf.LoraFormatError, match=rf"LF-608 .*{UNKNOWN[form]}.*not known exactly"):
        merge(update_of(form), open_base(save(made, tmp_path / "base.onnx")), tmp_path / "out.onnx", requantize=True)


def test_int8_of_half_the_range_stays_in_it(tmp_path):
    """ONNX Runtime quantises so for processors that add products of 8 bits in 16 (``reduce_range``)."""
    made, _ = FORMS["MatMulInteger"]()
    out = tmp_path / "out.onnx"
    merge(update_of("MatMulInteger", steps=9), open_base(save(made, tmp_path / "base.onnx")), out, requantize=True)
    (codes,) = (onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer if t.name == "q")
    assert (codes.min(), codes.max()) == (-64, 64)


def test_a_use_that_gives_8_bits_takes_a_merge_though_no_branch(tmp_path):
    made = model(f"""g (float[N,{IN}] x) => (uint8[N,{OUT}] c) <int8 z, uint8 u>
      {{ a = QuantizeLinear(x, s, u)  ["/m/q/MatMul_quant"] c = QLinearMatMul(a, s, u, q, s, z, t, u) }}""")
    draw = np.random.default_rng(4)
    held = {"q": draw.integers(-100, 100, (IN, OUT)).astype(np.int8), "s": np.float32(0.02), "t": np.float32(0.3)}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in held.items())
    base, ours = open_base(save(made, tmp_path / "base.onnx")), lf.Adapter({KEY: lora(OUT, IN, seed=2)})
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*a change would be rounded to them"):
        prepare("attach", [("default", ours)], base, Options(tmp_path / "out.onnx"))
    merge(ours, base, tmp_path / "out.onnx", requantize=True)
    assert not np.array_equal(*(outputs(session(tmp_path / name))["c"] for name in ("out.onnx", "base.onnx")))


def looked_up(folder):
    """What ONNX Runtime's quantiser makes of a product of a table's rows: they go on in 8 bits."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = model("""g (int64[N,T] x) => (float[N,T,7] y) <float[30,16] t, float[16,7] w, float[7] b>
      { ["/emb/Gather"] h = Gather(t, x)  ["/q/MatMul"] v = MatMul(h, w) ["/q/Add"] y = Add(v, b) }""")
    quantize_dynamic(save(made, folder / "float.onnx"), folder / "base.onnx", weight_type=QuantType.QInt8)
    assert onnx.load(folder / "base.onnx").graph.node[-1].op_type == "Add"
    return folder / "base.onnx"


def test_a_weight_that_multiplies_rows_in_8_bits_takes_a_merge_though_no_branch(tmp_path):
    """The two scales are one product of the graph: which is the weight's, its name tells."""
    path, given = looked_up(tmp_path), lf.Adapter({"q.weight": lora(7, 16, alpha=0.5)})
    merge(given, open_base(path), tmp_path / "out.onnx", requantize=True)
    stored, found = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer}
        for p in (path, tmp_path / "out.onnx")
    )
    step, zero = float(stored["w_scale"]), float(stored["w_zero_point"])
    wanted = (stored["w_quantized"] - zero) * step + given["q.weight"].matrix().T
    codes = np.clip(np.rint(wanted / step) + zero, -127, 127)  # the quantiser gives none that is lower
    assert np.array_equal(found.pop("w_quantized"), codes)
    assert all(np.array_equal(tensor, stored[name]) for name, tensor in found.items())
    assert not verify(open_base(path), given, open_base(tmp_path / "out.onnx")).problems
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*no float of it is at hand.*\n.*merge it: --requantize"):
        attach(given, open_base(path), tmp_path / "other.onnx")


@pytest.mark.parametrize("verb", ["merge", "attach"])
def test_a_table_whose_rows_go_on_in_8_bits_is_refused_with_a_way(verb, tmp_path):
    given = lf.Adapter({"emb.weight": lf.Update(lora(16, 30).parts, op="embedding")})
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*its weight is UINT8.*\n.*as it was before quantisation"):
        {"merge": merge, "attach": attach}[verb](given, open_base(looked_up(tmp_path)), tmp_path / "out.onnx")


def test_scales_whose_names_are_others_tell_nothing(tmp_path):
    path = looked_up(tmp_path)
    made = onnx.load(path)
    for node in made.graph.node:
        node.input[:] = ["s" if name == "w_scale" else name for name in node.input]
    next(t for t in made.graph.initializer if t.name == "w_scale").name = "s"
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*in steps that are not known exactly"):
        merge(lf.Adapter({"q.weight": lora(7, 16)}), open_base(save(made, path)), tmp_path / "o.onnx", requantize=True)


def test_external_codes_are_written_beside_the_model(tmp_path):
    made, _ = FORMS["MatMulNBits 4"]()
    path, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    onnx.save(made, path, save_as_external_data=True, location="base.data", size_threshold=0)
    ours = update_of("MatMulNBits 4")
    merge(ours, open_base(path), out, requantize=True)
    merge(ours, open_base(save(made, tmp_path / "inside.onnx")), tmp_path / "other.onnx", requantize=True)
    np.testing.assert_array_equal(weight_of(out), weight_of(tmp_path / "other.onnx"))
    x = feeds(session(out))
    assert relative_error(session(out).run(None, x)[0], session(tmp_path / "other.onnx").run(None, x)[0]) <= 1e-6


def test_the_models_of_a_folder_are_verified_too(run, tmp_path):
    (tmp_path / "base").mkdir()
    save(FORMS["MatMulNBits 4"]()[0], tmp_path / "base" / "model.onnx")
    lf.save(update_of("MatMulNBits 4"), tmp_path / "a.lora.safetensors")
    words = ["merge", tmp_path / "a.lora.safetensors", "--into", tmp_path / "base", "-o", tmp_path / "out"]
    told = run(*words, "--requantize", "--verify")
    assert told.code == 0
    assert "rounding ≤ " in told.err


@pytest.mark.parametrize("form", ["MatMulInteger", "MatMulNBits 4"])
def test_a_change_after_which_no_sketch_knows_the_weight_is_verified_where_it_was(form, run, tmp_path):
    made, weight = FORMS[form]()
    names = {tensor.name: f"t{i}" for i, tensor in enumerate(made.graph.initializer)}
    for i, node in enumerate(made.graph.node):
        node.name, node.input[:] = f"n{i}", [names.get(name, name) for name in node.input]
    for tensor in made.graph.initializer:
        tensor.name = names[tensor.name]
    save(made, tmp_path / "base.onnx")
    place = lf.Placement(weight.shape, (0,), (1,))
    (update,) = update_of(form).values()
    part = replace(update["lora"], alpha=update["lora"].alpha * float(np.linalg.norm(weight) / update.norm()))
    known = replace(update, parts=(part,), placement=place, sketch=sketch(weight.astype(np.float32), place))
    lf.save(lf.Adapter({KEY: known}), tmp_path / "a.lora.safetensors")
    told = run("merge", "a.lora.safetensors", "--into", "base.onnx", "-o", "o.onnx", "--requantize", "--verify")
    assert told.code == 0, told.err
    assert "1/1 targets by sketch" in told.err
    assert run("verify", "--base", "base.onnx", "--adapter", "a.lora.safetensors", "--merged", "base.onnx").code == 1
