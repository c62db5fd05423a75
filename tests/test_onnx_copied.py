"""A module of which one call goes by its name, and another lies in the packed weight of an attention."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import lora, model, save, session
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic

import loraformat as lf
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import merge, prepare

HIDDEN = 24
SIZES = {"same": (24, 24, 24), "v of another size": (24, 24, 40)}
DRAW = np.random.default_rng(3)


def called_twice(sizes, held, dtype=np.float32):
    """x·Q, x·K, x·V by their modules' names, and then an attention; ``held``: which of the three it holds too."""
    own = {n: DRAW.standard_normal((HIDDEN, size)).astype(dtype) for n, size in zip("qkv", sizes, strict=True)}
    other = [own[n] if n in held else DRAW.standard_normal(own[n].shape).astype(dtype) for n in "qkv"]
    more = f", qkv_hidden_sizes = {list(sizes)}" if len(set(sizes)) > 1 else ""
    kind = np.dtype(dtype).name.replace("float32", "float")
    made = model(f"""g ({kind}[N,T,{HIDDEN}] x) => ({kind}[N,T,A] a, {kind}[N,T,B] b, {kind}[N,T,C] c, {kind}[N,T,V] y)
      <{kind}[{sum(sizes)}] d> {{
         ["/m/q/MatMul"] a = MatMul(x, q)  ["/m/k/MatMul"] b = MatMul(x, k)  ["/m/v/MatMul"] c = MatMul(x, v)
         ["Attention_0"] y = com.microsoft.Attention <num_heads = 4{more}> (x, w, d)
      }}""")
    tensors = {**own, "w": np.concatenate(other, axis=1)}
    made.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in tensors.items())
    return made


@pytest.mark.parametrize("held", ["q", "k", "v", "kv"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("verb", "mode"), [("merge", "branch"), ("attach", "branch"), ("attach", "swap")])
def test_a_call_that_an_attention_holds_is_not_left_as_it_was(verb, mode, sizes, held, tmp_path):
    """As ONNX Runtime's optimizer (1.32) leaves ALBERT: the first call in its modules' names, the others fused."""
    base = open_base(save(called_twice(SIZES[sizes], held), tmp_path / "base.onnx"))
    adapter = lf.Adapter({f"m.{n}.weight": lora(size, HIDDEN) for n, size in zip("qkv", SIZES[sizes], strict=True)})
    with pytest.raises(lf.LoraFormatError) as told:
        prepare(verb, [("a", adapter)], base, Options(tmp_path / "out.onnx", mode))
    assert [(p.rule, p.where) for p in told.value.problems] == [("LF-609", f"m.{n}.weight") for n in held]
    assert "Attention_0 holds it too, as rows of w" in told.value.problems[0].what


def test_in_16_bits_too(tmp_path):
    base = open_base(save(called_twice((24, 24, 24), "k", np.float16), tmp_path / "base.onnx"))
    with pytest.raises(lf.LoraFormatError, match="LF-609"):
        prepare("attach", [("a", lf.Adapter({"m.k.weight": lora(24, 24)}))], base, Options(tmp_path / "out.onnx"))


@pytest.mark.parametrize("per_channel", [False, True])
def test_in_8_bits_too(per_channel, tmp_path):
    save(called_twice((24, 24, 24), "v"), tmp_path / "floats.onnx")
    quantize_dynamic(tmp_path / "floats.onnx", tmp_path / "base.onnx", per_channel=per_channel)
    base = open_base(tmp_path / "base.onnx")
    assert {site.operator for site in base.index.sites} >= {"MatMulInteger", "com.microsoft.QAttention"}
    with pytest.raises(lf.LoraFormatError, match="LF-609"):
        prepare("attach", [("a", lf.Adapter({"m.v.weight": lora(24, 24)}))], base, Options(tmp_path / "out.onnx"))


@pytest.mark.parametrize("sizes", SIZES)
def test_an_attention_of_other_weights_stands_in_nobodys_way(sizes, tmp_path):
    base = open_base(save(called_twice(SIZES[sizes], ""), tmp_path / "base.onnx"))
    adapter = lf.Adapter({"m.k.weight": lora(24, HIDDEN)})
    merge(adapter, base, tmp_path / "merged.onnx")
    base.apply(prepare("attach", [("a", adapter)], base, Options(tmp_path / "out.onnx")))
    x = {"x": DRAW.standard_normal((2, 3, HIDDEN)).astype(np.float32)}
    found, wanted = (session(tmp_path / f"{name}.onnx").run(None, x) for name in ("out", "merged"))
    assert all(relative_error(*pair) <= 1e-5 for pair in zip(found, wanted, strict=True))


def test_what_is_not_changed_may_lie_there(tmp_path):
    base = open_base(save(called_twice((24, 24, 24), "q"), tmp_path / "base.onnx"))
    prepare("attach", [("a", lf.Adapter({"m.k.weight": lora(24, 24)}))], base, Options(tmp_path / "out.onnx"))
