"""Golden adapters written by mlx-lm itself (on the CPU), with the change of each weight that mlx computes.

Run ``python make.py`` with mlx[cpu] and mlx-lm at the versions in ``golden.json``. One folder per case:

``adapter/``           what the training run of mlx-lm leaves: its own ``save_config``, and ``save_safetensors`` of the
                       trainable parameters, as ``tuner/trainer.py`` calls it
``base.safetensors``   the weights of the model before, under MLX's names
``truth.safetensors``  ``delta.<parameter>``: the weight of the layer that mlx-lm's ``fuse`` returns, minus the base;
                       ``x``, ``y``: tokens and the logits of the model with the adapter, unfused
``golden.json``        the case, the versions, the rank and the scale that the layers hold

No formula stands here: weights are drawn from a seeded generator, the rest is what mlx returns.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import save_config
from mlx_models import MODELS

HERE = Path(__file__).resolve().parent
QKV = ["self_attn.q_proj", "self_attn.v_proj"]

# Case → (model, fine_tune_type, num_layers, lora_parameters, dtype).
CASES: dict[str, tuple[str, str, int, dict[str, Any], Any]] = {
    "linear": ("llama", "lora", 1, {"rank": 3, "dropout": 0.0, "scale": 2.5, "keys": QKV}, mx.float32),
    "half": ("llama", "lora", 2, {"rank": 2, "dropout": 0.1, "scale": 20.0, "keys": QKV}, mx.bfloat16),
    "every": ("llama", "lora", -1, {"rank": 2, "dropout": 0.0, "scale": 0.3}, mx.float32),
    "embedding": ("llama", "lora", 1, {"rank": 4, "dropout": 0.0, "scale": 1.5, "keys": ["model.embed_tokens", "lm_head", *QKV]}, mx.float32),
    "experts": ("qwen3_moe", "lora", 1, {"rank": 2, "dropout": 0.0, "scale": 1.25}, mx.float32),
    "dora": ("llama", "dora", 1, {"rank": 3, "dropout": 0.0, "scale": 0.7, "keys": ["model.embed_tokens", *QKV]}, mx.float32),
    "full": ("llama", "full", 1, {"rank": 8, "dropout": 0.0, "scale": 20.0}, mx.float32),
}  # fmt: skip


def drawn(draw: np.random.Generator, tree: Any, size: float) -> Any:
    return tree_unflatten(
        [(name, mx.array(size * draw.standard_normal(p.shape)).astype(p.dtype)) for name, p in tree_flatten(tree)]
    )


def weights(model: Any) -> dict[str, mx.array]:
    return {name: mx.array(value).astype(mx.float32) for name, value in tree_flatten(model.parameters())}


def make(name: str) -> None:
    model_type, kind, num_layers, parameters, dtype = CASES[name]
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "adapter").mkdir(parents=True)
    model = MODELS[model_type]()
    model.update(drawn(draw, model.parameters(), 0.2))
    base = weights(model)
    mx.save_safetensors(str(folder / "base.safetensors"), base)

    model.freeze()
    if kind == "full":
        for layer in model.layers[-num_layers:]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, num_layers, parameters, use_dora=kind == "dora")
    model.eval()
    trained = model.trainable_parameters()
    noise = dict(tree_flatten(drawn(draw, trained, 0.3)))
    values = [(n, mx.abs(v) + 1 if n.endswith(".m") else v.astype(dtype)) for n, v in noise.items()]
    model.update(tree_unflatten(values))
    args = {**CONFIG_DEFAULTS, "model": f"tiny-{model_type}", "fine_tune_type": kind, "num_layers": num_layers}
    save_config(
        args | {"lora_parameters": None if kind == "full" else parameters}, folder / "adapter" / "adapter_config.json"
    )
    mx.save_safetensors(
        str(folder / "adapter" / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters()))
    )

    x = mx.array(draw.integers(0, 50, (1, 9)))
    y = model(x).astype(mx.float32)
    again = MODELS[model_type]()
    again.load_weights(list(base.items()))
    load_adapters(again, str(folder / "adapter")).eval()
    assert mx.abs(again(x) - y).max() <= 1e-6, name
    if kind != "full":
        # In float32: of bfloat16 factors fuse rounds scale · B to bfloat16, which the layer itself does not.
        model.update(tree_unflatten([(n, v.astype(mx.float32)) for n, v in tree_flatten(model.trainable_parameters())]))
        fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
        model.update_modules(tree_unflatten(fused))
    after = weights(model)
    delta = {f"delta.{n}": after[n] - value for n, value in base.items() if not mx.array_equal(after[n], value)}
    mx.save_safetensors(str(folder / "truth.safetensors"), delta | {"x": x.astype(mx.int32), "y": y})
    golden = {
        "case": name,
        "model": model_type,
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
        "made_by": "make.py",
    }
    golden |= {"type": kind, "rank": parameters["rank"], "scale": parameters["scale"]}
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    for case in sys.argv[1:] or CASES:
        make(case)
        print(case, sum(file.stat().st_size for file in (HERE / case).rglob("*") if file.is_file()))
