"""Recurrent layers as torch exports them: ΔW on torch's own parameters, and the same on the graph."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx
import pytest
from graphs import session

torch = pytest.importorskip("torch", reason="needs torch: the peers extra")
pytest.importorskip("onnxscript", reason="needs onnxscript: the peers extra")

import loraformat as lf  # noqa: E402
from loraformat.registry import open_base  # noqa: E402
from loraformat.sketch import sketch  # noqa: E402
from loraformat.testing import relative_error  # noqa: E402
from loraformat.verbs.merge import attach, merge  # noqa: E402

pytestmark = pytest.mark.peer
VERBS = {"merge": merge, "attach": attach}


class Model(torch.nn.Module):
    def __init__(self, kind, layers, both):
        super().__init__()
        self.rnn = getattr(torch.nn, kind)(10, 6, layers, bidirectional=both, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def exported(model, x, exporter, path):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = {"dynamo": True} if exporter == "dynamo" else {"dynamo": False, "opset_version": 17}
        torch.onnx.export(model, (x,), str(path), input_names=["x"], output_names=["y"], verbose=False, **how)


CASES = {
    "one layer by names": (1, False, False, "merge"),
    "two layers by sketches": (2, False, True, "attach"),
    "two directions by sketches": (1, True, True, "merge"),
    "two layers by names": (2, False, False, "merge"),
}
"""layers, whether both ways, whether bound, the verb."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_a_change_of_torchs_parameters_is_the_same_in_the_graph(exporter, kind, case, tmp_path):
    layers, both, bound, verb = CASES[case]
    torch.manual_seed(3)
    model, x = Model(kind, layers, both).eval(), torch.randn(2, 4, 10)
    path, out, draw = tmp_path / "base.onnx", tmp_path / "out.onnx", np.random.default_rng(1)
    with torch.no_grad():
        exported(model, x, exporter, path)
        base, targets = model(x).numpy(), {}
        for name, weight in model.named_parameters():
            if weight.ndim != 2:
                continue
            a, b = (draw.standard_normal(s).astype(np.float32) for s in ((2, weight.shape[1]), (weight.shape[0], 2)))
            place, old = lf.Placement(tuple(weight.shape), (0,), (1,)), weight.numpy().copy()
            drawn = sketch(old, place) if bound else None
            targets[name] = lf.Update((lf.Lora(a, b, 0.2, "factor"),), place if bound else None, sketch=drawn)
            weight += torch.from_numpy(np.float32(0.2) * (b @ a))
        truth = model(x).numpy()
    if exporter == "dynamo" and case == "two layers by names":  # it numbers no layers
        with pytest.raises(lf.LoraFormatError, match=r"LF-603  name_scopes: rnn\.weight_ih_l0 means 2 weights"):
            VERBS[verb](lf.Adapter(targets), open_base(path), out)
        return
    VERBS[verb](lf.Adapter(targets), open_base(path), out)
    feeds = {"x": x.numpy()}
    assert relative_error(session(path).run(None, feeds)[0], base) <= 1e-5
    assert relative_error(session(out).run(None, feeds)[0], truth) <= 1e-5
    assert relative_error(base, truth) > 0.05


