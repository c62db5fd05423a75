"""What ONNX Runtime fuses in the base and not in the attached model is counted."""

from __future__ import annotations

import numpy as np
from graphs import adapter, model, save

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.verbs.graph import prove
from loraformat.verbs.merge import prepare
from loraformat_converters.onnx.proving.fusions import unfused

KEY = "m.q.weight"
GELU = """g (float[N,T,5] x) => (float[N,T,7] y) <float[5,7] w, float[7] b, float[7] v, float[7,7] u>
  { ["/m/q/MatMul"] h = MatMul(x, w)  a = Add(h, b)  g = com.microsoft.Gelu(a)
    ["/m/k/MatMul"] i = MatMul(g, u)  j = Add(i, v)  y = com.microsoft.Gelu(j) }"""


def attached(tmp_path, targets):
    base = open_base(save(model(GELU), tmp_path / "base.onnx"))
    plan = prepare("attach", [("default", adapter(targets))], base, Options(tmp_path / "out.onnx"))
    base.apply(plan)
    return base, plan


def test_a_bias_that_the_branch_stands_behind_is_no_longer_fused(tmp_path):
    base, plan = attached(tmp_path, {KEY: (7, 5)})
    lost = unfused(base.path, tmp_path / "out.onnx")
    assert lost == {"com.microsoft.BiasGelu": (2, 1)}
    proof = prove(base, plan)
    assert proof.unfused == lost
    assert str(proof).endswith("no longer fused: com.microsoft.BiasGelu 2 → 1")


def test_where_nothing_is_lost_nothing_is_said(tmp_path):
    text = 'g (float[N,T,5] x) => (float[N,T,7] y) <float[5,7] w> { ["/m/q/MatMul"] h = MatMul(x, w)  y = Relu(h) }'
    base = open_base(save(model(text), tmp_path / "base.onnx"))
    plan = prepare("attach", [("default", adapter({KEY: (7, 5)}))], base, Options(tmp_path / "out.onnx"))
    base.apply(plan)
    proof = prove(base, plan)
    assert not proof.unfused
    assert "fused" not in str(proof)


def test_the_command_says_it(run, tmp_path):
    save(model(GELU), tmp_path / "base.onnx")
    lf.save(adapter({KEY: (7, 5), "m.k.weight": (7, 7)}), tmp_path / "a.lora.safetensors")
    words = ["attach", tmp_path / "a.lora.safetensors", "--to", tmp_path / "base.onnx", "-o", tmp_path / "out.onnx"]
    said = run(*words, "--verify", "--json").json
    assert said["proof"]["unfused"] == {"com.microsoft.BiasGelu": [2, 0]}
    assert np.isfinite(said["proof"]["error"])
