"""A small graph that makes W + L·R where W lies: in float32, rounded once to W's type, into a buffer that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import helper

from loraformat_converters.onnx.running.opened import opened

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

__all__ = ["Adding"]


class Adding:
    """Runs it, for weights of any shape and float type, and one that only copies. Values are ``OrtValue``."""

    def __init__(self, providers: Sequence[Any]) -> None:
        self._providers = [_exact(provider) for provider in providers]
        self._sessions: dict[tuple[str, int], Any] = {}

    def __call__(self, w: Any, left: F32, right: F32, out: Any) -> None:
        """``out`` = W + L·R, in float32, rounded once."""
        self._run("Add", w, {"left": left, "right": right}, out)

    def copy(self, w: Any, out: Any) -> None:
        """``out`` = W, bit for bit."""
        self._run("Identity", w, {}, out)

    def _run(self, op: str, w: Any, factors: Mapping[str, F32], out: Any) -> None:
        kind = w.element_type()
        if (op, kind) not in self._sessions:
            graph = _sum(kind) if op == "Add" else _copy(kind)
            self._sessions[op, kind] = opened(graph, Path(), self._providers, None, False)
        session = self._sessions[op, kind]
        binding = session.io_binding()
        binding.bind_ortvalue_input("w", w)
        for name, factor in factors.items():
            binding.bind_cpu_input(name, factor)
        binding.bind_ortvalue_output("out", out)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()


def _exact(provider: Any) -> Any:
    """CUDA multiplies float32 in TF32 unless told otherwise, which has the digits of float16."""
    name, its = (provider, {}) if isinstance(provider, str) else provider
    return (name, {**its, "use_tf32": "0", "enable_cuda_graph": "0"}) if name == "CUDAExecutionProvider" else provider


def _sum(kind: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["left", "right"], ["matrix"]),
        helper.make_node("Shape", ["w"], ["shape"]),
        helper.make_node("Reshape", ["matrix", "shape"], ["delta"]),
        helper.make_node("Cast", ["w"], ["wide"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "delta"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["out"], to=kind),
    ]
    ends = [helper.make_tensor_value_info("w", kind, None)]
    ends += [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None]) for name in ("left", "right")]
    return _small(nodes, ends, kind)


def _copy(kind: int) -> onnx.ModelProto:
    return _small(
        [helper.make_node("Identity", ["w"], ["out"])], [helper.make_tensor_value_info("w", kind, None)], kind
    )


def _small(nodes: Sequence[onnx.NodeProto], ends: Sequence[onnx.ValueInfoProto], kind: int) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "effective", ends, [helper.make_tensor_value_info("out", kind, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
