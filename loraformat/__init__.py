"""One LoRA adapter file for every runtime.

    import loraformat as lf

    adapter = lf.load("my-peft-adapter")            # any layout → Adapter, a mapping key → Update
    lf.save(adapter, "my.lora.safetensors")
    lf.merge(adapter, lf.open_base("model.onnx"), "merged.onnx")

Importing this package loads no framework, and the parts of it only as they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loraformat.errors import LoraFormatError, Problem

if TYPE_CHECKING:
    from loraformat.adapter import Adapter
    from loraformat.axes import Placement
    from loraformat.file import save
    from loraformat.identity import digest
    from loraformat.layout import ReadOptions
    from loraformat.pages import report
    from loraformat.parts import Delta, Loha, Lokr, Lora, Magnitude, Replace, Rows
    from loraformat.registry import from_tensors, load, open_base
    from loraformat.resolve import Hints
    from loraformat.updates import Update
    from loraformat.verbs.bind import bind
    from loraformat.verbs.combine import Combined, combine
    from loraformat.verbs.convert import convert
    from loraformat.verbs.diff import diff
    from loraformat.verbs.extract import extract
    from loraformat.verbs.graph import detach
    from loraformat.verbs.init import init
    from loraformat.verbs.merge import attach, merge
    from loraformat.verbs.resize import Resized, resize
    from loraformat.verbs.retarget import retarget
    from loraformat.verbs.validate import Limits, Validation, validate, validate_all
    from loraformat.verbs.verify import verify

__all__ = [
    "Adapter",
    "Combined",
    "Delta",
    "Hints",
    "Limits",
    "Loha",
    "Lokr",
    "Lora",
    "LoraFormatError",
    "Magnitude",
    "Placement",
    "Problem",
    "ReadOptions",
    "Replace",
    "Resized",
    "Rows",
    "Update",
    "Validation",
    "attach",
    "bind",
    "combine",
    "convert",
    "detach",
    "diff",
    "digest",
    "extract",
    "from_tensors",
    "init",
    "load",
    "merge",
    "open_base",
    "report",
    "resize",
    "retarget",
    "save",
    "validate",
    "validate_all",
    "verify",
]

_HOMES = {
    **dict.fromkeys(("Delta", "Loha", "Lokr", "Lora", "Magnitude", "Replace", "Rows"), "parts"),
    **dict.fromkeys(("from_tensors", "load", "open_base"), "registry"),
    **dict.fromkeys(("Combined", "combine"), "verbs.combine"),
    **dict.fromkeys(("Resized", "resize"), "verbs.resize"),
    **dict.fromkeys(("attach", "merge"), "verbs.merge"),
    "detach": "verbs.graph",
    **dict.fromkeys(("Limits", "Validation", "validate", "validate_all"), "verbs.validate"),
    "Adapter": "adapter",
    "Placement": "axes",
    "Hints": "resolve",
    "ReadOptions": "layout",
    "Update": "updates",
    "report": "pages",
    "save": "file",
    **{name: f"verbs.{name}" for name in ("bind", "convert", "diff", "extract", "init", "retarget", "verify")},
    "digest": "identity",
}


def __getattr__(name: str) -> Any:
    """Load a public name with its module, the first time it is asked for (PEP 562)."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("loraformat")
    if name not in _HOMES:
        raise AttributeError(f"module 'loraformat' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"loraformat.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
