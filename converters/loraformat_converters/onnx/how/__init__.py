"""Code that runs one model: its own names, dtypes and shapes, its free sizes as variables. For ``info --how``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraformat.errors import fault
from loraformat_converters.onnx.how.call import Call

__all__ = ["LANGUAGES", "how"]

LANGUAGES = ("python", "cpp", "csharp", "js", "genai")


def how(description: Mapping[str, Any], path: Path, language: str) -> str:
    """The code, ending in a newline.

    Args:
        description: of the model, by ``loraformat_converters.onnx.info``.

    Raises:
        LoraFormatError: LF-705 the language is unknown, or has no plain way to feed the model.
    """
    if language not in LANGUAGES:
        raise fault("LF-705", f"no code for {language!r}; there is {', '.join(LANGUAGES)}")
    module = importlib.import_module(f"{__name__}.{language}")
    code: str = module.code(Call.of(description, path))
    return code
