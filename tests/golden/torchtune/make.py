"""Goldens written by torchtune 0.6.1 itself, in its own names and, by its own conversion, in PEFT's.

Run ``python make.py`` in an environment with torchtune, torchao 0.16.0 and torch (the versions are in ``golden.json``).

``adapter_model.pt``      ``torch.save`` of ``get_adapter_state_dict``, as every checkpointer of torchtune writes it
``adapter_config.json``   as the recipe hands it to a checkpointer (of ``lora`` alone)
``base.safetensors``      the base's weights in torchtune's names; ``hf.safetensors``: in Hugging Face's, by ``tune_to_hf``
``truth.safetensors``     ``delta.<parameter>``: what ``get_merged_lora_ckpt`` adds (of DoRA ``merged.<parameter>``),
                          in float64 and then float32; ``hf_delta.<parameter>``, ``hf_merged.<parameter>``: the same
                          after ``tune_to_hf``; ``x``, ``y``: tokens and the logits of the model with its adapter
``config.json``           what a Hugging Face model of these sizes says of its heads
``golden.json``           rank, alpha, versions
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.llama3 import lora_llama3
from torchtune.models.qwen2 import lora_qwen2
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.modules.peft import get_adapter_state_dict, get_merged_lora_ckpt

HERE = Path(__file__).resolve().parent
SIZES: dict[str, Any] = {"vocab_size": 37, "num_layers": 2, "embed_dim": 24, "max_seq_len": 16, "intermediate_dim": 20}
HEADS = {"num_heads": 4, "num_kv_heads": 2}
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]

CASES: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 5, "lora_alpha": 9, "use_dora": False, "model_type": "llama"},
    "dora": {"lora_rank": 3, "lora_alpha": 8, "use_dora": True, "model_type": "llama"},
    "qwen2": {"lora_rank": 3, "lora_alpha": 7, "use_dora": False, "model_type": "qwen2"},
}


def build(case: dict[str, Any]) -> torch.nn.Module:
    own = {name: case[name] for name in ("lora_rank", "lora_alpha", "use_dora")}
    if case["model_type"] == "qwen2":
        return lora_qwen2(ATTENTION, apply_lora_to_mlp=True, **SIZES, **HEADS, **own)
    return lora_llama3(ATTENTION, apply_lora_to_mlp=True, apply_lora_to_output=True, **SIZES, **HEADS, **own)


@torch.no_grad()
def make(name: str) -> None:
    case = CASES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.manual_seed(zlib.crc32(name.encode()))
    model = build(case).eval()
    for key, parameter in model.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape)
        parameter.copy_(noise.abs() + 1 if key.endswith(("magnitude", "scale")) else noise)
    adapter = get_adapter_state_dict(model.state_dict())
    torch.save(adapter, folder / "adapter_model.pt")
    if name == "lora":
        config = {
            "r": case["lora_rank"],
            "lora_alpha": case["lora_alpha"],
            "target_modules": [*ATTENTION, "w1", "w2", "w3", "output"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))

    x = torch.randint(0, 37, (2, 7))
    exact = {key: value.double() for key, value in model.state_dict().items()}
    base = {key: value for key, value in exact.items() if key not in adapter}
    merged = get_merged_lora_ckpt(copy.deepcopy(exact), rank=case["lora_rank"], alpha=case["lora_alpha"])
    to_hf = qwen2_tune_to_hf if case["model_type"] == "qwen2" else tune_to_hf
    numbers = {"num_heads": 4, "num_kv_heads": 2, "dim": 24}
    if case["model_type"] == "qwen2":
        numbers["tie_word_embeddings"] = False
    hf_base, hf_merged = to_hf(base, **numbers), to_hf(merged, **numbers)
    save(base, folder / "base.safetensors")
    save(hf_base, folder / "hf.safetensors")
    truth = {"x": x, "y": model(x)}
    for prefix, before, after in (("", base, merged), ("hf_", hf_base, hf_merged)):
        for key, value in after.items():
            if not torch.equal(value, before[key]):
                truth |= {f"{prefix}merged.{key}": value, f"{prefix}delta.{key}": value - before[key]}
    save(truth, folder / "truth.safetensors")
    config = {
        "model_type": case["model_type"], "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "architectures": ["LlamaForCausalLM" if case["model_type"] == "llama" else "Qwen2ForCausalLM"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    golden = {
        "case": name,
        **case,
        **{tool: version(tool) for tool in ("torchtune", "torchao", "torch")},
        "made_by": "make.py",
    }
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    kept = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    save_file({key: value.contiguous().clone() for key, value in kept.items()}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for case in CASES:
        make(case)
