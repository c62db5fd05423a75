"""A batch normalisation that was folded into a weight: the name is the module's, the values are not, and that is said."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import adapter, lora, model, save, session
from onnx import numpy_helper
from safetensors.numpy import save_file

import loraformat as lf
from loraformat.registry import open_base
from loraformat.sketch import sketch
from loraformat.testing import relative_error
from loraformat.verbs.merge import attach, merge

KERNEL = (9, 5, 2, 3)


def graph(node="/c/Conv", weight="onnx::Conv_7", rule="", values=None, bias=True):
    """One convolution; ``rule``: what dynamo's exporter notes of the rewrites that made it."""
    made = model(
        f"""g (float[N,5,4,6] x) => (float[N,9,3,4] y) {"<float[9] b>" * bias}
        {{ ["{node}"] y = Conv(x, w{", b" * bias}) }}"""
    )
    made.graph.node[0].input[1] = weight
    values = np.random.default_rng(5).standard_normal(KERNEL) if values is None else values
    made.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), weight))
    if rule:
        made.graph.node[0].metadata_props.add(key="pkg.onnxscript.rewriter.rule_name", value=rule)
    return made


def convolution():
    draw = np.random.default_rng(3)
    a, b = draw.standard_normal((2, 5, 2, 3)), draw.standard_normal((9, 2, 1, 1))
    pair = lf.Lora(a.reshape(2, -1).astype(np.float32), b.reshape(9, 2).astype(np.float32), 3.0, "alpha/r")
    return adapter({"c.weight": lf.Update((pair,), lf.Placement(KERNEL, (0,), (1, 2, 3)))})


def problems(made, tmp_path, given=None, **hints):
    found = open_base(save(made, tmp_path / "base.onnx")).resolve(given or convolution(), lf.Hints(**hints))
    return [problem.rule for problem in (*found.unresolved, *found.ambiguous)]


@pytest.mark.parametrize(
    "form",
    [
        {"weight": "onnx::Conv_7"},
        {"weight": "ConvBnFusion_W_c.weight"},
        {"weight": "ConvBnFusion_W_c.weight_quantized"},
        {"weight": "_v_51"},
        {"node": "/c/Conv_output_0", "weight": "/n/BatchNormalization_output_0_weight", "named": False},
        {"node": "conv2d", "weight": "mul_1_weight", "named": False},
        {"node": "node_Conv_46", "weight": "c.weight", "rule": "FuseBatchNormIntoConv, RemoveOptionalBiasFromConv"},
        {"node": "node_Conv_46", "weight": "c.weight"},
        {"node": "node_Conv_46_quant", "weight": "c.weight", "bias": False},
    ],
    ids=[
        "TorchScript",
        "ONNX Runtime",
        "quantised after it",
        "onnxsim",
        "onnxslim",
        "dynamo, onnxslim",
        "dynamo",
        "dynamo, then a tool",
        "dynamo, then a quantiser",
    ],
)
def test_neither_a_name_nor_a_sketch_is_proof_of_a_weight_into_which_something_may_be_folded(form, tmp_path):
    """A sketch sees a factor, if it is one of all values and W was not divided by its norm: nothing of a γ/σ that varies little."""
    form, named = {**form}, form.get("named", True)
    form.pop("named", None)
    values = np.random.default_rng(5).standard_normal(KERNEL).astype(np.float32)
    place = convolution()["c.weight"].placement
    sketched = lf.Adapter({"c.weight": replace(convolution()["c.weight"], sketch=sketch(values, place))})
    if named:
        assert problems(graph(**form, values=values), tmp_path) == ["LF-608"]
    if form["weight"] != "c.weight":
        drawn = sketched["c.weight"].sketch
        older = lf.Adapter({"c.weight": replace(sketched["c.weight"], sketch=drawn / np.linalg.norm(drawn))})
        assert problems(graph(**form, values=values * 0.4), tmp_path, older) == ["LF-608"]
        assert problems(graph(**form, values=values * 0.95), tmp_path, sketched) == ["LF-608"]
        assert problems(graph(**form, values=values * 0.4), tmp_path, sketched) == ["LF-616"]


