"""``legacy_fused/``: two parts of a fused projection, as peft 0.2.0 adapted them (``enable_lora``).

Run ``python make_legacy.py`` with peft 0.2.0 (``pip install --no-deps --target DIR peft==0.2.0``, DIR first on
PYTHONPATH). The files are those of make.py, but for merged weights: 0.2.0 cannot merge what it saved here, so that
``delta`` is what its forward pass adds to the unit vectors.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import peft
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

FOLDER = Path(__file__).resolve().parent / "legacy_fused"
KEY = "h.0.attention.query_key_value"


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    """Seeded numbers."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) * 0.4


class Attention(nn.Module):
    """A module of the fused projection only."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(20, 42)

    def forward(self, x: Tensor) -> Tensor:
        return self.query_key_value(x)


class Model(nn.Module):
    """The projection at a path of several components."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.h = nn.ModuleList([nn.ModuleDict({"attention": Attention()})])

    def forward(self, x: Tensor) -> Tensor:
        return self.h[0]["attention"](x)


@torch.no_grad()
def main() -> None:
    """Write the folder."""
    assert peft.__version__ == "0.2.0"
    rng = np.random.default_rng(zlib.crc32(b"legacy_fused"))
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    model = Model()
    for parameter in model.parameters():
        parameter.copy_(normal(rng, *parameter.shape))
    base = {name: t.clone() for name, t in model.state_dict().items()}
    save_file(base, FOLDER / "base.safetensors")
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        lora_dropout=0.0,
        target_modules=["query_key_value"],
        enable_lora=[True, False, True],
        merge_weights=False,
    )
    adapted = get_peft_model(model, config)
    for name, parameter in sorted(adapted.named_parameters()):
        if "lora_" in name:
            parameter.copy_(normal(rng, *parameter.shape))
    adapted.eval()
    x = normal(rng, 3, 20)
    unit = torch.eye(20)[None]  # 0.2.0 takes the second axis for that of the tokens
    delta = (adapted(unit) - nn.functional.linear(unit, base[f"{KEY}.weight"], base[f"{KEY}.bias"]))[0].T
    y = adapted(x[None])[0]
    adapted.save_pretrained(FOLDER / "adapter")
    binary = FOLDER / "adapter" / "adapter_model.bin"
    tensors = torch.load(binary, weights_only=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, FOLDER / "adapter" / "adapter_model.safetensors")
    binary.unlink()  # 0.2.0 writes no other format
    truth = {f"delta.{KEY}.weight": delta, f"merged.{KEY}.weight": base[f"{KEY}.weight"] + delta, "x": x, "y": y}
    save_file({name: t.contiguous() for name, t in truth.items()}, FOLDER / "truth.safetensors")
    golden = {
        "case": "legacy_fused",
        "peft": peft.__version__,
        "torch": torch.__version__.split("+")[0],
        "made_by": "make_legacy.py",
        "note": "delta: what the forward pass adds to the unit vectors; merged: base plus that",
        "targets": {f"{KEY}.weight": {"r": 3, "scaling": 5 / 3}},
        "delta_from": {f"{KEY}.weight": "forward pass"},
    }
    (FOLDER / "golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
