"""Writes what PEFT makes of two or three adapters by each of its combination types: ``python make.py``.

peft 0.21.2, torch 2.13.0. The modules of the model come in the order of their names, and the seed is set where PEFT
begins to combine: what it draws to initialise the new adapter before that is nobody's number.
"""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

HERE = Path(__file__).parent
SEED, DENSITY = 7, 0.6
RANKS = {"one": 3, "two": 3, "three": 5}
WEIGHTS = {"one": 0.7, "two": -1.3, "three": 0.4}
MODULES = {
    "one": ["a_linear", "b_conv1d", "c_conv", "d_embed"],
    "two": ["a_linear", "b_conv1d", "c_conv", "d_embed"],
    "three": ["a_linear", "d_embed"],
}
ALL = ("one", "two", "three")
ELEMENTS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
RESULTS = {
    **{name: (name, ALL[:2], {}) for name in ELEMENTS},
    "cat": ("cat", ALL, {}),
    "svd": ("svd", ALL, {"svd_rank": 2}),
    **{f"{name}_svd": (f"{name}_svd", ALL, {"svd_rank": 4}) for name in ELEMENTS[1:]},
    "alone": ("svd", ("two",), {}),
}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a_linear = torch.nn.Linear(11, 17)
        self.b_conv1d = Conv1D(13, 10)
        self.c_conv = torch.nn.Conv2d(4, 9, (3, 2))
        self.d_embed = torch.nn.Embedding(19, 8)
        self.config = {"model_type": "custom", "tie_word_embeddings": False}

    def forward(self, x):
        return x


def make():
    torch.manual_seed(0)
    model = None
    for name, rank in RANKS.items():
        config = LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=MODULES[name])
        if model is None:
            model = get_peft_model(Model(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn(tensor.shape))
    for name in RANKS:
        shutil.rmtree(HERE / name, ignore_errors=True)
        model.save_pretrained(HERE, selected_adapters=[name])
        (HERE / "README.md").unlink(missing_ok=True)
        (HERE / name / "README.md").unlink(missing_ok=True)
    inject = model.base_model.inject_adapter

    def injected(*args, **kwargs):
        inject(*args, **kwargs)
        torch.manual_seed(SEED)

    model.base_model.inject_adapter = injected
    for label, (kind, names, options) in RESULTS.items():
        more = options | ({"density": DENSITY} if "ties" in kind or "dare" in kind or "prune" in kind else {})
        weights = [WEIGHTS[name] for name in names]
        model.add_weighted_adapter(list(names), weights, label, combination_type=kind, **more)
        tensors = {}
        for module, layer in model.base_model.model.named_modules():
            if hasattr(layer, "get_delta_weight") and label in layer.scaling:
                delta = layer.get_delta_weight(label)
                tensors[f"{module}.delta"] = delta.detach().contiguous()
                if label in layer.lora_A:
                    a, b = layer.lora_A[label].weight, layer.lora_B[label].weight
                else:
                    a, b = layer.lora_embedding_A[label], layer.lora_embedding_B[label]
                tensors[f"{module}.A"], tensors[f"{module}.B"] = (
                    a.detach().flatten(1).contiguous(),
                    b.detach().flatten(1).contiguous(),
                )
        save_file(tensors, HERE / f"{label}.safetensors")
        model.delete_adapter(label)


if __name__ == "__main__":
    make()
