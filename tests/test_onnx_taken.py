"""What other tools make of a model with inputs for adapters: those that keep them, and those that take them away."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import adapter, model, save
from test_onnx_swap import KEY, MATMUL

import loraformat as lf
from loraformat import LoraFormatError
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import prepare
from loraformat_converters.onnx.runtime import Session

pytestmark = pytest.mark.peer


def slimmed(path, out):
    onnx.save(pytest.importorskip("onnxslim").slim(str(path)), out)


def simplified(path, out):
    onnx.save(pytest.importorskip("onnxsim").simplify(onnx.load(path))[0], out)


def quantised(path, out):
    pytest.importorskip("onnxruntime.quantization").quantize_dynamic(str(path), str(out))


def halved(path, out):
    float16 = pytest.importorskip("onnxconverter_common.float16")
    onnx.save(float16.convert_float_to_float16(onnx.load(path)), out)


MODES = {
    "swap": {"mode": "swap"},
    "live": {"live_scale": True},
    "stack": {"mode": "stack", "rows": ("x",), "select": "weights"},
}


@pytest.mark.parametrize(
    ("mode", "tool", "says"),
    [
        ("swap", slimmed, "has no input"),
        ("swap", simplified, "has no input"),
        ("swap", quantised, "has no input"),
        ("swap", halved, "as float16"),
        ("live", slimmed, "has no input"),
        ("live", halved, "as float16"),
        ("stack", halved, "as float16"),
    ],
)
def test_inputs_that_another_tool_took_away_are_told(mode, tool, says, run, tmp_path):
    """What is fed would be refused run by run, by another message each time; what is written for it would never act."""
    lf.save(adapter({KEY: (7, 5)}), tmp_path / "q.safetensors")
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    given = [("q", lf.load(tmp_path / "q.safetensors"))]
    base.apply(prepare("attach", given, base, Options(tmp_path / "in.onnx", **MODES[mode])))
    tool(tmp_path / "in.onnx", tmp_path / "m.onnx")
    with pytest.raises(LoraFormatError, match=f"LF-613.*{says}"):
        Session(tmp_path / "m.onnx")
    if mode == "swap":
        write = ("convert", "q.safetensors", "q.onnx_adapter", "--for", "m.onnx", "--fold-scale")
        for words in (write, ("info", "m.onnx", "--how", "python")):
            told = run(*words)
            assert (told.code, says in told.err) == (1, True)


def test_required_slots_outlive_onnxslim(tmp_path):
    base = open_base(save(model(MATMUL), tmp_path / "base.onnx"))
    given = adapter({KEY: (7, 5)})
    base.apply(prepare("attach", [("q", given)], base, Options(tmp_path / "in.onnx", "swap", slots="required")))
    slimmed(tmp_path / "in.onnx", tmp_path / "m.onnx")
    found = []
    for path in ("in.onnx", "m.onnx"):
        running = Session(tmp_path / path)
        running.load("q", tmp_path / "in.q.onnx_adapter")
        found.append(running.use("q").run({"x": np.ones((2, 3, 5), np.float32)})["y"])
    assert relative_error(*found) <= 1e-6