def test_a_scale_that_onnxslim_folds_into_a_linear_weight_is_seen(tmp_path):
    """As it makes one Gemm of q's MatMul, Add and attention's 1/√d."""
    made = model(
        """g (float[N,5] x) => (float[N,9] y) <float[9,5] w, float[9] b> { y = Gemm <transB = 1> (x, w, b) }"""
    )
    values = numpy_helper.to_array(made.graph.initializer[0])
    place = lf.Placement((9, 5), (0,), (1,))
    drawn = sketch(values * 8, place)
    whole, older = (
        lf.Adapter({"q.weight": replace(adapter({"q": (9, 5)})["q"], placement=place, sketch=held)})
        for held in (drawn, drawn / np.linalg.norm(drawn))
    )
    assert problems(made, tmp_path, whole) == ["LF-616"]
    assert problems(made, tmp_path, older) == []  # its name alone says so
    made.graph.node[0].input[1] = made.graph.initializer[0].name = "/q/Add_output_0_weight_fused"
    assert problems(made, tmp_path, older) == ["LF-608"]


@pytest.mark.parametrize(("node", "bias"), [("/c/Conv", True), ("node_conv2d", True), ("node_Conv_46", False)])
def test_a_weight_under_its_own_name_is_the_modules(node, bias, tmp_path):
    """dynamo's exporter writes a convolution anew for a padding too; a normalisation always leaves a bias."""
    assert problems(graph(node, "c.weight", bias=bias), tmp_path) == []


def checkpoint(tmp_path, values):
    (tmp_path / "base").mkdir()
    save_file({"c.weight": values}, tmp_path / "base" / "model.safetensors")
    return open_base(tmp_path / "base")


def test_equal_values_prove_a_weight_without_a_name_and_like_ones_do_not(tmp_path):
    """γ/σ of 1 ± 0.15 leaves a cosine of 0.98, and a factor for all leaves 1."""
    values = np.random.default_rng(5).standard_normal(KERNEL).astype(np.float32)
    base = checkpoint(tmp_path, values)
    assert problems(graph(values=values), tmp_path, base=base) == []
    folded = values * np.linspace(0.7, 1.3, 9, dtype=np.float32)[:, None, None, None]
    assert problems(graph(values=folded), tmp_path, base=base) == ["LF-608"]
    assert problems(graph(values=folded * 0 + values * 2), tmp_path, base=base) == ["LF-616"]
    assert problems(graph("anonymous", "w7", values=folded), tmp_path, base=base) == ["LF-608"]
    half = values.astype(np.float16).astype(np.float32)
    assert problems(graph("anonymous", "w7", values=half), tmp_path, base=base) == []


def test_a_normalisation_that_onnx_runtime_folds_offline_is_seen(tmp_path):
    made = model(
        """g (float[N,5,4,6] x) => (float[N,9,3,4] y) <float[9,5,2,3] w, float[9] s, float[9] b, float[9] m>
        { ["/c/Conv"] h = Conv(x, w)  ["/n/BatchNormalization"] y = BatchNormalization(h, s, b, m, v) }"""
    )
    made.graph.initializer.append(numpy_helper.from_array(np.linspace(0.3, 4, 9, dtype=np.float32), "v"))
    next(t for t in made.graph.initializer if t.name == "w").name = "c.weight"
    made.graph.node[0].input[1] = "c.weight"
    assert problems(made, tmp_path) == []
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "base.onnx"), options, providers=["CPUExecutionProvider"])
    assert problems(onnx.load(tmp_path / "optimised.onnx"), tmp_path) == ["LF-608"]


@pytest.mark.parametrize("last", [False, True])
def test_a_product_that_gives_a_normalisations_value_holds_it(last, tmp_path):
    """As dynamo and then onnxslim or onnxsim leave a Linear with a BatchNorm1d: the weight has its own name, and no metadata."""
    made = model(
        f"""g (float[N,5] x) => (float[N,9] {"getitem" if last else "y"}) <float[9,5] w, float[9] b>
        {{ ["node_Gemm_8"] getitem = Gemm <transB = 1> (x, w, b) {"" if last else "y = Relu(getitem)"} }}"""
    )
    made.graph.node[0].input[1] = made.graph.initializer[0].name = "c.weight"
    given = adapter({"c.weight": (9, 5)})
    assert problems(made, tmp_path, given) == ["LF-608"]
    made.graph.node[0].output[0] = "addmm"
    if last:
        made.graph.output[0].name = "addmm"
        assert problems(made, tmp_path, given) == ["LF-608"]
        made.graph.node[0].name = "node_addmm"
    else:
        made.graph.node[1].input[0] = "addmm"
    assert problems(made, tmp_path, given) == []


