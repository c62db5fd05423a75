"""Write the names of transformers' Flax models beside torch's, as transformers itself pairs them.

    python make.py      (transformers 4.55.4, the last line with Flax models; with torch, jax, flax)

``names.json``: model → {torch: name → shape, flax: path → shape, pairs: torch name → path}. The pairs are by
``modeling_flax_pytorch_utils.rename_key_and_reshape_tensor``, which loads a PyTorch checkpoint into a Flax model.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import transformers
from flax.traverse_util import flatten_dict
from transformers.modeling_flax_pytorch_utils import rename_key_and_reshape_tensor

HERE = Path(__file__).resolve().parent
SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "bert": (
        transformers.BertConfig(vocab_size=53, max_position_embeddings=16, **SMALL),
        "BertForSequenceClassification",
    ),
    "vit": (transformers.ViTConfig(image_size=12, patch_size=4, **SMALL), "ViTForImageClassification"),
    "mistral": (transformers.MistralConfig(vocab_size=53, num_key_value_heads=2, **SMALL), "MistralForCausalLM"),
    "gemma": (transformers.GemmaConfig(vocab_size=53, num_key_value_heads=2, head_dim=8, **SMALL), "GemmaForCausalLM"),
    "llama": (transformers.LlamaConfig(vocab_size=53, num_key_value_heads=2, **SMALL), "LlamaForCausalLM"),
}


def one(config, name):
    flax = getattr(transformers, f"Flax{name}")(config, _do_init=False)
    shapes = jax.eval_shape(lambda: flax.init_weights(jax.random.PRNGKey(0), flax.input_shape))
    shapes = flatten_dict(shapes)
    torch = getattr(transformers, name)(config).state_dict()
    pairs = {}
    for key, tensor in torch.items():
        path, value = rename_key_and_reshape_tensor(
            tuple(key.split(".")), tensor.numpy(), shapes, flax.base_model_prefix
        )
        if path in shapes and shapes[path].shape == value.shape:
            pairs[key] = "/".join(path)
    left = {"/".join(path) for path in shapes} - set(pairs.values())
    assert not left, left
    return {
        "torch": {key: list(tensor.shape) for key, tensor in torch.items()},
        "flax": {"/".join(path): list(value.shape) for path, value in shapes.items()},
        "pairs": pairs,
    }


if __name__ == "__main__":
    found = {name: one(*model) for name, model in MODELS.items()}
    (HERE / "names.json").write_text(json.dumps(found, indent=0) + "\n")
