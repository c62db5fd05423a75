"""What ONNX Runtime fuses in the base and not in the attached model is counted."""

from __future__ import annotations

import numpy as np
import onnx
from graphs import adapter, model, save
from onnx import numpy_helper, parser

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


def test_a_model_of_any_size_is_counted(tmp_path):
    """More than a file of ONNX holds, as zeros that take no place."""
    n, layers = 8192, 9
    held = ", ".join(f"float[{n},{n}] w{i}" for i in range(layers))
    lines = " ".join(
        f'["/m/{i}/MatMul"] h{i} = MatMul(g{i}, w{i}) a{i} = Add(h{i}, b) g{i + 1} = com.microsoft.Gelu(a{i})'
        for i in range(layers)
    )
    made = parser.parse_model(f"""<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]>
      g (float[N,T,{n}] g0) => (float[N,T,{n}] g{layers}) <{held}, float[{n}] b> {{ {lines} }}""")
    del made.graph.value_info[:]
    for i in range(layers):
        tensor = onnx.TensorProto(name=f"w{i}", dims=[n, n], data_type=1, data_location=1)
        for key, value in (("location", "w.bin"), ("offset", 4 * n * n * i), ("length", 4 * n * n)):
            tensor.external_data.add(key=key, value=str(value))
        made.graph.initializer.append(tensor)
    made.graph.initializer.append(numpy_helper.from_array(np.zeros(n, np.float32), "b"))
    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(4 * n * n * layers)
    base = open_base(save(made, tmp_path / "base.onnx"))
    base.apply(prepare("attach", [("default", adapter({"m.3.weight": (n, n)}))], base, Options(tmp_path / "out.onnx")))
    assert unfused(base.path, tmp_path / "out.onnx") == {"com.microsoft.BiasGelu": (layers, layers - 1)}
