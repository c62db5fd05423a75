"""What is written is loaded by mlx-lm's own loader, and has its numbers."""

import sys

import mlx_goldens
import numpy as np
import pytest
from mlx_goldens import CASES, adapter_of, base_of, truth_of

import loraformat as lf
from loraformat import Adapter, Lora, Update
from loraformat.testing import relative_error
from loraformat.verbs.convert import save
from loraformat_converters.mlx import layout

pytestmark = pytest.mark.peer
mx = pytest.importorskip("mlx.core", reason="needs the peers: mlx, mlx-lm")
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.tuner.utils import load_adapters  # noqa: E402

mx.set_default_device(mx.cpu)
sys.path.insert(0, str(mlx_goldens.HERE))
from mlx_models import MODELS  # noqa: E402


def model_of(name, base):
    model = MODELS[name]()
    model.load_weights(str(base))
    return model


@pytest.mark.parametrize("case", CASES)
def test_mlx_gives_the_same_outputs_with_what_is_written(case, tmp_path):
    adapter = lf.load(adapter_of(case))
    save(lf.Adapter(adapter.targets, "mlx"), tmp_path / "a", layout)  # nothing of the source's configuration
    model = model_of("qwen3_moe" if case == "experts" else "llama", base_of(case))
    load_adapters(model, str(tmp_path / "a")).eval()
    y = np.array(model(mx.array(truth_of(case)["x"])).astype(mx.float32))
    assert relative_error(y, truth_of(case)["y"]) <= 1e-6


def test_mlx_computes_the_change_of_what_was_padded_and_folded(tmp_path):
    draw = np.random.default_rng(1)

    def pair(rank, out, inner, alpha, rule, batch=()):
        a, b = (draw.standard_normal((*batch, *s)).astype(np.float32) for s in ((rank, inner), (out, rank)))
        return Update((Lora(a, b, alpha, rule),))

    block = "model.layers.0"
    adapter = Adapter({
        f"{block}.self_attn.q_proj.weight": pair(4, 24, 20, 6, "alpha/sqrt(r)"),
        "model.layers.1.self_attn.v_proj.weight": pair(2, 12, 20, 6, "alpha/sqrt(r)"),
        f"{block}.mlp.switch_mlp.gate_proj.weight": pair(3, 14, 20, 0.7, "factor", (5,)),
        "model.embed_tokens.weight": pair(1, 20, 50, -8, "alpha/r"),
    }, "mlx")  # fmt: skip
    warnings = save(adapter, tmp_path / "a", layout)
    assert len(warnings) == 6
    base = base_of("experts")
    model = model_of("qwen3_moe", base)
    before = dict(tree_flatten(model.parameters()))
    load_adapters(model, str(tmp_path / "a")).eval()
    layers = [(name, m.fuse()) for name, m in model.named_modules() if hasattr(m, "fuse")]
    assert {name for name, _ in layers} == {key.removesuffix(".weight") for key in adapter}
    model.update_modules(tree_unflatten(layers))
    after = dict(tree_flatten(model.parameters()))
    for key, update in adapter.items():
        delta = np.array(after[key]) - np.array(before[key])
        wanted = update.matrix().T if "embed" in key else update.matrix()
        assert relative_error(delta, wanted) <= 1e-6, key
