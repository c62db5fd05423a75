"""A tiny vision transformer of timm 1.0.31, an adapter in its names, and what it computes with both.

    python tests/golden/timm/make.py FOLDER
    python tests/golden/timm/make.py FOLDER loads

takes timm from FOLDER, where its wheel is unpacked; torchvision, which only its transforms need, is stood in for: its wheel
does not load beside a torch without CUDA, and so timm is none of the peers that are installed with the tests. ``loads`` has
timm load what loraformat merges, of the adapter and of the same one out of transformers' names, and compares the logits.

``base.safetensors``      its state dict
``adapter.safetensors``   pairs on query-key-value, projections, MLP and head, in the native layout
``truth.safetensors``     ``x``: an image; ``y``: logits; ``merged``: logits with W + s·B·A in the place of W
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import loraformat as lf
from loraformat.axes import Placement

HERE = Path(__file__).parent


class _Words(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Anything(types.ModuleType):
    """A module in which every name is a class, with any attribute."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _Words(name, (), {}))
        return getattr(self, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        own = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if own else None

    def create_module(self, spec: Any) -> _Anything:
        return _Anything(spec.name)

    def exec_module(self, module: Any) -> None:
        """There is nothing in it."""


def made() -> torch.nn.Module:
    """The model, as timm begins with it."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(mlp_ratio=20 / 12, **sizes).eval()


@torch.no_grad()
def check_loads() -> None:
    """The relative error of the logits, of what timm loads; 0 (measured)."""
    sys.path.insert(0, str(HERE.parents[1]))
    from test_renames import vit_file

    truth, base = load_file(HERE / "truth.safetensors"), lf.open_base(HERE / "base.safetensors")
    adapter = lf.load(HERE / "adapter.safetensors")
    with tempfile.TemporaryDirectory() as name:
        there = lf.retarget(adapter, base=lf.open_base(vit_file(Path(name) / "hf"))).adapter
        for what, own in (("timm", adapter), ("transformers", lf.retarget(there, base=base).adapter)):
            merged = Path(name) / f"{what}.safetensors"
            lf.merge(own, base, merged)
            model = made()
            model.load_state_dict(load_file(merged), strict=True)
            wanted = truth["merged"]
            print(what, float((model(truth["x"]) - wanted).norm() / wanted.norm()))


@torch.no_grad()
def main() -> None:
    import timm

    torch.manual_seed(9)
    model = made()
    for parameter in model.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape))
    save_file(model.state_dict(), HERE / "base.safetensors")
    x = torch.randn(2, 3, 8, 8)
    truth, targets, draw = {"x": x, "y": model(x)}, {}, np.random.default_rng(9)
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            continue
        out, in_ = parameter.shape
        a, b = (draw.standard_normal(shape).astype(np.float32) for shape in ((3, in_), (out, 3)))
        targets[name] = lf.Update((lf.Lora(a, b, 0.7, "alpha/r"),), Placement((out, in_), (0,), (1,)))
        parameter.add_(torch.from_numpy(0.7 / 3 * b @ a))
    lf.save(lf.Adapter(targets), HERE / "adapter.safetensors", force=True)
    save_file({**truth, "merged": model(x)}, HERE / "truth.safetensors")
    facts = {"timm": timm.__version__, "torch": torch.__version__.split("+")[0], "made_by": "make.py"}
    (HERE / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, sys.argv[1])
    sys.meta_path.insert(0, _Finder())
    check_loads() if sys.argv[2:] == ["loads"] else main()
