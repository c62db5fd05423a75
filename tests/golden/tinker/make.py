"""A made-up Tinker adapter, and the weights that tinker-cookbook's own merge makes with it.

Tinker itself is a service; its cookbook reads what it gives. ``python make.py FOLDER`` takes tinker_cookbook 0.6.1 from
FOLDER, where its wheel is unpacked: its merge needs torch alone.

``adapter/``            adapter_model.safetensors, adapter_config.json
``base.safetensors``    weights under Hugging Face's names, experts one by one
``truth.safetensors``   ``delta.<parameter>``: what ``apply_merge_op`` adds, in float64 and then float32
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
EXPERTS, WIDTH, INNER, VOCABULARY, R, ALPHA = 3, 20, 14, 37, 4, 7


def main(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    for name in ("tinker", "pyrage"):  # of the download, which nothing here does
        sys.modules[name] = types.ModuleType(name)
    from tinker_cookbook.weights._merge import apply_merge_op, detect_merge_profile, plan_merge_ops

    torch.manual_seed(11)
    layer = "model.layers.0"
    base = {
        f"{layer}.self_attn.q_proj.weight": torch.randn(24, WIDTH),
        f"{layer}.self_attn.o_proj.weight": torch.randn(WIDTH, 24),
        "lm_head.weight": torch.randn(VOCABULARY, WIDTH),
        "model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH),
    }
    for i in range(EXPERTS):
        base |= {
            f"{layer}.mlp.experts.{i}.gate_proj.weight": torch.randn(INNER, WIDTH),
            f"{layer}.mlp.experts.{i}.up_proj.weight": torch.randn(INNER, WIDTH),
            f"{layer}.mlp.experts.{i}.down_proj.weight": torch.randn(WIDTH, INNER),
        }
    shapes = {
        f"{layer}.self_attn.q_proj": ((R, WIDTH), (24, R)),
        f"{layer}.self_attn.o_proj": ((R, 24), (WIDTH, R)),
        "model.unembed_tokens": ((R, WIDTH), (VOCABULARY, R)),
        f"{layer}.mlp.experts.w1": ((1, R, WIDTH), (EXPERTS, INNER, R)),
        f"{layer}.mlp.experts.w3": ((EXPERTS, R, WIDTH), (EXPERTS, INNER, R)),
        f"{layer}.mlp.experts.w2": ((EXPERTS, R, INNER), (1, WIDTH, R)),
    }
    adapter = {}
    for module, (a, b) in shapes.items():
        adapter[f"base_model.model.{module}.lora_A.weight"] = torch.randn(a)
        adapter[f"base_model.model.{module}.lora_B.weight"] = torch.randn(b)
    config = {"r": R, "lora_alpha": ALPHA, "peft_type": "LORA", "target_modules": "all-linear"}
    (HERE / "adapter").mkdir(exist_ok=True)
    save_file(adapter, HERE / "adapter/adapter_model.safetensors")
    (HERE / "adapter/adapter_config.json").write_text(json.dumps(config))
    save_file(base, HERE / "base.safetensors")

    exact = {name: tensor.double() for name, tensor in base.items()}
    profile = detect_merge_profile({"architectures": ["Qwen3MoeForCausalLM"]}, set(base))
    for ops in plan_merge_ops(adapter, config, set(base), profile).values():
        for op in ops:
            zeros = {op.target_key: torch.zeros_like(exact[op.target_key])}
            apply_merge_op(zeros, op)
            exact[op.target_key] += zeros[op.target_key]
    deltas = {
        f"delta.{n}": (exact[n] - base[n].double()).float() for n in base if not torch.equal(exact[n], base[n].double())
    }
    save_file(deltas, HERE / "truth.safetensors")
    facts = {"tinker_cookbook": "0.6.1", "torch": torch.__version__.split("+")[0], "made_by": "make.py"}
    (HERE / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