class Cells(torch.nn.Module):
    """A cell that is called step by step, from zeros or from a state that was learned."""

    def __init__(self, kind, *, learned):
        super().__init__()
        self.cell, self.two = getattr(torch.nn, kind)(10, 6), kind == "LSTMCell"
        self.state = torch.nn.Parameter(torch.randn(1, 6)) if learned else None

    def forward(self, x):
        h = torch.zeros(x.shape[1], 6) if self.state is None else self.state.expand(x.shape[1], 6)
        state = (h, h) if self.two else h
        for step in x:
            state = self.cell(step, state)
        return state[0] if self.two else state


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("LSTMCell", "peft"),
        ("GRUCell", "peft"),
        ("RNNCell", "peft"),
        ("LSTMCell", "a learned state"),
        ("GRUCell", "biases too"),
    ],
)
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_cells_are_products_of_one_module(what, exporter, kind, tmp_path):
    torch.manual_seed(3)
    model, x = Cells(kind, learned=what == "a learned state").eval(), torch.randn(3, 4, 10)
    path, out, draw = tmp_path / "base.onnx", tmp_path / "out.onnx", np.random.default_rng(1)
    with torch.no_grad():
        exported(model, x, exporter, path)
        base = model(x).numpy()
        ours = by_peft(model, tmp_path) if what == "peft" else lf.Adapter(drawn_for(model, draw, what == "biases too"))
        truth = model(x).numpy()
    verb = VERBS["attach" if exporter == "dynamo" else "merge"]
    if exporter == "dynamo" and what != "peft":  # which computes the first call ahead, of zeros if nothing was learned
        with pytest.raises(lf.LoraFormatError, match=r"LF-608  a product of it and a constant was computed") as caught:
            verb(ours, open_base(path), out)
        assert [p.where for p in caught.value.problems] == [
            "cell.bias_hh" if what == "biases too" else "cell.weight_hh"
        ]
        return
    verb(ours, open_base(path), out)
    assert relative_error(session(path).run(None, {"x": x.numpy()})[0], base) <= 1e-5
    assert relative_error(session(out).run(None, {"x": x.numpy()})[0], truth) <= 1e-5
    assert relative_error(base, truth) > 0.05


@pytest.mark.parametrize("start", ["zeros", "a learned state"])
@pytest.mark.parametrize("tool", ["onnxslim", "onnxsim"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_that_a_tool_simplified_are_still_one_module(kind, tool, start, tmp_path):
    """The tool computes the first call; one on zeros gave the bias, which no change of the weight moves."""
    tools = {"onnxslim": "slim", "onnxsim": "simplify"}
    work = getattr(pytest.importorskip(tool, reason=f"needs {tool}: the peers extra"), tools[tool])
    torch.manual_seed(3)
    model, x = Cells(kind, learned=start != "zeros").eval(), torch.randn(3, 4, 10)
    path, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    with torch.no_grad():
        exported(model, x, "torchscript", path)
        base, made = model(x).numpy(), work(onnx.load(path))
        onnx.save(made[0] if tool == "onnxsim" else made, path)
        ours = by_peft(model, tmp_path)
        truth = model(x).numpy()
    if start != "zeros":
        with pytest.raises(lf.LoraFormatError, match=r"LF-608 ") as caught:
            merge(ours, open_base(path), out)
        assert "cell.weight_hh" in {problem.where for problem in caught.value.problems}
        return
    merge(ours, open_base(path), out)
    assert relative_error(session(out).run(None, {"x": x.numpy()})[0], truth) <= 1e-5
    assert relative_error(base, truth) > 0.05


def drawn_for(model, draw, biases):
    """Key → what was added to the model's own parameter."""
    targets = {}
    for name, weight in model.cell.named_parameters():
        if weight.ndim == 2:
            a, b = (draw.standard_normal(s).astype(np.float32) for s in ((2, weight.shape[1]), (weight.shape[0], 2)))
            weight += torch.from_numpy(np.float32(0.2) * (b @ a))
            targets[f"cell.{name}"] = lf.Update((lf.Lora(a, b, 0.2, "factor"),))
        elif biases:
            weight += torch.from_numpy(draw.standard_normal(weight.shape).astype(np.float32))
            targets[f"cell.{name}"] = lf.Update((lf.Replace(weight.numpy().copy()),))
    return targets


def by_peft(model, folder):
    """PEFT's file of both weights, which it trains as parameters (``target_modules`` takes no cell, 0.21)."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "base.safetensors")
    config = LoraConfig(r=2, target_parameters=["cell.weight_ih", "cell.weight_hh"], init_lora_weights=False)
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(folder / "adapter")
    tuned.merge_and_unload()
    return lf.load(folder / "adapter", base=open_base(folder / "base.safetensors"))
