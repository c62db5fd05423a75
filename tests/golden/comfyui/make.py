"""What ComfyUI 0.3.52 makes of files that loraformat writes, and by which names it looks for the modules of a model.

    python tests/golden/comfyui/make.py FOLDER

takes ComfyUI's own ``comfy/lora.py``, ``comfy/utils.py`` and ``comfy/weight_adapter/`` from FOLDER, where its source lies
(b20ba1f2); what they import besides, models and devices, is stood in for. Needs the extra ``peers``.

``<case>.safetensors``        written by loraformat, in kohya's layout
``<case>.truth.safetensors``  ``delta.<key>``: what ``load_lora`` and ``calculate_weight`` add; ``base.<key>``: to what, if not 0
``names.json.gz``             family → module in a LoRA's file → ComfyUI's own parameter (``model_lora_keys_…``)
"""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import loraformat as lf
from loraformat.axes import Placement
from loraformat.parts import Delta, Loha, Lokr, Lora, Magnitude
from loraformat.verbs.convert import save
from loraformat_converters.kohya import layout, magnitudes
from loraformat_converters.spaces.families import FAMILIES

HERE = Path(__file__).parent
DRAW = np.random.default_rng(52)
CONV = (35, 20, 3, 2)


def normal(*shape: int, dtype: Any = np.float32) -> Any:
    return (0.4 * DRAW.standard_normal(shape)).astype(dtype)


def placed(part: Any, *shape: int, more: Any = ()) -> lf.Update:
    return lf.Update((part, *more), Placement(shape, (0,), tuple(range(1, len(shape)))))


def magnitude(n: int, axes: tuple[int, ...]) -> Magnitude:
    return Magnitude(1 + abs(normal(n)), axes, magnitudes.EPS)


def cases() -> dict[str, dict[str, lf.Update]]:
    """Case → module and leaf → update: every form that ComfyUI computes as LyCORIS does."""
    loha_cores = [normal(3, n) for n in (35, 20, 35, 20)]
    return {
        "pairs": {
            "to_q.weight": placed(Lora(normal(3, 30), normal(42, 3), 4.5, "alpha/r"), 42, 30),
            "to_v.weight": placed(Lora(normal(5, 12), normal(12, 5), 6.0, "alpha/sqrt(r)"), 12, 12),
            "conv.weight": placed(Lora(normal(2, 120), normal(35, 2), -0.1, "factor"), *CONV),
            "half.weight": placed(Lora(normal(4, 9, dtype=np.float16), normal(7, 4), 1e-3, "factor"), 7, 9),
        },
        "core": {"conv.weight": placed(Lora(normal(3, 20), normal(35, 3), 0.7, "factor", normal(3, 3, 3, 2)), *CONV)},
        "loha": {
            "to_q.weight": placed(Loha(normal(42, 3), normal(3, 30), normal(42, 3), normal(3, 30), 0.3, "factor"), 42, 30),
            "conv.weight": placed(Loha(*loha_cores, 5.0, "alpha/r", normal(3, 3, 3, 2), normal(3, 3, 3, 2)), *CONV),
        },
        "lokr": {
            "to_q.weight": placed(Lokr(0.3, "factor", normal(6, 5), lokr_w2_a=normal(7, 2), lokr_w2_b=normal(2, 6)), 42, 30),
            "conv.weight": placed(Lokr(1.0, "factor", normal(5, 4), lokr_w2=normal(7, 5, 3, 2)), *CONV),
        },
        "whole": {
            "to_q.weight": placed(Delta(normal(42, 30)), 42, 30),
            "to_q.bias": placed(Delta(normal(42)), 42),
            "conv.weight": placed(Delta(normal(35, 120)), *CONV),
            "norm.weight": placed(Delta(normal(17)), 17),
            "norm.bias": placed(Delta(normal(17)), 17),
        },
        "dora_in": {
            "to_q.weight": placed(Lora(normal(3, 30), normal(42, 3), 4.5, "alpha/r"), 42, 30, more=[magnitude(30, (1,))]),
        },
        "dora": {
            "to_q.weight": placed(Lora(normal(3, 30), normal(42, 3), 4.5, "alpha/r"), 42, 30, more=[magnitude(42, (0,))]),
        },
    }  # fmt: skip


