"""Attention's 1/√d, which onnxslim folds into q: an adapter that is bound to the checkpoint is refused without it (LF-616)."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import onnx
import pytest
from graphs import session
from safetensors.numpy import save_file

import loraformat as lf
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import attach

pytestmark = pytest.mark.peer

torch = pytest.importorskip("torch", reason="needs the peer torch")
onnxslim = pytest.importorskip("onnxslim", reason="needs the peer onnxslim")

WIDTH, HEADS = 64, 2
Q, K = "q_proj.weight", "k_proj.weight"


class Attention(torch.nn.Module):
    """Multiplies q by 1/√d behind its projection, as Whisper, BART and OPT do."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        def heads(y):
            return y.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

        q = heads(self.q_proj(x) * (WIDTH // HEADS) ** -0.5)
        mixed = torch.softmax(q @ heads(self.k_proj(x)).transpose(2, 3), -1) @ heads(self.v_proj(x))
        return self.out_proj(mixed.transpose(1, 2).reshape(x.shape))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of exports, whole and slim; the adapter, bound to the checkpoint; x; targets → what PEFT computes)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    folder, net, x = tmp_path_factory.mktemp("attention"), Attention().eval(), torch.randn(2, 7, WIDTH)
    save_file({name: weight.detach().numpy() for name, weight in net.state_dict().items()}, folder / "net.safetensors")
    for exporter in ("torchscript", "dynamo"):
        path, names = folder / f"{exporter}.onnx", {"input_names": ["x"], "output_names": ["y"]}
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(net, (x,), str(path), dynamo=exporter == "dynamo", **names)
        onnx.save(onnxslim.slim(onnx.load(path)), folder / f"{exporter}-slim.onnx")
    tuned = get_peft_model(net, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "k_proj"])).eval()
    second = {name.split(".")[2]: factor for name, factor in tuned.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for factor in second.values():
            factor.normal_(0, 0.3)
        tuned.save_pretrained(folder / "adapter")
        truth = {(Q, K): tuned(x).numpy()}
        second["q_proj"].zero_()
        truth[K,] = tuned(x).numpy()
    bound = lf.bind(lf.load(folder / "adapter"), open_base(folder / "net.safetensors"), lf.Hints(axes={"*": "out,in"}))
    return folder, bound, x.numpy(), truth


def nameless(path, out):
    """The model without a name that a module or a tool gave: a tool's own would tell that something was folded."""
    made = onnx.load(path)
    renamed = {tensor.name: f"w{i}" for i, tensor in enumerate(made.graph.initializer)}
    for tensor in made.graph.initializer:
        tensor.name = renamed[tensor.name]
    for i, node in enumerate(made.graph.node):
        node.name = f"n{i}"
        del node.metadata_props[:]
        for at, name in enumerate(node.input):
            node.input[at] = renamed.get(name, name)
    onnx.save(made, out)
    return out


def in_floats(path, out):
    return path


def in_16_bits(path, out):
    from onnxconverter_common import float16

    onnx.save(float16.convert_float_to_float16(onnx.load(path), keep_io_types=True), out)
    return out


def in_8_bits(path, out):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(path), str(out))
    return out


def in_4_bits(path, out):
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    tool = MatMulNBitsQuantizer(onnx.load(path), algo_config=DefaultWeightOnlyQuantConfig(32, is_symmetric=True))
    tool.process()
    onnx.save(tool.model.model, out)
    return out


@pytest.mark.parametrize("stored", [in_floats, in_16_bits, in_8_bits, in_4_bits])
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize(("tool", "right"), [("", (Q, K)), ("-slim", (K,))])
def test_a_scale_in_q_is_seen_and_what_is_as_it_was_takes_the_adapter(tool, right, exporter, stored, trained, tmp_path):
    folder, given, x, truth = trained
    path = stored(folder / f"{exporter}{tool}.onnx", tmp_path / "stored.onnx")
    base = open_base(nameless(path, tmp_path / "base.onnx"))
    problems = base.resolve(given, lf.Hints()).unresolved
    assert [(p.rule, p.where) for p in problems] == [("LF-616", key) for key in given if key not in right]
    assert all("is 0.177 times" in p.what for p in problems) or stored is in_4_bits
    if problems:
        with pytest.raises(lf.LoraFormatError, match="LF-616"):
            attach(given, base, tmp_path / "out.onnx", any_base=True)
    attach(replace(given, targets={key: given[key] for key in right}), base, tmp_path / "out.onnx")
    before, after = (session(p).run(None, {"x": x})[0] for p in (path, tmp_path / "out.onnx"))
    assert relative_error(after, before) > 0.05
    if stored is in_floats:
        assert relative_error(after, truth[right]) <= 1e-5
