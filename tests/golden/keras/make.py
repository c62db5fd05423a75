"""Write the golden of KerasHub: a tiny Gemma's factors, its kernels, and the kernels with the factors in them.

KERAS_BACKEND=jax python make.py      (keras 3.15.1, keras-hub 0.32.0, jax 0.10.2)
"""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"

from pathlib import Path

import keras
import keras_hub
import numpy as np

HERE = Path(__file__).resolve().parent
DRAW = np.random.default_rng(3)

if __name__ == "__main__":
    model = keras_hub.models.GemmaBackbone(
        vocabulary_size=13, num_layers=2, num_query_heads=4, num_key_value_heads=2, hidden_dim=10, intermediate_dim=14, head_dim=6
    )  # fmt: skip
    model.enable_lora(3, target_layer_names=["query_dense", "value_dense", "ffw_gating", "query", "value"])
    layers = [layer for layer in model._flatten_layers(include_self=False) if layer.weights]
    arrays = {}
    for index, layer in enumerate(layers):
        if not getattr(layer, "lora_enabled", False):
            continue
        for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
            variable.assign(DRAW.standard_normal(variable.shape).astype(np.float32))
        base, merged = (keras.ops.convert_to_numpy(kernel) for kernel in (layer._kernel, layer.kernel))
        arrays |= {f"{index}/kernel|W": base, f"{index}/kernel|merged": merged}
    model.save_lora_weights(str(HERE / "gemma.lora.h5"))
    model.save_weights(str(HERE / "gemma.weights.h5"))
    np.savez(HERE / "expected.npz", **arrays)
