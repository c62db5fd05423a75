"""ONNX models as bases: existing graphs, exported by anyone, that adapters are merged into or attached to.

``index`` finds the places that use weights, ``names`` what each place is called, ``ladder`` which target it is,
``merge`` and ``attach`` change the graph, ``model`` reads and writes the file and its external data. ``folder`` holds
several files that are one base.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.errors import fault
from loraformat_converters.onnx.finding.pipeline import models_in

if TYPE_CHECKING:
    from loraformat.base import Base

__all__ = ["kind"]


class _Kind:
    """A ``.onnx`` file, or a folder of them."""

    name = "onnx"
    describes = "ONNX model (.onnx, or a folder of them)"

    def recognises(self, path: Path) -> bool:
        return bool(models_in(path)) if path.is_dir() else path.suffix in (".onnx", ".ort")

    def open(self, path: Path) -> Base:
        if path.suffix == ".ort":
            what = f"{path.name} is in ONNX Runtime's own format, optimised for the machine that wrote it"
            raise fault("LF-601", what, fix="attach to the .onnx file that it was made from, then convert again")
        try:
            from loraformat_converters.onnx.base import OnnxBase
            from loraformat_converters.onnx.folder import OnnxFolder
        except ImportError as error:
            fix = "pip install 'loraformat[onnx]'"
            raise fault("LF-704", f"reading {path.name} needs the onnx package: {error}", fix=fix) from None
        return OnnxFolder(path) if path.is_dir() else OnnxBase(path)


kind = _Kind()
