"""A change beside a quantised weight: the quantised model computes what it computed, plus x·ΔWᵀ in float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import feeds, lora, run, save, session
from installed import needs
from quantised_graphs import FORMS, IN, KEY, OUT

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import attach, merge, prepare

ROUND_X = {"QDQ", "MatMulInteger", "MatMulInteger, uint8", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
ROUND_X |= {"QLinearMatMul", "QGemm", "ConvInteger", "a square QGemm"}

every_form = pytest.mark.parametrize("form", FORMS)

TOLERANCE = 2e-6
"""Of the change alone and of the sum, in float32 (relative L2)."""


def given(form, tmp_path, *, zero=False):
    """(path of the base, adapter, what the change adds to y)."""
    needs(form)
    made, _ = FORMS[form]()
    path = save(made, tmp_path / "base.onnx")
    convolved = "Conv" in form
    out = IN if "square" in form else OUT
    update = lora(out, IN * (3 if convolved else 1), rank=3, seed=8)
    if "Gather" in form:
        update = replace(update, op="embedding")
    if zero:
        part = update["lora"]
        update = replace(update, parts=(replace(part, lora_B=np.zeros_like(part.lora_B)),))
    x, delta = feeds(session(path))["x"], update.matrix().astype(np.float64)
    if "Gather" in form:
        change = delta.T[x]
    elif convolved:
        wide = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (0, 0)))
        kernel, size = delta.reshape(OUT, IN, 3), x.shape[2]
        change = sum(np.einsum("oi,nith->noth", kernel[..., k], wide[:, :, k : k + size]) for k in range(3))
    else:
        change = x.astype(np.float64) @ delta.T
    return path, lf.Adapter({KEY: update}), change


@pytest.mark.parametrize("optimise", [False, True], ids=["as it is", "optimised"])
@every_form
def test_the_change_is_added_to_what_the_quantised_model_computes(form, optimise, tmp_path):
    path, update, change = given(form, tmp_path)
    attach(update, open_base(path), tmp_path / "out.onnx")
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    before, after = (run(tmp_path / name, optimise=optimise)["y"] for name in ("base.onnx", "out.onnx"))
    assert relative_error(after - before.astype(np.float64), change) <= 2 * TOLERANCE
    assert relative_error(after, before + change) <= TOLERANCE
    assert relative_error(after, before) > 0.05


@every_form
def test_a_change_of_nothing_leaves_every_bit_and_is_taken_out_again(form, tmp_path):
    path, update, _ = given(form, tmp_path, zero=True)
    attach(update, open_base(path), tmp_path / "out.onnx")
    before, after = (run(tmp_path / name, optimise=False)["y"] for name in ("base.onnx", "out.onnx"))
    np.testing.assert_array_equal(before, after)
    attached = open_base(tmp_path / "out.onnx")
    assert lf.digest(extract(attached)) == lf.digest(update)
    detach(attached, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@every_form
def test_the_weight_is_read_as_the_operator_reads_it(form, tmp_path):
    made, wanted = FORMS[form]()
    base = open_base(save(made, tmp_path / "base.onnx"))
    (site,) = (site for site in base.index.sites if not site.vector)
    weight, place = base.values.read(site)
    np.testing.assert_allclose(place.to_matrix(weight), wanted, rtol=1e-6, atol=1e-7 * np.abs(wanted).max())


@every_form
def test_it_is_found_by_its_sketch_and_by_nothing_else(form, tmp_path):
    made, weight = FORMS[form]()
    for i, node in enumerate(made.graph.node):
        node.name = f"n{i}"
    base = open_base(save(made, tmp_path / "base.onnx"))
    linear = lf.Placement(weight.shape, (0,), (1,))
    op = "embedding" if "Gather" in form else None
    ours = lf.Update(lora(*weight.shape).parts, linear, sketch=sketch(weight.astype(np.float32), linear), op=op)
    (place,) = base.resolve(lf.Adapter({KEY: ours}), lf.Hints()).require().targets[KEY]
    assert place.evidence[0].startswith("sketch: ")
    assert place.confidence > 0.999
    other = np.random.default_rng(77).standard_normal(weight.shape).astype(np.float32)
    stranger = replace(ours, sketch=sketch(other, linear))
    assert not base.resolve(lf.Adapter({KEY: stranger}), lf.Hints()).targets


@every_form
def test_a_merge_is_refused_because_the_weight_is_quantised(form, tmp_path):
    path, update, _ = given(form, tmp_path)
    with pytest.raises(
        lf.LoraFormatError, match=r"LF-608.*(quantised|rounded)[^@]*@ m\.q\.weight\n +attach it"
    ) as caught:
        merge(update, open_base(path), tmp_path / "out.onnx")
    assert len(caught.value.problems) == 1


def rescaled(update, base):
    """The adapter with magnitudes of half to three halves the norms."""
    site = next(site for site in base.index.sites if not site.vector)
    weight, place = base.values.read(site)
    norms = np.linalg.norm(place.to_matrix(weight), axis=-1)
    magnitude = lf.Magnitude((norms * np.linspace(0.5, 1.5, len(norms))).astype(np.float32))
    return lf.Adapter({KEY: replace(update[KEY], parts=(*update[KEY].parts, magnitude))})


@pytest.mark.parametrize("kind", ["lora", "dora"])
@every_form
def test_it_is_proved_by_another_way_of_computing_it(form, kind, tmp_path):
    path, update, _ = given(form, tmp_path)
    base = open_base(path)
    if kind == "dora":
        update = rescaled(update, base)
    plan = prepare("attach", [("default", update)], base, Options(tmp_path / "out.onnx"))
    base.apply(plan)
    proof = prove(base, plan)
    rounded = kind == "dora" and form in ROUND_X
    assert proof.limit == (5e-2 if form in ROUND_X else 1e-5)
    assert proof.error <= (proof.limit if rounded else TOLERANCE)
    assert proof.moved > 0.05
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.onnx", "out.onnx"]


@pytest.mark.parametrize(("level", "limit"), [(0, 1e-5), (1, 1e-5), (4, 5e-2)])
def test_a_product_in_int8_is_proved_as_one_that_rounds(level, limit, tmp_path):
    """accuracy_level 4: ONNX Runtime rounds x to int8 in the product, and a last bit of x can become a whole step."""
    made, weight = FORMS["MatMulNBits 4"]()
    made.graph.node[0].attribute.append(onnx.helper.make_attribute("accuracy_level", level))
    base = open_base(save(made, tmp_path / "base.onnx"))
    update = lf.Adapter({KEY: lora(*weight.shape)})
    plan = prepare("attach", [("default", update)], base, Options(tmp_path / "out.onnx"))
    base.apply(plan)
    proof = prove(base, plan)
    assert (proof.limit, proof.holds) == (limit, True)


@pytest.mark.parametrize("form", [form for form in FORMS if "Gather" not in form and "Conv" not in form])
def test_a_row_chooses_a_magnitude_beside_codes(form, tmp_path):
    path, plain, _ = given(form, tmp_path)
    base = open_base(path)
    adapters = [("plain", plain), ("dora", rescaled(plain, base))]
    plan = prepare("attach", adapters, base, Options(tmp_path / "out.onnx", "stack", rows=("x",)))
    base.apply(plan)
    proof = prove(base, plan)
    assert proof.limit == (5e-2 if form in ROUND_X else 1e-5)
    assert proof.error <= (proof.limit if form in ROUND_X else TOLERANCE)


def test_a_weight_that_is_not_like_the_sketch_is_not_changed_by_its_name(tmp_path):
    made, weight = FORMS["MatMulNBits 4"]()
    base = open_base(save(made, tmp_path / "base.onnx"))
    linear = lf.Placement(weight.shape, (0,), (1,))
    for values, like in ((weight, True), (np.random.default_rng(7).standard_normal(weight.shape), False)):
        bound = replace(lora(OUT, IN), placement=linear, sketch=sketch(values.astype(np.float32), linear))
        ours = [("default", lf.Adapter({KEY: bound}))]
        if like:
            assert prepare("attach", ours, base, Options(tmp_path / "out.onnx")).steps
            continue
        with pytest.raises(lf.LoraFormatError, match="LF-607  q is not like the tensor"):
            prepare("attach", ours, base, Options(tmp_path / "out.onnx"))
        assert prepare("attach", ours, base, Options(tmp_path / "out.onnx"), any_base=True).steps


def test_codes_that_are_scaled_behind_the_operator_are_refused(tmp_path):
    """The branch would be scaled with them; a sketch alone cannot tell, because it knows no scale."""
    made, weight = FORMS["Cast, Mul"]()
    made.graph.node[1].CopyFrom(onnx.helper.make_node("MatMul", ["x", "f"], ["w"], "/m/q/MatMul"))
    made.graph.node[2].CopyFrom(onnx.helper.make_node("Mul", ["w", "s"], ["y"]))
    made.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.float32(0.013).reshape(1), "s"))
    base = open_base(save(made, tmp_path / "base.onnx"))
    with pytest.raises(
        lf.LoraFormatError, match="LF-608  /m/q/MatMul: Cast lies between its weight and it, and no scale"
    ):
        attach(lf.Adapter({KEY: lora(*weight.shape)}), base, tmp_path / "out.onnx")


@pytest.mark.parametrize("kind", ["loha", "delta", "replace", "rows"])
@pytest.mark.parametrize("form", ["MatMulNBits 4", "Cast, Mul"])
def test_what_is_no_pair_changes_a_weight_that_nodes_dequantise_and_no_other(form, kind, tmp_path):
    made, weight = FORMS[form]()
    path, draw = save(made, tmp_path / "base.onnx"), np.random.default_rng(3)
    a, b = ([draw.standard_normal(s).astype(np.float32) for s in ((OUT, 2), (2, IN))] for _ in range(2))
    part = {
        "loha": lf.Loha(*a, *b, alpha=0.1, scale_rule="factor"),
        "delta": lf.Delta(draw.standard_normal((OUT, IN)).astype(np.float32)),
        "replace": lf.Replace(draw.standard_normal((OUT, IN)).astype(np.float32)),
        "rows": lf.Rows(draw.standard_normal((1, IN)).astype(np.float32), np.array([3])),
    }[kind]
    update = lf.Update((part,), lf.Placement((OUT, IN), (0,), (1,)))
    if kind in ("loha", "delta") and form == "Cast, Mul":
        attach(lf.Adapter({KEY: update}), open_base(path), tmp_path / "out.onnx")
        x = feeds(session(path))["x"].astype(np.float64)
        assert relative_error(run(tmp_path / "out.onnx")["y"], x @ (weight + update.matrix()).T) <= TOLERANCE
        return
    with pytest.raises(lf.LoraFormatError, match=r"LF-608  /m/q/MatMul.*quantised.*(only a pair|no change beside)"):
        attach(lf.Adapter({KEY: update}), open_base(path), tmp_path / "out.onnx")


def spoilt(made, draw):
    """The model with one thing wrong in one of its nodes or tensors."""
    node = made.graph.node[draw.integers(len(made.graph.node))]
    tensor = made.graph.initializer[draw.integers(len(made.graph.initializer))]
    match draw.integers(6):
        case 0 if node.input:
            del node.input[int(draw.integers(len(node.input))) :]
        case 1 if node.input:
            node.input[int(draw.integers(len(node.input)))] = str(draw.choice(["", "x", "none", tensor.name]))
        case 2 if node.attribute:
            attribute = node.attribute[int(draw.integers(len(node.attribute)))]
            if attribute.type == onnx.AttributeProto.INT:
                attribute.i = int(draw.choice([-1, 0, 1, 3, 7, 2**31, 2**62]))
        case 3 if tensor.dims:
            tensor.dims[int(draw.integers(len(tensor.dims)))] = int(draw.choice([0, 1, 5, 2**40]))
        case 4:
            tensor.data_type = int(draw.choice([1, 2, 3, 7, 10, 16, 21, 22]))
        case _:
            node.output[0] = str(draw.choice(["", "lost"]))
    return made


@every_form
def test_a_spoilt_form_is_refused_or_changed_and_never_a_crash(form, tmp_path):
    draw, outcomes = np.random.default_rng(len(form)), set()
    for _ in range(10):
        made, weight = FORMS[form]()
        path = save(spoilt(made, draw), tmp_path / "base.onnx")
        linear = lf.Placement(weight.shape, (0,), (1,))
        op = "embedding" if "Gather" in form else None
        pair = replace(lora(*weight.shape), op=op)
        bound = replace(pair, placement=linear, sketch=sketch(weight.astype(np.float32), linear))
        for update in (pair, bound):
            try:
                base = open_base(path)
                base.describe()
                attach(lf.Adapter({KEY: update}), base, tmp_path / "out.onnx", force=True)
                outcomes.add("changed")
            except lf.LoraFormatError as error:
                outcomes |= {problem.rule for problem in error.problems}
    assert outcomes & {"LF-602", "LF-606", "LF-608", "LF-610"}
