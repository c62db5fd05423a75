"""Programs that draw: diffusers, ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraformat.loaders import Reason
from loraformat_converters.loaders import findings

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["ComfyUI", "Diffusers"]


class Diffusers:
    """diffusers' load_lora_weights."""

    name = "diffusers"
    version = "0.42.1"
    describes = "diffusers: pipelines of Hugging Face"
    layouts = ("diffusers", "kohya")

    def reasons(self, adapter: Adapter) -> Iterator[Reason]:
        """dora_scale is filtered out of what it loads, with only a warning."""
        source = "diffusers 0.42.1 loaders/lora_pipeline.py"
        yield from findings.lacking(adapter, {"magnitude": f"{source}: dora_scale is dropped"}, "wrong")
        yield from findings.lacking(adapter, dict.fromkeys(("loha", "rows", "replace", "delta"), source))


class ComfyUI:
    """ComfyUI's LoraLoader."""

    name = "comfyui"
    version = "0.3.52"
    describes = "ComfyUI, and what shares its loader"
    layouts = ("kohya", "diffusers")

    def reasons(self, adapter: Adapter) -> Iterator[Reason]:
        """It reads alpha from tensors alone, and normalises DoRA by W where training took W + ΔW."""
        source = "ComfyUI 0.3.52 comfy/weight_adapter/lora.py"
        if "diffusers" in adapter.extensions:
            yield from findings.scale_of_all(adapter, f"{source}: without an .alpha tensor the scale is 1", 1.0)
        keys = [key for key, update in adapter.items() if "magnitude" in update]
        if keys:
            what = f"DoRA is normalised by ‖W‖, not by ‖W + ΔW‖: {len(keys)} of {len(adapter)} targets"
            yield Reason("wrong", what, keys[0], findings.MERGE, "ComfyUI 0.3.52 comfy/weight_adapter/base.py")
        yield from findings.lacking(adapter, {"rows": source})