@pytest.mark.parametrize(("stored", "scopes", "wrong"), [
    ("onnx::Mul_27", None, True),
    ("/n/Add_output_0", None, True),
    ("add_1", ["", "n", "mul_1"], True),
    ("n.weight", ["", "n", "mul_1"], False),
    ("/If_0.else_branch/n.weight", None, False),
    ("other.weight", ["", "n", "mul_1"], False),
])  # fmt: skip
def test_a_vector_without_its_name_is_computed_of_the_parameter(stored, scopes, wrong, tmp_path):
    """Gemma's norms multiply by 1 + w, which every exporter computes ahead. ``other.weight`` is a tensor of equal values."""
    made = model("""g (float[N,5] x) => (float[N,5] y) <float[5] w> { ["/n/Mul"] y = Mul(x, w) }""")
    made.graph.node[0].input[1] = made.graph.initializer[0].name = stored
    if scopes:
        made.graph.node[0].name = "node_mul_1"
        made.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=repr(scopes))
    given = lf.Adapter({"n.weight": lf.Update((lf.Replace(np.ones(5, np.float32)),))})
    assert problems(made, tmp_path, given) == ["LF-608"] * wrong


def test_the_user_cannot_state_it_away(tmp_path):
    assert problems(graph(), tmp_path, names={"c.weight": "/c/Conv"}) == ["LF-608"]
    assert problems(graph(), tmp_path, names={"c.weight": "onnx::Conv_7"}) == ["LF-608"]


# As torch exports it.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A convolution, a linear layer, and a normalisation behind each, as PEFT adapts them and torch exports them."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layers = {"c": torch.nn.Conv2d(3, 8, 3), "n": torch.nn.BatchNorm2d(8), "flat": torch.nn.Flatten()}
    layers |= {"fc": torch.nn.Linear(8 * 16, 7), "last": torch.nn.BatchNorm1d(7)}
    net = torch.nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    for norm in (net.n, net.last):
        torch.nn.init.normal_(norm.weight, 1.5)
        torch.nn.init.uniform_(norm.running_var, 0.3, 3)
    net.eval()
    folder, x = tmp_path_factory.mktemp("trained"), torch.randn(2, 3, 6, 6)
    raw = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
    with contextlib.redirect_stdout(io.StringIO()):
        for exporter, folded, whole in (("torchscript", {}, raw), ("dynamo", {}, {"optimize": False})):
            for name, more in ((exporter, folded), (f"{exporter}-whole", whole)):
                options = {"dynamo": exporter == "dynamo", "input_names": ["x"], "output_names": ["y"]}
                torch.onnx.export(net, (x,), str(folder / f"{name}.onnx"), **options, **more)
    tuned = get_peft_model(net, LoraConfig(r=2, lora_alpha=5, target_modules=["c", "fc"])).eval()
    for name, factor in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(factor, 0, 0.3)
    tuned.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return folder, x.numpy(), tuned(x).numpy()


@pytest.mark.peer
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("change", [merge, attach])
def test_a_model_that_torch_exported_takes_the_adapter_as_peft_does_or_refuses(exporter, change, trained, tmp_path):
    folder, x, truth = trained
    given = lf.load(folder / "adapter")
    with pytest.raises(lf.LoraFormatError) as caught:
        change(given, open_base(folder / f"{exporter}.onnx"), tmp_path / "out.onnx")
    assert {problem.rule for problem in caught.value.problems} == {"LF-608"}
    assert not (tmp_path / "out.onnx").exists()
    change(given, open_base(folder / f"{exporter}-whole.onnx"), tmp_path / "out.onnx")
    assert relative_error(session(tmp_path / "out.onnx").run(None, {"x": x})[0], truth) <= 1e-5


@pytest.mark.parametrize("verb", ["attach", "merge"])
def test_a_weight_that_smoothquant_scaled_is_refused_under_its_own_name(verb, tmp_path):
    """As onnx-neural-compressor 1.0 writes it, with ``SmoothQuantFolding`` off: x / s is quantised, and W · s."""
    made = model("""g (float[N,16] x) => (float[N,8] y) <float[16] s, float a, uint8 za, float b, int8 zb, int8[16,8] q> {
        ["/q/MatMul_smooth_mul"] x_smooth_output = Mul(x, s)
        c = QuantizeLinear(x_smooth_output, a, za)
        ["/q/MatMul_quant"] d = QLinearMatMul(c, a, za, q, b, zb, a, za)  y = DequantizeLinear(d, a, za) }""")
    for tensor in made.graph.initializer:
        if tensor.name == "q":
            tensor.name = made.graph.node[2].input[3] = "q.weight_quantized"
    base = lf.open_base(save(made, tmp_path / "base.onnx"))
    options = {"requantize": True} if verb == "merge" else {}
    with pytest.raises(lf.LoraFormatError, match=r"LF-608 .*SmoothQuant divided its x[^@]*@ q\.weight"):
        getattr(lf, verb)(lf.Adapter({"q.weight": lora(8, 16)}), base, tmp_path / "out.onnx", **options)
