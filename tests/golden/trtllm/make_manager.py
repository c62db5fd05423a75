"""Goldens by TensorRT-LLM's own ``LoraManager``: ``load_from_ckpt`` of PEFT folders, then ``save_lora_weights_to_bin``.

``python make_manager.py LORA_MANAGER`` runs the class of that file (NVIDIA/TensorRT-LLM, tensorrt_llm/lora_manager.py at
007e181) beside stand-ins for the modules that need an installed TensorRT-LLM, on a CPU for a GPU; its functions for PEFT
are all that is used of it. What it makes of an adapter is what the runtime is given, and the files are those of
``hf_lora_convert.py`` with a fourth column.

``manager-llama``   of ``../peft/llama``
``manager-experts``   of ``experts/adapter``, by PEFT, with the ΔW that PEFT merged in ``experts/truth.safetensors``
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).resolve().parent
EXPERTS, WIDTH, INNER, LAYERS = 3, 24, 20, 2


@dataclasses.dataclass
class OneGpu:
    tp_size: int = 1
    tp_rank: int = 0

    def has_moe_ep(self) -> bool:
        return False


def manager_of(path: Path) -> Any:
    """The module of that file, inside a package of stand-ins."""

    def module(name: str, **members: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
        vars(sys.modules[name]).update(members)

    nothing = dict.fromkeys(("DictConversion", "pad_vocab_size"), type("Nothing", (), {}))
    module("tensorrt_llm")
    module("tensorrt_llm.layers")
    module("tensorrt_llm.layers.linear", ColumnLinear=None)
    module("tensorrt_llm.mapping", Mapping=OneGpu)
    module("tensorrt_llm.models")
    module(
        "tensorrt_llm._utils",
        release_gc=lambda: None,
        str_dtype_to_torch=lambda name: getattr(torch, name),
        torch_to_numpy=lambda tensor: tensor.numpy(),
        **nothing,
    )
    module(
        "tensorrt_llm.models.convert_utils",
        get_model_path=lambda folder, stem: Path(folder) / f"{stem}.safetensors",
        load_state_dict=load_file,
        split_matrix_tp=None,
    )
    torch.Tensor.cuda = lambda self: self
    spec = importlib.util.spec_from_file_location("tensorrt_llm.lora_manager", path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        expert = {"w1": (WIDTH, INNER), "w2": (INNER, WIDTH), "w3": (WIDTH, INNER)}
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in expert.items()}) for _ in range(EXPERTS)
        )


def save_experts(folder: Path) -> None:
    """A PEFT adapter of every expert, random, and what PEFT's own merge adds to each weight."""
    torch.manual_seed(5)
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList()
    for _ in range(LAYERS):
        layer = nn.Module()
        layer.block_sparse_moe = Experts()
        model.model.layers.append(layer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = get_peft_model(model, LoraConfig(r=5, lora_alpha=10, target_modules=["w1", "w2", "w3"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    shutil.rmtree(folder, ignore_errors=True)
    wrapped.save_pretrained(folder / "adapter")
    (folder / "adapter/README.md").unlink()
    after = wrapped.merge_and_unload().state_dict()
    changed = {name: after[name] - tensor for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    save_file(changed, folder / "truth.safetensors")


def main(path: Path) -> None:
    module = manager_of(path)
    names = module.get_default_trtllm_modules_to_hf_modules()
    save_experts(HERE / "experts")
    for case, folder in {"llama": HERE.parent / "peft/llama/adapter", "experts": HERE / "experts/adapter"}.items():
        targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        own = sorted(own for own, hf in names.items() if hf in targets)
        manager = module.LoraManager()
        options = module.LoraModelConfig(own, names, WIDTH, "float32")
        manager.load_from_ckpt([str(folder)], options, uids=[f"manager-{case}"])
        shutil.rmtree(HERE / f"manager-{case}", ignore_errors=True)
        manager.save_lora_weights_to_bin(HERE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
