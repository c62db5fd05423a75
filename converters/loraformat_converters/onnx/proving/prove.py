"""Proof: a written model computes what base and adapter make, got by the other path, in ONNX Runtime.

An attached model is held against merged weights, a merged one against an attached branch. Optimisations are off, so
that only the two paths differ.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from loraformat.errors import fault
from loraformat.plan import Proof
from loraformat_converters.onnx.graph.scopes import scopes, tensors

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["ROUNDED", "compare", "tolerance"]

_TOLERANCES: Mapping[int, float] = {
    onnx.TensorProto.FLOAT16: 5e-3,
    onnx.TensorProto.BFLOAT16: 2e-2,
}
"""Largest relative difference (L2) of a whole model's output, by the type of its weights; 1e-5 for wider ones."""

ROUNDED = 5e-2
"""The same where products are rounded to 8 bits: a difference of one bit in a float becomes one of a whole step."""

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

_BFLOAT16, _FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT


def tolerance(dtypes: set[int]) -> float:
    """What two ways of computing with weights of these types may differ by."""
    return max((_TOLERANCES.get(dtype, 1e-5) for dtype in dtypes), default=1e-5)


def compare(written: Path, other: Path, base: Path, feeds: Mapping[str, Array], limit: float) -> Proof:
    """How far the outputs of ``written`` and ``other`` are from each other, and from those of ``base``.

    Raises:
        LoraFormatError: LF-611 the written model is not valid, or the base draws at random; LF-704 ONNX Runtime is not installed; LF-705 it cannot
            run the model on these inputs.
    """
    for path in (written, other, base):
        if not _is_utf8(path):  # onnx 1.23, onnxruntime 1.32: UTF-8
            fix = "give it another name, or leave --verify out"
            raise fault(
                "LF-705", "onnx and ONNX Runtime open no file whose name is not UTF-8", where=str(path), fix=fix
            )
    if (refusal := _refusal(written)) and not _refusal(base):
        raise fault("LF-611", f"onnx.checker refuses the written model: {refusal}", where=str(written))
    found, wanted, before = (_run(path, feeds) for path in (written, other, base))
    errors = {name: _distance(found[name], wanted[name]) for name in wanted}
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] > limit and (drawn := _drawn(base)):
        what = f"{drawn} draws at random, in every graph other numbers: nothing is proved by running it"
        fix = "the weights are proved by loraformat verify; to run it, export it in eval mode, or with seeds"
        raise fault("LF-611", what, where=worst, fix=fix)
    moved = max(_distance(found[name], before[name]) for name in before)
    return Proof(errors[worst], limit, moved, worst)


def _is_utf8(path: Path) -> bool:
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def _refusal(path: Path) -> str:
    """What onnx.checker says of a model, "" where it passes: what onnxruntime-genai (0.18) builds, and what ONNX Runtime's
    optimizer writes, has operators of ONNX Runtime's own in the domain of ONNX, and never does."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return str(error)
    return ""


def _drawn(path: Path) -> str:
    """The first node that draws at random, "" if none does. ONNX Runtime (1.32) adds the node's number to its seed."""
    nodes = (node for scope in scopes(onnx.load(str(path), load_external_data=False)) for node in scope.nodes)
    random = (n for n in nodes if n.op_type in _RANDOM or (n.op_type == "Dropout" and len(n.input) > 2 and n.input[2]))
    return next((n.name or n.op_type for n in random if all(a.name != "seed" for a in n.attribute)), "")


def _run(path: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Output → values, on the CPU, without optimisation; bfloat16, which has no kernels there, as float32."""
    try:
        import onnxruntime
    except ImportError as error:
        fix = "pip install 'loraformat[onnx]'"
        raise fault("LF-704", f"--verify needs onnxruntime: {error}", fix=fix) from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what goes wrong is raised too
    model = onnx.load(str(path), load_external_data=False)
    if any(t.data_type == _BFLOAT16 for t in tensors(model)):
        source: Any = _widened(onnx.load(str(path))).SerializeToString()
        feeds = {name: v.astype(np.float32) if v.dtype.name == "bfloat16" else v for name, v in feeds.items()}
    else:
        source = str(path)
    try:
        running = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in running.get_outputs()]
        wanted = {i.name: feeds[i.name] for i in running.get_inputs()}
        wanted |= {i.name: feeds[i.name] for i in running.get_overridable_initializers() if i.name in feeds}
        values = running.run(names, wanted)
    except KeyError as error:
        raise fault("LF-705", f"no values for the input {error}", where=str(path), fix="--inputs FILE.npz") from None
    except Exception as error:  # onnxruntime raises a dozen classes of its own, without a common one
        first = str(error).splitlines()[0]
        fix = "inputs that it takes: --inputs FILE.npz"
        raise fault("LF-705", f"ONNX Runtime cannot run the model: {first}", where=str(path), fix=fix) from None
    return {n: np.asarray(v) for n, v in zip(names, values, strict=True) if getattr(v, "dtype", None) is not None}


def _distance(found: Array, wanted: Array) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; of integers, the share that differs."""
    if found.shape != wanted.shape:
        return float("inf")
    if not np.issubdtype(wanted.dtype, np.floating):
        return float(np.mean(found != wanted)) if wanted.size else 0.0
    one, other = found.astype(np.float64), wanted.astype(np.float64)
    odd = ~(np.isfinite(one) & np.isfinite(other))
    if not np.array_equal(one[odd], other[odd], equal_nan=True):
        return float("inf")
    one, other = np.where(odd, 0, one), np.where(odd, 0, other)
    size = float(np.linalg.norm(other))
    return float(np.linalg.norm(one - other)) / size if size else float(np.abs(one).max(initial=0.0))


def _widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float32 in the place of bfloat16 everywhere."""
    for tensor in tensors(model):
        if tensor.data_type == _BFLOAT16:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for scope in scopes(model):
        graph = scope.graph
        for value in (*graph.input, *graph.output, *graph.value_info) if graph else ():
            if value.type.tensor_type.elem_type == _BFLOAT16:
                value.type.tensor_type.elem_type = _FLOAT
        for node in scope.nodes:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i == _BFLOAT16:
                    attribute.i = _FLOAT
    return model
