"""Goldens written by loralib itself, with the change of every weight that loralib computes.

Run ``python make.py`` (torch and loralib at the versions in ``golden.json``). One folder a case:

``adapter.pt``         ``torch.save`` of what ``lora_state_dict`` gives
``base.safetensors``   the state dict without factors, before loralib merged
``truth.safetensors``  ``delta.<parameter>``: what ``eval()`` adds to the weight, in float64 and then float32;
                       ``x``, ``y``: an input and the output of the trained model
``golden.json``        the versions, and rank, alpha and enable_lora of every layer
"""

from __future__ import annotations

import copy
import json
import shutil
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import loralib as lora
import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).resolve().parent


class Chain(nn.Module):
    """Named modules, one after the other, a tanh between them."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x)
            x = torch.tanh(x) if x.is_floating_point() else x
        return x


def linears() -> nn.Module:
    """Embedding, Linear, a Linear whose weight lies [in, out]; ranks and alphas all different."""
    return Chain(
        embed=lora.Embedding(37, 20, r=4, lora_alpha=6),
        proj=lora.Linear(20, 28, r=5, lora_alpha=7),
        conv1d=lora.Linear(28, 18, r=3, lora_alpha=8, fan_in_fan_out=True),
        head=nn.Linear(18, 11),
    )


def merged() -> nn.Module:
    """Fused projections: the first two of three parts, all of two, the last of three."""
    return Chain(
        c_attn=lora.MergedLinear(20, 33, r=4, lora_alpha=6, enable_lora=[True, True, False]),
        both=lora.MergedLinear(33, 26, r=5, lora_alpha=7, enable_lora=[True, True]),
        one=lora.MergedLinear(26, 21, r=3, lora_alpha=8, enable_lora=[False, False, True], fan_in_fan_out=True),
    )


def convolutions() -> nn.Module:
    """Kernels: plain, of as many groups as rows of the kernel, depthwise."""
    return Chain(
        plain=lora.Conv2d(4, 6, 3, r=2, lora_alpha=5),
        three=lora.Conv2d(6, 9, 3, r=4, lora_alpha=7, groups=3),
        depth=lora.Conv2d(9, 18, 3, r=1, lora_alpha=2, groups=9),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linears": (linears, (3, 5), "all"),
    "merged": (merged, (3, 20), "none"),
    "convolutions": (convolutions, (2, 4, 9, 8), "none"),
}


@torch.no_grad()
def make(name: str) -> None:
    build, sizes, bias = CASES[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.manual_seed(zlib.crc32(name.encode()))
    model = build().train()
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape))
    torch.save(lora.lora_state_dict(model, bias), folder / "adapter.pt")
    base = {key: value for key, value in model.state_dict().items() if "lora_" not in key}
    save_file({key: value.clone().contiguous() for key, value in base.items()}, folder / "base.safetensors")

    x = torch.randn(sizes) if len(sizes) != 2 or name == "merged" else torch.randint(0, 37, sizes)
    y = model(x)
    exact = copy.deepcopy(model).double()
    before = {key: value.clone() for key, value in exact.state_dict().items()}
    after = exact.eval().state_dict()
    deltas = {key: (after[key] - before[key]).float() for key in after if not torch.equal(after[key], before[key])}
    truth = {"x": x, "y": y, **{f"delta.{key}": value for key, value in deltas.items()}}
    save_file({key: value.contiguous() for key, value in truth.items()}, folder / "truth.safetensors")
    layers = {path: m for path, m in model.named_modules() if hasattr(m, "lora_A")}
    golden = {
        "loralib": version("loralib"),
        "torch": torch.__version__.split("+")[0],
        "made_by": "make.py",
        "bias": bias,
        "layers": {
            path: {
                "r": m.r,
                "alpha": m.lora_alpha,
                **({"enable_lora": m.enable_lora} if hasattr(m, "enable_lora") else {}),
            }
            for path, m in layers.items()
        },
    }
    (folder / "golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        make(case)