class _Anything(types.ModuleType):
    """A module in which every name is a class of its own."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


def comfy(folder: Path) -> Any:
    """ComfyUI's own module ``comfy.lora``."""
    sys.path.insert(0, str(folder))
    for name in ("comfy.model_management", "comfy.model_base"):
        sys.modules[name] = _Anything(name)
    sys.argv = sys.argv[:1]
    import comfy.lora

    comfy.model_management = sys.modules["comfy.model_management"]
    comfy.model_base = sys.modules["comfy.model_base"]
    comfy.model_management.cast_to_device = lambda tensor, device, dtype, copy=False: tensor.to(dtype)
    return comfy.lora


def computed(lora: Any, path: Path, adapter: lf.Adapter, *, zero: bool) -> dict[str, torch.Tensor]:
    """What ComfyUI adds to each weight."""
    keys = {key.rpartition(".")[0]: f"{key.rpartition('.')[0]}.weight" for key in adapter}
    patches = lora.load_lora(load_file(path), keys)
    assert set(patches) == set(adapter), (sorted(patches), sorted(adapter))
    found = {}
    for key, update in adapter.items():
        assert update.placement is not None
        base = 0.0 if zero else 1.0
        weight = torch.from_numpy(normal(*update.placement.shape)) * base
        after = lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], weight.clone(), key)
        found |= {f"delta.{key}": after - weight, **({} if zero else {f"base.{key}": weight})}
    return found


# comfy/supported_models.py unet_config, as far as unet_to_diffusers asks for it.
UNETS = {
    "sd1": {
        "num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1,
    },
    "sdxl": {
        "num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
    },
    "flux": {"depth": 19, "depth_single_blocks": 38, "hidden_size": 3072},
    "sd3-medium": {"depth": 24},
    "sd3.5-large": {"depth": 38},
}  # fmt: skip


def names(lora: Any) -> dict[str, dict[str, Any]]:
    """Of every model: the names of its modules in a file of LoRAs → its own."""
    base = sys.modules["comfy.model_base"]
    found = {}
    for family in FAMILIES:
        if family.name not in UNETS:
            continue
        model = getattr(base, {"flu": "Flux", "sd3": "SD3"}.get(family.name[:3], "BaseModel"))()
        main = next(c for c in family.components if c.name in ("unet", "transformer"))
        own = dict.fromkeys(f"diffusion_model.{row.published}" for row in main.rows())
        model.state_dict, model.model_config = (
            lambda own=own: own,
            types.SimpleNamespace(unet_config=UNETS[family.name]),
        )
        keys = lora.model_lora_keys_unet(model, {})
        found[family.name] = {name: key for name, key in keys.items() if name.startswith("lora_unet_")}
    return found


def main(folder: Path) -> None:
    lora = comfy(folder)
    for case, updates in cases().items():
        adapter = lf.Adapter({f"lora_unet_{key}": u for key, u in sorted(updates.items())}, "kohya")
        path = HERE / f"{case}.safetensors"
        save(adapter, path, layout, force=True)
        truth = computed(lora, path, adapter, zero="dora" not in case)
        save_file({name: t.contiguous() for name, t in truth.items()}, HERE / f"{case}.truth.safetensors")
    text = json.dumps(names(lora), sort_keys=True, separators=(",", ":"))
    (HERE / "names.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    facts = {"comfyui": "0.3.52", "commit": "b20ba1f2", "torch": torch.__version__.split("+")[0], "made_by": "make.py"}
    (HERE / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
