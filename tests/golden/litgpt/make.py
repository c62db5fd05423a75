"""Goldens written by litgpt 0.5.13 itself, and what its own merge makes of its base.

Run ``python make.py`` in an environment with litgpt, lightning and torch (the versions are in ``golden.json``);
``python make.py loads``, where loraformat is too, has litgpt load what loraformat writes of each case, strictly, and
compares its logits with those of the case. It wants an older huggingface-hub than transformers 5, and so is none of the
peers that are installed with the tests. One folder a case, as ``litgpt finetune_lora`` leaves it:

``lit_model.pth.lora``     ``{"model": factors}``, by ``torch.save``
``hyperparameters.yaml``   the numbers that litgpt's own merge reads; ``model_config.yaml`` the model's
``base.safetensors``       the base's weights in litgpt's names
``truth.safetensors``      ``delta.<parameter>``: ``get_lora_AB`` of every layer; ``x``, ``y``: tokens and logits
``golden.json``            the versions and the case
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zlib
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from litgpt.lora import GPT, Config, LoRALinear, lora_filter
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
SIZES: dict[str, Any] = {
    "n_layer": 2, "n_embd": 24, "n_head": 4, "head_size": 10, "intermediate_size": 20, "padded_vocab_size": 37,
    "vocab_size": 37, "block_size": 16, "rotary_percentage": 1.0, "parallel_residual": False, "bias": False,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "name": "tiny",
}  # fmt: skip
LORA: dict[str, Any] = {
    "lora_dropout": 0.0,
    "lora_key": False,
    "lora_head": False,
    "lora_projection": False,
    "lora_mlp": False,
}
CASES: dict[str, dict[str, Any]] = {
    "query_value": {"n_query_groups": 2, "lora_r": 3, "lora_alpha": 7, "lora_query": True, "lora_value": True},
    "all": {
        "n_query_groups": 4, "lora_r": 5, "lora_alpha": 9, "lora_query": True, "lora_key": True, "lora_value": True,
        "lora_projection": True, "lora_mlp": True, "lora_head": True,
    },
    "key": {"n_query_groups": 2, "lora_r": 2, "lora_alpha": 3, "lora_query": False, "lora_key": True, "lora_value": False},
}  # fmt: skip


@torch.no_grad()
def make(name: str) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.manual_seed(zlib.crc32(name.encode()))
    lora = {key: value for key, value in {**LORA, **CASES[name]}.items() if key.startswith("lora_")}
    config = Config(**SIZES, n_query_groups=CASES[name]["n_query_groups"], **lora)
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape))
    state = model.state_dict()
    torch.save(
        {"model": {key: value for key, value in state.items() if lora_filter(key, value)}},
        folder / "lit_model.pth.lora",
    )
    (folder / "hyperparameters.yaml").write_text(yaml.dump({"checkpoint_dir": "base", "precision": "32-true", **lora}))
    model_config = {key: value for key, value in asdict(config).items() if not key.startswith("lora_")}
    (folder / "model_config.yaml").write_text(yaml.dump(model_config))
    base = {key.replace("linear.", ""): value for key, value in state.items() if not lora_filter(key, value)}
    save_file({key: value.contiguous() for key, value in base.items()}, folder / "base.safetensors")
    x = torch.randint(0, 37, (2, 7))
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear) and hasattr(m, "lora_A")}
    truth = {"x": x, "y": model(x), **{f"delta.{path}.weight": m.get_lora_AB() for path, m in layers.items()}}
    save_file({key: value.contiguous() for key, value in truth.items()}, folder / "truth.safetensors")
    golden = {"case": name, **{tool: version(tool) for tool in ("litgpt", "lightning", "torch")}, "made_by": "make.py"}
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")


@torch.no_grad()
def check_loads(name: str) -> float:
    """The relative error of the logits, of a file that was written from Hugging Face's names; 2.9e-7 at most (measured)."""
    import loraformat as lf
    from loraformat.layout import WriteOptions
    from loraformat.verbs.convert import save
    from loraformat.verbs.retarget import retarget
    from loraformat_converters.litgpt import NAMES, layout
    from loraformat_converters.litgpt.files import scalars

    groups = CASES[name]["n_query_groups"]
    known = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": groups, "head_dim": 10}
    known |= {"hidden_size": 24, "num_hidden_layers": 2}
    adapter = retarget(lf.load(HERE / name), "torch", config=known).adapter
    changed = {key: update for key, update in adapter.items() if update.matrix().any()}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        there = retarget(replace(adapter, targets=changed, extensions={}), NAMES, config=known).adapter
        save(there, out, layout, WriteOptions(config=known))
        state = torch.load(out / "lit_model.pth.lora", mmap=True, weights_only=True)["model"]
        lora = {k: v for k, v in scalars((out / "hyperparameters.yaml").read_text()).items() if k.startswith("lora_")}
        model = GPT(Config.from_file(HERE / name / "model_config.yaml", **lora)).eval()
        for key, value in load_file(HERE / name / "base.safetensors").items():
            module, _, leaf = key.rpartition(".")
            inner = f"{module}.linear.{leaf}"
            state[inner if inner in model.state_dict() else key] = value
        model.load_state_dict(state, strict=True)
    truth = load_file(HERE / name / "truth.safetensors")
    return float((model(truth["x"]) - truth["y"]).norm() / truth["y"].norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        print(case, check_loads(case)) if sys.argv[1:] == ["loads"] else make(case)
