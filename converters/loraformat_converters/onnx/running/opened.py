"""A model opened by ONNX Runtime, and where its first provider runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat.errors import fault
from loraformat_converters.onnx.running.pooled import Device

if TYPE_CHECKING:
    import onnx

__all__ = ["device_of", "opened", "runtime", "taken"]

_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where a model that is given as bytes has its data (onnxruntime_session_options_config_keys.h, from 1.21 on)."""


_WORDS = {"tensor(float)": "float32", "tensor(double)": "float64"}
"""ONNX Runtime's words for types where numpy has others."""


def runtime() -> Any:
    """The module onnxruntime; LF-704 where there is none."""
    try:
        import onnxruntime
    except ImportError as error:
        raise fault(
            "LF-704", f"running a model needs onnxruntime: {error}", fix="pip install 'loraformat[onnx]'"
        ) from None
    return onnxruntime


def opened(model: Path | onnx.ModelProto, folder: Path, providers: Sequence[Any], options: Any, captured: bool) -> Any:
    """An ``InferenceSession``; LF-705 where ONNX Runtime cannot open the model.

    Args:
        model: a file, or a model whose external data lies in ``folder``, where onnxruntime 1.21 or newer finds it.
        options: onnxruntime's own; else without a warning for each input that has a default.
        captured: by CUDA graphs, where the first provider is CUDA.
    """
    ort, given = runtime(), list(providers)
    first, its = (given[0], {}) if isinstance(given[0], str) else given[0]
    if captured and first == "CUDAExecutionProvider":
        given[0] = (first, {**its, "enable_cuda_graph": "1"})
    if options is None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
    if not isinstance(model, Path):
        options.add_session_config_entry(_FOLDER, str(folder.absolute()))
    try:
        return ort.InferenceSession(
            str(model) if isinstance(model, Path) else model.SerializeToString(), options, providers=given
        )
    except Exception as error:  # onnxruntime raises a dozen classes of its own, without a common one
        what = f"ONNX Runtime cannot open {model if isinstance(model, Path) else 'the model'}"
        fix = "is it whole, and of operators that the provider has?"
        raise fault("LF-705", f"{what}: {str(error).splitlines()[0]}", fix=fix) from None


def device_of(inference: Any, providers: Sequence[Any]) -> Device:
    """Where its first provider keeps values: that is the CPU's where the first of the given is not installed."""
    its = {} if isinstance(providers[0], str) else providers[0][1]
    runs = inference.get_providers()[0]
    return ("cuda", int(its.get("device_id", 0))) if runs.startswith(("CUDA", "Tensorrt")) else ("cpu", 0)


def taken(inference: Any) -> dict[str, str]:
    """Input → numpy's word for its type, of those with a default too."""
    values = [*inference.get_inputs(), *inference.get_overridable_initializers()]
    return {v.name: _WORDS.get(v.type, v.type.removeprefix("tensor(").removesuffix(")")) for v in values}
